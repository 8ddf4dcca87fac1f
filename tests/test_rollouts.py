"""Rollouts: written before they are learned from, and the same however a run is interrupted."""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import signal
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, Workshop, pretrained, read_jsonl, short, write_jsonl
from faults.forked import forget
from invariants import sampled
from invariants.test_topologies import several

from finetune import failures
from finetune.config.rollout_fields import Rollouts as Settings
from finetune.data.order import Sequences
from finetune.engine.checkpoint.storage import Storage
from finetune.engine.metrics import of_rollouts
from finetune.errors import (
    ConfigError,
    DataError,
    FinetuneError,
    Outage,
    Preempted,
    RunDirectoryError,
    TrainingDiverged,
)
from finetune.lines_file import LinesFile
from finetune.rollouts import group_examples, phase_facts
from finetune.rollouts.asked import Asked
from finetune.rollouts.collecting import Collector
from finetune.rollouts.phase_sampler import PhaseSampler
from finetune.rollouts.phases import Group, PhaseFiles, Rollout
from finetune.rollouts.rewards import Reward, Rewards
from finetune.rollouts.sampling import Drawing, Drawn, draw, numbers_of
from finetune.rollouts.shard_file import ShardFile

pytestmark = pytest.mark.slow


class Killed(BaseException):
    pass


def killed():
    raise Killed


# ------------------------------------------------------------------------------------ sampling


@pytest.fixture(scope="module")
def model():
    """A tiny Llama in float32 that answers as in training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.models import attention, head

    torch.manual_seed(0)
    shape = {**TINY_LLAMA, "vocab_size": 64, "initializer_range": 0.3}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention.DOCUMENTS)
    head.install(made)
    return made.train()


def drawn(model, prompts, numbers, **more):
    settings = {
        "temperature": 0.7, "ends": {2}, "pad": 0, "together": False, "beat": lambda: None, **more,
    }  # fmt: skip
    return draw(model, prompts, numbers, **settings)


PROMPTS = [[1, 10, 20, 30], [1, 5], [1, 7, 8, 9, 10, 11, 12], [1, 40]]


def test_a_completion_does_not_depend_on_those_beside_it(model):
    numbers = numbers_of(0, 3, count=4, places=12)
    together = drawn(model, PROMPTS, numbers)
    alone = [drawn(model, [p], numbers[[n]])[0] for n, p in enumerate(PROMPTS)]
    assert [each.ids for each in together] == [each.ids for each in alone]
    assert len({each.ids for each in together}) == 4
    other = drawn(model, PROMPTS, numbers_of(1, 3, count=4, places=12))
    assert [each.ids for each in other] != [each.ids for each in together]


def test_sampling_leaves_the_model_and_chance_as_they_were(model):
    before, settings = torch.get_rng_state(), model.generation_config
    drawn(model, PROMPTS, numbers_of(0, 3, count=4, places=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.generation_config is settings
    assert model.config._attn_implementation == "documents"


def test_tokens_are_drawn_with_their_probabilities_at_the_temperature():
    """At evenly spaced numbers each token comes as often as its probability says."""
    logits = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5)[:, None] / 10_000
    drawing = Drawing(numbers, 1, 0.5, lambda: None)
    chosen = drawing(torch.zeros(10_000, 1), logits.expand(10_000, 4)).argmax(-1)
    wanted = torch.softmax(logits / 0.5, -1)
    assert torch.bincount(chosen, minlength=4) / 10_000 == pytest.approx(wanted, abs=1e-4)
    assert drawing.logprobs[0].exp() == pytest.approx(wanted[chosen], abs=1e-6)


def test_the_sampler_finds_tokens_as_likely_as_the_policy_that_learns(model):
    found = drawn(model, PROMPTS, numbers_of(0, 3, count=4, places=12))
    groups = [group(n, each, prompt=PROMPTS[n]) for n, each in enumerate(found)]
    made = group_examples.examples_of(groups, Settings(cut_answers="learn"))
    batches = asked().learning_from(Sequences(made, False, 0, 0), 1)
    from finetune.models.policy import Policy

    with torch.no_grad():
        logprobs = Policy(model)(batches.at(0)[0], {"logprobs"}, temperature=0.7).logprobs
    wanted = np.concatenate([each.logprobs for each in found])
    assert logprobs.numpy() == pytest.approx(wanted, abs=5e-6)


# ---------------------------------------------------------------------------------- the arrays


def group(number=0, *found, prompt=(1, 2), rewards=None, cut=()):
    """A group of completions that are drawn, or of tokens."""
    rollouts = []
    for place, each in enumerate(found):
        if not isinstance(each, Drawn):
            end = "length" if place in cut else "stop"
            each = Drawn(tuple(each), np.full(len(each), -0.1, np.float32), end)
        reward = None if rewards is None else rewards[place]
        zeros = np.zeros(len(each.ids), np.float32)
        rollouts.append(
            Rollout(
                each.ids, each.logprobs, each.finish_reason, "a text", reward, {"rule": reward},
                values={"old_logprobs": zeros},
            )
        )  # fmt: skip
    return Group(number, "rows.jsonl:1", tuple(prompt), tuple(rollouts), rewards is not None)


def asked(count=10, **more):
    """The prompts of a run: an object with lengths stands for their tokens."""
    settings = Settings(**{"group_size": 2, "max_new_tokens": 4, **more})
    sequences = Sequences.__new__(Sequences)
    sequences.lengths, sequences._packs, sequences.examples = np.full(count, 3), None, None
    return Asked(
        sequences, None, SimpleNamespace(rollouts=settings), seed=0, global_batch_size=8,
        micro_batch_size=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "phases", "steps"),
    [({}, 3, [1, 1, 1]), ({"steps_per_phase": 2}, 2, [2, 1]), ({"passes": 3}, 3, [3, 3, 3])],
)
def test_each_phase_asks_the_next_prompts_of_an_epoch(settings, phases, steps):
    """10 prompts, 4 a step: phases count on over epochs, and every epoch asks each prompt once."""
    made = asked(**settings)
    assert made.phases_per_epoch == phases
    assert made.steps_per_epoch == sum(steps)
    for epoch in range(2):
        numbers = range(epoch * phases, (epoch + 1) * phases)
        every = np.concatenate([made.of_phase(each) for each in numbers])
        assert sorted(every) == list(range(10))
    places = [made.phase_of(step) for step in range(2 * sum(steps))]
    wanted = [(phase, step) for phase, count in enumerate(2 * steps) for step in range(count)]
    assert places == wanted
    assert [made.first_step(phase) for phase in range(3)] == [
        wanted.index((phase, 0)) for phase in range(3)
    ]
    assert not set(made.further(0)) & set(made.of_phase(0))


def test_masked_completions_count_for_the_baseline_alone():
    groups = [group(7, [3, 2], [4, 5, 6], rewards=(1.0, 0.0), cut=(1,))]
    scored = group_examples.scored(groups, Settings())
    assert scored.rewards.tolist() == [1.0, 0.0]
    assert scored.ends.tolist() == [2, 2]
    assert len(group_examples.examples_of(groups, Settings())) == 1
    kept = Settings(cut_answers="penalise", cut_penalty=0.25)
    assert group_examples.scored(groups, kept).rewards.tolist() == [1.0, -0.25]
    assert len(group_examples.examples_of(groups, kept)) == 2


def test_groups_without_rewards_are_left_out_and_counted():
    groups = [group(0, [3], [4], rewards=(1.0, 0.0)), group(1, [3], [4])]
    groups.append(group(2, [3], [4], rewards=(1.0, 1.0)))
    assert [each.number for each in group_examples.kept(groups, Settings(), 3)] == [0, 2]
    kept = group_examples.kept(groups, Settings(), 3)
    facts = phase_facts.of_phase(groups, kept, Settings())
    assert (facts["failed_groups"], facts["reward"], facts["no_signal_share"]) == (1, 0.75, 0.5)
    others = Settings(dynamic_sampling=1.0)
    assert [each.number for each in group_examples.kept(groups, others, 3)] == [0]


def test_a_completion_alone_in_its_group_lacks_no_signal():
    """Each of ppo's usual groups is one completion, which the value head is compared with."""
    groups = [group(0, [3], rewards=(1.0,)), group(1, [4], rewards=(0.0,))]
    facts = phase_facts.of_phase(groups, groups, Settings(group_size=1))
    assert "no_signal_share" not in facts
    assert of_rollouts(facts) == "reward 0.500  length 1  cut 0%"


