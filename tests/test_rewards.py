"""Rewards: what answers are worth, and what becomes of answers that cannot be scored."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pytest
from chat_server import ChatServer, reply, serving
from conftest import ROOT, read_jsonl, write_jsonl
from invariants import sampled
from pydantic import TypeAdapter, ValidationError

from finetune import own_code, replay, sandbox
from finetune.__main__ import main
from finetune.config import reader, reward_fields
from finetune.config.kinds import Kind, Section, by_kind
from finetune.config.messages import describe
from finetune.config.reward_fields import RewardList
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.errors import ConfigError, DataError, Outage, RunDirectoryError, UserError
from finetune.evaluation.scores.normalise import NORMALISATIONS
from finetune.generation.completions import Completion, Prompt, Score
from finetune.generation.reward_model import RewardModel
from finetune.rollouts import parts
from finetune.rollouts.apart import Apart
from finetune.rollouts.kept import FILE
from finetune.rollouts.rewards import Reward, Rewards

pytestmark = pytest.mark.slow


def prompt(line=1, reference="4", **fields):
    place = Place("rows.jsonl", line)
    return Prompt(Conversation((Message("user", "2 + 2?"),), place), reference, fields)


def completions(*texts, **changes):
    return [Completion(prompt(), text, **changes) for text in texts]


def rewards(*given):
    return Rewards(TypeAdapter(RewardList).validate_python(list(given)))


def totals(folder, answers, *given):
    with rewards(*given).opened(folder) as found:
        return [each.total for each in found(answers)]


@pytest.fixture
def own(tmp_path):
    """Returns the name of a function of a user's own, by its source."""

    def written(source, name="reward"):
        path = tmp_path / f"own_{abs(hash(source))}.py"
        path.write_text(source)
        own_code.read(f"{path}:{name}")
        return f"{path}:{name}"

    return written


# ------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("settings", "answers", "expected"),
    [
        ({"kind": "exact_match"}, [" 4 ", "4."], [1, 0]),
        ({"kind": "exact_match", "ignore": ["numbers", "punctuation"]}, ["4.0!", "5"], [1, 0]),
        ({"kind": "contains"}, ["it is 4, I think", "14"], [1, 0]),
        ({"kind": "contains", "text": "I think"}, ["i think so", "think I"], [1, 0]),
        ({"kind": "number"}, ["2 + 2 = 4", "4 or 5"], [1, 0]),
        ({"kind": "number", "tolerance": 0.1}, ["4.4", "4.5"], [1, 0]),
        ({"kind": "score", "score": "words"}, ["a b c"], [3]),
        ({"kind": "score", "score": "token_f1"}, ["4", "5"], [1, 0]),
    ],
)
def test_rules_are_the_scores_of_evaluations(tmp_path, settings, answers, expected):
    assert totals(tmp_path, completions(*answers), settings) == expected


def test_a_long_answer_loses_up_to_one(tmp_path):
    answers = [Completion(prompt(), "x", token_ids=(0,) * count) for count in (1, 10, 13, 14, 99)]
    settings = {"kind": "length", "most_tokens": 10, "grace_tokens": 4}
    assert totals(tmp_path, answers, settings) == [0, 0, -0.75, -1, -1]


def test_rewards_are_a_weighted_sum_by_name(tmp_path):
    given = (
        {"kind": "exact_match"}, {"kind": "contains", "text": "so", "weight": -0.25, "name": "so"},
        {"kind": "score", "score": "words", "weight": 0.0, "name": "length"},
    )  # fmt: skip
    with rewards(*given).opened(tmp_path) as found:
        assert found(completions("4", "so 4")) == [
            Reward(1.0, {"exact_match": 1.0, "so": 0.0, "length": 1.0}),
            Reward(-0.25, {"exact_match": 0.0, "so": 1.0, "length": 2.0}),
        ]


