"""The same as `finetune data teach`: write what a teacher expects into rows."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in a checkout, without pip install

from finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["data", "teach", *sys.argv[1:]]))
