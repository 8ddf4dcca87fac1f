"""Run a program with its tests, away from this machine: no network, no files, few resources.

    sandbox.require("--scores code-tests")
    found = sandbox.run("def double(x): return 2 * x", "assert double(2) == 4")
    found.passed, found.reason

The program sees Python's standard library, in namespaces of its own. It writes to a tmpfs that goes
with it. Its tests run in the same process: what a program prints or returns is not proof against
one that was written to deceive its tests.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetune import sandboxed
from finetune.errors import ConfigError

SPARE_SECONDS = 20  # to start and end, on a busy machine
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin")
POINTS = ("/mnt", "/media", "/srv", "/opt", "/tmp", "/var")


@dataclass(frozen=True)
class Limits:
    """Of a program and all that it starts; memory_bytes holds for each process and for all."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    disk_bytes: int = 64 << 20
    files: int = 4_096
    processes: int = 64
    output_bytes: int = 20_000


@dataclass(frozen=True)
class Outcome:
    """What became of a program. reason: why it did not pass; output: the end of what it printed."""

    passed: bool
    reason: str
    output: str
    seconds: float


def require(setting: str) -> None:
    """Raise ConfigError where the sandbox cannot be made. setting: what needs it."""
    if why := _why_unavailable():
        raise ConfigError(
            f"{setting} runs code in a sandbox, which cannot be made here: {why}; it needs Linux "
            "5.12 or newer on x86_64 or aarch64 and user namespaces, which containers often forbid "
            "(docker run --security-opt seccomp=unconfined allows them), so run it elsewhere"
        )


@cache
def _why_unavailable() -> str:
    if sys.platform != "linux" or platform.machine() not in sandboxed.MACHINES:
        return f"this is {sys.platform} on {platform.machine()}"
    try:
        found = run("", "", Limits(seconds=20))
    except ConfigError as exc:
        return str(exc)
    return "" if found.passed else f"an empty program fails: {found.reason} {found.output[-200:]}"


def run(code: str, tests: str = "", limits: Limits = Limits()) -> Outcome:
    """Run a program, then its tests in the same namespace. Raises ConfigError as `require`."""
    folders, links = _system()
    asked = {
        **vars(limits), "folders": folders, "links": links, "mount_point": _mount_point(folders),
        "code": _encodable(code), "tests": _encodable(tests), "python": _python(),
    }  # fmt: skip
    inside = [sys.executable, "-I", "-S", sandboxed.__file__]
    try:
        process = subprocess.run(
            inside, input=json.dumps(asked), capture_output=True, text=True, check=False,
            timeout=limits.seconds + SPARE_SECONDS, cwd="/", env={}, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(False, f"over {limits.seconds:g} s", "", limits.seconds)
    try:
        found = json.loads(process.stdout)
    except ValueError:
        found = {"unavailable": process.stderr.strip()[-300:] or f"ended by {process.returncode}"}
    if "unavailable" in found:
        raise ConfigError(found["unavailable"])
    return _outcome(found, limits)


def _outcome(found: dict[str, Any], limits: Limits) -> Outcome:
    output, nonce, seconds = found["output"], found["nonce"], found["seconds"]
    reason = {
        "time": f"over {limits.seconds:g} s", "memory": f"over {limits.memory_bytes >> 20} MB",
    }.get(found["reason"], "")  # fmt: skip
    if not reason and found["exit_code"]:
        lines = [line for line in output.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"ended with {found['exit_code']}"
        reason = f"over {limits.memory_bytes >> 20} MB" if last == "MemoryError" else last[:200]
    elif not reason and nonce not in output:
        reason = "ended before its tests did"
    return Outcome(not reason, reason, output.replace(nonce, ""), seconds)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@cache
def _python() -> str:
    """Return the interpreter itself, not the link of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def _system() -> tuple[list[str], dict[str, str]]:
    """Return the folders that an interpreter needs, and links to them, as in / of many systems."""
    links = {each: os.readlink(each) for each in SYSTEM if os.path.islink(each)}
    wanted = [*SYSTEM, sys.base_prefix, sys.base_exec_prefix, str(Path(_python()).parent)]
    real = {os.path.realpath(each) for each in wanted if os.path.isdir(each)} - {"/"}
    inner = {each for each in real if any(each.startswith(f"{other}/") for other in real)}
    return sorted(real - inner), links


def _mount_point(folders: list[str]) -> str:
    """Return a folder to mount the new root on, which holds none of the folders it needs."""
    for point in POINTS:
        if os.path.isdir(point) and not any(f"{each}/".startswith(f"{point}/") for each in folders):
            return point
    raise ConfigError(f"all of {', '.join(POINTS)} are missing or hold parts of Python")
