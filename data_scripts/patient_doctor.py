"""The same as `finetune data patient_doctor`: make rows of patients and a doctor."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in a checkout, without pip install

from finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["data", "patient_doctor", *sys.argv[1:]]))
