"""How processes share the model: the only package that knows Accelerate, FSDP and DeepSpeed."""

from finetune.engine.topology.launch import ParallelConfig
from finetune.engine.topology.processes import Processes
from finetune.engine.topology.topology import Topology

__all__ = ["ParallelConfig", "Processes", "Topology"]