def test_a_penalty_of_cut_answers_is_a_signal():
    """Two wrong answers, one of them cut: the penalty says which is better."""
    groups, others = [group(0, [3], [4], rewards=(0.0, 0.0), cut=(1,))], {"dynamic_sampling": 1.0}
    groups.append(group(1, [3], [4], rewards=(0.0, 0.0)))
    settings = Settings(cut_answers="penalise", **others)
    assert [each.number for each in group_examples.kept(groups, settings, 2)] == [0]
    assert phase_facts.of_phase(groups, groups, settings)["no_signal_share"] == 0.5
    assert not group_examples.has_signal(groups[0], Settings(cut_answers="learn", **others))


def test_columns_lie_beside_the_tokens_of_their_completions():
    groups = [group(0, [3, 4], [5], rewards=(1.0, 0.0)), group(1, [6], [7, 8], rewards=(2.0, 1.0))]
    column = np.arange(6, dtype=np.float32)
    made = group_examples.examples_of(groups, Settings(), {"advantages": column})
    batch = asked().learning_from(Sequences(made, False, 0, 0), 1).at(0)[0]
    assert batch.labels.tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.token_columns["advantages"].tolist() == column.tolist()


# ----------------------------------------------------------------------------------- the files


def recorded_shard(folder):
    """A closed file of two groups, one without rewards."""
    file = ShardFile(folder, 0, "run")
    file.sampled([group(0, [3], [4]), group(1, [5], [6])])
    file.scored(0, [{"reward": 1.0, "parts": {"rule": 1.0}}, {"reward": 0.0, "parts": {}}])
    file.failed(1, "no answer")
    file.close()
    return file