def test_a_gap_leaves_the_answer_without_a_reward_unless_it_has_no_weight(tmp_path):
    answer = Completion(prompt(reference=None), "so")
    match, so = {"kind": "exact_match"}, {"kind": "contains", "text": "so", "name": "so"}
    with rewards(match, so).opened(tmp_path) as found:
        gap = Reward(None, {"so": 1.0}, "exact_match: the row has no reference")
        assert found([answer]) == [gap]
    with rewards(match | {"weight": 0.0}, so).opened(tmp_path) as found:
        assert found([answer]) == [Reward(1.0, {"so": 1.0})]
    with rewards(so).opened(tmp_path) as found:
        [failed] = found([Completion(prompt(), "", "failed")])
        assert (failed.total, failed.reason) == (None, "so: no answer came")


@pytest.mark.parametrize("weights", [(1e300, -1e300), (1e300, 1.0), (1e16, 0.0)])
def test_a_sum_too_large_to_be_learned_from_is_a_gap(tmp_path, weights):
    first = {"kind": "score", "score": "words", "weight": weights[0]}
    second = {"kind": "contains", "text": "so", "weight": weights[1]}
    with rewards(first, second).opened(tmp_path) as found:
        [failed] = found(completions("so " * 9)[:1])
    assert failed.total is None
    assert "the sum of its rewards is" in failed.reason


# --------------------------------------------------------------------------------- what is wrong


class Learns(Kind):
    kind: Literal["learns"]
    """As an objective that samples."""
    rewards: RewardList
    """Rewards."""


class Whole(Section):
    objective: Annotated[Learns | Kind, by_kind(Learns)]


