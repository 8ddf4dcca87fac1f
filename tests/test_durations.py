"""The tests keep to their budget."""

import json
import sys

import durations
import pytest
from conftest import ROOT, launch, short, tracked

RECORDED = json.loads(durations.FILE.read_text())


@pytest.mark.parametrize("kind", durations.BUDGET)
def test_recorded_seconds_are_within_the_budget(kind):
    seconds = {
        name: sum(of.values()) if kind == "all" else of.get(kind, 0)
        for name, of in RECORDED.items()
    }
    most = sorted(seconds.items(), key=lambda each: -each[1])[:5]
    assert sum(seconds.values()) <= durations.BUDGET[kind], (
        f"move long forms to make proofs; the most take {most}"
    )


def test_every_file_of_tests_is_recorded():
    files = {
        name
        for name in tracked()
        if name.startswith("tests/") and name.rpartition("/")[2].startswith("test_")
    }
    recorded = {name for name in RECORDED if (ROOT / name).exists()}
    assert files - recorded == set(), (
        "run make durations, or add a line for a file of few tests by hand"
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", short(["0", "1"], "1"))
def test_the_end_of_a_run_names_what_it_left_out(workers):
    result = launch(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-n",
            workers,
            "tests/test_quickstart.py",
        ]
    )
    assert "left out here, and run: 1 by make proofs" in result.stdout, (
        result.stdout + result.stderr
    )
