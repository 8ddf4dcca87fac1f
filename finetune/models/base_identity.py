"""Record and compare the base of an adapter, so that it is never put on another one."""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from finetune.config import values as allowed
from finetune.config.model_files import WEIGHTS, object_in
from finetune.config.quantized import name_of
from finetune.errors import ModelError
from finetune.models import families
from finetune.models.embeddings import embedding_and_head

FILE = "base_weights.json"  # next to an adapter
# What bitsandbytes saves next to the bytes of a quantised weight.
SCALES = re.compile(r"\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)$")
# Values are rounded to this before they are hashed: a base may be loaded in another dtype.
COMPARED = torch.bfloat16
# Values hashed at once: an embedding of 128,000 x 4,096 would need a copy of 1 GB in each thread.
CHUNK = 1 << 24


def record(
    base: nn.Module, dtype: torch.dtype, quantization: dict[str, Any] | None, loftq: bool,
    new_tokens: Sequence[str], new_token_ids: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Return what identifies this base; without hashes for a model on the meta device."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "loftq": loftq,
        "architecture": _function(base),
        "new_tokens": list(new_tokens),
        "new_token_ids": list(new_token_ids),
        "labels": families.labels_of_model(base),
        "weights": hashes(base),
        "values": values(base, _known_whole(base, bool(new_tokens))),
    }


def _known_whole(base: nn.Module, with_new_tokens: bool) -> set[str]:
    """Return the names of the weights of which every value is compared.

    All but quantised ones, whose packing may depend on the device, and what the adapter brings
    itself: with new tokens, embedding and head; the head of a classifier.
    """
    replaced: set[int] = set()
    if with_new_tokens:
        replaced = {id(module.weight) for module in embedding_and_head(base)}
    new = families.new_weights(base)
    return {
        name
        for name, p in base.named_parameters()
        if p.is_floating_point() and id(p) not in replaced and name not in new
    }


