"""`make gpu`: that nothing is left out of its matrix, what it calls right and wrong, and a rehearsal without a GPU."""

import json
import os
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from on_gpu import correctness, matrix, memory, report, runner, speed
from on_gpu.correctness import Curves
from on_gpu.matrix import Case, Tolerance
from on_gpu.runner import Clock, Row

from finetune import config as configs
from finetune.config import fields
from finetune.engine.topology import launch, support

CASES = matrix.cases()


# ---------------------------------------------------------------------------------- the matrix


def choices(section, field):
    """The values of a Literal in finetune/config/fields.py, but for auto."""
    return set(typing.get_args(section.model_fields[field].annotation)) - {"auto"}


@pytest.mark.parametrize(
    ("section", "field", "never"),
    [
        (fields.Adapter, "kind", set()),
        (fields.Adapter, "init", set()),
        (fields.Adapter, "quantization", set()),
        (fields.Optimizer, "kind", set()),
        (fields.Train, "precision", set()),
        (fields.Model, "attention", set()),
        (fields.Model, "dtype", {"float32"}),  # what auto is for weights that train
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_every_choice_of_the_config_is_in_the_matrix(section, field, never):
    name = f"{section.__name__.lower()}.{field}"
    default = section.model_fields[field].default
    tried = {{**matrix.BASE, **case.settings}.get(name, default) for case in CASES}
    assert tried >= choices(section, field) - never


def test_every_topology_file_is_in_the_matrix_or_left_out_with_a_reason():
    files = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    tried = {topology for case in CASES for topology in (case.topology, case.then) if topology}
    assert tried | matrix.LEFT_OUT.keys() == files
    assert not tried & matrix.LEFT_OUT.keys()


def test_every_topology_trains_by_every_method_beside_the_plain_process():
    for topology in support.COLUMNS:
        found = {case.name: case.beside for case in CASES if case.topology == topology}
        assert found.items() >= {f"{topology}-{method}": f"plain-{method}" for method in matrix.METHODS}.items()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_run_that_starts(case, tmp_path):
    """Its config is valid, and its topology takes it: what is refused would show nothing."""
    values = {"run.name": case.name, "model.path": "base", "data.train": "rows.jsonl", "data.max_length": 256}
    config = configs.from_dict(correctness.sections({**values, **matrix.BASE, **case.settings}))
    for topology in (case.topology, case.then):
        kind, _, more = (topology or "single").partition("_")
        wish = launch.Wish(kind, 1, offload=more == "offload", num_context=1)
        assert not list(support.conflicts(config, wish))
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
    first = {case.beside for case in CASES if case.beside}
    assert max(places[name] for name in first) < len(first), "references run first"


def test_chosen_cases_bring_what_they_are_compared_with():
    found = {case.name for case in matrix.chosen(CASES, "^zero3-fp32$")}
    assert found == {"zero3-fp32", "optimizer-adamw", "cpu-adamw"}
    assert len(matrix.chosen(CASES, "")) == len(CASES)


def test_what_a_case_needs_follows_from_its_settings():
    needs = {case.name: case.needs for case in CASES}
    assert needs["zero3-qlora"] == {"deepspeed", "bitsandbytes"}
    assert needs["compiled-full"] == {"compiler"}
    assert needs["fp16"] == {"gpu"}
    assert needs["optimizer-lion"] == needs["init-loftq"] == {"bitsandbytes"}
    assert needs["resumed-zero2"] == {"deepspeed"}
    assert needs["plain-full"] == set()


def test_planning_needs_no_torch():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ------------------------------------------------------------------------------- right or wrong


NEAR = Case("own", beside="other", within=Tolerance(1e-3, 1e-2, "why"))


def curves(**changes):
    values = {
        "code": 0, "said": "", "was_out_of_turn": False, "seconds": 1.0, "losses": [5.0, 4.0, 3.0, 2.5, 2.0, 1.8, 1.6, 1.5],
        "norms": [1.0] * 8, "evals": [3.0, 2.0], "num_saves": 3, "opened": 2.5,
    }  # fmt: skip
    return Curves(**{**values, **changes})


def test_a_run_like_its_reference_is_right():
    row = correctness.judge(NEAR, curves(losses=[5.001, *curves().losses[1:]]), curves())
    assert (row.status, row.reason) == ("right", "")
    assert row.values["loss"] == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"losses": [5.1, *curves().losses[1:]]}, "losses differ by 2.0e-02 from other, more than 1.0e-03 (why)"),
        ({"evals": [3.0, 2.1]}, "losses differ"),
        ({"opened": 2.6}, "losses differ"),
        ({"norms": [2.0] * 8}, "gradient norms differ"),
        ({"code": 1, "said": "note\nValueError: no\n"}, "ended with 1: ValueError: no"),
        ({"code": None}, "killed, as it had not ended"),
        ({"losses": [5.0]}, "1 steps of 8"),
        ({"norms": [float("nan")] * 8}, "not finite"),
        ({"num_saves": 1}, "1 saves are on record"),
        ({"evals": [2.0, 3.0]}, "did not fall"),
        ({"evals": []}, "0 evaluations are on record, and at least 2 were due"),
        ({"opened": None}, "opened export"),
        ({"problem": "it ended before the signal came"}, "before the signal"),
        ({"num_skipped": 5}, "5 of 8 steps overflowed"),
    ],
)
def test_a_run_unlike_its_reference_is_wrong(changes, reason):
    row = correctness.judge(NEAR, curves(**changes), curves())
    assert row.status == "wrong"
    assert reason in row.reason


