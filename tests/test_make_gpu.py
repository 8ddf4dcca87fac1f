"""`make gpu` covers its matrix, tells right from wrong, and rehearses without a GPU."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
import typing
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from conftest import ROOT, pretrained, read_jsonl
from faults.forked import fork

sys.path.append(str(ROOT / "benchmarks"))
import attention
import chip
import gpu
import head
import optim
from on_gpu import correctness, helper, matrix, memory, memory_cases, picture, report, runner, speed
from on_gpu.correctness import Curves
from on_gpu.matrix import Case, Tolerance
from on_gpu.runner import Clock, Row

from finetune import config as configs
from finetune.config import fields
from finetune.engine.topology import launch, support
from finetune.models.varlen_choice import Work
from finetune.replay import NORM, TOLERANCE

CASES = matrix.cases()


# ---------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize(
    ("setting", "never"),
    [
        ("adapter.kind", set()),
        ("adapter.init", set()),
        ("adapter.quantization", set()),
        ("optimizer.kind", set()),
        ("train.precision", set()),
        ("model.attention", {"cudnn"}),
        ("model.dtype", {"float32"}),  # what auto is for weights that train
    ],
)
def test_every_choice_of_the_config_is_in_the_matrix(setting, never):
    section, name = setting.split(".")
    annotation = fields.Config.model_fields[section].annotation
    found = [
        cls.model_fields[name]
        for cls in typing.get_args(annotation) or [annotation]
        if name in cls.model_fields
    ]
    choices = {choice for field in found for choice in typing.get_args(field.annotation)} - {"auto"}
    tried = {{**matrix.BASE, **case.settings}.get(setting, found[0].default) for case in CASES}
    assert tried >= choices - never


def test_every_topology_file_is_in_the_matrix_or_left_out_with_a_reason():
    files = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    tried = {topology for case in CASES for topology in (case.topology, case.then) if topology}
    assert tried | matrix.LEFT_OUT.keys() == files
    assert not tried & matrix.LEFT_OUT.keys()


def test_every_topology_trains_by_every_method_beside_the_plain_process():
    beside = {case.name: (case.topology, case.beside) for case in CASES}
    for topology in "single ddp fsdp2 fsdp2_offload zero1 zero2 zero3 zero3_offload".split():
        for method in matrix.METHODS:
            assert beside[f"{topology}-{method}"] == (topology, f"plain-{method}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_run_that_starts(case):
    """Its config is valid, and its topology takes it: what is refused would show nothing."""
    own = {"run.name": case.name, "model.path": "base", "data.train": "rows.jsonl"}
    config = configs.from_dict(correctness.sections({**own, **matrix.BASE, **case.settings}))
    for topology in (case.topology, case.then):
        kind, _, more = (topology or "single").partition("_")
        parallel = launch.ParallelConfig(kind, 1, offload=more == "offload", num_context=1)
        assert not list(support.conflicts(config, parallel))
    due = config.train.max_steps // config.checkpoint.every_steps
    assert due >= 2, "two saves and more in each"


def test_every_comparison_has_a_reference_and_a_reason():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert (case.beside is None) == (case.within is None)
        assert case.beside is None or case.beside in names
        assert case.within is None or case.within.why
    places = {name: place for place, name in enumerate(names)}
    assert all(places[case.beside] < places[case.name] for case in CASES if case.beside), (
        "references run first"
    )


def test_the_most_important_cases_run_first():
    """Four cores have time for every method, kind of topology, precision, and a resumption."""
    first = CASES[: len(matrix.FIRST)]
    assert {case.name for case in first} == set(matrix.FIRST)
    assert {case.topology for case in first} >= {None, "single", "ddp", "fsdp2", "zero2", "zero3"}
    assert {case.settings.get("adapter.kind") for case in first} == {None, "lora", "qlora"}


def test_resumed_means_the_same_in_docs_tests_and_matrix():
    """What `replay` calls the same on a GPU, for losses and for gradient norms."""
    resumed = [case for case in CASES if case.is_interrupted]
    assert {(case.within.loss, case.within.norm) for case in resumed} == {
        (TOLERANCE["fp32"], NORM * TOLERANCE["fp32"])
    }
    assert {case.settings["train.precision"] for case in resumed} == {"fp32"}
    said = re.sub(r"\s+", " ", (ROOT / "docs/spot.md").read_text())
    assert f"{TOLERANCE['bf16']:.0%} (float32: {TOLERANCE['fp32']:.1%})" in said
    assert TOLERANCE["bf16"] == TOLERANCE["fp16"]
    assert "a gradient norm by five times that" in said
    assert NORM == 5


def test_fp16_beside_bf16_has_the_tolerance_of_other_roundings():
    within = {case.name: case.within for case in CASES}
    assert within["fp16-lora"] == within["fp16-qlora"] == matrix.LAYOUT
    assert within["fp16"] == within["fp16-ddp"] == matrix.HALF, "compared with float32"


def test_chosen_cases_include_their_references():
    found = {case.name for case in matrix.chosen(CASES, "^zero3-fp32$")}
    assert found == {"zero3-fp32", "optimizer-adamw", "cpu-adamw"}
    assert len(matrix.chosen(CASES, "")) == len(CASES)


def test_requirements_of_a_case_follow_from_its_settings():
    needs = {case.name: case.needs for case in CASES}
    assert needs["zero3-qlora"] == {"deepspeed", "bitsandbytes"}
    assert needs["compiled-full"] == {"compiler"}
    assert needs["fp16"] == {"gpu"}
    assert needs["optimizer-lion"] == needs["init-loftq"] == {"bitsandbytes"}
    assert needs["resumed-zero2"] == {"deepspeed"}
    assert needs["float8"] == {"gpu", "ada", "torchao", "compiler"}
    assert needs["plain-full"] == set()


def test_planning_needs_no_torch():
    code = "import sys; sys.path.append('benchmarks'); import gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ------------------------------------------------------------------------------- right or wrong


NEAR = Case("own", beside="other", within=Tolerance(1e-3, 1e-2, "why"))


def curves(**changes):
    values = {
        "code": 0, "output": "", "was_out_of_turn": False, "seconds": 1.0,
        "losses": [5.0, 4.0, 3.0, 2.5, 2.0, 1.8, 1.6, 1.5], "norms": [1.0] * 8, "evals": [3.0, 2.0],
        "num_saves": 3, "opened": 2.5,
    }  # fmt: skip
    return Curves(**{**values, **changes})


def test_a_run_equal_to_its_reference_passes():
    row = correctness.row_of(NEAR, curves(losses=[5.001, *curves().losses[1:]]), curves())
    assert (row.status, row.reason, row.values["compared"]) == ("right", "", "all")
    assert row.values["loss"] == pytest.approx(2e-4)


NAN = float("nan")
CUT_OFF = {"code": None, "was_out_of_turn": True}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"losses": [5.1, *curves().losses[1:]]},
            "losses differ by 2.0e-02 from other, more than 1.0e-03 (why)",
        ),
        ({"evals": [3.0, 2.1]}, "losses differ"),
        ({"opened": 2.6}, "losses differ"),
        ({"norms": [2.0] * 8}, "gradient norms differ"),
        ({"code": 1, "output": "note\nValueError: no\n"}, "ended with 1: ValueError: no"),
        ({"code": None}, "killed, as it had not ended"),
        ({"losses": [5.0]}, "1 steps of 8"),
        ({"norms": [NAN] * 8}, "not finite"),
        ({"num_saves": 1}, "1 saves are on record"),
        ({"evals": [2.0, 3.0]}, "did not fall"),
        ({"evals": []}, "0 evaluations are on record, and at least 2 were due"),
        ({"opened": None}, "opened export"),
        ({"problem": "it ended before the signal came"}, "before the signal"),
        ({"skipped": [1, 2, 3, 4, 5]}, "5 of 8 steps overflowed"),
    ],
)
def test_a_run_unlike_its_reference_fails(changes, reason):
    row = correctness.row_of(NEAR, curves(**changes), curves())
    assert row.status == "wrong"
    assert reason in row.reason


@pytest.mark.parametrize(
    ("own", "other", "status", "reason"),
    [
        ({}, {"code": 1}, "wrong", "did not end well: ended with 1"),
        ({}, {"losses": [NAN] * 8}, "wrong", "not finite"),
        ({}, CUT_OFF, "no turn", "before other, which it is compared with"),
        ({}, None, "no turn", "before other, which it is compared with"),
        ({"code": 1}, None, "wrong", "ended with 1"),
        ({"code": 1}, CUT_OFF, "wrong", "ended with 1"),
        (CUT_OFF, {}, "no turn", "was up while it ran"),
    ],
)
def test_only_a_reference_that_ended_well_proves_anything(own, other, status, reason):
    """None: the reference has not begun. What is wrong with a run by itself needs none."""
    row = correctness.row_of(NEAR, curves(**own), None if other is None else curves(**other))
    assert row.status == status
    assert reason in row.reason


def test_steps_that_fp16_skipped_are_read_without_their_norms(tmp_path):
    """Theirs are infinite, which JSON has not."""
    lines = [
        {"loss": 5.0, "grad_norm": None, "skipped": True},
        *({"loss": loss, "grad_norm": 1.0} for loss in curves().losses[1:]),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = correctness.read(tmp_path, runner.Ended(0, 1.0, ""), 1.0)
    assert (own.skipped, own.norms, own.losses) == ([1], [1.0] * 7, curves().losses)


FP16 = replace(NEAR, name="fp16", settings={"train.precision": "fp16"})


def lab_of(cls, folder, clock, log=lambda line: None):
    """A lab without helper or environment."""
    facts = {"left_out": {"deepspeed": "why"}, "compiler": True, "gpu": "x"}
    env = {"env_on_cpu": {}} if cls is correctness.Lab else {}
    return cls(
        work=folder, logs=folder, env={}, **env, facts=facts, helper=None, clock=clock,
        is_tiny=False, log=log,
    )  # fmt: skip


def in_turns(monkeypatch, cases, runs, only=""):
    """Rows of these cases, which come out as in `runs`: name -> Curves; and what ran, in order."""
    began = []

    def run_case(case, lab, without, name):
        began.append((name, tuple(without)))
        return runs[name]

    monkeypatch.setattr(correctness, "run_case", run_case)
    monkeypatch.setattr(correctness, "make", lambda lab: None)
    monkeypatch.setattr(correctness, "run_pytest", lambda lab: [])
    monkeypatch.setattr(matrix, "cases", lambda: cases)
    monkeypatch.setattr(matrix, "LEFT_OUT", {})
    lab = lab_of(correctness.Lab, ROOT, Clock(60))
    return {row.name: row for row in correctness.rows(lab, 1, only)}, began


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"losses": [5.0, *[0.001] * 7]}, "losses differ"),
        ({"norms": [1e9] * 7}, "gradient norms differ"),
        ({"evals": [3.0, 0.1]}, "losses differ"),
        ({"opened": 0.1}, "losses differ"),
    ],
)
def test_a_run_with_skipped_steps_is_compared_with_one_that_skips_them_too(
    monkeypatch, changes, reason
):
    """After a skip the weights have moved once less, so the reference must skip the same steps."""
    skipped = {"losses": [5.0, 5.0, 3.5, 2.9, 2.4, 2.0, 1.7, 1.6], "skipped": [1]}
    other = curves(losses=skipped["losses"], norms=[7.0, *[1.0] * 7])
    runs = {
        "other": curves(),
        "fp16": curves(**{**skipped, "norms": [1.0] * 7, **changes}),
        "other-without-1": other,
    }
    found, began = in_turns(monkeypatch, [Case("other"), FP16], runs)
    assert began == [("other", ()), ("fp16", ()), ("other-without-1", (1,))]
    row = found["fp16"]
    assert row.status == ("wrong" if reason else "right")
    assert (row.values["skipped"], row.values["compared"]) == (1, "all")
    assert reason in row.reason


def test_a_reference_without_the_skipped_steps_runs_once(monkeypatch):
    runs = {
        "other": curves(),
        "other-without-1": curves(),
        **dict.fromkeys("ab", curves(skipped=[1], norms=[1.0] * 7)),
    }
    cases = [Case("other"), *(replace(FP16, name=name) for name in "ab")]
    found, began = in_turns(monkeypatch, cases, runs)
    assert [name for name, _ in began] == ["other", "a", "other-without-1", "b"]
    assert [row.status for row in found.values()] == ["right"] * 3


def test_without_time_the_less_important_cases_are_left_out(monkeypatch):
    """A case without enough time left does not start or fail; first or requested ones are tried."""
    cases = [Case("plain-full"), Case("other"), Case("plain-lora")]
    runs = dict.fromkeys((case.name for case in cases), curves(seconds=50.0))
    found, began = in_turns(monkeypatch, cases, runs)
    assert [name for name, _ in began] == ["plain-full", "plain-lora"]
    assert found["other"].status == "left out"
    assert "no time for it, 1 at once; MINUTES=3 should be enough for all" in found["other"].reason
    assert report.exit_code(list(found.values())) == 0
    assert in_turns(monkeypatch, cases, runs, only=".")[0]["other"].status == "right"


def test_cases_whose_reference_cannot_run_are_left_out(monkeypatch):
    cases = [Case("other", needs=frozenset({"deepspeed"})), NEAR]
    found, _ = in_turns(monkeypatch, cases, {"own": curves()})
    assert [row.status for row in found.values()] == ["left out", "left out"]
    assert found["own"].reason == "other, which it is compared with, has not run"
    assert in_turns(monkeypatch, cases, {"own": curves(code=1)})[0]["own"].status == "wrong"


@pytest.mark.slow
def test_a_run_can_leave_out_steps_as_fp16_does(workshop, monkeypatch):
    """A skipped step logs loss and norm; the next has its own examples and unmoved weights."""
    from on_gpu import skipping

    from finetune import loop
    from finetune.errors import ExportError

    def train(name, left_out):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "train_step", loop.train_step)  # put back at the end
            skipping.skip(left_out)
            return read_jsonl(workshop.train(name, train__max_steps=4) / "metrics.jsonl")

    whole, two, one = train("whole", set()), train("two", {1, 2}), train("one", {2})
    seen = [[(line["loss"], line["grad_norm"]) for line in lines] for lines in (whole, two, one)]
    assert seen[0][0] == seen[1][0]
    assert seen[0][:2] == seen[2][:2], "the step that is left out is computed"
    assert seen[0][2] != seen[2][2] != seen[1][2]
    assert [line["lr"] for line in whole] == [line["lr"] for line in two]
    with pytest.raises(ExportError, match="no weight changed in 4 steps"):
        train("none", {1, 2, 3, 4})


def test_a_run_without_reference_is_compared_with_nothing():
    alone = correctness.row_of(Case("own"), curves(), None)
    assert (alone.status, alone.values["compared"]) == ("right", "nothing")


def test_where_methods_differ_only_the_first_loss_is_compared():
    case = replace(NEAR, only_first=True)
    other_later = curves(losses=[5.0, *[1.0] * 7], norms=[9.0] * 8)
    assert correctness.row_of(case, other_later, curves()).status == "right"
    other_first = curves(losses=[5.1, *[1.0] * 7])
    assert correctness.row_of(case, other_first, curves()).status == "wrong"


def test_forecasts_are_right_within_bounds():
    assert memory.verdict(9.1, 9.87, memory.RATIO)[0] == "right"
    assert memory.verdict(8.0, 9.87, memory.RATIO)[0] == "wrong"
    assert memory.verdict(12.9, 9.87, memory.RATIO)[0] == "wrong"
    assert memory.verdict(0.5, 0.9, None)[0] == "measured", "a CPU's helper keeps what it had"


def test_each_test_of_pytest_is_a_row():
    found = correctness.tests_in(
        '<testsuites><testsuite><testcase name="a" time="1.5"><properties><property name="waits" '
        'value="9"/></properties></testcase><testcase name="b" time="0"><skipped '
        'type="pytest.skip" message="no GPU"/></testcase>'
        '<testcase name="c"><skipped type="pytest.xfail" message="of old"/></testcase><testcase '
        'name="d"><failure message="assert 1 == 2"/></testcase></testsuite></testsuites>'
    )
    found = list(found)
    assert [row.values for row in found] == [{"waits": "9"}, {}, {}, {}]
    assert [(row.status, row.reason) for row in found] == [
        ("right", ""),
        ("left out", "no GPU"),
        ("known failure", "of old"),
        ("wrong", "assert 1 == 2"),
    ]


# ------------------------------------------------------------------------------------- results


def rows(*states, part="correctness"):
    return [Row(part, f"case {number}", state, "why") for number, state in enumerate(states)]


@pytest.mark.parametrize(
    ("states", "part", "code"),
    [
        (["right", "right"], "correctness", 0),
        (["right", "left out"], "correctness", 0),
        (["right", "wrong"], "correctness", 1),
        (["left out"], "correctness", 1),
        ([], "memory", 1),
        (["right", "no turn"], "correctness", 1),
        (["right", "no turn"], "speed", 0),
        (["measured"], "speed", 0),
        (["known failure"], "correctness", 1),
        (["right", "known failure"], "correctness", 0),
    ],
)
def test_the_exit_code_says_whether_everything_was_proved(states, part, code):
    assert report.exit_code(rows(*states, part=part)) == code


def test_the_table_names_what_did_not_run_and_why(tmp_path):
    gpu = {"gpu": "NVIDIA H200", "memory_gb": 150.0, "driver": "580"}
    facts = {"versions": {"torch": "2.11.0"}, **gpu}
    found = [
        Row("correctness", "a", "right", "", 3.0, {"loss": 1.5e-7, "tokens/s": 23600.0}),
        Row("correctness", "b", "wrong", "1 | 2", 4.0),
        Row("correctness", "c", "left out", "needs deepspeed"),
        Row("correctness", "d", "left out", "needs deepspeed"),
        Row("correctness", "e", "no turn", "the time was up"),
        Row("correctness", "f", "known failure", "7 waits"),
    ]
    text = report.write(tmp_path, "correctness", found, facts, 12.0)
    assert text.splitlines() == [
        "NVIDIA H200, 150 GB, driver 580; torch 2.11.0", "",
        "|  | result | loss | tokens/s | s |", "| --- | --- | --- | --- | --- |",
        "| a | right | 1.5e-07 | 23,600 | 3 |", "| b | **wrong**: 1 \\| 2 |  |  | 4 |", "",
        "- known failure: f: 7 waits", "", "- left out: c, d: needs deepspeed", "",
        "- no turn: e: the time was up", "",
        "1 right, 1 wrong, 1 known failure, 2 left out, 1 no turn",
    ]  # fmt: skip
    assert (tmp_path / "correctness.md").read_text() == text + "\n"
    recorded = json.loads((tmp_path / "correctness.json").read_text())["rows"]
    assert [row["name"] for row in recorded] == list("abcdef")


# --------------------------------------------------------------------------- processes and time


def started(folder, code, limit=20.0, clock=None):
    return runner.run(
        [sys.executable, "-c", code], env=dict(os.environ), log=folder / "log", limit=limit,
        clock=clock or Clock(60),
    )  # fmt: skip


@pytest.mark.parametrize(("wait", "code"), [("p.wait()", None), ("", 0)])
def test_no_worker_outlives_a_process_that_ended_or_was_over_its_limit(tmp_path, wait, code):
    """A worker in a session of its own, as the launcher's are, would keep its GPU memory."""
    script = (
        "import subprocess; p = subprocess.Popen(['sleep', '60'], start_new_session=True); "
        f"open('{tmp_path}/pid', 'w').write(str(p.pid)); {wait}"
    )
    ended = started(tmp_path, script, limit=20.0 if code == 0 else 1.5)
    assert (ended.code, ended.was_out_of_turn) == (code, False)
    assert has_ended(int((tmp_path / "pid").read_text()))


