"""Check for every causal LM of transformers that its head is followed and its memory forecast.

    python benchmarks/architectures.py          five minutes on a CPU; prints those that fail

Each has the default sizes of its config, but two layers and no weights.
"""

import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune.config import Config
from finetune.forecast.trace import Rehearsal, Shape
from finetune.models import head, load

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
SECONDS = 60


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, too_long)
    built, followed, forecast = 0, 0, 0
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(SECONDS)
        try:
            config = shallow(name)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception:  # needs a package that is missing, or sizes other than the defaults
            continue
        built += 1
        try:
            finish, why = head.probe(model)
            followed += finish is not None
            if why:
                print(f"{name}: holds all logits, as {why}", flush=True)
            trace(name, config)
            forecast += 1
        except Exception as exc:
            print(f"{name}: {exc}", flush=True)
        finally:
            signal.alarm(0)
    print(
        f"transformers {transformers.__version__}: {built} are built; {followed} heads followed, "
        f"{forecast} forecast"
    )


def shallow(name: str) -> Any:
    config = AutoConfig.for_model(name)
    for depth in DEPTHS:
        if isinstance(getattr(config, depth, None), int):
            setattr(config, depth, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:2]
    return config


def trace(name: str, model_config: Any) -> None:
    model = {"init": "random", "tokenizer": "bytes", "config": {"model_type": name}}
    config = Config.model_validate({"run": {"name": "x"}, "data": {"train": "x"}, "model": model})
    tokenizer = load.load_tokenizer(config.model)
    rehearsal = Rehearsal(config, model_config, tokenizer, attention="eager", precision="bf16")
    rehearsal.trace(Shape(1, 16, 16))


def too_long(*_: Any) -> NoReturn:
    raise TimeoutError(f"took more than {SECONDS} seconds")


if __name__ == "__main__":
    main()