def problems(*given):
    values = {"objective": {"kind": "learns", "rewards": list(given)}}
    with pytest.raises(ValidationError) as found:
        Whole.model_validate(values)
    return [describe(error, values) for error in found.value.errors()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "objective.rewards: List should have at least 1 item after validation, not 0"),
        (["number"], "objective.rewards.0: should be a mapping such as {kind: exact_match}, got"),
        ([{"kind": "exact"}], "objective.rewards.0.kind: should be 'exact_match', 'contains', "),
        ([{"weight": 1}], "objective.rewards.0.kind: is required"),
        ([{"kind": "regex"}], "objective.rewards.0.pattern: is required"),
        ([{"kind": "regex", "pattern": "("}], "objective.rewards.0.pattern: should be a regular"),
        ([{"kind": "number", "tolernce": 1}], "0.tolernce: unknown key; did you mean tolerance?"),
        ([{"kind": "number", "text": "x"}], "unknown key; number has kind, weight, name,"),
        ([{"kind": "number"}] * 2, "should have different names, and two are number; give each a"),
        ([{"kind": "number", "weight": 0.0}], "should have one whose weight is not 0"),
        ([{"kind": "number", "name": "std"}], "the logs have a reward_std of all of them"),
        ([{"kind": "number", "weight": math.nan}], "should be a finite number, got nan"),
        ([{"kind": "length", "most_tokens": 0, "grace_tokens": 1}], "greater than 0, got 0"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named_with_their_place(given, message):
    assert any(message in each for each in problems(*given)), problems(*given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "score", "score": "rouge"}, r"rewards.0 \(score\): .* did you mean rouge-l"),
        ({"kind": "score", "score": "exact_match"}, "is a reward of its own: kind: exact_match"),
        ({"kind": "score", "score": "label"}, "label needs more than an answer and its row"),
        ({"kind": "json_schema", "file": "none.json"}, "file: none.json: no such file"),
        ({"kind": "judge", "model": "m", "url": "x"}, "should begin with http"),
        ({"kind": "judge", "model": "m", "url": "http://a", "rubric": "no.yaml"},
         r"\(judge\): no.yaml"),
        ({"kind": "judge", "model": "m", "url": "http://a", "key_variable": "NONE"},
         "the environment has no NONE"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_made_is_a_config_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        rewards(settings)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\(math\): it .* pip install 'finetune\[math\]'"):
        rewards({"kind": "math"})


def test_rows_without_what_a_reward_reads_are_named_with_their_lines(monkeypatch):
    monkeypatch.setattr(sandbox, "require", lambda setting: None)
    found = rewards({"kind": "number"}, {"kind": "code_tests"})
    found.check([prompt(tests=["assert x == 1", "assert y"])])
    rows = [prompt(2, "four", tests="x"), prompt(3, None, tests="x"), prompt(4, tests=" ")]
    with pytest.raises(DataError, match="3 of 3 rows are wrong") as error:
        found.check(rows)
    assert str(error.value).splitlines()[1:] == [
        "  rows.jsonl:2: objective.rewards: number: the reference holds no number",
        "  rows.jsonl:3: objective.rewards: number: the row has no reference",
        "  rows.jsonl:4: objective.rewards: code_tests: the row has no text of tests in its column "
        "tests",
    ]


def test_the_config_names_the_normalisations_of_scores():
    [listed] = reward_fields.ExactMatch.model_fields["ignore"].annotation.__args__
    assert listed.__args__ == tuple(NORMALISATIONS)
    assert set(parts.MAKE) == {*reward_fields.BUILT_IN, reward_fields.OwnReward}


def test_a_run_names_what_is_wrong_with_its_rewards_before_weights_load(workshop, tmp_path):
    for given, message in (
        ({"kind": "regex", "patern": "x"}, "rewards.0.patern: unknown key; did you mean pattern"),
        ({"kind": f"{tmp_path}/none.py:reward"}, "objective.rewards.0.kind: no file"),
    ):
        with pytest.raises(ConfigError, match=message):
            workshop.check(**sampled.settings(workshop, rewards=[given]))
    rows = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 2?", "answer": "four", "x": 1}]
    own = sampled.settings(workshop, rewards=[{"kind": "number"}])
    write_jsonl(workshop.folder / "prompts.jsonl", rows)
    with pytest.raises(DataError, match="prompts.jsonl:2: .*number: the reference holds no number"):
        workshop.check(**own)


@pytest.mark.proof
def test_a_run_learns_by_a_function_whose_content_it_keeps(workshop, capsys):
    """A changed function is not resumed with; where it stands does not matter."""
    code = workshop.folder / "mine.py"
    code.write_text(
        "def reward(text, row, completion):\n"
        "    if completion.prompt.place.endswith('3'): return row['none']\n"
        "    return float(len(text.split()))\n"
    )
    rewards = [{"kind": f"{code}:reward"}]
    own = sampled.settings(workshop, rewards=rewards, train__max_steps=3)
    run = workshop.train(**own)
    noted = "1 of 4 groups are left out: reward: .*mine.py:2: KeyError: 'none'"
    assert re.search(f"note: phase [123]: {noted}", capsys.readouterr().out)
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "reward" in line]
    assert lines
    assert "code of objective.rewards.0: mine.py:reward" in workshop.receipt()["identity"]
    code.write_text("def reward(text, row):\n    return 1.0\n")
    with pytest.raises(UserError, match="code of objective.rewards.0"):
        workshop.train(**own)


# ---------------------------------------------------------------------- a user's own, and limits

OWN = """
import os, time
def reward(text, row, reference="none"):
    if text == "hang": time.sleep(60)
    if text == "die": os._exit(3)
    if text == "raise": return row["missing"]
    values = {"nan": float("nan"), "none": None, "text": "1", "reason": (0.0, "why")}
    return values.get(text, len(text) + row["more"] + len(reference))
"""


def test_what_fails_in_a_users_function_costs_one_answer_its_reward(tmp_path, own):
    """Each of these was answered in one process, which a hang and an end replace."""
    texts = ("ab", "hang", "die", "raise", "nan", "none", "text", "reason", "abc")
    answers = [Completion(prompt(more=0.5), text) for text in texts]
    with rewards({"kind": own(OWN), "seconds": 0.4}).opened(tmp_path) as found:
        given = found(answers)
    assert [each.total for each in given] == [3.5, *[None] * 6, 0.0, 4.5]
    reasons = [each.reason for each in given if each.total is None]
    for reason, expected in zip(reasons, (
        "reward: over 0.4 s", "reward: its process ended (3)", "KeyError: 'missing'", "returns nan",
        "gives none", "should return a number, True or False, None where it has none",
    )):  # fmt: skip
        assert expected in reason


