"""Check the folder and config.json of a model before anything is loaded. No torch."""

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import places
from finetune.config import paths, quantized
from finetune.config import values as allowed
from finetune.config.choices import DECODERS, FAMILIES, instead_of, objective_kind
from finetune.config.model_files import (
    ADAPTER_WEIGHTS,
    AGAIN,
    object_in,
    start_of,
    tensors_in,
    unreadable,
    weights_in,
)
from finetune.errors import ModelError

if TYPE_CHECKING:
    from finetune.config.fields import Config

SMALL = 1 << 16  # bytes of a tokenizer.json that takes a millisecond to parse; real ones are larger
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
OTHER_FORMATS = {
    ".gguf": "GGUF files, which are for inference; give the model they were made from",
    ".pth": "Meta's own format (.pth); give the same model in transformers' format",
}
# What else heads predict than the next token -> endings of their architectures.
OTHER_HEADS = {
    "a classifier, or a reward model": ("ForSequenceClassification",),
    "a classifier": ("ForMultipleChoice",),
    "a tagger": ("ForTokenClassification",),
    "an extractive question answerer": ("ForQuestionAnswering",),
    "a masked language model, which fills gaps": ("ForMaskedLM",),
    "an encoder": ("ForPreTraining", "ForNextSentencePrediction", "ForTextEncoding"),
    "an image classifier": ("ForImageClassification",),
    "an object detector": ("ForObjectDetection",),
    "a retriever": ("ForImageTextRetrieval",),
    "a speech recogniser": ("ForSpeechSeq2Seq", "ForCTC"),
    "an audio classifier": ("ForAudioClassification",),
    "a reward model": ("RewardModel",),
}
BOTH_WAYS = "WithLMHeadModel"  # of XLM and Flaubert, which see later tokens unless `causal` is set
ENCODERS = ("masked", "sequences", "tokens")  # families
WHAT_IT_IS = {
    "causal": "a model that continues text", "encoder": "an encoder",
    "seq2seq": "an encoder-decoder",
}  # fmt: skip
# Coefficients of losses other than the next token's, as configs call them.
BALANCE = (
    "router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "moe_aux_loss_coeff",
    "router_z_loss_coef", "moe_loss_weight",
)  # fmt: skip
# Names of the number of layers in configs.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


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
    for ending, what in OTHER_FORMATS.items():
        if any(name.endswith(ending) for name in names):
            return f"holds {what}, with config.json and .safetensors"
    runs = sorted(name for name in names if is_model_or_adapter(folder / name / "model"))
    if runs:
        listed = [str(folder / name / "model") for name in runs[:5]]
        listed += ["..."] * (len(runs) > 5)
        return f"is a folder of runs; name the model of one: {', '.join(listed)}"
    inside = sorted(name for name in names if is_model_or_adapter(folder / name))
    if inside:
        return f"has no config.json; did you mean {folder / inside[0]}?"
    return "has no config.json, so it is not a transformers model"


def decides_what_opens(name: str) -> bool:
    """Return whether a file, by its path in a folder, decides which model or tokenizer it is."""
    patterns = (each for each in OPENED if "/" in each or "/" not in name)
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


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
    return None if found is None else quantized.problem_of(f"{where}: quantization_config", found)


def weights_problem(folder: Path) -> str | None:
    """Return why the weights of a folder cannot be loaded; None if nothing is wrong.

    Reads only indices, headers and sizes, in milliseconds.
    """
    tensors, problem = weights_in(folder)
    return problem or (None if tensors is None else _packing_problem(folder, tensors))


