"""Kill it anywhere: it goes on as if nothing had happened."""

import os
import random
from pathlib import Path

import pytest
from conftest import Workshop
from faults.nursery import Scene

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("FINETUNE_KILLS", "12"))  # make faults: 200
SEED = int(os.environ.get("FINETUNE_SEED", "0"))
SETTINGS = {
    "train__max_steps": 9, "train__epochs": 9, "train__micro_batch_size": 1, "checkpoint__every_steps": 2, "checkpoint__every_minutes": None,
    "data__eval_fraction": 0.2, "evaluation__every_steps": 4, "train__hang_minutes": 0.3,
}  # fmt: skip
SCENES = [("single", 1), ("fsdp2", 2), ("zero2", 2)]


@pytest.fixture(scope="module", params=SCENES, ids=lambda v: f"{v[0]}-{v[1]}")
def scene(request, tmp_path_factory) -> Scene:
    folder: Path = tmp_path_factory.mktemp("scene")
    return Scene(Workshop(folder), *request.param, SETTINGS).undisturbed()


def test_a_run_that_is_killed_ends_as_one_that_is_not(scene):
    """Half of the kills at a line of the protocol of checkpoints, half at any moment."""
    dice = random.Random(SEED)
    killed, total = 0, KILLS // len(SCENES)
    for number in range(total):
        kill = scene.at_a_line if number % 2 else scene.at_a_moment
        codes = scene.survives(f"run{number}", kill, dice)
        killed += -9 in codes
    assert killed >= total // 2, "the others had ended before, or the process did not execute that line"


@pytest.mark.skipif(KILLS < 100, reason="make faults: a kill before each of about 150 lines")
def test_death_before_any_line_of_the_protocol_is_survived(scene):
    """Once before every line that a save executes, the first time or a later one."""
    if scene.topology != "single":
        pytest.skip("lines are the same under every topology")
    dice = random.Random(SEED)
    for line in sorted(scene.lines):
        codes = scene.survives(
            line.replace(":", "-"), lambda config, dice, line=line: scene.at_a_line(config, dice, line), dice
        )
        assert codes == [-9], line
