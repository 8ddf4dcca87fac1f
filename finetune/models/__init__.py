"""Models, their adapters, attention and head."""

import sys

from transformers.utils import logging

if not sys.stderr.isatty():  # a log file is no place for bars of loading and writing
    logging.disable_progress_bar()