def test_a_fork_that_a_function_leaves_behind_answers_nothing(tmp_path, own):
    code = "import os\ndef reward(text): os.fork(); return len(text)"
    with rewards({"kind": own(code)}).opened(tmp_path) as found:
        given = found(completions(*("a" * length for length in range(1, 9))))
    assert [each.total for each in given] == [*range(1, 9)]


@pytest.mark.proof
def test_a_call_has_a_limit_too_and_a_function_of_all_answers_only_that(tmp_path, own):
    code = "import time\ndef reward(text): time.sleep(0.2); return 1.0"
    settings = {"kind": own(code), "seconds": 5.0, "call_seconds": 0.5}
    with rewards(settings).opened(tmp_path) as found:
        given = found(completions(*"abcdef"))
    assert [each.total for each in given][::5] == [1.0, None]
    assert given[-1].reason == "reward: over 0.5 s for all answers"
    code = (
        "def reward(completions):\n"
        "    return [1.0] * (len(completions) - (completions[0].text == 'x'))"
    )
    with rewards({"kind": own(code)}).opened(tmp_path) as found:
        failed = Completion(prompt(), "", "failed")
        assert [each.total for each in found([*completions("a", "b"), failed])] == [1.0, 1.0, None]
        [short] = found(completions("x"))
        assert "should return a list with a value for each of 1 answers, got []" in short.reason


@pytest.mark.proof
def test_a_request_to_stop_is_not_kept_waiting_by_a_reward(workshop, tmp_path):
    """The answers of the group have no rewards then, and are asked for again: no group is lost."""
    code, seen = workshop.folder / "slow.py", tmp_path / "seen"
    code.write_text(
        "import os, pathlib, time\n"
        "def reward(text, completion):\n"
        f"    seen = pathlib.Path({str(seen)!r})\n"
        "    if completion.prompt.place.endswith('3') and not seen.exists():\n"
        "        seen.touch()\n"
        "        time.sleep(500)\n"
        "    return float(len(text))\n"
    )
    own = sampled.settings(
        workshop, rewards=[{"kind": f"{code}:reward", "seconds": 600.0}], train__max_steps=3
    )
    stopped = run_until(workshop.write(workshop.config(**own)), seen.exists)
    assert stopped == 75
    run = workshop.train(**own)
    phases = sorted((run / "rollouts").glob("phase-*.jsonl"))
    assert len(phases) == 3
    for phase in phases:
        rewarded = [line for line in read_jsonl(phase) if "rollouts" in line]
        assert len(rewarded) == 4
        assert all(each["reward"] is not None for line in rewarded for each in line["rollouts"])


def run_until(config, is_time):
    """Start train.py, send SIGTERM when it is time, and return the exit code, within a minute."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        for _ in range(1200):
            if is_time() or run.poll() is not None:
                break
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        try:
            return run.wait(60)
        except subprocess.TimeoutExpired:
            run.kill()
            raise


@pytest.mark.proof
def test_a_pattern_that_never_ends_is_ended(tmp_path):
    """It holds the interpreter's lock, so only the end of its process helps."""
    settings = {"kind": "regex", "pattern": "(a+)+$", "seconds": 0.3}
    began = time.monotonic()
    with rewards(settings).opened(tmp_path) as found:
        endless, quick = found(completions("a" * 60 + "b", "aa"))
    assert (endless.total, endless.reason) == (None, "regex: over 0.3 s")
    assert quick.total == 1.0
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def reward(prompts): ...", "has the parameter prompts; a reward takes text, reference"),
        ("def reward(completions, text): ...", "has the parameter completions; a reward takes"),
        (
            "def reward(): ...",
            "has no parameter; a reward takes any of text, reference, row, completion by name",
        ),
    ],
)
def test_a_function_with_other_parameters_is_an_error(own, source, message):
    with pytest.raises(ConfigError, match=message):
        rewards({"kind": own(source)})


