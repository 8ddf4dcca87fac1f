"""Models, their adapters, attention and head."""

import sys
import warnings

from transformers.utils import logging

if not sys.stderr.isatty():  # a log file is no place for bars of loading and writing
    logging.disable_progress_bar()

# peft 0.21 still reads the old name of a property that transformers 5.23 has renamed; nothing a user could act on.
warnings.filterwarnings(
    "ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`"
)  # peft sets it right
warnings.filterwarnings(
    "ignore", r"The following (rank|alpha)_pattern keys did not match .*gate_up_proj"
)  # peft's own, for fused experts
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
