"""Import once what all forked children need. Nothing here may start a thread."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import conftest  # noqa: F401
import deepspeed.checkpoint.ds_to_universal
import deepspeed.module_inject.auto_ep_layer

# With the compiler: 2 s of each process that shares by ZeRO
import deepspeed.runtime.zero.muon.muon_optimizer
import peft  # noqa: F401
import s3fs  # noqa: F401
import torch.distributed.algorithms.join  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from faults import forked  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import train  # noqa: F401
from finetune import loop  # noqa: F401
from finetune.engine import trackers  # noqa: F401
from finetune.engine.topology import fsdp, zero  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # 900 regular expressions, which it keeps
deepspeed.ops.__compatible_ops__  # noqa: B018  # which it finds out by trying

gc.freeze()  # a collection in a child would copy all of this