def test_a_reference_that_failed_proves_nothing():
    assert "did not end well" in correctness.judge(NEAR, curves(), curves(code=1)).reason
    assert "did not end well" in correctness.judge(NEAR, curves(), None).reason


def test_a_run_that_the_deadline_ended_is_not_wrong():
    assert correctness.judge(NEAR, curves(code=None, was_out_of_turn=True), curves()).status == "no turn"


def test_steps_that_fp16_left_out_are_no_error_and_end_the_comparison(tmp_path):
    """Their norm is infinite, which JSON has not."""
    lines = [
        {"loss": 5.0, "grad_norm": None, "skipped": True},
        *({"loss": loss, "grad_norm": 1.0} for loss in curves().losses[1:]),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = correctness.read(tmp_path, runner.Ended(0, 1.0, ""), 1.0)
    own = curves(losses=[5.0, *[9.0] * 7], norms=own.norms, num_skipped=own.num_skipped)
    row = correctness.judge(NEAR, own, curves())
    assert (row.status, row.values["skipped"], row.values["compared"]) == ("right", 1, "the first loss")
    assert "norm" not in row.values
    own.losses[0] = 5.1
    assert correctness.judge(NEAR, own, curves()).status == "wrong", "nothing has moved before the first step"


def test_a_row_says_what_was_compared():
    alone = correctness.judge(Case("own"), curves(), None)
    assert (alone.status, alone.values["compared"]) == ("right", "nothing")
    assert correctness.judge(NEAR, curves(), curves()).values["compared"] == "all"


def test_where_methods_differ_only_the_first_loss_is_compared():
    case = Case("own", beside="other", within=Tolerance(1e-3, 1e-2, "why"), only_first=True)
    assert correctness.judge(case, curves(losses=[5.0, *[1.0] * 7], norms=[9.0] * 8), curves()).status == "right"
    assert correctness.judge(case, curves(losses=[5.1, *[1.0] * 7]), curves()).status == "wrong"


def test_forecasts_are_right_within_bounds():
    assert memory.verdict(9.1, 9.87, memory.RATIO)[0] == "right"
    assert memory.verdict(8.0, 9.87, memory.RATIO)[0] == "wrong"
    assert memory.verdict(12.9, 9.87, memory.RATIO)[0] == "wrong"


def test_each_test_of_pytest_is_a_row():
    found = correctness.tests_in(
        '<testsuites><testsuite><testcase name="a" time="1.5"/><testcase name="b" time="0"><skipped type="pytest.skip" message="no GPU"/></testcase>'
        '<testcase name="c"><skipped type="pytest.xfail" message="7 waits"/></testcase><testcase name="d"><failure message="assert 1 == 2"/></testcase></testsuite></testsuites>'
    )
    assert [(row.status, row.reason) for row in found] == [("right", ""), ("left out", "no GPU"), ("known failure", "7 waits"), ("wrong", "assert 1 == 2")]  # fmt: skip


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
    facts = {"versions": {"torch": "2.11.0"}, "gpu": "NVIDIA H200", "memory_gb": 150.0, "driver": "580"}
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
        "- known failure: f: 7 waits", "", "- left out: c, d: needs deepspeed", "", "- no turn: e: the time was up", "",
        "1 right, 1 wrong, 1 known failure, 2 left out, 1 no turn",
    ]  # fmt: skip
    assert (tmp_path / "correctness.md").read_text() == text + "\n"
    assert [row["name"] for row in json.loads((tmp_path / "correctness.json").read_text())["rows"]] == list("abcdef")


# --------------------------------------------------------------------------- processes and time


def started(folder, code, **changes):
    values = {"env": dict(os.environ), "log": folder / "log", "limit": 20.0, "clock": Clock(60), **changes}
    return runner.run([sys.executable, "-c", code], **values)


def test_a_process_over_its_limit_is_killed_with_all_that_it_started(tmp_path):
    """Also what has a session of its own, as the processes of the launcher have."""
    code = f"import subprocess; p = subprocess.Popen(['sleep', '60'], start_new_session=True); open('{tmp_path}/pid', 'w').write(str(p.pid)); p.wait()"  # fmt: skip
    ended = started(tmp_path, code, limit=1.5)
    assert (ended.code, ended.was_out_of_turn) == (None, False)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie that its new parent has not reaped yet


