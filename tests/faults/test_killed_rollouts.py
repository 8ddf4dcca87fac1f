"""Kill a run that samples: in a rollout, between rollout and step, in a step, at any line."""

import json
import os
import random
from pathlib import Path

import pytest
from conftest import Workshop
from faults.forked import KILLS, Scene, long_form
from invariants import sampled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), long_form]

SEED = int(os.environ.get("FINETUNE_SEED", "0"))
MORE = {
    "train__max_steps": 9, "checkpoint__every_steps": 2, "checkpoint__every_minutes": None,
    "checkpoint__keep_last": 3, "data__eval_fraction": 0.2, "evaluation__every_steps": 4,
    "train__hang_minutes": 0.3, "train__micro_batch_size": 4,
}  # fmt: skip
OF_PHASES = ("phase", "rollouts", "shard_file")  # names of modules begin so
ROLLOUTS = {"steps_per_phase": 2, "dynamic_sampling": 1.0}


@pytest.fixture(
    scope="module", params=[("single", 1), ("ddp", 2), ("fsdp2", 2)], ids=lambda v: v[0]
)
def scene(request, tmp_path_factory) -> Scene:
    workshop = Workshop(tmp_path_factory.mktemp("scene"))
    settings = sampled.settings(workshop, rollouts=ROLLOUTS, **MORE)
    return Scene(workshop, *request.param, settings).undisturbed()


def completions(run: Path) -> list[list[int]]:
    """The tokens of every completion, in the order of phases, prompts and samples."""
    return [
        rollout["ids"]
        for path in sorted((run / "rollouts").glob("phase-*.jsonl"))
        for line in path.read_text().splitlines()[1:-1]
        for rollout in json.loads(line)["rollouts"]
    ]


def test_a_killed_run_samples_and_learns_like_an_undisturbed_one(scene):
    """Die at random moments, and at lines that write or read phases, until KILLS have hit."""
    dice = random.Random(f"{SEED} {scene.topology}")
    of_phases = [
        {line: count for line, count in each.items() if line.startswith(OF_PHASES)}
        for each in scene.lines
    ]
    ways = [
        lambda config: scene.at_a_moment(config, dice),
        lambda config: scene.at_a_line(config, dice, of_phases),
        lambda config: scene.at_a_line(config, dice, scene.lines),
    ]
    killed, number = 0, 0
    while killed < KILLS:
        kills = [dice.choice(ways) for _ in range(dice.randint(1, 3))]
        killed += sum(-9 in each for each in scene.survives(f"run{number}", kills))
        found, wanted = (
            completions(scene.workshop.run_dir(name)) for name in (f"run{number}", "undisturbed")
        )
        assert found == wanted
        number += 1
        assert number < 3 * KILLS, "hardly any kill hits"
