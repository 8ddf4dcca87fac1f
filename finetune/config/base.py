"""Check the folder and config.json of a model before anything is loaded. No torch."""

import fnmatch
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import failures, places
from finetune.config import paths
from finetune.config import values as allowed
from finetune.errors import ModelError

if TYPE_CHECKING:
    from finetune.config.fields import Config

# What transformers looks for, in this order.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # as peft looks for them
LFS_POINTER = b"version https://git-lfs"
MOST_HEADER = 100_000_000  # bytes; the most that safetensors itself reads
SMALL = 1 << 16  # bytes of a tokenizer.json that takes a millisecond to parse; real ones are larger
AGAIN = "download it again"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip
# Files that decide what transformers, peft or a server opens in a folder: one more makes it another
# model.
OPENED = (
    "config.json", "adapter_config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin",
    "adapter_model.bin", "generation_config.json", "quantize_config.json", "quant_config.json",
    "hf_quant_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
    "special_tokens_map.json", "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
# Endings of architectures whose heads predict something else than the next token.
OTHER_HEADS = {
    "ForSequenceClassification": "a classifier, or a reward model",
    "ForTokenClassification": "a tagger",
    "ForQuestionAnswering": "an extractive question answerer",
    "ForMultipleChoice": "a classifier",
    "ForMaskedLM": "a masked language model, which fills gaps",
    "ForPreTraining": "an encoder",
    "ForNextSentencePrediction": "an encoder",
    "ForImageClassification": "an image classifier",
    "ForObjectDetection": "an object detector",
    "ForImageTextRetrieval": "a retriever",
    "ForSpeechSeq2Seq": "a speech recogniser",
    "ForCTC": "a speech recogniser",
    "ForAudioClassification": "an audio classifier",
    "ForTextEncoding": "an encoder",
    "RewardModel": "a reward model",
}
# Coefficients of losses other than the next token's, as configs call them.
BALANCE = (
    "router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "moe_aux_loss_coeff",
    "router_z_loss_coef", "moe_loss_weight",
)  # fmt: skip
# Names of the number of layers in configs.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# First bytes of a file of torch.save: a zip archive, or before torch 1.6 a pickle.
PICKLES = (b"PK", b"\x80")


def kind_of_folder(path: str) -> str:
    """Return model, adapter, run, or a few words on what is wrong with the folder."""
    folder = Path(path)
    if not folder.is_dir():
        return "is a file; give the folder it is in" if folder.exists() else "does not exist"
    if (folder / "config.json").exists():
        return "model"
    if is_adapter(folder):
        return "adapter"
    is_begun = (folder / "config.yaml").exists() and (folder / "outcome.json").exists()
    if is_begun or is_model_or_adapter(folder / "model"):
        return "run"
    names = [entry.name for entry in folder.iterdir()]
    if not names:
        return "is an empty folder; was a download interrupted?"
    if any(name.endswith(".gguf") for name in names):
        what = "holds GGUF files, which are for inference; give the model they were made from"
        return f"{what}, with config.json and .safetensors"
    if any(name.endswith(".pth") for name in names):
        what = "holds Meta's own format (.pth); give the same model in transformers' format"
        return f"{what}, with config.json and .safetensors"
    runs = sorted(name for name in names if is_model_or_adapter(folder / name / "model"))
    if runs:
        listed = [str(folder / name / "model") for name in runs[:5]]
        listed += ["..."] if len(runs) > 5 else []
        return f"is a folder of runs; name the model of one: {', '.join(listed)}"
    inside = sorted(name for name in names if is_model_or_adapter(folder / name))
    if inside:
        return f"has no config.json; did you mean {folder / inside[0]}?"
    return "has no config.json, so it is not a transformers model"


def decides_what_opens(name: str) -> bool:
    """Return whether a file, by its path in a folder, decides which model or tokenizer it is."""
    return any(
        fnmatch.fnmatch(name, pattern) for pattern in OPENED if "/" in pattern or "/" not in name
    )


def mixed_problem(folder: Path) -> str | None:
    """Return why a folder may be a model to one program and an adapter to another; else None."""
    if (folder / "config.json").exists() and is_adapter(folder):
        return (
            f"{folder} holds config.json of a whole model and adapter_config.json of an adapter, "
            "and programs differ in which they open; move away the one that does not belong there"
        )
    return None


def is_model_or_adapter(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_adapter(folder)


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").exists()


def recorded_base(path: str | Path) -> str:
    """Return the folder or Hub id that an adapter names as its base; empty if it names none."""
    return object_in(Path(path) / "adapter_config.json")[0].get("base_model_name_or_path") or ""


def folder_problem(path: str, needs_weights: bool) -> str | None:
    """Return why a folder or file that exists cannot be model.path; None if it can."""
    kind = kind_of_folder(path)
    if kind == "adapter":
        named = recorded_base(path)
        base = f"model.path: {named}" if named else "its base in model.path"
        return (
            f"{path} is an adapter, not a model; to train it further give {base} and adapter.path: "
            f"{path}; to train on top of it, merge it first: {places.command()} merge"
        )
    if kind == "run":
        inside = os.path.join(path, "model")
        has_model = is_model_or_adapter(Path(inside))
        hint = f"its model is in {inside}: give that folder" if has_model else "it has no model yet"
        return f"{path} is a run directory; {hint}"
    if kind != "model":
        return f"{path} {kind}"
    problem = mixed_problem(Path(path)) or config_problem(Path(path))
    return problem or (weights_problem(Path(path)) if needs_weights else None)


def config_problem(folder: Path) -> str | None:
    """Return why config.json cannot be used; None if nothing is wrong."""
    values, problem = object_in(folder / "config.json")
    return problem or values_problem(f"{folder / 'config.json'}", values)


def values_problem(where: str, values: Mapping[str, Any]) -> str | None:
    """Return why the values of a config cannot be used; None if nothing is wrong.

    `where`: the file that holds them.
    """
    nested = values.get("text_config")
    if nested is not None and not isinstance(nested, Mapping):
        return f"{where}: text_config should be a mapping, got {allowed.short(nested)}; correct it"
    for part in (values, nested or {}):
        for name in LAYERS:
            number = part.get(name)
            if isinstance(number, int) and number < 1:
                return f"{where}: {name} should be at least 1, got {number}; correct it"
    found = values.get("quantization_config")
    return None if found is None else _quantization_problem(f"{where}: quantization_config", found)


def _quantization_problem(where: str, found: Any) -> str | None:
    """Return why a quantization_config is invalid; None if it is valid, trainable or not."""
    remedy = "correct it, or remove it if the weights are not quantised"
    if not isinstance(found, Mapping):
        got = allowed.short(found)
        return f"{where} should be a mapping with quant_method, got {got}; {remedy}"
    bits = [name for name in allowed.BITS if found.get(name)]
    method = _method(found)
    if not method and not bits and (not found or any(name in found for name in allowed.BITS)):
        return f"{where} has no quant_method, so transformers cannot open the model; {remedy}"
    if not bits and not method.startswith("bitsandbytes"):
        return None
    if problem := allowed.problem(where, found, allowed.OF_BITSANDBYTES):
        return problem
    if len({name.strip("_") for name in bits}) > 1:
        return f"{where} has both load_in_4bit and load_in_8bit; set one of them to false"
    return None


def weights_problem(folder: Path) -> str | None:
    """Return why the weights of a folder cannot be loaded; None if nothing is wrong.

    Reads only indices, headers and sizes, in milliseconds.
    """
    tensors, problem = _weights_in(folder)
    return problem or (None if tensors is None else _packing_problem(folder, tensors))


def shapes(path: str) -> dict[str, list[int]] | None:
    """Return names and shapes of the weights in a folder; None without valid .safetensors."""
    return _weights_in(Path(path))[0] if os.path.isdir(path) else None


def _packing_problem(folder: Path, tensors: Iterable[str]) -> str | None:
    """Return why the weights are not packed as config.json says; else None.

    Knows the format of bitsandbytes only.
    """
    found = quantization(config_of(str(folder)))
    form = form_of(found) if found else None
    if found and form is None:
        return None
    file = folder / "config.json"
    matches = (re.search(r"\.quant_state\.bitsandbytes__(\w+)$", name) for name in tensors)
    types = {match[1] for match in matches if match}
    types |= {"int8" for name in tensors if name.endswith(".SCB")}
    listed = ", ".join(sorted(types))
    if form is None and types:
        what = "has no quantization_config, but bitsandbytes has quantised the weights"
        return f"{file}: {what} ({listed}); {AGAIN}"
    if form is None:
        return None
    claim = f"{file}: quantization_config says {name_of(found or {})}, but the weights are"
    if not types:
        how = "remove it from config.json (adapter.kind: qlora quantises them itself)"
        return f"{claim} not quantised; {how}"
    return None if form["quantization"] in types else f"{claim} {listed}; correct it"


def _weights_in(folder: Path) -> tuple[dict[str, list[int]] | None, str | None]:
    """Return (names and shapes of the weights, what is wrong with their files).

    The first is None if they are not in .safetensors.
    """
    names = sorted(os.listdir(folder))
    if object_in(folder / "config.json")[0].get("transformers_weights"):
        return None, None  # names a file of its own
    first = next((name for name in WEIGHTS if name in names), None)
    if first is None:
        return None, _absence(folder, names)
    if not first.endswith(".json"):
        return tensors_in(folder / first)
    index, problem = object_in(folder / first)
    if problem:
        return None, problem
    parts = index.get("weight_map")
    if not isinstance(parts, dict) or not parts or not allowed.are_words(list(parts.values())):
        return None, f"{folder / first}: has no weight_map, so it is not an index; {AGAIN}"
    tensors: dict[str, list[int]] = {}
    for part in sorted(set(parts.values())):
        held, problem = tensors_in(folder / part)
        if problem is not None:
            return None, problem
        if held is None:
            continue
        absent = sorted(name for name in parts if parts[name] == part and name not in held)
        if absent:
            what = f"lacks {absent[0]}, which {first} says is in it; download both again"
            return None, f"{folder / part}: {what}"
        tensors |= held
    return tensors or None, None


def _absence(folder: Path, names: list[str]) -> str:
    """Describe which weights a folder lacks. `names`: the files in it."""
    shards = [name for name in names if re.search(r"-\d+-of-\d+\.(safetensors|bin)$", name)]
    if shards:
        missing = WEIGHTS[3] if shards[0].endswith(".bin") else WEIGHTS[1]
        what = f"has weights in parts ({shards[0]}), but not their index, {missing}"
        return f"{folder} {what}; download it too"
    others = [name for name in names if name.endswith((".safetensors", ".bin"))]
    others = [name for name in others if name != "training_args.bin"]
    if others:
        what = f"has no model.safetensors, and transformers does not look for {others[0]}"
        return f"{folder} {what}; rename it, or download the model again"
    what = "; was a download interrupted?"
    if any(name.endswith(".gguf") for name in names):
        what = ", only GGUF, which is for inference; give the model it was made from"
    return f"{folder} has no weights (.safetensors){what}"


def tensors_in(path: Path) -> tuple[dict[str, list[int]] | None, str | None]:
    """Return (names and shapes of the tensors in a file of weights, what is wrong with it).

    The first is None if it is not .safetensors.
    """
    start, size, problem = _start_of(path)
    if problem:
        return None, problem
    if path.suffix != ".safetensors":
        if not start.startswith(PICKLES):
            return None, f"{path} is not a file of PyTorch; {AGAIN}"
        is_cut = start.startswith(b"PK") and not zipfile.is_zipfile(path)
        return None, f"{path} is not whole; {AGAIN}" if is_cut else None
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > MOST_HEADER:
        return None, f"{path} is not .safetensors; {AGAIN}"
    if length > size - 8:
        return None, f"{path} is cut off in its header, at {size:,} bytes; {AGAIN}"
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        tensors = {name: values for name, values in header.items() if name != "__metadata__"}
        end = max((values["data_offsets"][1] for values in tensors.values()), default=0)
        found = {name: list(values["shape"]) for name, values in tensors.items()}
        expected = 8 + length + end
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        what = f"its header cannot be read ({type(exc).__name__}), so it is not .safetensors"
        return None, f"{path}: {what}; {AGAIN}"
    if size != expected:
        return None, f"{path} has {size:,} bytes, and should have {expected:,}; {AGAIN}"
    return found, None


def _start_of(path: Path) -> tuple[bytes, int, str | None]:
    """Return (first bytes, size, what is wrong) of a file that a download should have brought."""
    try:
        with path.open("rb") as file:
            start, size = file.read(len(LFS_POINTER)), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return b"", 0, f"{path} is missing; download it too"
    except OSError as exc:
        return b"", 0, _unreadable(path, exc)
    if not size:
        return start, size, f"{path} is empty; {AGAIN}"
    if start == LFS_POINTER:
        what = "is a pointer of Git LFS, not the file itself"
        return start, size, f"{path} {what}; run git lfs pull in its folder, or {AGAIN}"
    return start, size, None


def _unreadable(path: Path, exc: OSError) -> str:
    """Return why a file cannot be read. Raises Outage if the disk fails: the file may be fine."""
    failures.reraise(exc, f"{path}: cannot be read now")
    return f"{path}: cannot be read: {exc.strerror or exc}"


def object_in(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return (the object that a JSON file holds, what is wrong with it)."""
    _, _, problem = _start_of(path)
    if problem:
        return {}, problem
    try:
        values = json.loads(path.read_bytes().decode())  # UTF-8, as transformers and peft read it
    except (ValueError, RecursionError) as exc:
        return {}, f"{path}: broken JSON: {failures.parsing_reason(exc)}; correct it, or {AGAIN}"
    if not isinstance(values, dict):
        return {}, f"{path}: should hold an object, {{...}}, got {allowed.short(values)}; {AGAIN}"
    return values, None


def name_problem(name: str | None) -> str | None:
    """Return why a name is neither an existing path nor a possible Hub id; None if it is one."""
    if not name or not name.strip():
        return "is empty; give a folder, or a Hub id as owner/name"
    if not os.path.exists(name) and paths.is_local(name):
        near = places.nearest(*os.path.split(name.rstrip("/")))
        hint = "a run's model is in runs/<name>/model, a Hub id is owner/name"
        hint = f"did you mean {near}?" if near else hint
        return f"{name}: no such folder (looked for in {places.looked_in()}); {hint}"
    return None


def adapter_problem(path: str) -> str | None:
    """Return why a name cannot be adapter.path; None if it can, or is one of the Hub."""
    if not os.path.exists(path):
        return name_problem(path)
    if is_adapter(path):
        return _adapter_files_problem(Path(path))
    kind, inside = kind_of_folder(path), os.path.join(path, "model")
    if kind == "run":
        is_inside = is_adapter(inside)
        hint = f"its adapter is in {inside}: give that folder"
        return f"{path} is a run directory; {hint if is_inside else 'it has no adapter in model/'}"
    if kind == "model":
        return f"{path} is a whole model, not an adapter; give it as model.path"
    return f"{path} has no adapter_config.json, so it is not an adapter"


def _adapter_files_problem(folder: Path) -> str | None:
    """Return why settings or weights of an adapter cannot be used; None if nothing is wrong."""
    file = folder / "adapter_config.json"
    settings, problem = object_in(file)
    if problem:
        return problem
    if "peft_type" not in settings:
        return f"{file}: has no peft_type, so peft cannot open the adapter; {AGAIN}"
    if problem := allowed.problem(str(file), settings, allowed.OF_LORA):
        return problem
    weights = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        what = f"has no {ADAPTER_WEIGHTS[0]}, the weights of the adapter"
        return f"{folder} {what}; copy it there too"
    tensors, problem = tensors_in(weights)
    if problem or tensors is None:
        return problem
    return _ranks_problem(file, settings, weights, tensors)


def _ranks_problem(
    file: Path, settings: dict[str, Any], weights: Path, tensors: dict[str, list[int]]
) -> str | None:
    """Return why the weights of an adapter do not fit its settings; None if they fit."""
    ranks = {
        name: shape[0]
        for name, shape in tensors.items()
        if re.search(r"\.lora_(embedding_)?A(\.|$)", name) and shape
    }
    if not ranks:
        return f"{weights} holds no weights of LoRA (lora_A); {AGAIN}"
    r = settings.get("r", 8)  # peft's default
    known = {r, *(settings.get("rank_pattern") or {}).values()}
    remedy = "put back the adapter_config.json that belongs to it"
    has_experts = bool(settings.get("target_parameters"))  # with r rows for each expert
    for name, rank in ranks.items():
        if rank not in known and not has_experts:
            return f"{file}: r is {r}, but {name} in {weights.name} has rank {rank}; {remedy}"
    dora = settings.get("use_dora")
    if bool(dora) != any("lora_magnitude_vector" in name for name in tensors):
        what = f"use_dora is {allowed.short(dora)}, and {weights.name} does not agree"
        return f"{file}: {what}; {remedy}"
    return None


def tokenizer_problem(path: str) -> str | None:
    """Return why an existing folder cannot be model.tokenizer; None if it can."""
    if not os.path.isdir(path):
        return f"{path} is a file; give the folder it is in"
    folder = Path(path)
    is_known = any((folder / name).exists() for name in TOKENIZER)
    if not is_known and not any(map(_may_be_tokenizer, os.listdir(path))):
        hint = "give the one that belongs to the model as model.tokenizer"
        return f"{path} has no tokenizer ({TOKENIZER[0]}); {hint}"
    for file in (folder / name for name in TOKENIZER if os.path.lexists(folder / name)):
        _, size, problem = _start_of(file)
        if file.suffix == ".json" and size < SMALL and not problem:
            values, problem = object_in(file)
            if file.name == TOKENIZER[0] and not problem and "model" not in values:
                problem = f"{file} has no vocabulary (model); {AGAIN}"
            rules = allowed.OF_TOKENIZER.get(file.name, {})
            problem = problem or allowed.problem(str(file), values, rules)
        if problem:
            return problem
    return _templates_problem(folder)


def _may_be_tokenizer(name: str) -> bool:
    return name.endswith((".model", ".tiktoken")) or name.startswith("tokenization_")


def _templates_problem(folder: Path) -> str | None:
    """Return why the chat templates of a folder cannot be read; None if they can."""
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for file in (folder / "chat_template.jinja", *others):
        if file.exists():
            try:
                file.read_text("utf-8")
            except UnicodeDecodeError as exc:
                return f"{file}: is not UTF-8 at byte {exc.start}; save it as UTF-8, or {AGAIN}"
            except OSError as exc:
                return _unreadable(file, exc)
    return None


def model_in(path: str) -> str:
    """Return the model of a run directory; any other path or name as it is."""
    inside = os.path.join(path, "model")
    is_run = os.path.isdir(path) and kind_of_folder(path) == "run" and os.path.isdir(inside)
    return inside if is_run else path


def config_of(path: str) -> dict[str, Any]:
    """Return config.json of a folder; empty if it cannot be read."""
    values, _ = object_in(Path(path) / "config.json")
    for file, method in (
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
        ("hf_quant_config.json", "modelopt"),
    ):
        if values and not values.get("quantization_config") and (Path(path) / file).exists():
            values["quantization_config"] = {"quant_method": method}
    return values


def quantization(model_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation of a model by its config; None if it is not quantised."""
    nested = model_config.get("text_config")
    for values in (model_config, nested if isinstance(nested, Mapping) else {}):
        for name in ("quantization_config", "compression_config", "quantization"):
            found: Any = values.get(name)
            found = found.to_dict() if hasattr(found, "to_dict") else found
            if isinstance(found, dict) and found and not _is_off(found):
                return found
    return None


def _is_off(found: Mapping[str, Any]) -> bool:
    """Return whether bitsandbytes has neither 4 nor 8 bits: the weights are not quantised."""
    return _method(found) == "bitsandbytes" and not any(found.get(name) for name in allowed.BITS)


def _method(found: Mapping[str, Any]) -> str:
    """Return quant_method (in a config that transformers opened, an enum); empty without one."""
    method = found.get("quant_method")
    return str(getattr(method, "value", method) or "")


def form_of(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a quantisation of bitsandbytes as settings of `adapter`; None for any other."""
    has_bits = found.get("load_in_4bit") or found.get("load_in_8bit")
    method = _method(found) or ("bitsandbytes" if has_bits else "")
    if method.removesuffix("_4bit").removesuffix("_8bit") != "bitsandbytes":
        return None
    if found.get("load_in_8bit", found.get("_load_in_8bit")):
        return {"quantization": "int8"}
    return {
        "quantization": found.get("bnb_4bit_quant_type", "fp4"),
        "double_quantization": bool(found.get("bnb_4bit_use_double_quant")),
    }


def name_of(found: Mapping[str, Any]) -> str:
    """Name a quantisation in a few words."""
    form = form_of(found)
    if form:
        doubly = ", doubly quantised" if form.get("double_quantization") else ""
        return f"bitsandbytes {form['quantization']}{doubly}"
    method = _method(found)
    if not method:
        return "MLX" if "group_size" in found else "of an unnamed kind"
    bits = found.get("bits") or found.get("w_bit")
    return method + (f", {bits} bits" if bits else "")


def quantized_problem(name: str, model_config: Mapping[str, Any], adapter_kind: str) -> str | None:
    """Return why this adapter cannot train a quantised model; None if it can."""
    found = quantization(model_config)
    if found is None:
        return None
    what = f"{name} is quantised already ({name_of(found)})"
    original = "give the model before quantisation as model.path"
    if form_of(found) is None:
        hint = f"{original} (adapter.kind: qlora quantises it itself)"
        return f"{what}, which cannot be trained; {hint}"
    if adapter_kind != "qlora":
        hint = f"set adapter.kind: qlora, or {original}"
        return f"{what}, so adapter.kind: {adapter_kind} cannot train it; {hint}"
    return None


def architecture_problem(name: str, model_config: Mapping[str, Any]) -> str | None:
    """Return why a model does not continue text; None if it may.

    `model_config`: from the file or with all defaults.
    """
    named = model_config.get("architectures")
    architecture = str(named[-1]) if isinstance(named, list) and named else ""
    is_one = architecture or f"a {model_config.get('model_type')}"
    if model_config.get("is_encoder_decoder"):
        hint = "use a model that only decodes, such as Qwen or Llama"
        return f"{name} is an encoder-decoder ({is_one}); these are not yet supported: {hint}"
    original = "give the causal language model it was made from"
    for ending, what in OTHER_HEADS.items():
        if architecture.endswith(ending):
            kind = f"{what} ({architecture}), not a model that continues text"
            return f"{name} is {kind}; {original}"
    is_body = architecture.endswith("Model") and "LMHead" not in architecture
    if is_body and model_config.get("tie_word_embeddings") is False:
        what = f"has no head ({architecture}: an embedding model, or only the body)"
        return f"{name} {what}; {original}"
    return None


def forgotten_losses(model_config: Mapping[str, Any]) -> str | None:
    """Describe losses that a config asks for and the run does not add; None if there are none."""
    nested = (model_config.get("text_config"), model_config.get("ffn_config"))
    for values in (model_config, *(each for each in nested if isinstance(each, Mapping))):
        asked = [f"{name} {values[name]}" for name in BALANCE if values.get(name)]
        if values.get("output_router_logits"):
            asked.insert(0, "output_router_logits")
        if asked:
            return (
                f"the model's config asks for a router balance loss ({', '.join(asked)}); it is "
                "not yet added: the loss is that of the next token alone"
            )
        if values.get("num_nextn_predict_layers"):
            return (
                "the model's config has layers that predict further tokens "
                "(num_nextn_predict_layers); their loss is not yet added"
            )
    return None


def settled(config: "Config", model_config: Mapping[str, Any]) -> tuple["Config", list[str]]:
    """Return (the config with adapter.quantization as its base has it, problems of the base)."""
    name, found = str(config.model.path), quantization(model_config)
    problems = (
        [f"model.path: {problem}"] if (problem := architecture_problem(name, model_config)) else []
    )
    if config.model.init == "random" or found is None:
        return config, problems
    if problem := quantized_problem(name, model_config, config.adapter.kind):
        return config, [*problems, f"model.path: {problem}"]
    form, adapter = form_of(found) or {}, config.adapter
    problems += list(_against(form, adapter, name_of(found)))
    return config.model_copy(update={"adapter": adapter.model_copy(update=form)}), problems


def _against(form: dict[str, Any], adapter: Any, name: str) -> Iterator[str]:
    """List settings of an adapter that a quantised base rules out."""
    base = f"the base is quantised already ({name})"
    for field, value in form.items():
        given = getattr(adapter, field)
        if field in adapter.model_fields_set and given != value:
            yield f"adapter.{field}: {given}, but {base}, and stays as it is; remove it"
    if adapter.init == "loftq":
        why = "loftq needs the weights before quantisation"
        yield f"adapter.init: {why}, and {base}; use default"


def model_argument(text: str) -> str:
    """Return the model of a word on a command line: a folder, a run directory, or a Hub id."""
    return model_in(paths.argument(text))


def require_model(name: str, option: str) -> None:
    """Raise ModelError if a name is a path without a model or adapter that can be loaded."""
    problem = name_problem(name)
    if problem is None and os.path.exists(name):
        is_one = kind_of_folder(name) == "adapter"
        problem = adapter_problem(name) if is_one else folder_problem(name, needs_weights=True)
    if problem:
        raise ModelError(f"{option}: {problem}")