def has_ended(pid):
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie that its new parent has not reaped yet


def test_the_deadline_of_a_part_precedes_that_of_a_process(tmp_path):
    ended = started(tmp_path, "import time; time.sleep(60)", clock=Clock(0.3))
    assert (ended.code, ended.was_out_of_turn) == (None, True)


def test_each_process_has_its_own_part_of_the_log(tmp_path):
    started(tmp_path, "print('first')")
    ended = started(tmp_path, "raise ValueError('second')")
    assert ended.code == 1
    assert "first" not in ended.output
    assert runner.last_words(ended.output) == "ValueError: second"
    assert "first" in (tmp_path / "log").read_text()


def test_after_the_deadline_nothing_starts():
    clock, began = Clock(0.2), []

    def do(name):
        began.append(name)
        time.sleep(0.3)
        return Row("speed", name, "right")

    found = runner.side_by_side(
        1, ["a", "b"], do, clock, lambda name: Row("speed", name, "no turn")
    )
    assert began == ["a"]
    assert [row.status for row in found] == ["right", "no turn"]


def test_a_signal_before_the_first_case_ends_the_tests_that_run_beside(tmp_path, monkeypatch):
    """They take minutes, and the sender of the signal waits for the GPU."""
    begun = threading.Event()

    def run_pytest(lab):
        begun.set()
        return [started(tmp_path, "import time; time.sleep(60)", clock=lab.clock, limit=60)]

    def make(lab):
        begun.wait()
        sys.exit(1)  # as gpu.py does at SIGTERM

    monkeypatch.setattr(correctness, "run_pytest", run_pytest)
    monkeypatch.setattr(correctness, "make", make)
    lab = lab_of(correctness.Lab, tmp_path, Clock(60))
    began = time.monotonic()
    with pytest.raises(SystemExit):
        list(correctness.rows(lab, 1, ""))
    assert time.monotonic() - began < 20


