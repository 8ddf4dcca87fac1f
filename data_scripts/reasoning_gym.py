"""The same as `finetune data reasoning_gym`: make rows of reasoning-gym's tasks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in a checkout, without pip install

from finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["data", "reasoning_gym", *sys.argv[1:]]))
