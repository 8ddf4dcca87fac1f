"""Share the model between processes; only this package uses Accelerate, FSDP and DeepSpeed."""

from finetune.engine.topology.launch import ParallelConfig
from finetune.engine.topology.processes import Processes
from finetune.engine.topology.topology import Topology

__all__ = ["ParallelConfig", "Processes", "Topology"]