def test_code_of_a_reward_is_found_and_read_with_the_config(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(text): return 1.0\nOTHER = 3")
    named = {"objective": {"rewards": [{"kind": "number"}, {"kind": "mine.py:reward"}]}}
    values, wrong = reader._with_own_code(named, tmp_path)
    assert wrong == []
    assert values["objective"]["rewards"] == [
        {"kind": "number"}, {"kind": f"{os.path.realpath(tmp_path)}/mine.py:reward"}
    ]  # fmt: skip
    settings = {"objective.rewards": values["objective"]["rewards"]}
    assert list(reader.own_names(settings)) == ["objective.rewards.1"]
    with pytest.raises(RunDirectoryError, match="is not the file that .* ran with"):
        replay.require_own_code(tmp_path, settings, {"identity": {}})
    named = {"objective": {"rewards": [{"kind": "mine.py:rewrd"}, {"kind": "mine.py:OTHER"}]}}
    _, wrong = reader._with_own_code(named, tmp_path)
    assert "objective.rewards.0.kind: " in wrong[0]
    assert "did you mean reward?" in wrong[0]
    assert wrong[1].endswith("is of type int, not a function of (text, reference, row)")


# ------------------------------------------------------------------------- models and tasks


def test_a_model_that_continues_text_is_refused_before_it_is_asked(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}")
    settings = {"kind": "reward_model", "model": str(tmp_path)}
    with pytest.raises(
        ConfigError, match=r"rewards.0 \(reward_model\): .*LlamaForCausalLM gives no"
    ):
        rewards(settings)


def test_another_version_on_the_hub_is_another_reward(tmp_path, monkeypatch):
    """A resuming run would otherwise go on with the scores of another model."""
    repository, found = tmp_path / "hub" / "models--some--scores", set()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        config = {"architectures": ["LlamaForSequenceClassification"]}
        (repository / "snapshots" / commit / "config.json").write_text(json.dumps(config))
        (repository / "refs" / "main").write_text(commit)
        of_reward = rewards({"kind": "reward_model", "model": "some/scores"}).identity()
        found.add(of_reward["reward reward_model"])
    assert len(found) == 2
    with pytest.raises(ConfigError, match=r"rewards.0 \(reward_model\): .*'some/none' cannot be"):
        rewards({"kind": "reward_model", "model": "some/none"})


@pytest.mark.proof
def test_a_reward_model_scores_whole_conversations_once(tmp_path, workshop):
    pairs = [{"prompt": f"{n}", "chosen": "good", "rejected": "bad"} for n in range(8)]
    run = workshop.train(
        data__train=str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), train__max_steps=1,
        objective__kind="reward", train__global_batch_size=4,
    )  # fmt: skip
    answers = [*completions("good", "x" * 300, "good"), Completion(prompt(), "", "failed")]
    with rewards({"kind": "reward_model", "model": str(run)}).opened(tmp_path / "kept") as found:
        good, long, again, failed = found(answers)
    conversation = Conversation(
        (Message("user", "2 + 2?"), Message("assistant", "good")), Place("rows.jsonl", 1)
    )
    assert good == again == Reward(good.total, {"reward_model": good.total})
    assert RewardModel(run)([conversation]) == pytest.approx([good.total], abs=1e-6)
    assert "the reward model has only 256 positions" in long.reason
    assert failed.total is None
    assert len(read_jsonl(tmp_path / "kept/process-0" / FILE)) == 1
    with pytest.raises(ConfigError, match=r"\(reward_model\): model: "):
        rewards({"kind": "reward_model", "model": str(tmp_path / "none")})


