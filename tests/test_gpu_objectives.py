"""`make gpu PART=objectives` has every objective, starts its runs, and tells right from wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu
from on_gpu import correctness, helper, many_runs, objective_cases, objectives, runner
from on_gpu.objective_cases import BASE, ROLLOUTS
from on_gpu.objectives import Result

from finetune import config as configs
from finetune.config.choices import OBJECTIVES
from finetune.engine.topology import launch, support

CASES = {case.name: case for case in objective_cases.cases()}
# tests/test_gpu.py trains encoders and encoder-decoders; clm and sft are in on_gpu/matrix.py.
ELSEWHERE = {
    "sft", "clm", "mlm", "sequence_classification", "token_classification", "seq2seq",
    "span_corruption", "text_infilling",
}  # fmt: skip


def test_every_objective_is_tried_beside_the_cpu():
    beside = [case for case in CASES.values() if (case.beside or "").startswith("cpu-")]
    tried = {case.settings["objective.kind"] for case in beside}
    assert tried == OBJECTIVES.keys() - ELSEWHERE


def test_reinforcement_is_tried_by_every_method_and_kind_of_topology():
    grpo = [case for case in CASES.values() if case.settings["objective.kind"] == "grpo"]
    assert {case.settings.get("adapter.kind") for case in grpo} == {None, "lora", "qlora"}
    assert {case.topology for case in grpo} == {None, "fsdp2", "zero2", "zero3"}
    assert {case.precision for case in grpo} == {"fp32", "bf16", "fp16"}
    assert any(case.is_interrupted for case in grpo)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_case_is_a_run_that_starts(case, tmp_path):
    """Its config is valid, its topology takes it, and its words stand for paths."""
    lab = SimpleNamespace(work=tmp_path)
    config, _ = configs.parse(["--config", str(objectives.config(case, lab))])
    parallel = launch.ParallelConfig(case.topology or "single", 1, num_context=1)
    assert not list(support.conflicts(config, parallel))
    assert config.train.max_steps // config.checkpoint.every_steps >= 2
    assert case.rows in helper.ROWS_OF or case.rows == "questions"
    if case.samples:  # a phase is two steps, and its groups fill them
        assert (
            BASE["train.global_batch_size"] % case.settings["objective.rollouts"]["group_size"] == 0
        )
        assert ROLLOUTS["steps_per_phase"] * 2 == objective_cases.STEPS


def test_references_are_there_and_cases_of_a_process_share_its_topology():
    for case in CASES.values():
        assert case.beside is None or case.beside in CASES
        others = [each for each in CASES.values() if each.process == case.process]
        assert {(each.topology, each.on_cpu) for each in others} == {(case.topology, case.on_cpu)}
    assert objectives.chosen("^zero3-grpo-full$")[0].name == "cpu-grpo-full"
    assert objectives.chosen("no such case") == []
    of_model = {case.name for case in objectives.chosen("^rewarded-by-model-lora$")}
    assert of_model >= {"reward-full", "cpu-reward-full"}
    places = {name: place for place, name in enumerate(CASES)}
    for case in CASES.values():  # a process runs its cases in this order
        if reward := objectives.reward_run(case):
            assert CASES[reward].process == case.process
            assert places[reward] < places[case.name]


# ------------------------------------------------------------------------------ right or wrong


def sampled(number, gap=0.0):
    """A completion whose tokens are made of a number."""
    return {
        "ids": [number, 2],
        "sampler_logprobs": [-1.0, -2.0],
        "old_logprobs": [-1.0 - gap, -2.0],
    }


def result(**changes):
    metrics = [
        {"loss": 0.5, "grad_norm": 1.0, "ratio": 1.0 + 0.1 * (n % 2), "kl": 0.1 * n}
        for n in range(4)
    ]
    made = Result([0], metrics=metrics, evals=[{"eval_loss": 1.0}], saves=2)
    made.phases = [[sampled(5), sampled(6)], [sampled(7), sampled(8)]]
    return replace(made, **changes)


GRPO, DPO = CASES["grpo-lora"], CASES["dpo-full"]


def with_metric(number, **values):
    metrics = result().metrics
    metrics[number] = metrics[number] | values
    return {"metrics": metrics}


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        (GRPO, {}, ""),
        (DPO, {"phases": []}, ""),
        (GRPO, {"codes": [1], "message": "RuntimeError: on two devices"}, "on two devices"),
        (CASES["resumed-grpo-lora"], {}, "ended with [0], not [75, 0]"),
        (GRPO, with_metric(2, ratio=1.0000001), "the ratio of step 3, the first of its phase"),
        (GRPO, with_metric(0, kl=0.01), "the divergence of the first step"),
        (GRPO, with_metric(1, loss=None), "not finite"),
        (GRPO, {"phases": [[sampled(5, 0.01)], [sampled(7)]]}, "nats from the update's"),
        (GRPO, {"phases": [[sampled(5)]]}, "1 phases of 2"),
        (GRPO, {"saves": 1}, "1 saves"),
        (GRPO, {"metrics": result().metrics[:3]}, "3 steps of 4"),
        (GRPO, with_metric(3, loss=0.51), "losses differ by 2.0e-02"),
        (GRPO, with_metric(3, grad_norm=1.1), "gradient norms differ"),
        (GRPO, {"phases": [[sampled(4)], [sampled(7)]]}, "its first completions are not those"),
    ],
)
def test_a_run_is_right_by_itself_and_beside_its_reference(case, changes, reason):
    row = objectives.row_of(case, result(**changes), result())
    assert row.status == ("wrong" if reason else "right"), row.reason
    assert reason in row.reason


def test_steps_after_other_completions_are_not_compared():
    """One token that differs is another phase from there on, and no error of arithmetic."""
    other = [result().phases[0], [sampled(9), sampled(8)]]
    row = objectives.row_of(GRPO, result(**with_metric(3, loss=9.0)), result(phases=other))
    assert (row.status, row.values["steps compared"]) == ("right", 2)


def test_a_process_that_breaks_tells_which_run_it_was(tmp_path):
    """The runs after it are started again; without a reference a run proves nothing."""
    (tmp_path / "single.jsonl").write_text(json.dumps({"begun": "grpo-lora"}) + "\n")
    lab = SimpleNamespace(work=tmp_path, clock=runner.Clock(60))
    ended = runner.Ended(-6, 1.0, "CUDA error: an illegal memory access\n")
    found = objectives.read([GRPO, DPO], tmp_path / "single.jsonl", ended, lab)
    assert found["grpo-lora"].message == "its process ended: CUDA error: an illegal memory access"
    assert "before" in found["dpo-full"].message
    assert objectives.row_of(GRPO, found["grpo-lora"], result()).status == "wrong"
    assert objectives.row_of(GRPO, result(), None).status == "no turn"
    assert objectives.row_of(GRPO, None, None).status == "no turn"


def test_the_second_phase_is_interrupted_in_its_middle():
    assert objectives.stop_of(CASES["resumed-dpo-full"]) == {"step": 2}
    assert objectives.stop_of(GRPO) == {"group": 6}  # of four in each
    assert objectives.stop_of(CASES["ppo-full"]) == {"group": 24}
    assert correctness.command("fsdp2", ROOT)[-3:][0] == "train.py", "run_group replaces these"


def test_a_run_is_told_to_stop_at_a_call_of_a_number(monkeypatch):
    flag, calls = SimpleNamespace(reason=None), []
    monkeypatch.setattr(many_runs.loop, "train_step", lambda: calls.append(flag.reason))
    with many_runs.stopped(flag, {"step": 2}):
        for _ in range(3):
            many_runs.loop.train_step()
    many_runs.loop.train_step()
    assert calls == [None, "SIGTERM", "SIGTERM", "SIGTERM"]
    assert callable(many_runs.ShardFile.scored), "what counts groups"


def test_all_parts_fit_a_slot_of_fifteen_minutes():
    def minutes(part, asked="all", given=None, on_cpu=False):
        return gpu.minutes_of(part, SimpleNamespace(part=asked, minutes=given, cpu=on_cpu))

    assert gpu.OF_ALL.keys() == {*gpu.PARTS}
    assert sum(map(minutes, gpu.PARTS)) <= 14.5
    assert minutes("speed", asked="speed") == gpu.MINUTES
    assert (minutes("speed", given=9.0), minutes("speed", on_cpu=True)) == (9.0, 600.0)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_a_rehearsal_runs_interrupts_and_compares_without_a_gpu(tmp_path):
    """A reference, the same run interrupted and resumed, and under ZeRO-2."""
    only = "^(resumed|zero2)-grpo-lora$"
    words = ["benchmarks/gpu.py", "objectives", "--cpu", "--only", only, "--out", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "objectives.json").read_text())["rows"]
    assert {row["name"]: row["status"] for row in rows} == {
        f"{name}grpo-lora": "right" for name in ("cpu-", "", "resumed-", "zero2-")
    }
    assert all(row["values"].get("steps compared", 4) == 4 for row in rows)
