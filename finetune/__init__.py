"""Specialise a language model to a task, and prove it."""

import logging

# peft imports bitsandbytes, which would like to download a kernel for 4-bit products on a CPU and says so in every run.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
