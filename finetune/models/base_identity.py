"""The base under an adapter: what it was, so that the adapter is never put on another one."""

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
from finetune.config.base import WEIGHTS, name_of, object_in
from finetune.errors import ModelError

FILE = "base_weights.json"  # next to an adapter
# What bitsandbytes saves next to the bytes of a quantised weight.
SCALES = re.compile(r"\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)$")
COMPARED = (
    torch.bfloat16
)  # what values are rounded to before they are hashed: a base may be loaded in another dtype
CHUNK = (
    1 << 24
)  # values hashed at once; an embedding of 128,000 x 4,096 would need a copy of 1 GB for each thread


def record(
    base: nn.Module, dtype: torch.dtype, quantization: dict[str, Any] | None, *, loftq: bool, new_tokens: Sequence[str],
    new_token_ids: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """What is needed to know this base again; without weights for a model on the meta device."""
    return {
        "dtype": str(dtype).removeprefix("torch."), "quantization": quantization, "loftq": loftq, "architecture": _function(base),
        "new_tokens": list(new_tokens), "new_token_ids": list(new_token_ids), "weights": hashes(base),
        "values": values(base, _known_whole(base, bool(new_tokens))),
    }  # fmt: skip


def _known_whole(base: nn.Module, with_new_tokens: bool) -> set[str]:
    """Names of the weights whose every value tells a base from another.

    Quantised ones are left out, as how they are packed may depend on the device; beside new tokens
    also embedding and head, as the adapter brings its own.
    """
    ends = (base.get_input_embeddings(), base.get_output_embeddings()) if with_new_tokens else ()
    replaced = {id(getattr(end, "weight", None)) for end in ends}
    return {
        name
        for name, p in base.named_parameters()
        if p.is_floating_point() and id(p) not in replaced
    }


def read(folder: Path) -> dict[str, Any]:
    """What an adapter knows of its base; empty for adapters from elsewhere. Raises ModelError for a
    damaged record.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    found, problem = object_in(path)
    found = OLDER | found
    wrong = next(
        (
            name
            for name, is_right in FIELDS.items()
            if name not in found or not is_right(found[name])
        ),
        None,
    )
    if problem:
        wrong = "no JSON object"
    elif wrong is None and len(found["new_tokens"]) != len(found["new_token_ids"]):
        wrong = "new_token_ids"
    if wrong:
        raise ModelError(
            f"{path}: is damaged ({wrong}), so the base of this adapter cannot be checked; restore "
            "it, or export the run again"
        )
    return found


def _is_dtype(name: Any) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def _are_texts(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _is_form(form: Any) -> bool:
    """Whether it is what `adapters.quantization` gives."""
    if not isinstance(form, dict) or form.get("load_in_8bit") is True:
        return form is None or form == {"load_in_8bit": True}
    return (
        form.keys() == {"load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"}
        and form["load_in_4bit"] is True and form["bnb_4bit_quant_type"] in ("nf4", "fp4")
        and isinstance(form["bnb_4bit_use_double_quant"], bool) and _is_dtype(form["bnb_4bit_compute_dtype"])
    )  # fmt: skip


# What each field of a record may hold.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "dtype": _is_dtype, "quantization": _is_form, "loftq": allowed.is_switch,
    "architecture": allowed.is_object, "weights": lambda value: bool(value) and _are_texts(value), "values": _are_texts,
    "new_tokens": allowed.are_words,
    "new_token_ids": lambda value: isinstance(value, list) and all(type(number) is int and number >= 0 for number in value),
}  # fmt: skip
OLDER: dict[str, Any] = {
    "loftq": False,
    "architecture": {},
    "values": {},
}  # what records of older versions lack


def _function(base: nn.Module) -> dict[str, Any]:
    """`architecture` without how weights are stored."""
    return {
        name: value
        for name, value in architecture(base.config).items()
        if not name.startswith("quantization_config")
    }


def require_architecture(
    base: nn.Module, known: dict[str, Any], folder: Path, given: str | None = None
) -> None:
    """Raise ModelError if a base calculates with its weights in another way than the one that an
    adapter was trained on.

    `given`: what --base names, if it does.
    """
    now = _function(base)
    others = [
        name for name, value in known["architecture"].items() if name in now and now[name] != value
    ]
    if others:
        name = "model_type" if "model_type" in others else others[0]  # the rest follows from it
        if given is not None:
            raise ModelError(
                f"--base: {given} is not the base of {folder}: {name} was "
                f"{known['architecture'][name]} there, and is "
                f"{now[name]} here; give the folder of the base that the adapter was trained on"
            )
        raise ModelError(
            f"{folder}: its base has another config than when the adapter was trained: {name} was "
            f"{known['architecture'][name]}, now {now[name]}; put the old config.json back, or "
            "train again"
        )


def require_same(now: dict[str, Any], known: dict[str, Any], folder: Path) -> None:
    """Raise ModelError if an adapter was trained on another base, or on this one in another form.
    `now`: its `record`.
    """
    if now["new_tokens"] != known["new_tokens"]:
        raise ModelError(
            f"model.new_tokens: {now['new_tokens']}, but the adapter {folder} was trained with "
            f"{known['new_tokens']}; "
            "set them alike"
        )
    forms = [describe(each["quantization"]) for each in (now, known)]
    if forms[0] != forms[1]:
        raise ModelError(
            f"adapter.kind: the base would be {forms[0]}, but the adapter {folder} was trained on "
            f"one that was {forms[1]}; "
            "set adapter.kind and adapter.quantization to that"
        )
    if now["weights"]:
        _require_hashes(now["weights"], known["weights"], folder)


def require_weights(
    base: nn.Module, known: dict[str, Any], folder: Path, given: str | None = None
) -> None:
    """Raise ModelError if the weights of a base are not those of a record.

    Where --base names it (`given`), every value is compared; where it is in its old place a sample
    of them, so that an adapter opens as fast as its base.
    """
    dtype = getattr(
        torch, known["dtype"]
    )  # float16 has fewer exponents, so what passed through it is other numbers
    _require_hashes(hashes(base, dtype), known["weights"], folder, given)
    if given is not None:
        _require_hashes(values(base, set(known["values"]), dtype), known["values"], folder, given)


def _require_hashes(
    found: dict[str, str], known: dict[str, str], folder: Path, given: str | None = None
) -> None:
    others = [name for name, wanted in known.items() if found.get(name) != wanted]
    if others and given is not None:
        raise ModelError(
            f"--base: {given} is not the base of {folder}: {len(others)} of {len(known)} weights "
            "differ, such as "
            f"{others[0]}; give the folder of the base that the adapter was trained on"
        )
    if others:
        raise ModelError(
            f"{folder}: its base has changed since the adapter was trained on it: {len(others)} of "
            f"{len(known)} weights differ, such as {others[0]}; put the old base back, or train "
            "again"
        )


def other_weights(base: Any, known: dict[str, Any]) -> list[str]:
    """Names of the weights of a loaded base that differ from those of a record, of all that both
    hold in one form.

    Quantisation packs matrices, though not the embedding, and new tokens lengthen embedding and
    head.
    """
    embedding, head = (
        getattr(end, "weight", None)
        for end in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    packed = known["quantization"] or getattr(base, "is_quantized", False)

    def is_alike(weight: torch.Tensor) -> bool:
        if weight is embedding or weight is head:
            return not known["new_tokens"] and (weight is embedding or not packed)
        return weight.dim() == 1 or not packed

    alike = {name for name, weight in base.named_parameters() if is_alike(weight)}
    return [
        name
        for name, found in hashes(base).items()
        if name in alike and found != known["weights"].get(name)
    ]


def describe(quantization: dict[str, Any] | None) -> str:
    """How weights are stored, in words; without the dtype they are unpacked to for a product."""
    return (
        "not quantised"
        if quantization is None
        else name_of(quantization).removeprefix("bitsandbytes ")
    )


def hashes(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Name -> hash of the shape and up to 64 values of each weight, rounded to `dtype`, where
    given, and then to bfloat16.
    """
    found = {}
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            flat = weight.detach().flatten()
            sample = (
                flat[:: max(1, flat.numel() // 64)][:64]
                .to(dtype or weight.dtype)
                .to(COMPARED)
                .float()
                .cpu()
                .numpy()
            )
            found[name] = hashlib.sha256(
                f"{tuple(weight.shape)} ".encode() + sample.tobytes()
            ).hexdigest()[:16]
    return found


def values(model: nn.Module, names: set[str], dtype: torch.dtype | None = None) -> dict[str, str]:
    """As `hashes`, of every value of each weight in `names`. Threads hash at once."""

    def digest(weight: torch.Tensor) -> str:
        found = hashlib.sha256(f"{tuple(weight.shape)} ".encode())
        for part in weight.detach().reshape(-1).split(CHUNK):
            found.update(
                memoryview(
                    part.to(dtype or part.dtype).to(COMPARED).cpu().view(torch.uint8).numpy()
                )
            )
        return found.hexdigest()[:32]

    weights = {name: p for name, p in model.named_parameters() if name in names and not p.is_meta}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(weights, pool.map(digest, weights.values())))


def fingerprints(model: nn.Module) -> tuple[str, str]:
    """(of the weights that do not train, of all): every byte of every tensor that the model would
    save.

    Scales of quantised weights are left out: bitsandbytes takes a mean over them, whose last bit
    depends on the GPU. Where weights were quantised here, the saved values count and not the codes
    that this device made of them: bitsandbytes divides by the scale in fast arithmetic on a GPU, so
    a value halfway between two codes may get either. Where a start of adapters has rewritten the
    base, by a decomposition whose last bits depend on the number of threads, the base counts as it
    was before. Threads hash at once, as an 8B model in 16 bits has 16 GB: seconds on the cores of
    such a machine.
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
    return tuple(hashlib.sha256(repr(part).encode()).hexdigest()[:32] for part in (frozen, digests))  # type: ignore[return-value]


def _is_code(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor is what bitsandbytes made of a weight, or stands beside it in 8 bits."""
    return name.endswith((".SCB", ".weight_format")) or (
        name.endswith(".weight") and not value.is_floating_point()
    )


def _files(name: str, commit: str | None) -> list[Path]:
    """The files of weights that a model was just loaded from: of a folder, or of the Hub's cache."""

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
    """Name -> hash of every tensor in a file of weights, however many files there are; of a pickle
    the hash of the file.
    """
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            return {f"saved {path.name}": hashlib.file_digest(file, "sha256").hexdigest()}
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
        return {
            f"saved {name}": digest
            for name, digest in zip(names, pool.map(lambda n: _digest(file.get_tensor(n)), names))
        }


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().as_subclass(torch.Tensor).cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- identity

# Fields of a config that say how it was saved, or how answers are generated, and not which function
# the model is.
NO_FUNCTION = frozenset(
    {
        "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict", "return_dict_in_generate",
        "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id",
        "sep_token_id", "decoder_start_token_id",
    }
)  # fmt: skip


def architecture(config: Any) -> dict[str, Any]:
    """Every field of a model's config that can change its function, by its path, such as
    `rope_parameters.rope_theta`.
    """
    return dict(fields(json.loads(json.dumps(config.to_dict(), default=str))))


def usual(config: Any) -> dict[str, Any]:
    """As `architecture`, with what this version of transformers takes where a config says nothing."""
    try:
        return architecture(type(config)())
    except Exception:  # configs from elsewhere may not be made from nothing
        return {}


def fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each field that can change a model's function, by its path, and its value."""
    for name, value in values.items():
        if name in NO_FUNCTION:
            continue
        if isinstance(value, dict) and value:
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def code(model: nn.Module) -> str:
    """Hash of the Python files that a model brought along; "none" if it is one of transformers'
    own.
    """
    module = inspect.getmodule(type(model))
    if (
        module is None
        or not module.__name__.startswith("transformers_modules.")
        or not module.__file__
    ):
        return "none"
    digest = hashlib.sha256()
    for path in sorted(Path(module.__file__).parent.glob("*.py")):
        digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()[:32]
