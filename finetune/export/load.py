"""Load an exported model, or an adapter on its base, and the tokenizer."""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from finetune.config.base import (
    adapter_problem,
    config_of,
    folder_problem,
    is_adapter,
    model_argument,
    recorded_base,
    require_model,
    tokenizer_problem,
)
from finetune.config.model_files import object_in
from finetune.errors import ModelError
from finetune.models import adapters, base_identity, embeddings, families
from finetune.models.families import Family
from finetune.models.load import keep_layout, quantized_as, require_all_weights, translated


def load(
    path: str | Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False,
    quantized: bool = True, base: str | None = None, device: torch.device | None = None,
    revision: str | None = None,
) -> Any:  # fmt: skip
    """Load full weights, or an adapter on its base, quantised as in training. Raises ModelError.

    `quantized`: False loads the base of a QLoRA adapter unquantised. `base`: where the base of an
    adapter is now, if it has moved since training; every value of its weights must be the same,
    except for quantised ones. `device`: the CPU keeps a quantised base off the GPU. `revision`: of
    full weights on the Hub; an adapter names that of its base itself.
    """
    folder = Path(path)
    with translated(f"model {str(path)!r}"):
        if not is_adapter(folder):
            found: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
            saved = AutoConfig.from_pretrained(str(path), **found)
            model, info = families.of_saved(saved).auto.from_pretrained(
                str(path), dtype=dtype, output_loading_info=True, **found
            )
            require_all_weights(str(path), model, info)
            return model
        return _load_adapter(folder, dtype, trust_remote_code, quantized, base, device)


def _load_adapter(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool, quantized: bool,
    base: str | None, device: torch.device | None,
) -> Any:  # fmt: skip
    from peft import PeftConfig, PeftModel

    require_adapter(folder)
    adapter = PeftConfig.from_pretrained(str(folder))
    record = base_identity.read(folder)
    where, revision = base_of(folder, adapter, base)
    is_unmoved = base is None and os.path.isdir(where)
    if is_unmoved and (problem := folder_problem(where, needs_weights=True)):
        raise ModelError(f"the base of {folder}: {problem}")
    quantization = (record.get("quantization") or None) if quantized else None
    if quantization and dtype == "auto":
        dtype = getattr(torch, record["dtype"])
    on_cpu = quantization is not None and device is not None and device.type == "cpu"
    with translated(f"--base: {where!r}") if base is not None else nullcontext():
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = _load_base(
            where, dtype, options, quantization, on_cpu, families.of_adapter(adapter), record
        )
        if not quantized and getattr(model, "is_quantized", False):  # it was saved so
            model = model.dequantize(dtype=model.dtype)
            model._weight_conversions = None  # transformers 5.23 would quantise again on saving
    keep_layout(model)
    if record.get("new_token_ids"):
        embeddings.extend(model, record["new_token_ids"])
    if record:
        base_identity.require_architecture(model, record, folder, base)
        if quantization or not record["quantization"]:
            base_identity.require_weights(model, record, folder, base)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if families.of_model(model) == families.SCORES:  # it reads the last token that is not padding
        pad_id = load_tokenizer(folder, trust_remote_code).pad_token_id
        model.config.get_text_config().pad_token_id = pad_id
    adapted = PeftModel.from_pretrained(model, str(folder))
    adapters.require_whole(adapted, str(folder))
    return adapted


def _load_base(
    where: str, dtype: torch.dtype | str, options: dict[str, Any],
    quantization: dict[str, Any] | None, on_cpu: bool, family: Family, record: dict[str, Any],
) -> Any:  # fmt: skip
    """Return the base of an adapter. Raises ModelError if weights are missing.

    `options`: revision and trust_remote_code. `record`: of the base; it has the labels of a
    classifier, whose head comes with the adapter.
    """
    config = AutoConfig.from_pretrained(where, **options)
    families.set_labels(config, record.get("labels"))
    options |= quantized_as(config, quantization)
    if on_cpu:
        options["device_map"] = {"": "cpu"}
    model, info = family.auto.from_pretrained(
        where, dtype=dtype, output_loading_info=True, **options
    )
    require_all_weights(where, model, info, may_be_new=True)
    if on_cpu:
        vars(model).pop("hf_device_map", None)  # with it, peft would move the base to the GPUs
    return model


