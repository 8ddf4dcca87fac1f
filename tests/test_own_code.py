"""A base that brings its own Python code: that code is part of the run's identity, and of what it exports."""

import json
import shutil

import pytest

from finetune import export
from finetune.models import bases

pytestmark = pytest.mark.slow

CONFIG = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper_own import SCALE
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def settings(workshop, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(workshop.folder / "modules"))
    base = workshop.train("base") / "model"
    values = json.loads((base / "config.json").read_text())
    values |= {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(values))
    (base / "configuration_own.py").write_text(CONFIG)
    (base / "modeling_own.py").write_text(MODEL)
    (base / "helper_own.py").write_text("SCALE = 1\n")
    return {
        "model__init": "pretrained", "model__path": str(base), "model__config": None, "model__tokenizer": None,
        "model__trust_remote_code": True, "checkpoint__every_steps": 2,
    }  # fmt: skip


def test_code_comes_along_and_is_part_of_the_identity(workshop, settings):
    run = workshop.train("whole", **settings)
    assert {"configuration_own.py", "modeling_own.py", "helper_own.py"} <= {p.name for p in (run / "model").iterdir()}
    exported = export.load(run / "model", trust_remote_code=True)
    assert type(exported).__name__ == "OwnForCausalLM"
    manifest = json.loads((run / "checkpoints/step-00000005/manifest.json").read_text())
    assert manifest["identity"]["code of the model"] == bases.code(exported)
    other = shutil.copytree(run / "model", workshop.folder / "other")
    (other / "modeling_own.py").write_text(MODEL + "    twice = True\n")
    assert bases.code(export.load(other, trust_remote_code=True)) != bases.code(exported)
    assert bases.code(export.load(workshop.train("plain") / "model")) == "none"
