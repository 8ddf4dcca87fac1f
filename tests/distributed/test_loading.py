"""No process but the main one ever holds a whole model in its memory."""

import sys

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.proof, pytest.mark.timeout(600)]


def test_a_process_holds_its_part_and_one_weight_more(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import loading

    total = loading.make_model(tmp_path / "model", layers=12, width=512)
    _, other = loading.measure("fsdp2", 2, tmp_path)
    largest = 32000 * 512 * 4
    assert total / 2 < other < total / 2 + 2 * largest, f"{other:,} bytes for half of {total:,}"
