"""Disks fill up, forbid, flip bits and lose ends: earlier checkpoints stay, and errors name it."""

import contextlib
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Workshop, read_jsonl
from faults.forked import Launch, assert_same_end, long_form, run_to_completion, start, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {
    "train__max_steps": 12, "train__epochs": 9, "train__micro_batch_size": 2,
    "checkpoint__every_steps": 2, "checkpoint__every_minutes": None,
}  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that can be filled: 3 MB, of which a checkpoint takes 0.45."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path, leave_bytes: int) -> Path:
    """A file that leaves only this many bytes free."""
    ballast = folder / "ballast"
    with (
        contextlib.suppress(OSError),
        ballast.open("wb", buffering=0) as file,
    ):  # the run writes, too
        file.write(b"\0" * max(0, shutil.disk_usage(folder).free - leave_bytes))
    return ballast


@pytest.mark.parametrize(
    ("leave", "says"),
    [pytest.param(60_000, "GB are needed", marks=long_form), (470_000, "the disk is full")],
)
def test_a_full_disk_keeps_what_was_saved_and_stops_the_run_at_the_third_failure(
    workshop, small_disk, leave, says
):
    """Known before anything is written, or found out in the middle."""
    settings = SETTINGS | {
        "train__max_steps": 60,
        "train__epochs": 99,
        "run__dir": str(small_disk),
    }
    config = workshop.write(workshop.config(**settings))
    launch = start(config)
    run = small_disk / "run"
    wait_for(lambda: list((run / "checkpoints").glob("step-*")))
    ballast = fill(small_disk, leave)
    assert launch.codes() == [1], launch.output()
    assert "2 of 3 failures in a row" in launch.output()
    assert "3 saves in a row have failed" in launch.output()
    assert says in launch.output()
    kept = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith("step-")]
    assert kept
    ballast.unlink()
    run_to_completion(config)
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == list(range(1, 61))


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("run__dir", {}),
        ("data__cache_dir", {}),
        pytest.param("data__cache_dir", {"data__streaming": True}, marks=long_form),
    ],
)
def test_a_full_disk_at_the_start_is_not_a_config_error(workshop, small_disk, where, more):
    """Exit code 1: a cluster tries again, on another node or after somebody has made room."""
    fill(small_disk, 0)
    launch = start(workshop.write(workshop.config(**{where: str(small_disk / "new")}, **more)))
    assert launch.codes() == [1], launch.output()
    assert "No space left on device" in launch.output()


@long_form
def test_a_temporarily_full_disk_costs_only_one_checkpoint(workshop, small_disk):
    settings = SETTINGS | {
        "train__max_steps": 75,
        "train__epochs": 99,
        "checkpoint__every_steps": 25,
    }
    whole = workshop.write(workshop.config("whole", **settings))
    run_to_completion(whole)
    config = workshop.write(workshop.config(**settings, run__dir=str(small_disk)))
    launch = start(config)
    run = small_disk / "run"
    wait_for(lambda: list((run / "checkpoints").glob("step-*")))
    ballast = fill(small_disk, 0)
    with contextlib.suppress(AssertionError):
        wait_for(lambda: "failures in a row" in launch.output(), 20, every=0.02)
    ballast.unlink()
    assert launch.codes() == [0], launch.output()
    assert "1 of 3 failures in a row" in launch.output()
    assert_same_end(run, workshop.run_dir("whole"))


DAMAGES = {
    "one bit flipped": lambda content: content[: len(content) // 2] + bytes(
        [content[len(content) // 2] ^ 1],
    ) + content[len(content) // 2 + 1 :],
    "cut short": lambda content: content[:-1],
    "empty": lambda content: b"",
}  # fmt: skip
WAYS = [*DAMAGES, "missing"]
FILES = {
    "single": ["manifest.json", "process-0000.json", "shards/.metadata", "shards/__0_0.distcp"],
    "zero2": [
        "shards/engine/mp_rank_00_model_states.pt",
        "shards/engine/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ],
}


@pytest.fixture(
    scope="module",
    params=[("single", 1), pytest.param(("zero2", 2), marks=long_form)],
    ids=["single", "zero2"],
)
def saved(request, tmp_path_factory) -> tuple[Workshop, str, int]:
    workshop, (topology, processes) = Workshop(tmp_path_factory.mktemp("saved")), request.param
    config = workshop.write(workshop.config(**SETTINGS, checkpoint__keep_last=9))
    run_to_completion(config, topology, processes)
    return workshop, topology, processes


def copy_of(saved: tuple[Workshop, str, int], folder: Path) -> Launch:
    """The same run, but in another place."""
    workshop, topology, processes = saved
    config = workshop.write(workshop.config(**SETTINGS, checkpoint__keep_last=9))
    return start(config, topology, processes, "--run.dir", str(folder))


def damaged(saved: tuple[Workshop, str, int], folder: Path, kind: str, how: str) -> Path:
    """A copy of the run whose newest checkpoint has a damaged file; that checkpoint."""
    shutil.copytree(saved[0].run_dir(), folder / "run")
    (folder / "run/outcome.json").unlink()
    newest = folder / "run/checkpoints/step-00000012"
    if how == "missing":
        (newest / kind).unlink()
    else:
        (newest / kind).write_bytes(DAMAGES[how]((newest / kind).read_bytes()))
    return newest


def assert_passed_over(output: str, newest: Path, kind: str, is_missing: bool) -> None:
    line = next(line for line in output.splitlines() if "skipped a damaged checkpoint" in line)
    assert str(newest) in line
    assert kind in line or is_missing, line
    assert Path(line.rpartition("kept as ")[2]).is_dir()
    assert "at step 10" in output


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=long_form)])
def test_damage_is_reported_and_the_previous_checkpoint_used(saved, tmp_path, capfd, every):
    """Each file damaged in one way, or in every way."""
    workshop, topology, processes = saved
    combined = itertools.product if every else zip
    for file, how in combined(FILES[topology], WAYS):
        folder = tmp_path / file.replace("/", "-") / how
        newest = damaged(saved, folder, file, how)
        if topology == "single":
            capfd.readouterr()
            workshop.train(**SETTINGS, checkpoint__keep_last=9, run__dir=str(folder))
            output = "".join(capfd.readouterr())
        else:
            launch = copy_of(saved, folder)
            assert launch.codes() == [0] * processes, launch.output()
            output = launch.output()
        assert_passed_over(output, newest, file, how == "missing")
        assert_same_end(folder / "run", workshop.run_dir())


def test_when_nothing_is_valid_the_run_stops_and_deletes_nothing(saved, tmp_path):
    workshop, _, processes = saved
    shutil.copytree(workshop.run_dir(), tmp_path / "run")
    (tmp_path / "run/outcome.json").unlink()
    for manifest in tmp_path.rglob("manifest.json"):
        manifest.write_bytes(DAMAGES["one bit flipped"](manifest.read_bytes()))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    launch = copy_of(saved, tmp_path)
    assert launch.codes() == [2] * processes
    assert "no checkpoint is valid, and nothing was deleted" in launch.output()
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "no checkpoint is valid" in after.pop(tmp_path / "run/outcome.json").decode()
    assert after == before
