"""Models, their adapters, attention and head."""

import logging
import sys
import warnings

from transformers.utils.logging import disable_progress_bar

if not sys.stderr.isatty():  # keep progress bars of loading and writing out of log files
    disable_progress_bar()

# bitsandbytes 0.50 warns at each product of an 8-bit layer that it rounds the input to float16.
# That is how LLM.int8() works, and only 8 bits are left afterwards: a user cannot act on it.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast" not in str(record.msg)
)

# Three more warnings that a user cannot act on. peft corrects fan_in_fan_out itself, writes the
# patterns for fused experts itself, and 0.21 reads a property that transformers 5.23 has renamed.
for _message in (
    "fan_in_fan_out is set to False but the target module is `Conv1D`",
    r"The following (rank|alpha)_pattern keys did not match .*gate_up_proj",
):
    warnings.filterwarnings("ignore", _message)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