def test_a_failed_request_does_not_affect_the_next(tmp_path, monkeypatch):
    """A late or killed helper is replaced, so its answer cannot be taken for the next one's."""
    (tmp_path / "helper.py").write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    what, arguments = json.loads(line)\n"
        "    time.sleep(60 if what == 'sleep' else 0)\n"
        "    os._exit(1) if what == 'die' else print(json.dumps([None, what]), flush=True)\n"
    )
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "runner.py"))
    helper = runner.Helper(dict(os.environ), tmp_path / "log", Clock(60))
    try:
        for what, limit, why in (
            ("sleep", 0.5, "did not answer to sleep in 0 s"),
            ("die", 20, "ended while it did die"),
        ):
            with pytest.raises(RuntimeError, match=why):
                helper.ask(what, limit)
            assert helper.ask("facts", 20) == "facts"
    finally:
        helper.close()


def test_a_forecast_ended_by_the_deadline_does_not_fail(tmp_path):
    lab = lab_of(memory.Lab, tmp_path, Clock(0))
    late = Future()
    late.set_exception(RuntimeError("the helper did not answer to forecast in 0 s"))
    case = memory_cases.Case("full", {})
    assert memory.measure(case, [tmp_path / "full.yaml"], late, lab).status == "no turn"


def test_processes_see_one_gpu_and_no_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    env = runner.environment(tmp_path, threads=2, on_cpu=False)
    assert env["CUDA_VISIBLE_DEVICES"] == "3"
    assert "RANK" not in env
    assert "ACCELERATE_USE_FSDP" not in env
    assert runner.environment(tmp_path, threads=2, on_cpu=True)["CUDA_VISIBLE_DEVICES"] == "-1"


