"""What tests cost: the order in which they run, what is left out, and the budget of `make test`.

durations.json has, for each file, the seconds of CPU of its fast and of its slow tests, with all
the processes that they start. `make durations` records it, and `pytest FILE --record-durations` the
line of a file. Give several files at once, as the first of them also imports PyTorch (6 s). Seconds
of CPU, as those of a clock depend on what else a machine does: two idle cores give two of them a
second.
"""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

FILE = Path(__file__).with_suffix(".json")
# Seconds of CPU: 382 took 4:02 on two idle cores; on slower ones the same tests take 1.6 times as
# much of both, and `make test` may take six minutes. "fast" is under 90 seconds.
BUDGET = {"all": 400.0, "fast": 135.0}
LONG_FORMS = {
    "proof": "make proofs",
    "fault": "make faults",
    "image": "make image-test",
    "gpu": "make gpu",
}
LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser):
    parser.addoption(
        "--record-durations", action="store_true", help=f"measure, and write {FILE.name}"
    )


def pytest_configure(config):
    config.stash[LEFT_OUT] = {}
    if config.getoption("record_durations"):
        config.pluginmanager.register(Recorder(), "recorder")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark long forms slow, and deal the longest files out to two workers first.

    Those that fork runs go to the first worker alone: each worker that does prepares a process to
    fork from, which takes 9 s of CPU.
    """
    for item in items:
        if "image" in getattr(item, "fixturenames", ()):
            item.add_marker("image")
        if any(item.get_closest_marker(name) for name in ("proof", "fault", "image")):
            item.add_marker("slow")
    seconds = {name: sum(of.values()) for name, of in json.loads(FILE.read_text()).items()}
    names = list(dict.fromkeys(file_of(item.nodeid) for item in items))
    names.sort(key=lambda name: -seconds.get(name, 0))
    forking = {file_of(item.nodeid) for item in items if forks(item.module)}
    others = [name for name in names if name not in forking]
    dealt = [*(name for name in names if name in forking), *others[::2], *others[1::2]]
    place = {name: number for number, name in enumerate(dealt)}
    items.sort(key=lambda item: place[file_of(item.nodeid)])


def forks(module: object) -> bool:
    """Whether a file of tests has imported what forks runs."""
    return any(getattr(each, "__module__", "") == "faults.forked" for each in vars(module).values())


def file_of(node: str) -> str:
    return node.partition("::")[0]


def pytest_deselected(items):
    left_out = items[0].config.stash[LEFT_OUT]
    for item in items:
        for name in LONG_FORMS:
            if item.get_closest_marker(name):
                left_out[name] = left_out.get(name, 0) + 1
                break


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each worker of pytest-xdist collects all tests, and leaves the same ones out."""
    node.config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter, config):
    if left_out := config.stash[LEFT_OUT]:
        named = (
            f"{left_out[name]} by {LONG_FORMS[name]}" for name in LONG_FORMS if name in left_out
        )
        terminalreporter.write_line(f"left out here, and run: {', '.join(named)}")


class Recorder:
    """Adds up the cost of each phase of a test; workers report it to the process that writes it."""

    def __init__(self):
        self.before = cpu()
        self.found = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        now = cpu()
        kind = "slow" if item.get_closest_marker("slow") else "fast"
        report.user_properties.append((kind, now - self.before))
        self.before = now
        return report

    def pytest_runtest_logreport(self, report):
        for kind, seconds in report.user_properties:
            self.found.setdefault(file_of(report.nodeid), Counter())[kind] += seconds

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            return
        found = {
            name: {kind: round(of[kind], 2) for kind in sorted(of)}
            for name, of in self.found.items()
        }
        kept = {
            name: of
            for name, of in json.loads(FILE.read_text()).items()
            if (FILE.parents[1] / name).exists()
        }
        lines = [
            f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in sorted((kept | found).items())
        ]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def cpu() -> float:
    """Return the seconds of CPU of this process and of those it started.

    Reads their entries in /proc alone: all entries, three times a test, would be 12 s of the suite.
    """
    total, todo = 0, [os.getpid()]
    while todo:
        process = Path(f"/proc/{todo.pop()}")
        with contextlib.suppress(OSError):  # it has just ended
            total += sum(map(int, (process / "stat").read_text().rpartition(")")[2].split()[11:15]))
            for children in (process / "task").glob("*/children"):
                todo += map(int, children.read_text().split())
    return total / os.sysconf("SC_CLK_TCK")