def require_adapter(folder: Path) -> None:
    if problem := adapter_problem(str(folder)):
        raise ModelError(problem)


def base_of(folder: Path, adapter: Any, given: str | None) -> tuple[str, str | None]:
    """Return (folder or Hub id, revision) of an adapter's base. Raises ModelError if it is gone.

    `given`: the value of --base, if there is one.
    """
    known = adapter.base_model_name_or_path
    if given is not None:
        return given, None
    if not known:
        raise ModelError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path names no base; give --base "
            "with the folder of the base"
        )
    if os.path.isabs(known) and not os.path.isdir(known):
        raise ModelError(
            f"{folder} is an adapter, and the folder of its base, {known}, does not exist; give "
            "--base with the folder where it is now"
        )
    return known, adapter.revision


def require_base(base: str | None) -> None:
    """Raise ModelError for a --base that does not exist or is itself an adapter."""
    if base is None:
        return
    require_model(base, "--base")
    if is_adapter(base):
        raise ModelError(
            f"--base: {base} is itself an adapter; give the model that it was trained on"
        )


def moved(path: str | Path, base: str) -> str | None:
    """Return `base` if `path` is an adapter whose recorded base is missing; otherwise None."""
    if not is_adapter(path):
        return None
    known = recorded_base(path)
    return base if not known or (os.path.isabs(known) and not os.path.isdir(known)) else None


def other_base(tuned: str, base: Any) -> str | None:
    """Return a message if a loaded base is not that of an adapter.

    None if it is, or if the adapter has no record of its base.
    """
    record = base_identity.read(Path(tuned)) if is_adapter(tuned) else {}
    if not record.get("weights") or adapters.are_in(base):
        return None
    others = base_identity.other_weights(base, record)
    if not others:
        return None
    return (
        f"{tuned} was trained on another base ({recorded_base(tuned)}): {len(others)} weights of "
        f"--base differ, such as {others[0]}; the gain does not come from training alone"
    )


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """Return the tokenizer of an exported model, or of a Hub id. Raises ModelError."""
    if os.path.exists(path) and (problem := tokenizer_problem(str(path))):
        raise ModelError(problem)
    with translated(f"the tokenizer of {str(path)!r}"):
        return AutoTokenizer.from_pretrained(
            str(path), revision=revision, trust_remote_code=trust_remote_code
        )


def commit_of(name: str, revision: str | None = None) -> str | None:
    """Return the commit on the Hub that a name, or a revision of it, is now; None for a folder.

    Raises ModelError if the Hub, and its cache here, have no such model.
    """
    if os.path.exists(name):
        return None
    with translated(f"model {name!r}"):
        path = cached_file(name, "config.json", revision=revision)
    found: str | None = extract_commit_hash(path, None)
    return found


def weights_in(folder: Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of the weights in a folder: they change with training."""
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]


def load_chat_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """Return the same as `load_tokenizer`.

    Raises ModelError without a chat template, or if the model scores and writes no answers.
    """
    adapter = object_in(Path(path, "adapter_config.json"))[0].get("task_type")
    named = str((config_of(path).get("architectures") or [""])[0])
    if adapter == families.SCORES.task or named.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{path}: scores or labels conversations and writes no answers; evaluate a reward run "
            "by its directory"
        )
    tokenizer = load_tokenizer(path, trust_remote_code)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{path}: its tokenizer has no chat template, which chat needs; models tuned with "
            "objective.kind: sft have one"
        )
    return tokenizer


def base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=model_argument,
        help="folder of the adapter's base, if you moved it after training; every value of its "
        "weights is compared",
    )


def trust_remote_code_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code from the model's Hub repository",
    )
