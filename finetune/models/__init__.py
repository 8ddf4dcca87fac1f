"""Models, their adapters, attention and head."""

import sys
import warnings

from transformers.utils import logging

if not sys.stderr.isatty():  # a log file is no place for bars of loading and writing
    logging.disable_progress_bar()

# peft 0.21 still reads the old name of a property that transformers 5.23 has renamed; nothing a user could act on.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
