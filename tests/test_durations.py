"""The tests keep to their budget."""

import json

import durations
import pytest
from conftest import ROOT, tracked

RECORDED = json.loads(durations.FILE.read_text())


@pytest.mark.parametrize("kind", durations.BUDGET)
def test_recorded_seconds_are_within_the_budget(kind):
    seconds = {name: sum(of.values()) if kind == "all" else of.get(kind, 0) for name, of in RECORDED.items()}
    most = sorted(seconds.items(), key=lambda each: -each[1])[:5]
    assert sum(seconds.values()) <= durations.BUDGET[kind], f"move long forms to make proofs; the most take {most}"


def test_every_file_of_tests_is_recorded():
    files = {name for name in tracked() if name.startswith("tests/") and name.rpartition("/")[2].startswith("test_")}
    recorded = {name for name in RECORDED if (ROOT / name).exists()}
    assert files - recorded == set(), "run make durations, or add a line for a file of few tests by hand"
