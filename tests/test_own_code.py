"""A base's own Python code is part of the run's identity and of its export."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import Workshop

from finetune.export.load import load, load_tokenizer
from finetune.export.merge import merge
from finetune.models import base_identity

pytestmark = pytest.mark.slow

CONFIG = (
    "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
)
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper_own import SCALE
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {"tokenizer_file": "tokenizer.json", "words_file": "own.words"}
    def __init__(self, *args, words_file, **kwargs):
        self.words = Path(words_file).read_text()
        super().__init__(*args, **kwargs)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("plain")).train("base", train__max_steps=1) / "model"


@pytest.fixture
def settings(workshop, plain, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(workshop.folder / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds that folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # of another test's folder
    base = shutil.copytree(plain, workshop.folder / "base")
    values = json.loads((base / "config.json").read_text())
    values |= {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(values))
    (base / "configuration_own.py").write_text(CONFIG)
    (base / "modeling_own.py").write_text(MODEL)
    (base / "helper_own.py").write_text("SCALE = 1\n")
    return {
        "model__init": "pretrained", "model__path": str(base), "model__config": None,
        "model__tokenizer": None,
        "model__trust_remote_code": True, "train__max_steps": 1, "train__micro_batch_size": 8,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "lora", "merged"])
def test_all_files_of_own_code_are_exported(workshop, settings, kind):
    """Folders of code, and files that only a tokenizer's class names, also beside an adapter."""
    base = Path(settings["model__path"])
    files = {
        "custom_generate/generate.py": "def generate(model): ...",
        "custom_generate/requirements.txt": "torch\n", "kernels/fast/own.py": "",
        "own.words": "a b",
        "tokenization_own.py": TOKENIZER,
    }  # fmt: skip
    others = {".git/hook.py": "", "runs/old/model/config.json": "{}", "runs/old/model/old.py": ""}
    for name, text in {**files, **others}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    path = base / "tokenizer_config.json"
    code = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": code}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    adapter = "full" if kind == "full" else "lora"
    folder = workshop.train("tuned", **settings, adapter__kind=adapter) / "model"
    if kind == "merged":
        merge([folder], workshop.folder / "merged", trust_remote_code=True)
        folder = workshop.folder / "merged"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found >= ({"own.words", "tokenization_own.py"} if kind == "lora" else files.keys())
    assert not found & others.keys() - {"runs/old/model/config.json"}
    assert load_tokenizer(folder, trust_remote_code=True).words == "a b"


def test_code_is_exported_and_part_of_the_identity(workshop, plain, settings):
    run = workshop.train("whole", **settings)
    found = {path.name for path in (run / "model").iterdir()}
    assert found >= {"configuration_own.py", "modeling_own.py", "helper_own.py"}
    exported = load(run / "model", trust_remote_code=True)
    assert type(exported).__name__ == "OwnForCausalLM"
    manifest = json.loads((run / "checkpoints/step-00000001/manifest.json").read_text())
    assert manifest["identity"]["code of the model"] == base_identity.code(exported)
    other = shutil.copytree(run / "model", workshop.folder / "other")
    (other / "modeling_own.py").write_text(MODEL + "    twice = True\n")
    assert base_identity.code(load(other, trust_remote_code=True)) != base_identity.code(exported)
    assert base_identity.code(load(plain)) == "none"