def test_what_was_recorded_survives_and_a_torn_line_goes(tmp_path):
    file = recorded_shard(tmp_path)
    with file.path.open("ab") as torn:
        torn.write(b'{"prompt": 1, "rewards": [{"rew')
    again = ShardFile(tmp_path, 0, "run")
    assert again.reasons == {1: "no answer"}
    assert [each.is_scored for each in again.groups.values()] == [True, False]
    assert [each.reward for each in again.groups[0].rollouts] == [1.0, 0.0]
    again.scored(1, [{"reward": 2.0, "parts": {}}, {"reward": 3.0, "parts": {}}])
    again.close()
    for of, known in (("run", [True, True]), ("another run", [])):
        with closing(ShardFile(tmp_path, 0, of)) as found:
            assert [each.is_scored for each in found.groups.values()] == known


def test_any_altered_byte_of_a_shard_is_found_with_its_line(tmp_path):
    """The last line may be one that the end of the machine left half written: it goes."""
    path = recorded_shard(tmp_path).path
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        number = content[:place].count(b"\n") + 1
        if number < len(lines):
            with pytest.raises(RunDirectoryError, match=rf"shard-0000.jsonl:{number}: was altered"):
                ShardFile(tmp_path, 0, "run")
            continue
        with closing(ShardFile(tmp_path, 0, "run")) as file:
            assert (file.groups[0].is_scored, file.reasons) == (True, {})


def test_a_full_disk_is_named_with_the_file_though_closing_fails_too(tmp_path):
    def fail(file, *line):
        file._file.close()
        file._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the next line
        with closing(file):
            (file.append if isinstance(file, LinesFile) else file.failed)(*line)

    full = f"{tmp_path}/.* cannot be written now: the disk is full"
    with pytest.raises(Outage, match=full):
        fail(ShardFile(tmp_path, 0, "run"), 0, "no reason")
    with pytest.raises(Outage, match=full):
        fail(LinesFile(tmp_path / "lines", "", "", print), {})


def test_a_sealed_phase_reads_back_the_same_floats(tmp_path):
    files, numbers = PhaseFiles(tmp_path), np.random.default_rng(0)
    values = np.float32(-(numbers.random(50) ** 9))
    made = Group(0, "a:1", (1,), (Rollout((3,) * 50, values, "stop", "x", 0.1, {"r": 0.1}),), True)
    files.folder.mkdir()
    files.seal(4, {"of": "run"}, [made])
    header, [found] = files.read(4, "run")
    assert header == {"of": "run"}
    assert np.array_equal(found.rollouts[0].sampler_logprobs, values)
    assert found.rollouts[0].reward == 0.1
    with pytest.raises(RunDirectoryError, match="of another run"):
        files.read(4, "another")
    path = files.path(4)
    path.write_text(path.read_text().replace('"x"', '"y"'))
    with pytest.raises(RunDirectoryError, match=r"phase-00005.jsonl is damaged"):
        files.read(4, "run")
    assert files.read(5, "run") is None


# -------------------------------------------------------------------------------------- a run


def metrics(run):
    return read_jsonl(run / "metrics.jsonl")