def test_rows_of_reasoning_gym_are_scored_by_their_tasks(tmp_path):
    pytest.importorskip("reasoning_gym")
    argv = ["reasoning_gym", "--tasks", "chain_sum,countdown", "--output", str(tmp_path / "set")]
    assert main(["data", *argv, "--train", "20", "--held-out", "2"]) == 0
    rows = read_jsonl(tmp_path / "set/train.jsonl")
    assert {row["task"] for row in rows} == {"chain_sum", "countdown"}
    assert len({row["question"] for row in rows}) == 20
    [row] = [row for row in rows if row["task"] == "chain_sum"][:1]
    fields = {name: row[name] for name in ("task", "entry")}
    answers = [
        Completion(prompt(reference=None, **fields), text)
        for text in (f"So <answer>{row['answer']}</answer>", "<answer>x</answer>", row["answer"])
    ]
    found = rewards({"kind": "reasoning_gym"})
    with found.opened(tmp_path / "kept"):
        assert [each.total for each in found(answers)] == [1.0, 0.0, 1.0]
    with pytest.raises(DataError, match="rows.jsonl:1: .* no task of reasoning-gym in its columns"):
        found.check([prompt()])


def test_mathematics_is_compared_as_such(tmp_path):
    pytest.importorskip("math_verify")
    answers = [Completion(prompt(reference="$0.5$"), text) for text in ("$\\frac{1}{2}$", "$2$")]
    assert totals(tmp_path, answers, {"kind": "math"}) == [1.0, 0.0]


# -------------------------------------------------------------------------------- what is kept


def counting(scores):
    """Return a scorer that counts its answers."""

    def scorer(answers):
        scorer.asked += [each.text for each in answers]
        return [scores.get(each.text, Score(1.0)) for each in answers]

    scorer.asked = []
    return scorer


@pytest.fixture
def counted(monkeypatch):
    scorer = counting({"gap": Score(None, "not now")})
    made = parts.MAKE[reward_fields.CodeTests]

    monkeypatch.setattr(sandbox, "require", lambda setting: None)

    def make(settings, log):
        return replace(made(settings, log), scorer=scorer)

    monkeypatch.setitem(parts.MAKE, reward_fields.CodeTests, make)
    return scorer


def test_scores_that_cost_are_kept_and_gaps_asked_again(tmp_path, counted):
    settings = {"kind": "code_tests"}
    answers = completions("a", "b", "a", "gap")
    assert totals(tmp_path, answers, settings) == [1, 1, 1, None]
    with (tmp_path / "process-0" / FILE).open("a") as file:
        file.write('{"key": "cut')  # by a kill
    assert totals(tmp_path, [*answers, *completions("c")], settings) == [1, 1, 1, None, 1]
    assert counted.asked == ["a", "b", "gap", "gap", "c"]
    assert len(read_jsonl(tmp_path / "process-0" / FILE)) == 3
    other = [Completion(prompt(reference="5"), "a"), Completion(prompt(tests="x"), "a")]
    totals(tmp_path, other, settings)
    assert counted.asked[5:] == ["a", "a"], "another reference or other tests"


def test_what_one_process_has_scored_no_other_scores(tmp_path, counted):
    """Nor one of a later attempt with fewer or more processes, nor while both run."""
    made = [rewards({"kind": "code_tests"}) for _ in range(3)]
    with made[2].opened(tmp_path, rank=2) as third:
        third(completions("a"))
    with made[0].opened(tmp_path, rank=0) as first, made[1].opened(tmp_path, rank=1) as second:
        first(completions("a", "b"))
        second(completions("a", "b", "c"))
        first(completions("c"))
    assert counted.asked == ["a", "b", "c"]
    with (tmp_path / "process-2" / FILE).open("a") as file:
        file.write("{}\n")
    match = rf"process-2/{FILE}:2: holds no score of an answer: {{}}; move the file away"
    with (
        rewards({"kind": "code_tests"}).opened(tmp_path) as found,
        pytest.raises(DataError, match=match),
    ):
        found(completions("d"))


