"""Run train.py on random weights made on the device, with little around the steps.

    python benchmarks/on_gpu/one_run.py --config run.yaml

The loop, the step and everything in it are those of train.py. Left out, as they take longer than
the steps that are measured: reading and hashing the weights, checkpoints, the export.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from on_gpu import random_model

import train
from finetune import loop
from finetune.engine.checkpoint.saver import Saver
from finetune.models import base_identity, load, parameters


def leave_out() -> None:
    """Replace what is not measured."""

    def load_model(
        model: Any, config: Any, tokenizer: Any, attention: str, dtype: torch.dtype,
        quantization: dict[str, Any] | None = None, family: Any = load.CAUSAL,
    ) -> Any:  # fmt: skip
        made = random_model.make(config, dtype, attention, quantization)
        return load._completed(made, model, tokenizer)

    def nothing(*_: Any, **__: Any) -> None: ...

    load.load_model = load_model
    base_identity.hashes = base_identity.values = lambda *_: {}
    base_identity.fingerprints = lambda _: ("", "")
    parameters.fingerprints = lambda *_: {}
    Saver.save = Saver.require = nothing
    loop.finish = nothing


if __name__ == "__main__":
    leave_out()
    sys.exit(train.main())
