"""Read the JSON files and the headers of weights in a model's folder. No torch."""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from finetune import failures
from finetune.config import values as allowed

# What transformers looks for, in this order.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # as peft looks for them
LFS_POINTER = b"version https://git-lfs"
MOST_HEADER = 100_000_000  # bytes; the most that safetensors itself reads
AGAIN = "download it again"
# First bytes of a file of torch.save: a zip archive, or before torch 1.6 a pickle.
PICKLES = (b"PK", b"\x80")


def shapes(path: str) -> dict[str, list[int]] | None:
    """Return names and shapes of the weights in a folder; None without valid .safetensors."""
    return weights_in(Path(path))[0] if os.path.isdir(path) else None


def weights_in(folder: Path) -> tuple[dict[str, list[int]] | None, str | None]:
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
    start, size, problem = start_of(path)
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


def start_of(path: Path) -> tuple[bytes, int, str | None]:
    """Return (first bytes, size, what is wrong) of a file that a download should have brought."""
    try:
        with path.open("rb") as file:
            start, size = file.read(len(LFS_POINTER)), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return b"", 0, f"{path} is missing; download it too"
    except OSError as exc:
        return b"", 0, unreadable(path, exc)
    if not size:
        return start, size, f"{path} is empty; {AGAIN}"
    if start == LFS_POINTER:
        what = "is a pointer of Git LFS, not the file itself"
        return start, size, f"{path} {what}; run git lfs pull in its folder, or {AGAIN}"
    return start, size, None


def unreadable(path: Path, exc: OSError) -> str:
    """Return why a file cannot be read. Raises Outage if the disk fails: the file may be fine."""
    failures.reraise(exc, f"{path}: cannot be read now")
    return f"{path}: cannot be read: {exc.strerror or exc}"


def object_in(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return (the object that a JSON file holds, what is wrong with it)."""
    _, _, problem = start_of(path)
    if problem:
        return {}, problem
    try:
        values = json.loads(path.read_bytes().decode())  # UTF-8, as transformers and peft read it
    except (ValueError, RecursionError) as exc:
        return {}, f"{path}: broken JSON: {failures.parsing_reason(exc)}; correct it, or {AGAIN}"
    if not isinstance(values, dict):
        return {}, f"{path}: should hold an object, {{...}}, got {allowed.short(values)}; {AGAIN}"
    return values, None