def speed_rows(monkeypatch, only, measure, clock):
    """The rows of `speed`, where `measure(case, own)` stands for a run."""
    monkeypatch.setattr(speed, "one_round", lambda lab, case, own: measure(case, own))
    lab = lab_of(memory.Lab, ROOT, clock)
    return {row.name: row for row in speed.rows(lab, only)}


def test_rounds_of_speed_end_when_the_longest_no_longer_fits(monkeypatch):
    """A case stops when a round may not fit into the time of all, and reports its rounds."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def measure(case, own):
        now[0] += 0.2
        own.speeds.append(1000.0 + len(own.speeds))
        own.mfu += [] if case.by == speed.TRL else [0.4]

    found = speed_rows(monkeypatch, "^8B lora r 16(, TRL)?$", measure, Clock(0.7))
    assert [row.status for row in found.values()] == ["measured", "measured"]
    assert sorted(row.values["rounds"] for row in found.values()) == [1, 2]
    assert found["8B lora r 16, TRL"].values["mfu"] == "40.0%"
    assert found["8B lora r 16"].values["x TRL"] == 1.0


def test_a_series_of_lengths_ends_where_memory_does(monkeypatch):
    def measure(case, own):
        if case.length > 8192:
            ended = runner.Ended(1, 1.0, "torch.OutOfMemoryError: CUDA out of memory. Tried to ...")
            speed.fail(own, "it", ended)
        else:
            own.speeds.append(1.0)

    found = speed_rows(monkeypatch, "^8B lora, [0-9,]+ tokens$", measure, Clock(60))
    assert [row.status for row in found.values()] == [
        *["measured"] * 3, "out of memory", *["left out"] * 3,
    ]  # fmt: skip
    assert list(found.values())[-1].reason == "shorter sequences ran out of memory"
    rows = list(found.values())
    assert "| 8B lora, 16,384 tokens | out of memory |" in report.table(rows, {"versions": {}})
    assert report.exit_code(rows) == 0


@pytest.mark.parametrize(
    ("name", "losses", "why"),
    [
        ("8B lora r 16, TRL", [11.8, 11.0], ""),
        ("8B lora r 16, TRL", [11.8, 11.2], "its last loss is 11.2000, that of 8B lora r 16 11"),
        ("8B lora r 16, compiled", [11.0, 11.0], "its first loss is 11.0000"),
        ("8B qlora nf4, TRL", [11.8, 11.2], ""),  # TRL rounds these adapters to 16 bits
        ("8B full in bf16, TRL", [11.7, 9.0], "its first loss"),
        ("8B packs lora, TRL", [9.0, 9.0], ""),  # other documents share a pack
    ],
)
def test_losses_that_should_be_equal_are_compared(name, losses, why):
    reference = name.split(", ")[0]
    found = {
        reference: speed.Found(losses=[11.8, 11.0]),
        name: speed.Found(losses=losses),
    }
    said = speed.unequal(speed.Case.of(name, *speed.CASES[name]), found)
    assert said.startswith(why)
    assert bool(said) == bool(why)


def test_every_case_of_speed_is_a_run_that_starts():
    for name, of in speed.CASES.items():
        case = speed.Case.of(name, *of)
        values = speed.config_of(case, Path("base"), Path("rows.jsonl"))
        configs.from_dict(correctness.sections({"run.name": "a", **values}))
        assert case.by in (None, speed.TRL, speed.LITGPT) or case.needs_saved_weights
        assert case.length <= speed.SHAPES[case.size]["max_position_embeddings"]
    assert len(speed.LENGTHS) * 6 == sum(speed.LENGTH in c[1] for c in speed.CASES.values()) - 1


def test_a_run_that_is_timed_starts_from_random_weights(workshop, monkeypatch, tmp_path):
    """What one_run.py replaces has the parameters of what it stands for."""
    from on_gpu import one_run, random_model

    shape = {**memory.TINY, "max_position_embeddings": 512}
    random_model.write_folder(tmp_path / "base", shape)
    replaced = [
        (one_run.load, "load_model"), (one_run.base_identity, "hashes"),
        (one_run.base_identity, "values"), (one_run.base_identity, "fingerprints"),
        (one_run.parameters, "fingerprints"), (one_run.Saver, "save"),
        (one_run.Saver, "require"), (one_run.loop, "finish"),
    ]  # fmt: skip
    with monkeypatch.context() as patched:
        for owner, name in replaced:
            patched.setattr(owner, name, getattr(owner, name))  # put back at the end
        one_run.leave_out()
        for adapter in ({}, {"adapter__kind": "lora"}):
            run = workshop.train(
                f"timed-{len(adapter)}", **pretrained(tmp_path / "base"), **adapter
            )
            assert len(read_jsonl(run / "metrics.jsonl")) > 0
            assert not (run / "model").exists()


def test_trl_gets_the_same_rows_and_its_own_best_settings():
    def asked(name, left_out=()):
        case = speed.Case.of(name, *speed.CASES[name])
        return speed.asked_of(case, Path("b"), Path("r"), Path("o"), set(left_out), True)

    plain, best = asked("8B lora r 16, TRL"), asked("8B lora r 16, best, TRL")
    assert plain["settings"]["gradient_checkpointing"]
    assert not best["settings"]["gradient_checkpointing"]
    assert (plain["lora"], plain["dtype"]) == ({"r": 16, "lora_alpha": 32}, "bfloat16")
    assert asked("8B qlora nf4, TRL")["qlora"]
    assert asked("1B full, TRL")["dtype"] == "float32"
    packs = asked("8B packs lora, TRL")["settings"]
    assert (packs["packing"], packs["attn_implementation"]) == (True, "flash_attention_2")
    without = asked("8B packs lora, TRL", ["flash_attn.flash_attn_interface"])["settings"]
    assert without["attn_implementation"] == "sdpa"


def test_the_picture_has_a_bar_for_each_case_and_a_line_for_each_series(tmp_path):
    def row(name, tokens):
        return Row("speed", name, "measured", values={"tokens/s": tokens, "memory, GB": 9.9})

    rows = [row("8B lora", 2000.0), row("8B lora, TRL", 1000.0), Row("speed", "x", "no turn")]
    rows += [row(f"8B lora, {length:,} tokens", 1e6 / length) for length in (2048, 4096)]
    picture.write(tmp_path / "a.svg", rows, "H100 & more")
    drawn = ElementTree.parse(tmp_path / "a.svg").getroot()
    widths = [float(each.get("width")) for each in drawn.iter() if each.tag.endswith("rect")]
    assert widths[1:] == [picture.BAR, picture.BAR / 2]
    assert sum(each.tag.endswith("polyline") for each in drawn.iter()) == 1
    picture.write(tmp_path / "b.svg", rows[2:3], "nothing")
    assert not (tmp_path / "b.svg").exists()


# ------------------------------------------------------------------- kernels one by one


def cells(table):
    """Return {name: {column: cell}} of a table in markdown."""
    first, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    )
    return {row[0]: dict(zip(first[1:], row[1:])) for row in rows}


def test_every_kernel_of_attention_agrees_with_float32():
    """A document that sees its neighbour would be a tenth away, or more."""
    lengths = [7, 1, 24]
    work = Work(4, 2, 16, torch.bfloat16, False, tuple(lengths), tuple(sorted(lengths)))
    found = cells(attention.measure(work, rounds=1, rate=1e12))
    assert set(found) >= {"ours", "SDPA, flash, each document", "SDPA, mask of documents"}
    for row in found.values():
        assert float(row["error of output"]) < 1e-2
        assert float(row["of the worst gradient"]) < 1e-2


def test_packs_of_attention_are_named_by_their_documents():
    assert attention.documents("8x1024") == [1024] * 8
    mixed = attention.documents("mixed8192")
    assert (sum(mixed), max(mixed) <= 600) == (8192, True)
    with pytest.raises(Exception, match="neither 8x1024 nor mixed8192"):
        attention.documents("many")


def test_optimizers_are_measured_by_bytes_and_by_how_far_they_move(monkeypatch):
    """Steps of 1e-5 on weights of 0.02: rounding bfloat16 to the nearest loses most of them."""
    monkeypatch.setattr(optim, "SIZE", 64)
    found = {}
    for name in ("ours, stochastic rounding", "torch AdamW, fused, bf16 to the nearest"):
        row = optim.measure(name, *optim.ways()[name], count=2, rounds=1, rate=1e9)
        assert row[3] == "14", "reads weight, gradient and two averages, writes three of them"
        found[name] = float(row[-1].rstrip("%"))
    assert found["ours, stochastic rounding"] == pytest.approx(100, abs=5)
    assert found["torch AdamW, fused, bf16 to the nearest"] < 50


def test_what_fails_is_named_and_the_rest_is_measured():
    def breaks():
        raise ImportError("no such package")

    medians, failed = chip.alternate({"a": lambda: [1.0, 2.0], "b": breaks}, rounds=2)
    assert (medians, failed) == ({"a": [1.0, 2.0]}, {"b": "ImportError: no such package"})
    assert chip.notes(failed) == "\n- cannot run here: b: ImportError: no such package"


def test_the_head_gives_the_gradients_of_all_logits():
    sizes = head.made(20, 16, 50)
    right = head.gradients(head.plain, *sizes)
    for own, wanted in zip(head.gradients(head.without_kernel, *sizes), right):
        assert ((own - wanted).norm() / wanted.norm()).item() < 1e-2


# ------------------------------------------------------------------------------ the whole thing


def make_gpu(*arguments, **environment):
    command = ["make", "gpu", f"PYTHON={sys.executable}", *arguments]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    env = {**clean, "CUDA_VISIBLE_DEVICES": "-1", **environment}
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=280
    )


class HelperHere:
    """Answers in this process, which has imported torch; the real one takes 10 s to begin."""

    def __init__(self, *arguments):
        pass

    def ask(self, what, limit, **arguments):
        return helper.REQUESTS[what](**arguments)

    def close(self):
        pass


def run_forked(command, *, env, log, limit, clock, meanwhile=lambda process: True):
    """Run train.py as runner.run does, but in a forked process, which begins at once."""
    assert command[:2] == [sys.executable, "train.py"]
    part = log.with_suffix(f".{len(list(log.parent.iterdir()))}")
    began, is_done = time.monotonic(), False
    [process] = fork("train", command[2:], "single", [part], env).processes
    process.send_signal = functools.partial(os.kill, process.pid)
    while process.is_alive() and time.monotonic() < began + limit:
        is_done = is_done or meanwhile(process)
        time.sleep(0.05)
    with log.open("a") as file:
        file.write(part.read_text())
    return runner.Ended(process.exitcode, time.monotonic() - began, part.read_text())


@pytest.fixture
def at_once(monkeypatch):
    """Run benchmarks/gpu.py here, without cold processes, and return its exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        return gpu.main()

    monkeypatch.setattr(gpu, "Helper", HelperHere)
    monkeypatch.setattr(correctness, "run", run_forked)
    return run


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("is_cold", [False, True], ids=["forked", "make gpu"])
def test_a_rehearsal_without_a_gpu_runs_interrupts_resumes_and_compares(
    tmp_path, at_once, capsys, is_cold
):
    only = "^resumed-lora$"
    if is_cold:
        done = make_gpu("PART=correctness", "CPU=1", f"ONLY={only}", f"OUT={tmp_path}")
        code, printed = done.returncode, done.stdout
    else:
        code = at_once("correctness", "--cpu", "--only", only, "--out", str(tmp_path))
        printed = capsys.readouterr().out
    assert code == 0, printed
    recorded = json.loads((tmp_path / "correctness.json").read_text())["rows"]
    found = {row["name"]: row for row in recorded}
    assert {name: row["status"] for name, row in found.items()} == {
        "long-lora": "right",
        "resumed-lora": "right",
    }
    assert found["resumed-lora"]["values"]["loss"] == 0.0, "on a CPU to the bit"
    assert "preempted: " in (tmp_path / "correctness/resumed-lora.log").read_text()
    assert "| resumed-lora | right |" in printed