def test_the_deadline_of_the_part_ends_a_process_before_its_own(tmp_path):
    ended = started(tmp_path, "import time; time.sleep(60)", clock=Clock(0.3))
    assert (ended.code, ended.was_out_of_turn) == (None, True)


def test_what_a_process_says_is_its_own_part_of_the_log(tmp_path):
    started(tmp_path, "print('first')")
    ended = started(tmp_path, "raise ValueError('second')")
    assert ended.code == 1
    assert "first" not in ended.said
    assert runner.last_words(ended.said) == "ValueError: second"
    assert "first" in (tmp_path / "log").read_text()


def test_after_the_deadline_nothing_starts():
    clock, began = Clock(0.2), []

    def do(name):
        began.append(name)
        time.sleep(0.3)
        return Row("speed", name, "right")

    found = runner.side_by_side(1, ["a", "b"], do, clock, lambda name: Row("speed", name, "no turn"))
    assert began == ["a"]
    assert [row.status for row in found] == ["right", "no turn"]


def test_processes_see_one_gpu_and_no_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    env = runner.environment(tmp_path, threads=2, on_cpu=False)
    assert env["CUDA_VISIBLE_DEVICES"] == "3"
    assert "RANK" not in env
    assert "ACCELERATE_USE_FSDP" not in env
    assert runner.environment(tmp_path, threads=2, on_cpu=True)["CUDA_VISIBLE_DEVICES"] == "-1"


def test_rounds_of_speed_end_when_the_longest_no_longer_fits(monkeypatch):
    """One clock for all: a case whose last round would not fit gets no more of them, and says how many it had."""
    clock = Clock(0.5)
    lab = memory.Lab(
        ROOT, ROOT, {}, {"left_out": {}, "compiler": True, "gpu": "x"}, None, clock, False, lambda line: None
    )

    def one_round(lab, name, topology, settings, own):
        time.sleep(0.2)
        own.speeds.append(1000.0 + len(own.speeds))
        own.mfu += [] if topology == speed.TRL else [0.4]

    monkeypatch.setattr(speed, "one_round", one_round)
    found = {row.name: row for row in speed.rows(lab, "^8B lora r 16(, TRL)?$")}
    assert [row.status for row in found.values()] == ["measured", "measured"]
    assert sum(row.values["rounds"] for row in found.values()) in (2, 3)
    assert found["8B lora r 16, TRL"].values["mfu"] == "40.0%"


# ------------------------------------------------------------------------------ the whole thing


def gpu(*arguments, **environment):
    command = ["make", "gpu", f"PYTHON={sys.executable}", *arguments]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")} | {"CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False, timeout=280)  # fmt: skip


@pytest.mark.slow
def test_a_rehearsal_without_a_gpu_runs_interrupts_resumes_and_compares(tmp_path):
    done = gpu("PART=correctness", "CPU=1", "ONLY=^resumed-lora$", f"OUT={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["name"]: row for row in json.loads((tmp_path / "correctness.json").read_text())["rows"]}
    assert {name: row["status"] for name, row in found.items()} == {"long-lora": "right", "resumed-lora": "right"}
    assert found["resumed-lora"]["values"]["loss"] == 0.0, "on a CPU to the bit"
    assert "preempted: " in (tmp_path / "correctness/resumed-lora.log").read_text()
    assert "| resumed-lora | right |" in done.stdout


@pytest.mark.slow
def test_what_cannot_start_ends_at_once_and_says_why(tmp_path):
    done = gpu("PART=speed", f"OUT={tmp_path}")
    assert "Error 2" in done.stderr
    assert "no GPU: PyTorch sees no CUDA device here; --cpu (make gpu CPU=1)" in done.stdout
    (tmp_path / "torch.py").write_text("raise ImportError('half of it is there')\n")
    done = gpu("PART=speed", f"OUT={tmp_path}", PYTHONPATH=str(tmp_path))
    assert "Error 2" in done.stderr
    assert "missing: torch: ImportError: half of it is there" in done.stdout


def test_plugins_of_other_projects_do_not_end_the_tests(tmp_path):
    """They warn about themselves, in words that pytest gives them, while pytest starts; a library's warning is still an error."""
    plugin = "import pytest, warnings\nclass Own(pytest.PytestWarning): pass\ndef pytest_configure(config): warnings.warn(Own('mine'))\n"
    (tmp_path / "theirs.py").write_text(plugin)
    (tmp_path / "test_it.py").write_text(
        "import warnings\ndef test_quiet(): pass\ndef test_loud(): warnings.warn('old', DeprecationWarning)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "theirs", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "DeprecationWarning: old" in done.stdout


def test_settings_become_sections():
    nested = correctness.sections({"train.precision": "bf16", "train.epochs": 2, "run.name": "x"})
    assert yaml.safe_load(yaml.safe_dump(nested)) == {"train": {"precision": "bf16", "epochs": 2}, "run": {"name": "x"}}