def tokens(run):
    """Every completion of a run, by phase and group."""
    return [
        [each["ids"] for each in json.loads(line)["rollouts"]]
        for path in sorted((run / "rollouts").glob("phase-*.jsonl"))
        for line in path.read_text().splitlines()[1:-1]
    ]


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def equal(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


OFTEN = {"checkpoint__every_steps": 1, "train__max_steps": 3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of three phases, with the groups that it sampled and rewarded."""
    workshop = Workshop(tmp_path_factory.mktemp("undisturbed"))
    with asking() as found:
        run = workshop.train(**sampled.settings(workshop, **OFTEN))
    return SimpleNamespace(run=run, sampled=found[0], rewarded=found[1])


def test_a_run_samples_learns_and_keeps_the_record(undisturbed):
    run = undisturbed.run
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["ratio"] == 1 for line in lines)  # to the bit: the same weights sampled
    assert lines[0]["completion_length"] == 12
    assert lines[0]["reward"] > 1
    header, *groups, end = (run / "rollouts/phase-00002.jsonl").read_text().splitlines()
    assert json.loads(header)["step"] == 1
    assert json.loads(end)["groups"] == len(groups) == 4
    found = json.loads(groups[0])["rollouts"][0]
    assert np.abs(np.subtract(found["old_logprobs"], found["sampler_logprobs"])).max() < 1e-4
    samples = read_jsonl(run / "samples.jsonl")
    assert {"prompt", "completion", "reward"} <= samples[0].keys()
    assert not list((run / "rollouts").glob("*.partial"))


@pytest.mark.proof
def test_several_steps_of_a_phase_learn_from_the_same_file(workshop):
    more = {"steps_per_phase": 2, "passes": 2}
    steps = {"train__max_steps": 6, "data__eval_fraction": 0.2}
    run = workshop.train(**sampled.settings(workshop, rollouts=more, **steps))
    lines = metrics(run)
    # 10 prompts an epoch, 8 a phase: 2 x 2 steps, then 1 x 2 with the rest.
    assert [line["ratio"] == 1 for line in lines] == [True, False, False, False, True, False]
    assert len(tokens(run)) == 10
    assert read_jsonl(run / "eval.jsonl")[-1]["eval_prompts"] == 2


@pytest.mark.proof
def test_rewards_rise(workshop):
    more = {"train__max_steps": 12, "optimizer__lr": 3e-2, "train__global_batch_size": 32}
    run = workshop.train(**sampled.settings(workshop, rollouts={"group_size": 16}, **more))
    rewards = [line["reward"] for line in metrics(run)]
    assert sum(rewards[-3:]) > 1.25 * sum(rewards[:3])


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["rloo", "ppo"])
def test_other_policy_gradients_sample_too(workshop, kind):
    run = workshop.train(**sampled.settings(workshop, kind, objective__beta=0.0))
    assert all(line["ratio"] == 1 for line in metrics(run))


@pytest.mark.proof
def test_adapters_sample_and_compare_with_the_model_below_them(workshop):
    """The first phase is the base's; a later one is the adapted policy's, and the KL rises."""
    base = workshop.train("base", train__max_steps=1) / "model"
    lora = pretrained(base, adapter__kind="lora", objective__beta=0.05)
    runs = [
        workshop.train(f"lr{lr}", **sampled.settings(workshop, **lora, optimizer__lr=lr))
        for lr in (1e-9, 3e-2)
    ]
    still, moved = map(tokens, runs)
    assert still[:4] == moved[:4]
    assert still[4:] != moved[4:]
    kl = [line["kl"] for line in metrics(runs[1])]
    assert kl[0] == 0
    assert kl[-1] > 1e-3


@pytest.mark.proof
def test_all_weights_compare_with_a_frozen_copy_of_their_start(workshop):
    run = workshop.train(**sampled.settings(workshop, objective__beta=0.05))
    kl = [line["kl"] for line in metrics(run)]
    assert kl[0] == 0
    assert kl[-1] > 1e-3


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_several_processes_sample_and_learn_like_one(workshop):
    """The same tokens, and rewards, losses and evaluations within rounding; weights to 1e-5."""
    topologies = ("ddp", "fsdp2", "zero2", "zero3")
    own = sampled.settings(
        workshop, train__micro_batch_size=4, data__eval_fraction=0.2, evaluation__every_steps=2,
        objective__beta=0.04, rollouts={"steps_per_phase": 2, "dynamic_sampling": 1.0},
    )  # fmt: skip
    alone, arguments = workshop.train("alone", **own), list[object]()
    for topology in topologies:
        arguments += [f"topology:{topology}", workshop.write(workshop.config(topology, **own))]
    launch = several(workshop.folder, "ddp", 2, *arguments)
    assert launch.codes() == [0, 0], launch.output()
    for topology in topologies:
        run = workshop.run_dir(topology)
        assert tokens(run) == tokens(alone), topology
        for one, other in zip(metrics(run), metrics(alone), strict=True):
            for name in ("loss", "reward", "grad_norm", "kl", "entropy"):
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (topology, name)
        assert read_jsonl(run / "eval.jsonl")[-1]["reward"] == pytest.approx(
            read_jsonl(alone / "eval.jsonl")[-1]["reward"]
        )
        mine, wanted = weights(run), weights(alone)
        assert max(float((mine[name] - wanted[name]).abs().max()) for name in wanted) < 1e-4


UNSHARDED = "fsdp2:--fsdp_reshard_after_forward:false"
LORA = {"adapter__kind": "lora", "objective__beta": 0.05}
ALONE_OR_TOGETHER = {
    "fsdp2": ("fsdp2", {}),
    "sharded": ("zero3 fsdp2_offload zero3_offload", {}),
    "averaged": (UNSHARDED, {"train__precision": "bf16", "train__ema_decay": 0.5}),
    "lora": ("fsdp2 zero3", LORA),
    "qlora": ("fsdp2 zero3", {"adapter__kind": "qlora"}),
    "bf16": ("zero3", {"train__precision": "bf16", "objective__beta": 0.05}),
    "one process": ("fsdp2_offload zero3", {}),
}


@pytest.mark.proof
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ALONE_OR_TOGETHER)
def test_whole_weights_sample_and_learn_like_all_processes_together(workshop, case):
    """To the bit; of the shards of a phase one process has two and the other one."""
    processes = 1 if case == "one process" else 2
    topologies, own = ALONE_OR_TOGETHER[case]
    shape = TINY_LLAMA | {"hidden_size": 384}  # DeepSpeed never parts small weights
    own = {"model__config": shape, **own}
    if "adapter__kind" in own:
        own |= pretrained(workshop.train("base", train__max_steps=2, model__config=shape) / "model")
    own = sampled.settings(
        workshop, train__global_batch_size=12, train__micro_batch_size=3, train__max_steps=2,
        data__eval_fraction=0.2, evaluation__every_steps=2, rollouts={"shard_size": 1}, **own,
    )  # fmt: skip
    pairs, arguments = [], list[object]()
    for number, topology in enumerate(topologies.split()):
        one, other = f"whole{number}", f"together{number}"
        arguments += [f"topology:{topology}", workshop.write(workshop.config(one, **own))]
        arguments += ["break:no_room", workshop.write(workshop.config(other, **own))]
        pairs.append((workshop.run_dir(one), workshop.run_dir(other)))
    launch = several(workshop.folder, re.split("[ :]", topologies)[0], processes, *arguments)
    assert launch.codes() == [0] * processes, launch.output()
    assert launch.output().count("each process samples by itself") == len(pairs)
    assert launch.output().count("note: all processes gather the weights") == len(pairs)
    for run, together in pairs:
        assert lines_of_phases(run) == lines_of_phases(together)
        for name in ("metrics.jsonl", "eval.jsonl"):
            one, other = map(without_times, (read_jsonl(each / name) for each in (run, together)))
            assert one == other
        [one], [other] = (list((each / "model").glob("*.safetensors")) for each in (run, together))
        assert one.read_bytes() == other.read_bytes()


def lines_of_phases(run):
    """The groups of each phase, with what sampler and policy said of each token."""
    return [read_jsonl(path)[1:-1] for path in sorted((run / "rollouts").glob("phase-*.jsonl"))]


def without_times(lines):
    timed = ("seconds", "per_second", "memory_gb", "mfu")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]


def test_a_process_that_cannot_write_a_shard_leaves_no_other_in_a_pass(tmp_path):
    """Where processes sample together, each has to come to the same collectives in turn."""

    def collectives(can_write):
        calls = list[str]()

        def on_every(action):
            try:
                return action()
            finally:
                calls.append("on_every")

        topology = SimpleNamespace(
            rank=0, data_rank=0, num_data=1, parallel=SimpleNamespace(num_context=1),
            any=lambda request: calls.append("any") or request, on_every=on_every, is_main=False,
            watchdog=SimpleNamespace(heartbeat=lambda *_: None),
        )  # fmt: skip
        folder = tmp_path / str(can_write)
        folder.mkdir()
        sampler = PhaseSampler.__new__(PhaseSampler)
        sampler.around = SimpleNamespace(
            topology=topology, stop=lambda: False, of_phase=lambda phase: "a run"
        )
        sampler.files, sampler.settings = PhaseFiles(folder), Settings()
        sampler.collector = SimpleNamespace(together=True, drawn=lambda *_: killed())
        if not can_write:
            sampler.files.folder.write_text("in the way")
        with pytest.raises(Killed if can_write else (OSError, FinetuneError)):
            sampler._collected(0, [0], 0)
        return calls

    alone, others = collectives(False), collectives(True)
    assert alone == others[: len(alone)]


class Phase:
    """Samples phase 1 of 10 prompts, 4 a phase, without a model; a run of one process.

    `rewards(number)` gives those of a group of two, None in place of one that failed, or raises.
    """

    def __init__(self, folder, rewards):
        self.sampled, self.rewarded, self.rewards = list[int](), list[int](), rewards
        settings = {"dynamic_sampling": 2.0, "shard_size": 3}
        topology = SimpleNamespace(
            rank=0, data_rank=0, num_data=1, parallel=SimpleNamespace(num_context=1),
            any=bool, on_every=lambda action: action(), on_main=lambda action: action(),
            is_main=False, watchdog=SimpleNamespace(heartbeat=lambda *_: None),
        )  # fmt: skip
        self.sampler = sampler = PhaseSampler.__new__(PhaseSampler)
        sampler.around = SimpleNamespace(
            topology=topology, stop=lambda: False, of_phase=lambda phase: "a run"
        )
        sampler.asked, sampler.files = asked(**settings), PhaseFiles(folder)
        sampler.settings = sampler.asked.rollouts
        sampler.collector = SimpleNamespace(
            together=False, drawn=self.drawn, rewards=self.rewards_of
        )

    def drawn(self, of, members):
        self.sampled += [number for number, _ in members]
        return [group(number, [3], [example], prompt=[example]) for number, example in members]

    def rewards_of(self, made, example):
        self.rewarded.append(made.number)
        return [
            Reward(each, {}, "" if each is not None else f"{made.number} fails")
            for each in self.rewards(made.number)
        ]

    def __call__(self):
        return self.sampler.sampled(0)


def test_reasons_of_the_first_round_are_kept_where_a_second_one_follows(tmp_path):
    phase = Phase(tmp_path, lambda number: (1.0, None) if number == 1 else (1.0, 0.0))
    groups = phase()
    assert [each.failed for each in groups] == ["", "1 fails", "", "", ""]


@pytest.mark.parametrize("ends_at", range(1, 9))
def test_a_phase_goes_on_with_the_groups_that_it_has_asked(tmp_path, ends_at):
    """Two of four groups have a signal, then one of two further ones, then the last."""
    rewards = {0: (1.0, 1.0), 2: (1.0, 1.0), 5: (0.0, 0.0)}

    def end(number):
        if len(before.rewarded) == ends_at:
            raise Killed
        return rewards.get(number, (0.0, 1.0))

    before = Phase(tmp_path / "killed", end)
    with contextlib.suppress(Killed):
        before()
    after = Phase(tmp_path / "killed", lambda number: rewards.get(number, (0.0, 1.0)))
    whole = Phase(tmp_path / "whole", lambda number: rewards.get(number, (0.0, 1.0)))
    found, wanted = ([each.to_json() for each in phase()] for phase in (after, whole))
    assert found == wanted
    assert whole.sampled == list(range(7))
    assert before.sampled + after.sampled == whole.sampled
    assert before.rewarded[: ends_at - 1] + after.rewarded == whole.rewarded


def test_a_group_that_is_recorded_is_not_asked_again_where_fewer_are_missing(tmp_path):
    """A reward that had failed is there at the next attempt, so the second round is smaller."""

    def failing(number):
        if number == 5:
            raise Killed
        return {1: (None, 1.0), 2: (1.0, 1.0), 4: (1.0, 1.0)}.get(number, (0.0, 1.0))

    before = Phase(tmp_path, failing)
    with pytest.raises(Killed):
        before()
    after = Phase(tmp_path, lambda number: (0.0, 1.0))
    after()
    assert before.sampled == [0, 1, 2, 3, 4, 5]
    assert not after.sampled
    assert after.rewarded == [1, 5]


# ------------------------------------------------------------------- what an end leaves behind


@contextmanager
def asking(ends_at=None, end=None):
    """Note which groups are sampled and rewarded; call `end` before a reward."""
    sampled_groups, asked_groups = list[str](), list[str]()
    draw_groups, reward_group = Collector.drawn, Collector.rewards

    def drawn(self, of, members):
        found = draw_groups(self, of, members)
        sampled_groups.extend(f"{of[0]} {each.number}" for each in found)
        return found

    def rewards(self, group, example):
        if len(asked_groups) == ends_at:
            end()
        asked_groups.append(f"{group.number} {[each.ids for each in group.rollouts]}")
        return reward_group(self, group, example)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "drawn", drawn)
        patch.setattr(Collector, "rewards", rewards)
        yield sampled_groups, asked_groups


@pytest.mark.parametrize("ends_at", short([1, 9], 9))
def test_what_was_recorded_before_a_kill_is_never_sampled_or_asked_again(
    workshop, undisturbed, ends_at
):
    own = sampled.settings(workshop, **OFTEN)
    with asking(ends_at, killed) as (before, asked_before), pytest.raises(Killed):
        workshop.train(**own)
    with asking() as (after, asked_after):
        run = workshop.train(**own)
    assert sorted(before + after) == sorted(undisturbed.sampled)
    assert sorted(asked_before + asked_after) == sorted(undisturbed.rewarded)
    assert tokens(run) == tokens(undisturbed.run)
    assert equal(run, undisturbed.run)


@pytest.mark.parametrize("ends_at", short([1, 6], 6))
def test_a_request_to_stop_in_a_rollout_saves_the_step_before(workshop, undisturbed, ends_at):
    own = sampled.settings(workshop, train__max_steps=3)
    stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with asking(ends_at, stop), pytest.raises(Preempted, match=r"SIGTERM.*run the same command"):
        workshop.train(**own)
    outcome = workshop.outcome()
    assert (outcome["state"], outcome["step"]) == ("preempted", ends_at // 4)
    saved = list((workshop.run_dir() / "checkpoints").glob("step-*"))
    assert len(saved) == ends_at // 4  # before the first step there is nothing to save
    assert equal(workshop.train(**own), undisturbed.run)


@pytest.mark.proof
def test_a_request_to_stop_ends_an_evaluation_which_the_next_attempt_makes(workshop):
    own = sampled.settings(workshop, data__eval_fraction=0.3, evaluation__every_steps=1)
    undisturbed = workshop.train("undisturbed", **own)
    stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with asking(5, stop) as (_, asked), pytest.raises(Preempted, match="at step 1; saved"):
        workshop.train(**own)
    assert len(asked) == 6, "a phase of four, and two of the four held-out prompts"
    assert not (workshop.run_dir() / "eval.jsonl").exists()
    run = workshop.train(**own)
    names = ("step", "eval_loss", "completion_length", "eval_prompts")
    found, wanted = (
        [[line[name] for name in names] for line in read_jsonl(each / "eval.jsonl")]
        for each in (run, undisturbed)
    )
    assert found == wanted
    assert equal(run, undisturbed)


@pytest.mark.proof
@pytest.mark.parametrize("full_at", [1, 2, 5])
def test_a_disk_that_fills_up_in_a_rollout_costs_nothing_that_it_took(
    workshop, undisturbed, full_at
):
    """The line that did not fit is half there."""
    own, appended = sampled.settings(workshop, **OFTEN), list[dict]()
    append = ShardFile._append

    def filling(self, values):
        appended.append(values)
        if len(appended) == full_at:
            self._file.write(json.dumps(values).encode()[:20])
            self._file.flush()
            with failures.writing(self.path):
                raise OSError(errno.ENOSPC, "No space left on device")
        append(self, values)

    full = r"shard-000\d.jsonl cannot be written now: the disk is full"
    with pytest.MonkeyPatch.context() as patch, asking() as (before, asked_before):
        patch.setattr(ShardFile, "_append", filling)
        with pytest.raises(Outage, match=full):
            workshop.train(**own)
    assert workshop.outcome()["state"] == "failed"
    with asking() as (after, asked_after):
        run = workshop.train(**own)
    lost = 2 * ("groups" in appended[-1]), "rewards" in appended[-1]
    counts = len(before + after), len(asked_before + asked_after)
    wanted = len(undisturbed.sampled), len(undisturbed.rewarded)
    assert [one - other for one, other in zip(counts, wanted)] == list(lost)
    assert tokens(run) == tokens(undisturbed.run)
    assert equal(run, undisturbed.run)


@pytest.mark.proof
def test_a_sealed_phase_is_not_sampled_again_though_its_checkpoint_is_lost(workshop):
    own = sampled.settings(workshop, checkpoint__every_steps=1, checkpoint__keep_last=9)
    undisturbed = workshop.train("undisturbed", **own)
    run = workshop.train(**own)
    forget(run, 1)
    shutil.rmtree(run / "model")
    with asking() as (of_all, asked_all):
        workshop.train(**own)
    assert not of_all
    assert not asked_all
    assert equal(run, undisturbed)


@pytest.mark.proof
def test_another_machine_gets_a_phase_from_the_store(workshop):
    """It was uploaded before its first step, after which the first machine goes."""
    own = sampled.settings(workshop, rollouts={"steps_per_phase": 2})
    own["checkpoint__storage"] = f"file://{workshop.folder}/store"
    undisturbed = workshop.train("undisturbed", **own)
    stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with asking(7, stop), pytest.raises(Preempted, match="at step 1; saved"):
        workshop.train(**own)
    shutil.rmtree(workshop.run_dir())
    with asking() as (of_all, _):
        run = workshop.train(**own)
    assert {each.split()[0] for each in of_all} == {"1", "2"}  # phases count from 0
    assert tokens(run) == tokens(undisturbed)
    assert equal(run, undisturbed)


def test_a_sealed_phase_that_was_not_uploaded_is_uploaded_by_the_next_attempt(workshop):
    own = sampled.settings(workshop, train__max_steps=1)
    own["checkpoint__storage"] = f"file://{workshop.folder}/store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "upload_file", lambda *_: killed())
        with pytest.raises(Killed):
            workshop.train(**own)
    run = workshop.train(**own)
    name = "rollouts/phase-00001.jsonl"
    stored = workshop.folder / "store" / run.name / name
    assert stored.read_bytes() == (run / name).read_bytes()


def test_a_phase_that_is_gone_is_not_sampled_by_weights_that_learned_from_it(workshop):
    own = sampled.settings(workshop, rollouts={"steps_per_phase": 2}, train__max_steps=2)
    own["checkpoint__every_steps"] = 1
    run = workshop.train(**own)
    forget(run, 1)
    (run / "rollouts" / "phase-00001.jsonl").unlink()
    with pytest.raises(RunDirectoryError, match=r"phase-00001.jsonl is missing, .* since step 0"):
        workshop.train(**own)


# ------------------------------------------------------------------------------------ bad input


BAD = {
    "top_p": ({"top_p": 0.9}, "top_p: learning divides by the probability that a token had"),
    "groups": ({"group_size": 3}, "16 completions cannot be parted into groups of 3"),
    "length": (
        {"max_new_tokens": 96},
        "96 tokens have to hold a prompt and a completion of up to 96",
    ),
    "signal": ({"dynamic_sampling": 1.0, "group_size": 1}, "has nothing to differ from"),
    "penalty": ({"cut_penalty": 2.0}, "cut_penalty is only for cut_answers: penalise"),
}


def test_rows_of_text_are_no_prompts_whatever_the_template(workshop):
    rows = write_jsonl(workshop.folder / "texts.jsonl", [{"text": "a b"}] * 4)
    for more in ({}, {"data__template": "plain"}):
        with pytest.raises(ConfigError, match=r"texts.jsonl: rows of text ask nothing, .* prompt"):
            workshop.check(**sampled.settings(workshop, **more) | {"data__train": str(rows)})


@pytest.mark.parametrize("name", list(BAD))
def test_settings_that_cannot_work_are_refused(workshop, name):
    rollouts, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        workshop.check(**sampled.settings(workshop, rollouts=rollouts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__packing": True}, "data.packing: would be ignored"),
        ({"data__truncation": "right"}, "data.truncation: right would cut the end of a prompt"),
        ({"train__neftune_alpha": 5.0}, "the ratio of their probabilities would not start at 1"),
        ({"objective__kind": "sft", "objective__rewards": None}, "belongs to grpo"),
        ({"adapter__kind": "lora", "adapter__init": "pissa", "objective__stop_kl": 1.0},
         "adapter.init: pissa starts from other weights than the base's"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_rollouts_are_refused(workshop, changes, message):
    with pytest.raises(ConfigError, match=message):
        workshop.check(**sampled.settings(workshop) | changes)


def test_a_wrong_setting_is_not_blamed_on_the_default_that_stands_for_it(workshop):
    own = sampled.settings(workshop, rollouts={"temperature": 0.0})
    with pytest.raises(ConfigError, match="1 problem in") as found:
        workshop.check(**own)
    assert "max_length" not in str(found.value)


def test_a_prompt_that_leaves_no_room_is_refused_with_its_line(workshop):
    own = sampled.settings(workshop)
    rows = [{"prompt": "a"}, {"prompt": "b" * 100}]
    own["data__train"] = str(write_jsonl(workshop.folder / "long.jsonl", rows))
    with pytest.raises(
        DataError, match=r"long.jsonl:2: \d+ tokens and completions of 12 .* are over"
    ):
        workshop.check(**own)


def test_completions_have_to_fit_into_the_positions_of_the_model(workshop):
    own = sampled.settings(workshop, data__max_length=9000, data__truncation="left")
    positions = TINY_LLAMA["max_position_embeddings"]
    own["objective__rollouts"] |= {"max_new_tokens": positions}
    with pytest.raises(ConfigError, match=rf"max_new_tokens: the model has {positions:,} pos.*low"):
        workshop.check(**own)
    own["objective__rollouts"] |= {"max_new_tokens": positions - 5}
    own["data__truncation"] = "error"
    with pytest.raises(DataError, match=rf"prompts.jsonl:1: .* the model's {positions} positions"):
        workshop.check(**own)
    with pytest.raises(DataError, match=r"no prompt is left; lower objective.rollouts.max_new_tok"):
        workshop.check(**own | {"data__truncation": "drop"})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([((1.0, 1.0), ()), ((1.0, 1.0), ())],
         "all 4 completions of the first phase have the reward 1, so none is better than another"),
        ([((1.0, 0.0), (0, 1))], "it cut all 2 completions of the first phase"),
    ],
)  # fmt: skip
def test_a_first_phase_that_teaches_nothing_is_named(groups, message):
    made = [group(n, [3], [4], rewards=r, cut=cut) for n, (r, cut) in enumerate(groups)]
    with pytest.raises(ConfigError, match=message):
        group_examples.require_some(0, made, made, Settings())
    group_examples.require_some(1, made, made, Settings())
    with pytest.raises(FinetuneError, match="phase 1: every group lacks a reward"):
        group_examples.require_some(0, made, [], Settings())


@pytest.mark.proof
def test_a_reward_that_fails_everywhere_is_asked_again_by_the_same_command(workshop):
    def failing(self, completions):
        return [Reward(None, {}, "the judge is away") for _ in completions]

    own = sampled.settings(workshop, train__max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewards, "__call__", failing)
        with pytest.raises(FinetuneError, match=r"every group lacks a reward: the judge is away"):
            workshop.train(**own)
    with asking() as (of_all, asked_all):
        workshop.train(**own)
    assert not of_all
    assert len(asked_all) == 4


def test_a_step_that_diverges_names_the_prompts_that_it_learned_from(workshop):
    """Not those that it would have learned from, had no group been left out."""
    own = sampled.settings(workshop, rollouts={"steps_per_phase": 2})
    reward_group, places = Collector.rewards, list[str]()

    def rewards(self, group, example):
        places.append(group.place)
        found = reward_group(self, group, example)
        return [replace(each, total=None) for each in found] if group.number < 4 else found

    def diverging(*given, **more):
        raise TrainingDiverged("loss nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "rewards", rewards)
        patch.setattr("finetune.loop.train_step", diverging)
        with pytest.raises(TrainingDiverged) as error:
            workshop.train(**own)
    assert str(error.value).endswith(f"look at its rows: {places[4]}, {places[5]}")


@pytest.mark.parametrize("kind", short(["ppo", "grpo", "rloo"], "ppo"))
def test_a_later_phase_whose_completions_are_all_masked_teaches_nothing(workshop, kind):
    """Such a phase is on the disk by then: a fault would meet every further attempt."""
    own = sampled.settings(
        workshop, kind, train__max_steps=3, objective__beta=0.1, rollouts={"cut_answers": "mask"}
    )
    draw_groups = Collector.drawn

    def drawn(self, of, members):
        end = "length" if of[0] == 1 else "stop"
        found = draw_groups(self, of, members)
        return [
            replace(each, rollouts=tuple(replace(it, finish_reason=end) for it in each.rollouts))
            for each in found
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "drawn", drawn)
        run = workshop.train(**own)
    shares = [each["cut_share"] for each in metrics(run)]
    norms = [each["grad_norm"] for each in metrics(run)]
    assert shares == [0.0, 1.0, 0.0]
    assert [norm > 0 for norm in norms] == [True, False, True]


# ----------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "asked", "reference"),
    [
        ({"prompt": "a", "answer": 7}, "a", "7"),
        ({"prompt": "a"}, "a", None),
        ({"prompt": [{"role": "user", "content": "a"}], "solution": "b"}, "a", "b"),
        ({"question": "a", "answer": "b"}, "a", "b"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "a", "b"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", "b"),
    ],
)  # fmt: skip
def test_rows_become_prompts_with_their_references(workshop, row, asked, reference):
    from finetune.data.chat_templates import load
    from finetune.data.tokenised import Options
    from finetune.models.load import bytes_tokenizer
    from finetune.rollouts import prompts

    path = write_jsonl(workshop.folder / "rows.jsonl", [row])
    tokenizer = bytes_tokenizer()
    format = "preference" if "chosen" in row else "auto"
    options = Options(format, {}, "line", None, "completion", 64, "error")
    template = load("question_answer", "prompt", None, tokenizer.special_tokens_map, {})
    found = prompts.prepare({str(path): ""}, template, tokenizer, options, 8)
    assert found.prompt(0).question == asked
    assert found.prompt(0).reference == reference
    assert found.prompt(0).fields == row
    assert tokenizer.decode(found.ids(0)).endswith("Answer:") or asked in tokenizer.decode(
        found.ids(0)
    )
