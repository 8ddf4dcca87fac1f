"""Kill a run that samples: in a rollout, between rollout and step, in a step, at any line."""

import itertools
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from chat_server import ChatServer, reply, serving
from conftest import Workshop, read_jsonl
from faults.forked import (
    KILLS,
    Scene,
    long_form,
    run_to_completion,
    start,
    weights,
)
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


ENDS = ["judge:6:9", "sealed:1:9", "step:2:9", "rollout:2:15", "sealed:1:15", "step:2:15"]
"""Places where the last process gets a signal, and how often it is there before."""


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


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run of one process that nothing disturbs, and what all further ones are to have.

    A judge that answers otherwise each time is only logged, so rewards stay those of a rule.
    """
    dice = random.Random(SEED)

    def answer(body, text, usage):
        is_score, chance = bool(body.get("logprobs")), dice.uniform(0.1, 0.9)
        values = reply(body, "5" if is_score else text, usage)
        top = [{"token": token, "logprob": math.log(each)} for token, each in
               (("5", chance), ("1", 1 - chance))]  # fmt: skip
        if is_score:
            values["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
        return values

    workshop = Workshop(tmp_path_factory.mktemp("judged"))
    rubric = workshop.folder / "rubric.yaml"
    rubric.write_text("name: tone\ncriterion: Polite.\nscores: {1: a, 5: c}\n")
    judge = {"kind": "judge", "model": "m", "rubric": str(rubric), "weight": 0.0}
    with (
        serving(ChatServer(answer=lambda body: "1. Read it.")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("chat_server.reply", answer)
        rewards = (sampled.WORDS, judge | {"url": server.url})
        # As many micro-batches as processes at most, so that sums have one order.
        more = {**MORE, "train__micro_batch_size": 8}
        own = sampled.settings(workshop, rewards=rewards, rollouts=ROLLOUTS, **more)
        scene = Scene(workshop, "single", 1, own)
        run_to_completion(scene.config("undisturbed"), attempts=1)
        yield scene


@pytest.mark.parametrize(("first", "topology"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2")])
def test_a_run_moves_between_one_process_and_two_at_each_end(judged, first, topology):
    """The same tokens and rewards, and weights to the bit; the judge is asked once."""
    name = f"{topology}-from{first}"
    config, numbers = judged.config(name), itertools.cycle([first, 3 - first])

    def place():
        return (topology, 2) if next(numbers) == 2 else ("single", 1)

    for each in ENDS:
        launch = start(config, *place(), script="distributed.interrupted", ENDS=each)
        ended = launch.codes()[-1]
        assert ended == (-9 if each.endswith(":9") else 75), (each, launch.output())
    run_to_completion(config, *place(), attempts=1)
    run, undisturbed = map(judged.workshop.run_dir, (name, "undisturbed"))
    assert completions(run) == completions(undisturbed)
    # FSDP2 sums norms over the shards, in another order.
    norm = pytest.approx if topology == "fsdp2" else float
    lines = [read_jsonl(each / "metrics.jsonl") for each in (run, undisturbed)]
    for one, other in zip(*lines, strict=True):
        assert (one["step"], one["reward"]) == (other["step"], other["reward"])
        assert (one["loss"], one["grad_norm"]) == (other["loss"], norm(other["grad_norm"]))
    own, wanted = weights(run), weights(undisturbed)
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)
    files = run.glob("rewards/process-*/judge/judge_answers.jsonl")
    asked = [line["key"] for path in files for line in read_jsonl(path)]
    assert len(asked) == len(set(asked)) > 100
