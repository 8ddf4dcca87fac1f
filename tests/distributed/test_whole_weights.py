"""Weights made whole on each process for a while, under what shares them out."""

import pytest
from conftest import short
from faults.forked import fork

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "topology", short(["fsdp2", "fsdp2_offload", "zero2", "zero3", "zero3_offload"], "fsdp2")
)
def test_each_process_passes_alone_and_training_goes_on_as_before(tmp_path, topology):
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    launch = fork("distributed.whole_weights", [], topology, logs, {})
    assert launch.codes(100) == [0, 0], launch.output()