@pytest.mark.proof
def test_code_runs_within_the_limits_of_a_reward(tmp_path):
    """5 seconds, 512 MB, no network, no files; test_sandbox.py has more that try to get out."""
    if why := sandbox._why_unavailable():
        pytest.skip(f"no sandbox on this machine: {why}")
    tests = "assert double(2) == 4"
    right = "```python\ndef double(x): return 2 * x\n```"
    codes = [right, "def double(x): return x", "x = bytearray(600 << 20)", "while True: pass"]
    codes += [f"open({str(tmp_path / 'new')!r}, 'w')", "import socket; socket.socket()"]
    answers = [Completion(prompt(tests=tests), code) for code in codes]
    with rewards({"kind": "code_tests"}).opened(tmp_path / "kept") as found:
        assert [each.total for each in found(answers)] == [1.0, *[0.0] * 5]
    reasons = [line["reason"] for line in read_jsonl(tmp_path / "kept/process-0" / FILE)]
    assert [reasons[2], reasons[3]] == ["over 512 MB", "over 5 s"]
    assert not (tmp_path / "new").exists()


def test_a_request_to_stop_waits_for_no_process_of_a_reward():
    apart = Apart(time.sleep, (60,), partial(Score, None), seconds=60, call_seconds=60)
    began = time.monotonic()
    apart.open(lambda: time.monotonic() > began + 0.2)
    assert apart(completions("a", "b")) == [Score(None, "the run stops")] * 2
    assert time.monotonic() < began + 10


# ---------------------------------------------------------------------------------- judges