@pytest.mark.proof
def test_a_rehearsal_of_memory_shows_forecasts_peaks_and_the_notes_figures(tmp_path):
    only = "^OPT-350M lora, recomputed, (eager|inside)|^Falcon-7B int8, 500 tokens, rec|of 8 GB"
    done = make_gpu("PART=memory", "CPU=1", f"ONLY={only}", f"OUT={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    found = {row["name"]: (row["status"], row["values"]["notes, MB"]) for row in rows}
    assert found == {
        "1B lora, on a card of 8 GB": ("measured", ""),
        "OPT-350M lora, recomputed, eager": ("measured", "2,059"),
        "OPT-350M lora, recomputed, inside documents": ("measured", "1,595"),
        "Falcon-7B int8, 500 tokens, recomputed": ("measured", "10,369"),
    }
    assert all(row["values"]["forecast, GB"] > 0.4 for row in rows)
    assert not (tmp_path / "measured.json").exists(), "only a GPU's figures are recorded"


@pytest.mark.slow
def test_what_cannot_start_fails_at_once_with_a_reason(tmp_path, at_once, capsys):
    assert at_once("speed", "--out", str(tmp_path)) == 2
    printed = capsys.readouterr().out
    assert "no GPU: PyTorch sees no CUDA device here; --cpu (make gpu CPU=1)" in printed
    (tmp_path / "torch.py").write_text("raise ImportError('half of it is there')\n")
    done = make_gpu("PART=speed", f"OUT={tmp_path}", PYTHONPATH=str(tmp_path))
    assert "Error 2" in done.stderr
    assert "missing: torch: ImportError: half of it is there" in done.stdout


@pytest.mark.slow
def test_a_wrong_choice_of_cases_ends_with_a_reason_and_keeps_the_results_before(
    tmp_path, at_once, capsys
):
    for arguments, said in (
        (("--only", "["), "--only '[' is not a regular expression"),
        (("--minutes", "-1"), "--minutes -1: must be a number above 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            at_once("memory", "--cpu", *arguments)
        assert said in capsys.readouterr().err
    (tmp_path / "memory.json").write_text("before")
    assert at_once("memory", "--cpu", "--only", "loar", "--out", str(tmp_path)) == 2
    assert "no case of memory has a name that matches --only 'loar'" in capsys.readouterr().out
    assert (tmp_path / "memory.json").read_text() == "before"


def test_plugins_of_other_projects_do_not_end_the_tests(tmp_path):
    """Their warnings while pytest starts pass; a library's warning is still an error."""
    plugin = (
        "import pytest, warnings\nclass Own(pytest.PytestWarning): pass\n"
        "def pytest_configure(config): warnings.warn(Own('mine'))\n"
    )
    (tmp_path / "theirs.py").write_text(plugin)
    (tmp_path / "test_it.py").write_text(
        "import warnings\ndef test_quiet(): pass\ndef test_loud(): warnings.warn('old', "
        "DeprecationWarning)\n"
    )
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "theirs", "-p", "no:cacheprovider"),
        *("-c", str(ROOT / "pyproject.toml"), str(tmp_path)),
    ]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "DeprecationWarning: old" in done.stdout


def test_settings_become_sections():
    nested = correctness.sections({"train.precision": "bf16", "train.epochs": 2, "run.name": "x"})
    assert yaml.safe_load(yaml.safe_dump(nested)) == {
        "train": {"precision": "bf16", "epochs": 2},
        "run": {"name": "x"},
    }