def _packing_problem(folder: Path, tensors: Iterable[str]) -> str | None:
    """Return why the weights are not packed as config.json says; else None.

    Knows the format of bitsandbytes only.
    """
    found = quantized.quantization(config_of(str(folder)))
    form = quantized.form_of(found) if found else None
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
    claim = (
        f"{file}: quantization_config says {quantized.name_of(found or {})}, but the weights are"
    )
    if not types:
        how = "remove it from config.json (adapter.kind: qlora quantises them itself)"
        return f"{claim} not quantised; {how}"
    return None if form["quantization"] in types else f"{claim} {listed}; correct it"


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
    if not has_tokenizer(folder):
        hint = "give the one that belongs to the model as model.tokenizer"
        return f"{path} has no tokenizer ({TOKENIZER[0]}); {hint}"
    for file in (folder / name for name in TOKENIZER if os.path.lexists(folder / name)):
        _, size, problem = start_of(file)
        if file.suffix == ".json" and size < SMALL and not problem:
            values, problem = object_in(file)
            if file.name == TOKENIZER[0] and not problem and "model" not in values:
                problem = f"{file} has no vocabulary (model); {AGAIN}"
            rules = allowed.OF_TOKENIZER.get(file.name, {})
            problem = problem or allowed.problem(str(file), values, rules)
        if problem:
            return problem
    return _templates_problem(folder)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a file that transformers may read a tokenizer from."""
    is_known = any((folder / name).exists() for name in TOKENIZER)
    return is_known or any(map(_may_be_tokenizer, os.listdir(folder)))


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
                return unreadable(file, exc)
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


def architecture_problem(
    name: str, model_config: Mapping[str, Any], objective: str = "sft"
) -> str | None:
    """Return why an objective cannot train a model; None if it may.

    `model_config`: from the file or with all defaults.
    """
    named = model_config.get("architectures")
    architecture = str(named[-1]) if isinstance(named, list) and named else ""
    is_one = architecture or f"a {model_config.get('model_type')}"
    family, found = objective_kind(objective).family, _family_of(model_config, architecture)
    fitting = "causal" if family in DECODERS else "seq2seq" if family == "seq2seq" else "encoder"
    if found == "seq2seq" and fitting == "causal":
        what = f"is an encoder-decoder ({is_one}), not a model that continues text"
        return f"{name} {what}; {instead_of(objective, 'seq2seq')}"
    if fitting != "causal":
        if found in (fitting, None):
            return None
        instead = instead_of(objective, *(ENCODERS if found == "encoder" else (found,)))
        return (
            f"{name} is {WHAT_IT_IS[found]} ({is_one}), and objective.kind: {objective} trains "
            f"{FAMILIES[family]}; {instead}"
        )
    if family == "scores" and architecture.endswith("ForSequenceClassification"):
        count = len(model_config.get("id2label") or ()) or 2  # as transformers without labels
        what = f"is a classifier of {count} labels ({architecture}), not a reward model"
        return None if count == 1 else f"{name} {what}; give the model it was made from"
    original = "give the causal language model it was made from"
    for what, endings in OTHER_HEADS.items():
        if architecture.endswith(endings):
            kind = f"{what} ({architecture}), not a model that continues text"
            if architecture.endswith("ForMaskedLM"):
                original = instead_of(objective, *ENCODERS)
            return f"{name} is {kind}; {original}"
    is_body = architecture.endswith("Model") and "LMHead" not in architecture
    if is_body and model_config.get("tie_word_embeddings") is False:
        what = f"has no head ({architecture}: an embedding model, or only the body)"
        return f"{name} {what}; {original}"
    return None


def _family_of(model_config: Mapping[str, Any], architecture: str) -> str | None:
    """Return causal, encoder or seq2seq, as far as a config says it; None if it does not."""
    if model_config.get("is_encoder_decoder"):
        return "seq2seq"
    if architecture.endswith(BOTH_WAYS):
        return "causal" if model_config.get("causal") else "encoder"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    return "encoder" if architecture.endswith(("ForMaskedLM", "ForTokenClassification")) else None


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
    name, found = str(config.model.path), quantized.quantization(model_config)
    problem = architecture_problem(name, model_config, config.objective.kind)
    problems = [f"model.path: {problem}"] if problem else []
    if config.model.init == "random" or found is None:
        return config, problems
    if problem := quantized.training_problem(name, model_config, config.adapter.kind):
        return config, [*problems, f"model.path: {problem}"]
    form, adapter = quantized.form_of(found) or {}, config.adapter
    problems += list(_against(form, adapter, quantized.name_of(found)))
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
    problem, run = name_problem(name), os.path.join(paths.RUNS, name)
    # A base may be on the Hub under the name that a run has here: gpt2, tuned as runs/gpt2.
    is_run = not paths.is_local(name) and kind_of_folder(run) == "run" and option != "--base"
    if problem is None and is_run:
        problem = f"{name}: no such folder here; did you mean {run}?"
    if problem is None and os.path.exists(name):
        is_one = kind_of_folder(name) == "adapter"
        problem = adapter_problem(name) if is_one else folder_problem(name, needs_weights=True)
    if problem:
        raise ModelError(f"{option}: {problem}")
