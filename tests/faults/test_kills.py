"""Kill it anywhere: it goes on as if nothing had happened."""

import inspect
import os
import random
from pathlib import Path

import pytest
from conftest import Workshop
from faults.forked import KILLS, Scene, long_form

from finetune.engine.checkpoint import contents, folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("FINETUNE_SEED", "0"))
SETTINGS = {
    "train__max_steps": 9, "train__epochs": 9, "train__micro_batch_size": 2,
    "checkpoint__every_steps": 2, "checkpoint__every_minutes": None, "checkpoint__keep_last": 3,
    "data__eval_fraction": 0.2, "evaluation__every_steps": 4, "train__hang_minutes": 0.3,
}  # fmt: skip
# Every topology writes by the same lines of the protocol, one process by those of the first of two,
# and test_topologies.py resumes each way to save; FSDP2 and ZeRO start at three times the cost.
LONG = [("single", 1), ("zero2", 1), ("fsdp2", 2), ("zero2", 2)]
SCENES = [("ddp", 2), *(pytest.param(each, marks=long_form) for each in LONG)]


@pytest.fixture(scope="module", params=SCENES, ids=lambda v: f"{v[0]}-{v[1]}")
def scene(request, tmp_path_factory) -> Scene:
    folder: Path = tmp_path_factory.mktemp("scene")
    return Scene(Workshop(folder), *request.param, SETTINGS).undisturbed()


def lines_of_a_write(scene: Scene) -> list[str]:
    """Lines that a save executes while its files are half there."""
    found = set()
    for function in (contents.write, folder.commit):
        name = Path(inspect.getfile(function)).name
        text, first = inspect.getsourcelines(function)
        found |= {f"{name}:{number}" for number in range(first, first + len(text))}
    return sorted(found & scene.lines[0].keys())


def test_a_killed_run_ends_like_an_undisturbed_one(scene):
    """Kill at random moments, at protocol lines and in the resumption, until KILLS have hit."""
    dice = random.Random(f"{SEED} {scene.topology}")  # each at moments of its own
    killed, number = 0, 0
    kills = [
        lambda config: scene.at_a_moment(config, dice),
        lambda config: scene.at_a_line(config, dice, scene.lines),
        lambda config: scene.at_a_line(config, dice, scene.lines_of_a_resumption),
    ]
    writes = lines_of_a_write(scene)
    in_a_write = [
        lambda config: scene.at_a_line(config, dice, scene.lines, dice.choice(writes)), kills[2]
    ]  # fmt: skip
    ways = [in_a_write, kills[:1], kills[1:2], kills[1:]]
    while killed < KILLS // 3:
        codes = scene.survives(
            f"run{number}", ways[number] if number < len(ways) else dice.choice(ways)
        )
        number += 1
        killed += sum(-9 in each for each in codes)
        assert number < 2 * KILLS, "hardly any kill hits"


@long_form
def test_death_before_any_line_of_the_protocol_is_survived(scene):
    """Die once before every line that a save or a resumption executes, at a random repetition."""
    if scene.topology != "single":
        pytest.skip("lines are the same under every topology")
    dice = random.Random(SEED)
    for line in sorted(scene.lines[0]):
        codes = scene.survives(
            line.replace(":", "-"),
            [lambda config, line=line: scene.at_a_line(config, dice, scene.lines, line)],
        )
        assert codes == [[-9]], line
    only = scene.lines_of_a_resumption[0].keys() - scene.lines[0].keys()
    for line in sorted(only):
        at_a_save = next(each for each in scene.lines[0] if each.startswith("saver.py"))
        scene.survives(
            line.replace(":", "-"),
            [
                lambda config, line=at_a_save: scene.at_a_line(config, dice, scene.lines, line),
                lambda config, line=line: scene.at_a_line(config, dice, [{line: 1}], line),
            ],
        )
