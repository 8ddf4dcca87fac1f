"""Adapters that others wrote, or a disk damaged: named by file and key before anything is loaded."""

import json
import shutil

import pytest
from conftest import Workshop, forget_process_state

from finetune.__main__ import main
from finetune.config import base
from finetune.errors import ConfigError, ModelError
from finetune.export.load import load, moved
from finetune.models import base_identity


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a base, an adapter on it)"""
    shop = Workshop(tmp_path_factory.mktemp("adapters"))
    forget_process_state()
    model = shop.train("base", train__max_steps=1) / "model"
    return model, shop.train("lora", **on(model), train__max_steps=1) / "model"


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of the adapter."""
    shutil.copytree(saved[1], tmp_path / "adapter")
    return tmp_path / "adapter"


def on(model, **changes):
    return {
        "model__init": "pretrained", "model__path": str(model), "model__config": None, "model__tokenizer": None,
        "adapter__kind": "lora", **changes,
    }  # fmt: skip


def change(path, **changes):
    """Change keys of a JSON file; ...: remove the key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (WEIGHTS, lambda path: path.unlink(), f" has no {WEIGHTS}"),
        (WEIGHTS, lambda path: path.write_text(""), f"/{WEIGHTS} is empty"),
        (WEIGHTS, lambda path: path.write_text("garbage " * 99), f"/{WEIGHTS} is not .safetensors"),
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-9]), f"/{WEIGHTS} has "),
        (
            WEIGHTS,
            lambda path: path.rename(path.with_suffix(".bin")),
            "/adapter_model.bin is not a file of PyTorch",
        ),
        (SETTINGS, lambda path: path.write_text("[]"), f"/{SETTINGS}: should hold an object"),
        (SETTINGS, lambda path: path.write_text("{"), f"/{SETTINGS}: broken JSON"),
        (SETTINGS, lambda path: path.write_bytes(b"\xff\xfe{"), f"/{SETTINGS}: broken JSON"),
    ],
)
def test_a_damaged_file_of_an_adapter_is_named(adapter, saved, capsys, name, damage, says):
    damage(adapter / name)
    assert main(["chat", "--model", str(adapter), "--prompt", "a"]) == 2
    assert f"error: --model: {adapter}{says}" in capsys.readouterr().err
    assert f"{adapter}{says}" in str(base.adapter_problem(str(adapter)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_model_name_or_path": 5}, "base_model_name_or_path should be the folder or Hub id of the base, got 5"),
        ({"peft_type": "ZZZ"}, 'peft_type should be LORA, the only supported kind of adapter, got "ZZZ"'),
        ({"peft_type": ...}, "has no peft_type"),
        ({"r": 3}, "r is 3, but "),
        ({"r": "16"}, "r should be a whole number"),
        ({"lora_alpha": "x"}, "lora_alpha should be a number"),
        ({"lora_dropout": 7}, "lora_dropout should be a number from 0"),
        ({"target_modules": 5}, "target_modules should be a list of names"),
        ({"rank_pattern": 5}, "rank_pattern should be a mapping"),
        ({"bias": "zzz"}, "bias should be none, all or lora_only"),
        ({"use_dora": True}, "use_dora is true, and"),
    ],
)  # fmt: skip
def test_a_wrong_setting_of_an_adapter_is_named_by_its_key(adapter, changes, says):
    change(adapter / SETTINGS, **changes)
    assert says in str(base.adapter_problem(str(adapter)))
    assert str(base.adapter_problem(str(adapter))).startswith(f"{adapter}/{SETTINGS}: ")


def test_an_adapter_to_go_on_from_is_looked_at_with_the_config(workshop, saved, adapter):
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=f"adapter.path: {adapter} has no {WEIGHTS}"):
        workshop.check(**on(saved[0], adapter__path=str(adapter)))


def test_weights_that_peft_would_leave_out_are_refused(workshop, saved, adapter):
    """Without target_modules peft takes those that are usual for Llama: q and v."""
    change(adapter / SETTINGS, target_modules=None)
    with pytest.raises(ModelError, match=f"{adapter}: 20 of its weights do not fit"):
        workshop.check(**on(saved[0], adapter__path=str(adapter)))
    with pytest.raises(ModelError, match=f"{adapter}: 20 of its weights do not fit"):
        load(adapter)


@pytest.mark.parametrize("known", [None, "", ...])
def test_an_adapter_that_names_no_base_needs_one(saved, adapter, capsys, known):
    change(adapter / SETTINGS, base_model_name_or_path=known)
    assert main(["chat", "--model", str(adapter), "--prompt", "a"]) == 2
    assert (
        f"{adapter}/{SETTINGS}: base_model_name_or_path names no base; give --base"
        in capsys.readouterr().err
    )
    load(adapter, base=str(saved[0]))
    assert moved(adapter, str(saved[0])) == str(saved[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "zzz"}, {"dtype": "nn"}, {"dtype": 5}, {"quantization": "x"}, {"quantization": {}}, {"quantization": ...},
        {"quantization": {"load_in_4bit": True}}, {"weights": [1]}, {"weights": {}}, {"weights": {"a": 5}}, {"values": 5},
        {"new_tokens": 5}, {"new_token_ids": ["x"]}, {"new_token_ids": [-3]}, {"new_token_ids": [300]}, {"architecture": 5}, {"loftq": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_the_base_with_a_wrong_type_is_damaged(adapter, changes):
    change(adapter / base_identity.FILE, **changes)
    with pytest.raises(
        ModelError,
        match=rf"{base_identity.FILE}: is damaged \({next(iter(changes))}\), so the base",
    ):
        base_identity.read(adapter)


def test_a_record_of_an_older_version_is_read(adapter):
    change(adapter / base_identity.FILE, values=..., architecture=..., loftq=...)
    assert base_identity.read(adapter)["loftq"] is False


def test_the_base_of_an_adapter_is_looked_at_before_it_is_opened(saved, adapter, tmp_path):
    shutil.copytree(saved[0], tmp_path / "base")
    (tmp_path / "base/model.safetensors").write_text("")
    change(adapter / SETTINGS, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(
        ModelError, match=f"the base of {adapter}: {tmp_path}/base/model.safetensors is empty"
    ):
        load(adapter)


def test_a_broken_chat_template_is_not_merged(adapter, tmp_path, capsys):
    (adapter / "chat_template.jinja").write_text("{% if %}")
    assert (
        main(["export", "--merge", "--model", str(adapter), "--output", str(tmp_path / "merged")])
        == 2
    )
    assert "chat_template.jinja) cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
