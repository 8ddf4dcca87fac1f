"""How processes share the model: the only package that knows Accelerate, FSDP and DeepSpeed."""

from finetune.engine.topology.launch import Wish
from finetune.engine.topology.processes import Processes
from finetune.engine.topology.topology import Topology

__all__ = ["Processes", "Topology", "Wish"]
