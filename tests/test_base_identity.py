"""Bases of every kind: what a folder says of itself decides before anything is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Workshop, losses, short
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from finetune import config as configs
from finetune.config import model_files
from finetune.config.base import config_of
from finetune.errors import ConfigError, ModelError, OutOfMemory
from finetune.export.load import load
from finetune.export.merge import merge
from finetune.export.verify import probe_logits, verify
from finetune.models import base_identity
from finetune.models.load import require_all_weights

QUANTIZATIONS = {
    "nf4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


WIDE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
ONE_STEP = {"train__max_steps": 1, "train__micro_batch_size": 8}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A saved model of two layers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    return Workshop(folder).train("base", **ONE_STEP, model__config=WIDE) / "model"


@pytest.fixture
def copied(plain, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(plain, tmp_path / "base")


def save(tensors, path):
    save_file(tensors, path, {"format": "pt"})


def rewrite(folder, **changes):
    """Change keys of config.json; None: without that key."""
    written = json.loads((folder / "config.json").read_text()) | changes
    left = {key: value for key, value in written.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(left))


@pytest.fixture(scope="module")
def quantized(plain):
    """The same, saved as bitsandbytes stores it: form -> folder."""

    def save(form: str) -> Path:
        folder = plain.parent / form
        if not folder.exists():
            wanted = BitsAndBytesConfig(**QUANTIZATIONS[form])
            model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=wanted)
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(plain / name, folder)
        return folder

    return save


def on(base, **changes):
    return {
        "model__init": "pretrained", "model__path": str(base), "model__config": None,
        "model__tokenizer": None, **changes,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "double"),
    short([("nf4", True), ("fp4", False), ("int8", True)], ("nf4", True), ("int8", True)),
)
def test_qlora_trains_on_a_quantised_base_as_it_is(
    workshop, quantized, capsys, caplog, form, double
):
    own = {"adapter__kind": "qlora", "train__micro_batch_size": 8}
    run = workshop.train("run", **on(quantized(form), **own))
    doubly = ", doubly quantised" if form == "nf4" else ""
    assert f"method      {form}{doubly} (the base is saved so)" in capsys.readouterr().out
    saved = configs.read_yaml(run / "config.yaml")["adapter"]
    assert (saved["quantization"], saved["double_quantization"]) == (form, double)
    record = json.loads((run / "model/base_weights.json").read_text())["quantization"]
    assert record.get("bnb_4bit_quant_type", "int8") == form
    assert record.get("bnb_4bit_use_double_quant", double) == double
    assert losses(run)[-1] < losses(run)[0]
    assert [record for record in caplog.records if "MatMul8bitLt" in record.msg] == []


def test_an_adapter_merges_into_the_dequantised_weights_of_its_base(workshop, quantized, tmp_path):
    run = workshop.train("run", **on(quantized("nf4"), adapter__kind="qlora", **ONE_STEP))
    merged = merge([run / "model"], tmp_path / "merged")
    assert merged.rounding < 1e-2
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    load(tmp_path / "merged")


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        (
            {"adapter__kind": "full"}, "model.path",
            "quantised already (bitsandbytes nf4, doubly quantised)",
        ),
        (
            {"adapter__kind": "lora"}, "model.path",
            "set adapter.kind: qlora, or give the model before quantisation",
        ),
        (
            {"adapter__kind": "qlora", "adapter__quantization": "int8"}, "adapter.quantization",
            "int8, but the base is quantised already",
        ),
        (
            {"adapter__kind": "qlora", "adapter__double_quantization": False},
            "adapter.double_quantization", "stays as it is",
        ),
        (
            {"adapter__kind": "qlora", "adapter__init": "loftq"}, "adapter.init",
            "loftq needs the weights before quantisation",
        ),
    ],
)  # fmt: skip
def test_unsupported_settings_of_a_quantised_base_are_config_errors(
    workshop, quantized, changes, key, says
):
    with pytest.raises(ConfigError, match=f"{key}: ") as caught:
        workshop.check("run", **on(quantized("nf4"), **changes))
    assert says in str(caught.value)


def test_an_explicit_setting_is_not_mistaken_for_its_default(workshop, quantized):
    """nf4 is the default, and written of a base in 8 bits it is still wrong."""
    own = {"adapter__kind": "qlora", "adapter__quantization": "nf4"}
    refused = "adapter.quantization: nf4, but the base is quantised already"
    with pytest.raises(ConfigError, match=refused):
        workshop.check("run", **on(quantized("int8"), **own))


def folder_with(tmp_path, config=None, files=()):
    folder = tmp_path / "base"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_a_config_nested_too_deeply_is_an_error_of_the_model(tmp_path):
    folder = folder_with(tmp_path, {})
    (folder / "config.json").write_text("[" * 100_000)
    assert config_of(str(folder)) == {}


def refusal(base, **adapter):
    values = {"run": {"name": "a"}, "model": {"path": str(base)}, "data": {"train": "x"}}
    with pytest.raises(ConfigError) as caught:
        configs.from_dict({**values, "adapter": adapter})
    return str(caught.value)


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize(
    ("written", "files", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, (), "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, (), "awq, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, (), "fp8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, (), "mxfp4"),
        (
            {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}, (),
            "compressed-tensors",
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, (), "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, (), "MLX"),
        ({}, ("quantize_config.json",), "gptq"),
        ({}, ("hf_quant_config.json",), "modelopt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_other_quantisation_is_refused_by_its_name(tmp_path, written, files, name, kind):
    base = folder_with(tmp_path, {"model_type": "llama", **written}, ("model.safetensors", *files))
    message = refusal(base, kind=kind)
    assert f"{base} is quantised already ({name})" in message
    assert "give the model before quantisation" in message


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            {
                "model_type": "bart", "is_encoder_decoder": True,
                "architectures": ["BartForConditionalGeneration"],
            },
            "encoder-decoder",
        ),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "masked language model"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "classifier",
        ),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "image classifier"),
        (
            {
                "model_type": "mistral", "architectures": ["MistralModel"],
                "tie_word_embeddings": False,
            },
            "has no head",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value["model_type"],
)  # fmt: skip
def test_a_model_that_is_not_causal_is_refused(tmp_path, written, says):
    assert says in refusal(folder_with(tmp_path, written, ["model.safetensors"]))


@pytest.mark.parametrize(
    ("config", "files", "says"),
    [
        (None, (), "is an empty folder"),
        (None, ("model.safetensors",), "has no config.json"),
        (None, ("model.Q4_K_M.gguf",), "holds GGUF files"),
        (None, ("consolidated.00.pth", "params.json"), "holds Meta's own format"),
        ({"model_type": "llama"}, (), "has no weights"),
        ({"model_type": "llama"}, ("model.gguf",), "has no weights (.safetensors), only GGUF"),
        (None, ("adapter_config.json",), "is an adapter"),
        (
            {"model_type": "llama"}, ("model.safetensors", "adapter_config.json"),
            "holds config.json of a whole model and adapter_config.json",
        ),
    ],
)  # fmt: skip
def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path, config, files, says):
    base = folder_with(tmp_path, config, files)
    assert f"model.path: {base} {says}" in refusal(base)
    file = tmp_path / "file.bin"
    file.write_text("")
    assert f"model.path: {file} is a file; give the folder it is in" in refusal(file)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def parts(copied):
    """A copy of the model in two parts, with their index."""
    folder = copied
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (name > names[5])}-of-00002.safetensors" for name in names}
    for part in set(where.values()):
        save({name: tensors[name] for name in names if where[name] == part}, folder / part)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop_one(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save(tensors, path)


FIRST = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda at: (at / FIRST).unlink(), f"/{FIRST} is missing; download it too"),
        (lambda at: (at / FIRST).write_text(""), f"/{FIRST} is empty; download it again"),
        (
            lambda at: (at / FIRST).write_text(POINTER),
            f"/{FIRST} is a pointer of Git LFS, not the file itself; run git lfs pull",
        ),
        (lambda at: (at / FIRST).write_text("<html>Sorry</html>"), f"/{FIRST} is not .safetensors"),
        (
            lambda at: (at / FIRST).write_bytes(b"\2" + b"\0" * 7 + b"[]"),
            f"/{FIRST}: its header cannot be read",
        ),
        (lambda at: cut(at / FIRST, 100), f"/{FIRST} is cut off in its header, at 100 bytes"),
        (lambda at: cut(at / FIRST, 20_000), f"/{FIRST} has 20,000 bytes, and should have "),
        (
            lambda at: drop_one(at / FIRST),
            f"/{FIRST}: lacks lm_head.weight, which {INDEX} says is in it",
        ),
        (
            lambda at: (at / INDEX).unlink(),
            f"has weights in parts ({FIRST}), but not their index, {INDEX}",
        ),
        (lambda at: (at / INDEX).write_text("{"), f"/{INDEX}: broken JSON"),
        (lambda at: (at / INDEX).write_text("{}"), f"/{INDEX}: has no weight_map"),
        (lambda at: (at / INDEX).write_text(POINTER), f"/{INDEX} is a pointer of Git LFS"),
        (
            lambda at: (at / "config.json").write_text('{"model_type": '),
            "/config.json: broken JSON",
        ),
        (lambda at: (at / "config.json").write_text("[]"), "/config.json: should hold an object"),
        (
            lambda at: (at / "config.json").write_text('{"quantization_config": "nf4"}'),
            "/config.json: quantization_config should be a mapping with quant_method, got \"nf4\"",
        ),
    ],
)  # fmt: skip
def test_an_incomplete_download_is_refused_with_its_file(parts, damage, says):
    damage(parts)
    assert f"model.path: {parts}{says if says.startswith('/') else ' ' + says}" in refusal(parts)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "is not whole"),
        ("consolidated.safetensors", "has no model.safetensors"),
    ],
)
def test_incomplete_weights_of_other_formats_are_refused(plain, tmp_path, name, says):
    base = folder_with(tmp_path, {"model_type": "llama"})
    (base / name).write_bytes(b"PK\3\4 and so on")
    assert says in refusal(base)


def test_complete_shards_are_accepted(workshop, plain, parts):
    workshop.check(**on(parts))
    assert model_files.shapes(str(parts)) == model_files.shapes(str(plain))


def test_random_weights_need_no_saved_ones(workshop, parts):
    (parts / FIRST).unlink()
    run = workshop.train(**on(parts, **ONE_STEP) | {"model__init": "random"})
    weights = json.loads((parts / INDEX).read_text())["weight_map"]
    assert model_files.shapes(str(run / "model")).keys() == weights.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_a_missing_weight_is_reported_before_loading(workshop, copied, tied):
    """The file is whole; only the architecture says what should be in it."""
    path, name = copied / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    if tied:
        rewrite(copied, tie_word_embeddings=True)
        del tensors["lm_head.weight"]
        save(tensors, path)
        workshop.check(**on(copied))
    refused = f"1 weights are missing or of another shape, such as {name}"
    weight = tensors.pop(name)
    for other in ({}, {name: weight[:5].clone()}):
        save({**tensors, **other}, path)
        with pytest.raises(ModelError, match=refused):
            workshop.check(**on(copied))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "has no vocabulary"), ('{"model": 5}', "model should be an object"),
        (POINTER, "is a pointer of Git LFS"), ("", "is empty"), ("{", "broken JSON"),
    ]
)  # fmt: skip
def test_an_incomplete_tokenizer_is_refused(workshop, copied, content, says):
    (copied / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"model.tokenizer: {copied}/tokenizer.json:? {says}"):
        workshop.check(**on(copied))


def test_disabled_quantisation_flags_do_not_make_a_model_quantised(workshop, copied):
    off = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    rewrite(copied, quantization_config=off)
    run = workshop.train(**on(copied, **ONE_STEP))
    assert "quantization_config" not in json.loads((run / "model/config.json").read_text())


def test_the_error_for_a_folder_of_runs_lists_their_models(tmp_path):
    for run in ("a", "b"):
        (tmp_path / "runs" / run / "model").mkdir(parents=True)
        (tmp_path / "runs" / run / "model/config.json").write_text("{}")
    runs = tmp_path / "runs"
    models = f"{runs}/a/model, {runs}/b/model"
    assert f"{runs} is a folder of runs; name the model of one: {models}" in refusal(runs)


def test_a_missing_tokenizer_and_a_missing_local_path_are_reported(
    workshop, plain, tmp_path, monkeypatch
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(plain / name, bare)
    with pytest.raises(ModelError, match=f"{bare} has no tokenizer"):
        workshop.check(**on(bare))
    monkeypatch.chdir(tmp_path)
    for name in ("bare/x", "./x", "x/", "../x", "a/b/c"):
        with pytest.raises(ModelError, match="model.path: .*no such folder"):
            workshop.check(**on(name))
    with pytest.raises(ConfigError, match="model.path: is empty"):
        workshop.check(**on(""))


def test_weights_in_pytorchs_own_format_are_taken(workshop, copied):
    """transformers reads them without executing anything."""
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    run = workshop.train(**on(copied, **ONE_STEP))
    assert (run / "model/model.safetensors").exists()


def test_random_weights_of_a_quantised_models_shape_are_not_quantised(workshop, quantized):
    run = workshop.train(**on(quantized("nf4"), **ONE_STEP) | {"model__init": "random"})
    assert "quantization_config" not in json.loads((run / "model/config.json").read_text())


def test_errors_for_run_directories_and_adapters_say_what_to_write(workshop, plain):
    run = workshop.train("lora", **on(plain, adapter__kind="lora", **ONE_STEP))
    model = run / "model"
    given = "is a run directory; its model is in"
    assert f"{run} {given} {model}: give that folder" in refusal(run)
    message = refusal(model)
    assert (
        f"{model} is an adapter, not a model; to train it further give model.path: {plain} and "
        f"adapter.path: {model}"
    ) in message
    assert "give the causal language model" not in message
    message = refusal(plain, kind="lora", path=str(run))
    given = "is a run directory; its adapter is in"
    assert f"adapter.path: {run} {given} {model}: give that folder" in message
    message = refusal(plain, kind="lora", path=str(plain))
    assert f"adapter.path: {plain} is a whole model, not an adapter" in message


@pytest.mark.slow
@pytest.mark.parametrize("full_at", ["open", "pass"])
def test_an_export_on_a_quantised_base_that_fills_the_gpu_is_verified_on_the_cpu(
    workshop, plain, monkeypatch, full_at
):
    devices = []

    def on_a_gpu(folder, was, *arguments, **keywords):
        verify(folder, replace(was, device=torch.device("cuda")), *arguments, **keywords)

    def loaded(*arguments, device, **keywords):
        devices.append(device.type)
        if full_at == "open" and device.type == "cuda":
            raise OutOfMemory("CUDA out of memory")
        return load(*arguments, device=device, **keywords)

    def passed(model, *device):
        if full_at == "pass" and devices == ["cuda"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return probe_logits(model, *device)

    monkeypatch.setattr("finetune.export.publish.verify", on_a_gpu)
    monkeypatch.setattr("finetune.export.verify.load", loaded)
    monkeypatch.setattr("finetune.export.verify.probe_logits", passed)
    workshop.train("run", **on(plain, adapter__kind="qlora", **ONE_STEP))
    assert devices == ["cuda", "cpu"]


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_identity_depends_on_packed_values_but_not_on_the_device(plain, copied, form):
    def loaded(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**QUANTIZATIONS[form])
        )

    model = loaded(plain)
    before = base_identity.fingerprints(model)
    packed = model.model.layers[1].mlp.up_proj.weight
    packed.data.view(-1)[7] ^= 1  # as another device might
    assert base_identity.fingerprints(model) == before
    weights = load_file(plain / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] *= 1.001  # too little for another code
    save(weights, copied / "model.safetensors")
    found = base_identity.fingerprints(loaded(copied))
    assert all(one != other for one, other in zip(found, before))


def test_the_bytes_of_a_base_that_was_saved_quantised_are_its_identity(quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized("nf4"))
    before = base_identity.fingerprints(model)
    model.model.layers[1].mlp.up_proj.weight.data.view(-1)[7] ^= 1
    assert all(one != other for one, other in zip(base_identity.fingerprints(model), before))


FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({}, "quantization_config has no quant_method"),
        ({"load_in_4bit": False, "load_in_8bit": False}, "quantization_config has no quant_method"),
        (
            {**FOUR, "bnb_4bit_quant_type": None},
            "bnb_4bit_quant_type should be nf4 or fp4, got null",
        ),
        (
            {**FOUR, "bnb_4bit_quant_type": "nf5"},
            'bnb_4bit_quant_type should be nf4 or fp4, got "nf5"',
        ),
        ({**FOUR, "load_in_4bit": "yes"}, 'load_in_4bit should be true or false, got "yes"'),
        ({**FOUR, "load_in_8bit": True}, "has both load_in_4bit and load_in_8bit"),
        (
            {**FOUR, "bnb_4bit_use_double_quant": "x"},
            "bnb_4bit_use_double_quant should be true or false",
        ),
        (
            {**FOUR, "bnb_4bit_compute_dtype": "zzz"},
            "bnb_4bit_compute_dtype should be one of float32",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": "x"},
            "llm_int8_threshold should be a number",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_an_impossible_quantisation_is_refused_by_its_key(tmp_path, found, says, kind):
    folder = folder_with(tmp_path, {"model_type": "llama", "quantization_config": found})
    assert f"model.path: {folder}/config.json: quantization_config" in refusal(folder, kind=kind)
    assert says in refusal(folder, kind=kind)


@pytest.mark.parametrize(
    ("form", "found", "says"),
    [
        (None, FOUR, "says bitsandbytes fp4, but the weights are not quantised"),
        (
            None, {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "says bitsandbytes int8, but the weights are not quantised",
        ),
        (
            "nf4", {**FOUR, "bnb_4bit_quant_type": "fp4"},
            "says bitsandbytes fp4, but the weights are nf4",
        ),
        (
            "int8", {**FOUR, "bnb_4bit_quant_type": "nf4"},
            "says bitsandbytes nf4, but the weights are int8",
        ),
        ("nf4", None, "bitsandbytes has quantised the weights (nf4)"),
    ],
)  # fmt: skip
def test_weights_quantised_unlike_the_config_are_refused(
    plain, quantized, tmp_path, form, found, says
):
    folder = shutil.copytree(quantized(form) if form else plain, tmp_path / "base")
    rewrite(folder, quantization_config=found)
    assert says in refusal(folder, kind="qlora" if found else "lora")


@pytest.mark.parametrize("number", [-1, 0])
def test_a_model_without_layers_is_refused(workshop, copied, number):
    rewrite(copied, num_hidden_layers=number)
    refused = f"{copied}/config.json: num_hidden_layers should be at least 1, got {number}"
    assert refused in refusal(copied)
    with pytest.raises(ModelError, match="model.config: num_hidden_layers should be at least 1"):
        workshop.check(model__config={**WIDE, "num_hidden_layers": number})


@pytest.mark.parametrize(
    ("changes", "new_tokens", "says"),
    [
        ({"num_hidden_layers": 1}, [], "fewer layers than its weights: 9 of them would be dropped"),
        ({"intermediate_size": 64}, ["<new>"], "6 weights are missing or of another shape"),
        ({"num_key_value_heads": 4}, ["<new>"], "4 weights are missing or of another shape"),
    ],
)
def test_sizes_that_do_not_fit_the_weights_are_refused_by_the_check(
    workshop, copied, changes, new_tokens, says
):
    rewrite(copied, **changes)
    with pytest.raises(ModelError, match=says):
        workshop.check(**on(copied, model__new_tokens=new_tokens))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"dtype": "float99"},
            "its config.json cannot be loaded: dtype is 'float99', "
            "which transformers does not know",
        ),
        ({"hidden_size": "64"}, "its config.json cannot be loaded: .*'hidden_size' expected int"),
        (
            {"num_attention_heads": 5},
            "its config.json cannot be loaded: .*number of attention heads",
        ),
        (
            {"hidden_act": "nope"},
            "/config.json: architecture llama cannot be loaded: hidden_act is 'nope'",
        ),
        (
            {"rope_parameters": {"rope_type": "zzz", "rope_theta": 1e4}},
            "rope_parameters.rope_type is 'zzz'",
        ),
        ({"vocab_size": 10}, "the tokenizer has ids up to 260, but the embedding has 10 rows"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_a_models_config_is_reported(workshop, copied, changes, says):
    rewrite(copied, **changes)
    with pytest.raises(ModelError, match=says):
        workshop.check(**on(copied))


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", ["hostile", "garbage"])
def test_weights_that_hold_code_are_refused_without_advice_to_run_it(
    workshop, copied, capsys, content
):
    (copied / "model.safetensors").unlink()
    path = copied / "pytorch_model.bin"
    if content == "hostile":
        torch.save({"a": Hostile()}, path)
    else:
        path.write_text("garbage")
    with pytest.raises((ConfigError, ModelError), match=str(path)) as caught:
        workshop.check(**on(copied))
    assert "weights_only" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_a_chat_template_that_is_not_utf8_is_named(workshop, copied):
    (copied / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(ModelError, match=f"{copied}/chat_template.jinja: is not UTF-8 at byte 0"):
        workshop.check(**on(copied))


def test_a_base_of_zeros_is_reported(workshop, copied):
    path = copied / "model.safetensors"
    save({name: tensor * 0 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="its embedding holds only zeros"):
        workshop.train(**on(copied))


def test_a_config_with_fewer_layers_than_the_weights_is_refused(copied):
    """As chat and evaluate open it."""
    rewrite(copied, num_hidden_layers=1)
    with pytest.raises(ModelError, match="fewer layers than its weights"):
        load(copied)


@pytest.mark.parametrize("name", ["missing_keys", "mismatched_keys"])
def test_weights_that_loading_left_random_are_refused(name):
    """As a model on the Hub may leave them, whose files are not looked at before."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE, vocab_size=50))
    info = {"unexpected_keys": set(), "missing_keys": set(), "mismatched_keys": set()}
    require_all_weights("owner/name", model, info)
    with pytest.raises(ModelError, match="'owner/name': 1 weights are missing or of another shape"):
        require_all_weights("owner/name", model, {**info, name: {"model.norm.weight"}})