def read(folder: Path) -> dict[str, Any]:
    """Return the record of an adapter's base; empty for adapters from elsewhere.

    Raises ModelError for a damaged record.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    found, problem = object_in(path)
    found = OLDER | found
    fields = FIELDS.items()
    wrong = [name for name, is_right in fields if name not in found or not is_right(found[name])]
    if problem:
        wrong = ["no JSON object"]
    elif not wrong and len(found["new_tokens"]) != len(found["new_token_ids"]):
        wrong = ["new_token_ids"]
    if wrong:
        raise ModelError(
            f"{path}: is damaged ({wrong[0]}), so the base of this adapter cannot be checked; "
            "restore it, or export the run again"
        )
    return found


def _is_dtype(name: Any) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def _are_texts(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _is_form(form: Any) -> bool:
    """Return whether `form` is as `adapters.quantization` returns it."""
    if not isinstance(form, dict) or form.get("load_in_8bit") is True:
        return form is None or form == {"load_in_8bit": True}
    is_right: dict[str, Callable[[Any], bool]] = {
        "load_in_4bit": lambda value: value is True,
        "bnb_4bit_quant_type": lambda value: value in ("nf4", "fp4"),
        "bnb_4bit_use_double_quant": lambda value: isinstance(value, bool),
        "bnb_4bit_compute_dtype": _is_dtype,
    }
    return form.keys() == is_right.keys() and all(is_right[name](form[name]) for name in form)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


# What each field of a record may hold.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "dtype": _is_dtype,
    "quantization": _is_form,
    "loftq": allowed.is_switch,
    "architecture": allowed.is_object,
    "weights": lambda value: bool(value) and _are_texts(value),
    "values": _are_texts,
    "new_tokens": allowed.are_words,
    "new_token_ids": _are_ids,
    "labels": allowed.are_words,
}
# Fields that records of older versions lack.
OLDER: dict[str, Any] = {"loftq": False, "architecture": {}, "values": {}, "labels": []}


def _function(base: nn.Module) -> dict[str, Any]:
    """Return `architecture` without how weights are stored."""
    found = architecture(base.config).items()
    return {name: value for name, value in found if not name.startswith("quantization_config")}


def require_architecture(
    base: nn.Module, known: dict[str, Any], folder: Path, given: str | None = None
) -> None:
    """Raise ModelError if the config of a base differs from that of the adapter's base.

    `given`: the value of --base, if there is one.
    """
    now = _function(base)
    others = [
        name for name, value in known["architecture"].items() if name in now and now[name] != value
    ]
    if others:
        name = "model_type" if "model_type" in others else others[0]  # the rest follows from it
        before = known["architecture"][name]
        if given is not None:
            raise _not_the_base(
                given, folder, f"{name} was {before} there, and is {now[name]} here"
            )
        raise ModelError(
            f"{folder}: its base has another config than when the adapter was trained: {name} was "
            f"{before}, now {now[name]}; put the old config.json back, or train again"
        )


def require_same(now: dict[str, Any], known: dict[str, Any], folder: Path) -> None:
    """Raise ModelError if the adapter in `folder` was trained on another base, or in another form.

    `now`: the `record` of the base at hand; `known`: that of the adapter.
    """
    if now["new_tokens"] != known["new_tokens"]:
        raise ModelError(
            f"model.new_tokens: {now['new_tokens']}, but the adapter {folder} was trained with "
            f"{known['new_tokens']}; set them alike"
        )
    forms = [describe(each["quantization"]) for each in (now, known)]
    if forms[0] != forms[1]:
        raise ModelError(
            f"adapter.kind: the base would be {forms[0]}, but the adapter {folder} was trained on "
            f"one that was {forms[1]}; set adapter.kind and adapter.quantization to that"
        )
    if now["weights"]:
        _require_hashes(now["weights"], known["weights"], folder)


def require_weights(
    base: nn.Module, known: dict[str, Any], folder: Path, given: str | None = None
) -> None:
    """Raise ModelError if the weights of a base are not those of a record.

    Compares every value if --base names the base (`given`), and otherwise a sample, so that an
    adapter opens as fast as its base.
    """
    dtype = getattr(torch, known["dtype"])  # rounding through float16 changes values in bfloat16
    _require_hashes(hashes(base, dtype), known["weights"], folder, given)
    if given is not None:
        _require_hashes(values(base, set(known["values"]), dtype), known["values"], folder, given)


def _require_hashes(
    found: dict[str, str], known: dict[str, str], folder: Path, given: str | None = None
) -> None:
    others = [name for name, wanted in known.items() if found.get(name) != wanted]
    if not others:
        return
    how = f"{len(others)} of {len(known)} weights differ, such as {others[0]}"
    if given is not None:
        raise _not_the_base(given, folder, how)
    raise ModelError(
        f"{folder}: its base has changed since the adapter was trained on it: {how}; put the old "
        "base back, or train again"
    )


def _not_the_base(given: str, folder: Path, how: str) -> ModelError:
    return ModelError(
        f"--base: {given} is not the base of {folder}: {how}; give the folder of the base that the "
        "adapter was trained on"
    )


def other_weights(base: Any, known: dict[str, Any]) -> list[str]:
    """Return the names of the weights of a loaded base that differ from those of a record.

    Compares those that both hold in one form: quantisation packs matrices, except the embedding,
    and new tokens add rows to embedding and head.
    """
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    embedding, head = (getattr(module, "weight", None) for module in modules)
    packed = known["quantization"] or getattr(base, "is_quantized", False)

    def is_alike(weight: torch.Tensor) -> bool:
        if weight is embedding or weight is head:
            return not known["new_tokens"] and (weight is embedding or not packed)
        return weight.dim() == 1 or not packed

    alike = {name for name, weight in base.named_parameters() if is_alike(weight)}
    found = {name: digest for name, digest in hashes(base).items() if name in alike}
    return [name for name, digest in found.items() if digest != known["weights"].get(name)]


def describe(quantization: dict[str, Any] | None) -> str:
    """Return how weights are stored, for messages; without the dtype of the arithmetic."""
    if quantization is None:
        return "not quantised"
    return name_of(quantization).removeprefix("bitsandbytes ")


def hashes(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Return name -> hash of each weight's shape and up to 64 of its values.

    Not of the head of a classifier, which may be new: it comes with the adapter. Values are rounded
    to `dtype`, if given, and then to bfloat16.
    """
    found, new = {}, families.new_weights(model)
    for name, weight in model.named_parameters():
        if weight.is_meta or name in new:
            continue
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(dtype or weight.dtype).to(COMPARED)
        text = f"{tuple(weight.shape)} ".encode() + sample.float().cpu().numpy().tobytes()
        found[name] = hashlib.sha256(text).hexdigest()[:16]
    return found


def values(model: nn.Module, names: set[str], dtype: torch.dtype | None = None) -> dict[str, str]:
    """Return the same as `hashes`, of every value of each weight in `names`, in several threads."""

    def digest(weight: torch.Tensor) -> str:
        found = hashlib.sha256(f"{tuple(weight.shape)} ".encode())
        for part in weight.detach().reshape(-1).split(CHUNK):
            rounded = part.to(dtype or part.dtype).to(COMPARED).cpu()
            found.update(memoryview(rounded.view(torch.uint8).numpy()))
        return found.hexdigest()[:32]

    weights = {name: p for name, p in model.named_parameters() if name in names and not p.is_meta}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(weights, pool.map(digest, weights.values())))


