"""Fixtures and helpers of all tests: rows, a two-layer model, and runs of the real train.py."""

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are tiny, and several processes share few cores
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidia0").exists():  # Triton reads it when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"
# Else importing torch spends 2 s of CPU on collecting garbage that it does not make.
gc.set_threshold(200_000, 20, 100)

pytest_plugins = ["durations", "s3_server"]
TINY_LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def pairs(count: int = 40) -> list[dict[str, Any]]:
    """Question and answer rows whose answers have very different lengths."""
    return [
        {"question": f"what is {i} times three", "answer": f"{'so ' * (i * 7 % 13)}{3 * i}"}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tracked() -> list[str]:
    """Return the paths that git tracks, without other files of this folder."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listed.stdout.splitlines()


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl")]


def pretrained(model: Path | str, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run on saved weights."""
    return {
        "model__init": "pretrained", "model__path": str(model), "model__config": None,
        "model__tokenizer": None, **changes,
    }  # fmt: skip


def tiny_llama(**changes: Any) -> Any:
    """Return the config of a two-layer Llama."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**TINY_LLAMA | changes)


class Workshop:
    """A folder with rows, and configs of small runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = write_jsonl(folder / "rows.jsonl", pairs())

    def config(self, name: str = "run", **changes: Any) -> dict[str, Any]:
        """A complete run config; changes are given as section__field=value."""
        config: dict[str, Any] = {
            "run": {"name": name, "dir": str(self.folder / "runs")},
            "model": {"init": "random", "tokenizer": "bytes", "config": dict(TINY_LLAMA)},
            "data": {
                "train": str(self.rows),
                "max_length": 128,
                "cache_dir": str(self.folder / "cache"),
            },
            "optimizer": {"lr": 1e-2},
            "train": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 5},
        }
        for key, value in changes.items():
            section, field = key.split("__")
            config.setdefault(section, {})[field] = value
        return config

    def write(self, config: dict[str, Any]) -> Path:
        path = self.folder / f"{config['run']['name']}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def run_dir(self, name: str = "run") -> Path:
        return self.folder / "runs" / name

    def outcome(self, name: str = "run") -> dict[str, Any]:
        """Return outcome.json of a run."""
        found: dict[str, Any] = json.loads((self.run_dir(name) / "outcome.json").read_text())
        return found

    def receipt(self, name: str = "run") -> dict[str, Any]:
        """Return receipt.json of a run."""
        found: dict[str, Any] = json.loads((self.run_dir(name) / "receipt.json").read_text())
        return found

    def num_lines(self, log: str = "metrics.jsonl") -> int:
        """Return the number of whole lines that a run has written so far."""
        path = self.run_dir() / log
        return path.read_text().count("\n") if path.exists() else 0

    def copy_of(self, run: Path, left_out: Sequence[str] = ()) -> Path:
        """Copy a run of another workshop, to go on with it here; return the run directory."""
        shutil.copytree(run, self.run_dir(run.name), ignore=shutil.ignore_patterns(*left_out))
        self.rows = run.parents[1] / "rows.jsonl"
        return self.run_dir(run.name)

    def train(self, name: str = "run", **changes: Any) -> Path:
        """Train in this process and return the run directory; raise the errors of train.py."""
        return self._run([], name, changes)

    def check(self, name: str = "run", **changes: Any) -> Path:
        """Run train.py --check in this process."""
        return self._run(["--check"], name, changes)

    def _run(self, arguments: list[str], name: str, changes: dict[str, Any]) -> Path:
        from finetune import config as configs
        from finetune import loop
        from finetune.survival.preemption import StopFlag

        forget_process_state()

        config, check_only = configs.parse(
            ["--config", str(self.write(self.config(name, **changes))), *arguments]
        )
        loop.run(config, check_only, StopFlag())
        freeze_imports(len(sys.modules))
        return self.run_dir(name)

    def main(self, name: str = "run", arguments: Sequence[str] = (), **changes: Any) -> int:
        """Run train.py's main function in this process and return its exit code."""
        return run_main("--config", self.write(self.config(name, **changes)), *arguments)

    def launch(
        self, name: str = "run", processes: int = 1, arguments: Sequence[str] = (), **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run train.py in its own processes; the code is that of the first process to fail."""
        from faults.forked import start

        config = self.write(self.config(name, **changes))
        begun = start(config, "single" if processes == 1 else "cpu_debug", processes, *arguments)
        code = next((code for code in begun.codes(240) if code), 0)
        return subprocess.CompletedProcess(["train.py"], code, begun.output(), begun.output())


@pytest.fixture(autouse=True)
def no_config_folder():
    """A process of the product reads one config; here many tests share a process."""
    from finetune import places

    yield
    places.note_config_folder(None)


@functools.cache
def freeze_imports(num_modules: int) -> None:
    """Freeze objects of new imports: runs collect garbage, which would cost 0.3 s in each."""
    gc.collect()
    gc.freeze()


def launcher(topology: str, processes: int, extra: Sequence[str] = ()) -> list[str]:
    """Return an `accelerate launch` command with a file of accelerate_configs/."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / f"accelerate_configs/{topology}.yaml"), "--num_processes", str(processes),
        "--main_process_port", "0", *extra,
    ]  # fmt: skip


def session(leader: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
            if int(number) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def run_main(*arguments: str | Path) -> int:
    """Run train.py's main function in this process and return its exit code."""
    import train

    forget_process_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        for stream in ("stdout", "stderr"):  # which it wraps
            patch.setattr(sys, stream, getattr(sys, stream))
        return train.main()


def forget_process_state() -> None:
    """Accelerate keeps one state per process; a run in a process of its own would start without."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def launch(arguments: Sequence[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture(autouse=True)
def fresh_process_state() -> Iterator[None]:
    """Runs install signal handlers and fill Accelerate's state; each test starts without."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    }
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    forget_process_state()


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """End the processes that tests/faults/forked.py started, also stopped ones."""
    yield
    if forked := sys.modules.get("faults.forked"):
        forked.end_all()


def short(values: Sequence[Any], *kept: Any) -> list[Any]:
    """Parametrize a test: `make test` runs only the kept values, `make proofs` the others."""
    proof = pytest.mark.proof
    return [
        value
        if value in kept
        else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=proof)
        for value in values
    ]


def made_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """Return a folder that the first worker to need it fills for all pytest-xdist workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".made").exists():
            make(folder)
            (folder / ".made").touch()
    return folder


@pytest.fixture
def interpreted() -> Callable[[str], Any]:
    """Import a module of Triton kernels, which Triton's interpreter runs on a CPU."""
    pytest.importorskip("triton")
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("here Triton compiles for the GPU; tests/test_gpu.py runs the kernels")
    return importlib.import_module


@pytest.fixture
def bytes_tokenizer() -> Any:
    from finetune.models.load import bytes_tokenizer

    return bytes_tokenizer()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data and tokenizers, or skip the test."""
    folder = os.environ.get("FINETUNE_REAL_DATA")
    if not folder:
        pytest.skip("FINETUNE_REAL_DATA is not set: no real data on this machine")
    return Path(folder)
