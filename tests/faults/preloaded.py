"""What the server of tests/faults/nursery.py imports once for all its children. Nothing here may start a thread."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import conftest  # noqa: F401
import deepspeed.checkpoint.ds_to_universal  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from faults import nursery  # noqa: F401

import train  # noqa: F401
from finetune import loop  # noqa: F401
from finetune.engine import trackers  # noqa: F401
from finetune.engine.topology import fsdp, zero  # noqa: F401

gc.freeze()  # a collection in a child would copy all of this
