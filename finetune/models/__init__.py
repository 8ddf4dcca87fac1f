"""Models, their adapters, attention and head."""

import logging
import sys
import warnings

from transformers.utils.logging import disable_progress_bar

if not sys.stderr.isatty():  # keep progress bars of loading and writing out of log files
    disable_progress_bar()

# bitsandbytes 0.50 says at each product of an 8-bit layer that it rounds what comes in to float16
# before it quantises it to 8 bits. That is how LLM.int8() computes, and float16 has more bits than
# are left after it: nothing a user could act on.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast" not in str(record.msg)
)

# peft 0.21 still reads the old name of a property that transformers 5.23 has renamed; nothing a
# user could act on.
warnings.filterwarnings(
    "ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`"
)  # peft sets it right
warnings.filterwarnings(
    "ignore", r"The following (rank|alpha)_pattern keys did not match .*gate_up_proj"
)  # peft's own, for fused experts
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
