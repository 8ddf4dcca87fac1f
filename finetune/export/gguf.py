"""GGUF files, by the converter of llama.cpp, which this project does not bring."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from finetune.errors import ExportError, UserError

CONVERTER = "convert_hf_to_gguf.py"
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")  # that the converter writes; others: llama-quantize
HOW = (
    "git clone https://github.com/ggml-org/llama.cpp, pip install -r llama.cpp/requirements/"
    "requirements-convert_hf_to_gguf.txt, and give --llama-cpp llama.cpp"
)
LAST_LINES = 5  # of what the converter prints, in errors


def converter(folder: str | None) -> Path:
    """Return the converter: in the folder of llama.cpp, or on PATH. Raises UserError."""
    if folder is not None:
        found = Path(folder, CONVERTER)
        if not found.is_file():
            raise UserError(f"--llama-cpp: {folder} has no {CONVERTER}; {HOW}")
        return found
    on_path = shutil.which(CONVERTER)
    if on_path is None:
        raise UserError(f"--gguf: llama.cpp's {CONVERTER} is not on PATH; {HOW}")
    return Path(on_path)


def convert(program: Path, folder: Path, kind: str) -> Path:
    """Write FOLDER/model.gguf and return it. Raises ExportError if it is not a GGUF file."""
    target = folder / "model.gguf"
    partial = folder / ".writing-model.gguf"
    command = [sys.executable, str(program), str(folder), "--outfile", str(partial)]
    done = subprocess.run(
        [*command, "--outtype", kind], capture_output=True, text=True, errors="replace", check=False
    )
    try:
        if done.returncode:
            lines = " | ".join((done.stderr or done.stdout).strip().splitlines()[-LAST_LINES:])
            raise ExportError(f"{program} ended with {done.returncode}: {lines}; {folder} is whole")
        if why := problem(partial):
            raise ExportError(f"{program} ended with 0, but {target.name} {why}; {folder} is whole")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def problem(path: Path) -> str | None:
    """Return why a file is not a GGUF file with weights; None if it is one.

    It begins with a magic, a version (uint32) and the number of tensors (uint64), little-endian.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as exc:
        return f"cannot be read ({exc.strerror})"
    if len(head) < 16 or head[:4] != b"GGUF":
        return "is not a GGUF file"
    version, num_tensors = struct.unpack("<IQ", head[4:])
    return None if version and num_tensors else "holds no weights"
