"""Every method and optimizer: it learns, moves only what it should, exports what it trained, and resumes to the bit."""

import json

import pytest
import torch
from conftest import Workshop, losses
from safetensors.torch import load_file

METHODS = {
    "full": {},
    "full, frozen by pattern": {"adapter__freeze": ["embed_tokens", r"layers\.0\."]},
    "lora": {"adapter__kind": "lora"},
    "lora, some layers": {"adapter__kind": "lora", "adapter__target_modules": ["q_proj", "up_proj"], "adapter__layers": [1]},
    "lora, patterns": {"adapter__kind": "lora", "adapter__rank_pattern": {"q_proj": 4}, "adapter__alpha_pattern": {"q_proj": 7.0}},
    "lora, rsLoRA": {"adapter__kind": "lora", "adapter__rslora": True},
    "lora, DoRA": {"adapter__kind": "lora", "adapter__dora": True},
    "lora, gaussian": {"adapter__kind": "lora", "adapter__init": "gaussian"},
    "lora, PiSSA": {"adapter__kind": "lora", "adapter__init": "pissa"},
    "lora, EVA": {"adapter__kind": "lora", "adapter__init": "eva"},
    "lora, random": {"adapter__kind": "lora", "adapter__init": "random", "adapter__alpha": 1.0},
    "lora, norms": {"adapter__kind": "lora", "adapter__train_norms": True},
    "lora, whole modules": {"adapter__kind": "lora", "adapter__modules_to_save": ["embed_tokens", "lm_head"]},
    "lora, biases": {"adapter__kind": "lora", "adapter__bias": "all"},
    "lora, biases of adapted": {"adapter__kind": "lora", "adapter__bias": "lora_only"},
    "qlora, NF4": {"adapter__kind": "qlora"},
    "qlora, FP4": {"adapter__kind": "qlora", "adapter__quantization": "fp4", "adapter__double_quantization": False},
    "qlora, int8": {"adapter__kind": "qlora", "adapter__quantization": "int8"},
    "qlora, LoftQ": {"adapter__kind": "qlora", "adapter__init": "loftq"},
    "qlora, LoftQ of int8": {"adapter__kind": "qlora", "adapter__init": "loftq", "adapter__quantization": "int8"},
    "qlora, DoRA": {"adapter__kind": "qlora", "adapter__dora": True},
}  # fmt: skip
OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion", "lion_8bit", "adafactor", "muon"]
RATES = {"lion": 1e-3, "lion_8bit": 1e-3, "adafactor": 3e-2}
TWENTY = {"train__max_steps": 20, "train__epochs": 9, "checkpoint__every_steps": 10, "checkpoint__keep_last": 9}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model with biases on its projections, trained a little, so that there are main directions to find."""
    workshop = Workshop(tmp_path_factory.mktemp("base"))
    config = workshop.config()["model"]["config"] | {"attention_bias": True, "mlp_bias": True, "hidden_size": 64}
    return str(workshop.train("base", model__config=config) / "model")


def on(base: str) -> dict:
    return {"model__init": "pretrained", "model__path": base, "model__config": None, "model__tokenizer": None}


def pairs_of_method_and_optimizer():
    for method in METHODS:
        for optimizer in OPTIMIZERS if method in ("full", "lora", "qlora, NF4") else OPTIMIZERS[:2]:
            if not (optimizer == "muon" and METHODS[method]):
                yield method, optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimizer"), [pytest.param(*pair, id=" with ".join(pair)) for pair in pairs_of_method_and_optimizer()]
)
def test_it_learns_exports_and_resumes_to_the_bit(workshop, base, method, optimizer):
    """That only what should moves, and that the export agrees, is checked by every run itself before it is complete."""
    settings = {
        **on(base),
        **METHODS[method],
        **TWENTY,
        "optimizer__kind": optimizer,
        "optimizer__lr": RATES.get(optimizer, 1e-2),
    }
    run = workshop.train(**settings)
    curve = losses(run)
    assert sum(curve[-5:]) < 0.99 * sum(curve[:5]), "an epoch is five steps"
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"
    final = exported(run)

    (run / "outcome.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if path.name != "step-00000010":
            path.rename(workshop.folder / path.name)
    assert losses(workshop.train(**settings)) == curve
    again = exported(run)
    assert final.keys() == again.keys()
    assert all(torch.equal(final[name], again[name]) for name in final)


def exported(run):
    [path] = (run / "model").glob("*model.safetensors")
    return load_file(path)
