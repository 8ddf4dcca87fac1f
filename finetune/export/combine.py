"""Several adapters as one, and the base back from a merged model; both opened and compared."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune import failures
from finetune.config.base import is_adapter
from finetune.errors import ExportError, ModelError
from finetune.export.load import base_of, load, load_tokenizer
from finetune.export.merge import (
    require_adapters,
    require_mergeable,
    require_output,
    with_adapters,
)
from finetune.export.publish import staged
from finetune.export.save import Base, save
from finetune.export.verify import opened, require_weights

COMBINED = "combined"
# Largest difference of a weight after adding and subtracting, relative to the largest of its
# matrix: two roundings of the dtype, each 2^-24, 2^-8 or 2^-11 of a value, and the products'.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def combine(
    sources: Sequence[Path], weights: Sequence[float], target: Path,
    trust_remote_code: bool = False, base: str | None = None,
) -> float:  # fmt: skip
    """Write one adapter that adds sum of w (alpha / r) B A to the base; its rank is their sum.

    Returns the largest difference of a change of weights, relative to the largest of its matrix,
    between the adapter that was opened again and the sum. Raises ModelError for adapters that
    cannot be added, ExportError if the difference is more than rounding.
    """
    if len(sources) < 2 or len(weights) != len(sources):
        raise ModelError(
            f"--weights: {len(weights)} for {len(sources)} adapters; give two adapters or more, "
            "and a weight for each"
        )
    require_adapters(sources)
    require_output(sources, target)
    _require_plain(sources)
    require_mergeable(sources)
    model, names = with_adapters(sources, "float32", trust_remote_code, base)
    model.add_weighted_adapter(names, list(weights), COMBINED, combination_type="cat")
    expected: dict[str, torch.Tensor] = {}
    for name, weight in zip(names, weights):
        for layer, change in _changes(model, name).items():
            expected[layer] = expected.get(layer, 0) + weight * change
    with staged(target) as folder:
        with failures.writing(target):
            _save(model, sources[0], folder)
        reloaded = opened(
            lambda: load(folder, torch.float32, trust_remote_code, quantized=False, base=base)
        )
        found = _changes(reloaded, "default")
        difference = max(_relative(found[layer], change) for layer, change in expected.items())
        if found.keys() != expected.keys() or not difference < TOLERANCE[torch.float32]:
            raise ExportError(
                f"{target}: changes the weights otherwise than the sum, by {difference:.2g} of the "
                "largest; nothing was written"
            )
    return difference


def _require_plain(sources: Sequence[Path]) -> None:
    """Raise ModelError for DoRA, whose change of a weight depends on the weight itself."""
    from peft import PeftConfig

    for source in sources:
        if getattr(PeftConfig.from_pretrained(str(source)), "use_dora", False):
            raise ModelError(f"{source} uses DoRA, which cannot be combined; merge it alone")


def _save(model: Any, source: Path, folder: Path) -> None:
    """Write the combined adapter with the tokenizer and the record of its base."""
    shutil.copytree(source, folder)
    settings = model.peft_config[COMBINED]
    settings.inference_mode = True
    written = folder / f".{COMBINED}"
    model.save_pretrained(written, selected_adapters=[COMBINED], save_embedding_layers=False)
    for path in (written / COMBINED).iterdir():
        if path.name != "README.md":
            path.replace(folder / path.name)
    shutil.rmtree(written)


def _changes(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Return what an adapter adds to each weight, float32, by the name of the layer."""
    return {
        path: layer.get_delta_weight(name).float()
        for path, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and name in getattr(layer, "scaling", {})
    }


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def unmerge(
    merged: Path, adapter: Path, target: Path, trust_remote_code: bool = False,
    base: str | None = None,
) -> float:  # fmt: skip
    """Write the base of `adapter`, from a model that it was merged into.

    Returns the largest difference of a weight from the base that the adapter names, relative to the
    largest of its matrix. Raises ModelError if `merged` has other weights,
    ExportError if the difference is more than rounding: then something else was merged.
    """
    require_adapters([adapter])
    require_output([adapter], target)
    if is_adapter(merged):
        raise ModelError(f"--unmerge: {merged} is an adapter; give the folder of a merged model")
    model = load(merged, trust_remote_code=trust_remote_code)
    changed = load(adapter, torch.float32, trust_remote_code, quantized=False, base=base)
    changes = {
        path.removeprefix("base_model.model."): change
        for path, change in _changes(changed, "default").items()
    }
    wanted = _weights_without(changed)
    origin = Base(*base_of(adapter, changed.peft_config["default"], base), trust_remote_code)
    del changed
    found = dict(model.named_parameters())
    difference = 0.0
    for name, weight in wanted.items():
        if name not in found or found[name].shape != weight.shape:
            raise ModelError(
                f"--unmerge: {merged} has no weight {name} of shape {list(weight.shape)}, as the "
                f"base of {adapter} has; give the model that it was merged into"
            )
        change = changes.get(name.removesuffix(".weight"))
        if change is not None:
            found[name].data = (found[name].data.float() - change).to(found[name].dtype)
        difference = max(difference, _relative(found[name].data.float(), weight))
    if not difference < TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16]):
        raise ExportError(
            f"{target}: without {adapter} the weights of {merged} still differ from the base by "
            f"{difference:.2g} of the largest: something else was merged or trained; nothing was "
            "written"
        )
    _write_whole(model, merged, target, origin, trust_remote_code)
    return difference


def _weights_without(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the base of an adapted model, float32, by their names in the base."""
    whole = {}
    for name, weight in model.base_model.model.named_parameters():
        if "lora_" not in name and ".modules_to_save." not in name:
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            whole[name] = weight.detach().float()
    return whole


def _write_whole(
    model: Any, source: Path, target: Path, origin: Base, trust_remote_code: bool
) -> None:
    weights = {name: each.detach().cpu() for name, each in model.state_dict().items()}
    tokenizer = load_tokenizer(source, trust_remote_code)
    with staged(target) as folder:
        with failures.writing(target):
            save(model, weights, tokenizer, None, folder, None, origin)
        require_weights(folder, opened(lambda: load(folder, "auto", trust_remote_code)), weights)