def fingerprints(model: nn.Module) -> tuple[str, str]:
    """Return hashes (of the frozen weights, of all): every byte that the model would save.

    Three things would differ between machines. Scales of quantised weights are left out:
    bitsandbytes takes a mean over them, whose last bit depends on the GPU. Of weights quantised
    here, the saved values are hashed and not their codes: bitsandbytes divides by the scale in fast
    arithmetic on a GPU, so a value halfway between two codes may get either. Of a base that the
    start of adapters rewrote, by a decomposition whose last bits depend on the number of threads,
    the earlier weights are hashed. Several threads hash: an 8B model in 16 bits has 16 GB.
    """
    trained = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    saved = model.state_dict().items()
    tensors = {
        name: value
        for name, value in saved
        if isinstance(value, torch.Tensor) and not SCALES.search(name)
    }
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    sources: list[Path] = []
    if getattr(base, "hf_quantizer", None) is not None and not base.hf_quantizer.pre_quantized:
        tensors = {name: value for name, value in tensors.items() if not _is_code(name, value)}
        sources = _files(base.config._name_or_path, getattr(base.config, "_commit_hash", None))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(tensors, pool.map(_digest, tensors.values())))
        for path in sources:
            digests |= _saved_digests(path, pool)
    frozen: Any = {name: digest for name, digest in digests.items() if name not in trained}
    if getattr(model, "start_rewrites_base", False):
        frozen = model.base_record["weights"]
    return _digest_of(frozen), _digest_of(digests)


def _digest_of(digests: dict[str, str]) -> str:
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:32]


def _is_code(name: str, value: torch.Tensor) -> bool:
    """Return whether bitsandbytes packed this weight, or saves the tensor next to an 8-bit one."""
    return name.endswith((".SCB", ".weight_format")) or (
        name.endswith(".weight") and not value.is_floating_point()
    )


def _files(name: str, commit: str | None) -> list[Path]:
    """Return the files of weights that a model was loaded from: in a folder or the Hub's cache."""

    def found(file: str) -> Path | None:
        path = cached_file(
            name, file, revision=commit, local_files_only=True,
            _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return None if path is None else Path(path)

    first = next((path for path in map(found, WEIGHTS) if path is not None), None)
    if first is None or first.suffix != ".json":
        return [] if first is None else [first]
    parts = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    return [path for path in map(found, parts) if path is not None]


def _saved_digests(path: Path, pool: ThreadPoolExecutor) -> dict[str, str]:
    """Return name -> hash of every tensor in a file of weights; for a pickle, of the file."""
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            return {f"saved {path.name}": hashlib.file_digest(file, "sha256").hexdigest()}
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
        digests = pool.map(lambda name: _digest(file.get_tensor(name)), names)
        return {f"saved {name}": digest for name, digest in zip(names, digests)}


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().as_subclass(torch.Tensor).cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- identity

# Fields of a config that do not change what the model computes: how it was saved, how it generates.
NO_FUNCTION = frozenset(
    "_name_or_path transformers_version architectures dtype torch_dtype use_cache return_dict "
    "return_dict_in_generate output_attentions output_hidden_states id2label label2id problem_type "
    "pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id".split()
)


def architecture(config: Any) -> dict[str, Any]:
    """Return all `fields` of a model's config: those that can change what it computes."""
    return dict(fields(json.loads(json.dumps(config.to_dict(), default=str))))


def usual(config: Any) -> dict[str, Any]:
    """Return `architecture` of the defaults in this version of transformers."""
    try:
        return architecture(type(config)())
    except Exception:  # a config class from elsewhere may need arguments
        return {}


def fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of the same fields; a path is such as `rope_parameters.rope_theta`."""
    for name, value in values.items():
        if name in NO_FUNCTION:
            continue
        if isinstance(value, dict) and value:
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def code(model: nn.Module) -> str:
    """Return a hash of a model's own Python files; "none" if its code is that of transformers."""
    module = inspect.getmodule(type(model))
    is_own = module is not None and module.__name__.startswith("transformers_modules.")
    file = getattr(module, "__file__", None)
    if not is_own or not file:
        return "none"
    digest = hashlib.sha256()
    for path in sorted(Path(file).parent.glob("*.py")):
        digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()[:32]