def judged(body, text, usage):
    """Answer 5 to every question, with its log-probability."""
    values = reply(body, "5", usage)
    if body.get("logprobs"):
        top = [{"token": "5", "logprob": math.log(0.75)}, {"token": "3", "logprob": math.log(0.25)}]
        values["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
    return values


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("finetune.endpoint.FIRST_WAIT", 0.01)
    monkeypatch.setattr("chat_server.reply", judged)
    with serving(ChatServer(answer=lambda body: "5")) as found:
        yield found


@pytest.fixture
def rubric(tmp_path):
    path = tmp_path / "rubric.yaml"
    path.write_text(
        "name: tone\ncriterion: Polite.\nscores: {1: a, 3: b, 5: c}\nsteps: [Read it.]\n"
    )
    return {"kind": "judge", "model": "good-model", "rubric": str(path), "seconds": 5.0}


def test_a_judges_score_is_a_share_and_asked_once(tmp_path, server, rubric):
    settings = rubric | {"url": server.url}
    expected = (5 * 0.75 + 3 * 0.25 - 1) / 4
    for _ in range(2):
        given = totals(tmp_path / "kept", completions("a", "b", "a"), settings)
        assert given == pytest.approx([expected] * 3)
    assert len(server.seen) == 2


def test_all_processes_ask_a_judge_by_the_same_steps(tmp_path, server, rubric):
    """What it was asked in one process is not asked in another, as the prompt is the same."""
    path = Path(rubric["rubric"])
    path.write_text(path.read_text().replace("steps: [Read it.]\n", ""))
    written = iter(["1. Read it.", "1. Count it."])
    server.answer = lambda body: next(written)
    made = [rewards(rubric | {"url": server.url}) for _ in range(2)]
    with (
        made[0].opened(tmp_path / "kept") as first,
        made[1].opened(tmp_path / "kept", rank=1) as second,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("chat_server.reply", reply)
        first.prepare()
        patch.undo()
        scores = [each(completions("a"))[0].total for each in (second, first)]
    assert scores[0] == scores[1]
    assert len(server.seen) == 2


def test_a_request_to_stop_waits_for_no_judge(tmp_path, server, rubric):
    server.delay, began = lambda body: 3.0, time.monotonic()
    settings = rubric | {"url": server.url}
    with rewards(settings).opened(tmp_path, lambda: time.monotonic() > began + 0.2) as found:
        assert found(completions("a"))[0].reason == "judge: the run stops"
        assert time.monotonic() < began + 2


def test_an_answer_that_the_judge_does_not_score_is_a_gap(tmp_path, server, rubric):
    settings = rubric | {"url": server.url, "seconds": 0.3}
    server.delay = lambda body: 2.0 * ("hang" in body["messages"][-1]["content"])
    with rewards(settings).opened(tmp_path / "kept") as found:
        hangs, fine = found(completions("hang", "b"))
        assert "no answer in 0.3 seconds, 3 times" in hangs.reason
        assert fine.total is not None
    with rewards(settings | {"call_seconds": 0.2}).opened(tmp_path / "kept") as found:
        [late, kept] = found(completions("hang", "b"))
        assert (late.reason, kept.total) == ("judge: over 0.2 s for all answers", fine.total)


def test_a_judge_that_does_not_answer_ends_the_run(tmp_path, server, rubric):
    settings = rubric | {"url": server.url}
    with rewards(settings).opened(tmp_path / "kept") as found:
        server.faults = ["503"] * 30
        with pytest.raises(Outage, match="503"):
            found(completions("a"))
    server.faults = ["key"]
    with pytest.raises(ConfigError, match="objective.rewards: judge: .*refuses the key"):
        rewards(settings).check([prompt()])
    with pytest.raises(ConfigError, match="is the server running"):
        rewards(rubric | {"url": "http://127.0.0.1:9/v1"}).check([prompt()])


def test_a_changed_rubric_or_schema_is_another_identity(tmp_path, rubric):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    settings = [{"kind": "json_schema", "file": str(schema)}, rubric | {"url": "http://a/v1"}]
    before = rewards(*settings).identity()
    assert list(before) == ["reward json_schema", "reward judge"]
    schema.write_text('{"type": "array"}')
    after = rewards(*settings).identity()
    assert before["reward judge"] == after["reward judge"]
    assert before["reward json_schema"] != after["reward json_schema"]


@pytest.mark.proof
def test_a_judge_may_be_a_model_of_this_machine(tmp_path, workshop, rubric):
    """One that knows no digits puts its probability elsewhere: a gap, which is not asked again."""
    run = workshop.train(data__template="chatml", train__max_steps=1)
    settings = rubric | {"model": str(run)}
    for _ in range(2):
        with rewards(settings).opened(tmp_path / "kept") as found:
            [gap] = found(completions("a"))
        assert re.search("judge: the judge puts [0-9]+% outside its options", gap.reason)
    assert len(read_jsonl(tmp_path / "kept/process-0/judge/judge_answers.jsonl")) == 1


# ------------------------------------------------------------------------------------ orphans

ENDLESS = """
import re, sys
from functools import partial
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.evaluation.scores import matching
from finetune.generation.completions import Completion, Prompt, Score
from finetune.rollouts.apart import Apart

if __name__ == "__main__":
    limits = {"seconds": 600, "call_seconds": 600}
    apart = Apart(matching.regex, (re.compile("(a+)+$"),), partial(Score, None), **limits)
    prompt = Prompt(Conversation((Message("user", "q"),), Place("rows", 1)))
    apart([Completion(prompt, "a")])
    print(apart._process.pid, flush=True)
    apart([Completion(prompt, "a" * 60 + "b")])
"""


@pytest.mark.proof
def test_a_killed_run_leaves_no_process_that_scores(tmp_path):
    """The process holds the interpreter's lock, so none of its threads could end it."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        scorer = int(run.stdout.readline())
        time.sleep(1.0)
        run.kill()
    for _ in range(100):
        stat = Path(f"/proc/{scorer}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(scorer, signal.SIGKILL)
    pytest.fail("the process of a reward outlives its run")


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "regex", "pattern": "a"},
        {"kind": "json_schema", "file": "schema.json"},
        {"kind": "math"},
        {"kind": "reasoning_gym"},
    ],
    ids=lambda given: given["kind"],
)
def test_a_reward_in_a_process_has_no_limit_but_its_seconds(tmp_path, monkeypatch, given):
    """`finetune evaluate` has another for the same rule."""
    if package := {"math": "math_verify", "reasoning_gym": "reasoning_gym"}.get(given["kind"]):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text('{"type": "object"}')
    [part] = rewards({**given, "seconds": 3600.0})._parts
    assert part.scorer._make(*part.scorer._arguments).seconds is None
