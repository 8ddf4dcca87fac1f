"""What a run does with wrong rows, several sources and parts of epochs."""

import re
import shlex

import pytest
from conftest import Workshop, pairs, read_jsonl, write_jsonl

from finetune.config import fields
from finetune.data import examples
from finetune.engine import optim
from finetune.errors import ConfigError, DataError, RunDirectoryError


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


BAD = [{"question": "q", "answer": ""}, {"question": "q", "answer": None}]


def test_bad_rows_are_skipped_and_kept_in_the_run_directory(workshop, capsys):
    write_jsonl(workshop.rows, [BAD[0], *pairs(30), BAD[1]])
    run = workshop.train(data__on_bad_row="skip")
    said = capsys.readouterr().out
    assert "bad rows    2 rows skipped: column 'answer' is empty (1 row)" in said
    assert "data        30 rows -> 30 examples" in said
    rejects = read_jsonl(run / "rejects.jsonl")
    assert [reject["row"] for reject in rejects] == BAD
    assert rejects[0]["problem"].startswith(f"{workshop.rows}:1: column 'answer' is empty")
    assert workshop.outcome()["state"] == "complete"


def test_the_error_for_a_few_bad_rows_names_the_setting(workshop):
    write_jsonl(workshop.rows, [BAD[0], *pairs(30)])
    for rows, hint in (
        ([BAD[0], *pairs(30)], "\n  correct it, or leave it out with data.on_bad_row: skip"),
        ([*BAD, *pairs(30)], "\n  correct them, or leave them out with data.on_bad_row: skip"),
        ([BAD[0], *pairs(3)], '; the row: {"question": "q", "answer": ""}'),
    ):
        write_jsonl(workshop.rows, rows)
        with pytest.raises(DataError) as caught:
            workshop.check()
        assert str(caught.value).endswith(hint)


def test_more_bad_rows_than_allowed_end_a_run(workshop):
    write_jsonl(workshop.rows, [BAD[0], *pairs(9)])
    workshop.check(data__on_bad_row="skip")
    with pytest.raises(DataError, match=r"data\.max_bad_fraction: 0\.05 lets at most 0 be skipped"):
        workshop.check(data__on_bad_row="skip", data__max_bad_fraction=0.05)
    with pytest.raises(ConfigError, match=r"data\.max_bad_fraction: would be ignored"):
        workshop.check(data__max_bad_fraction=0.05)


def test_rows_that_are_too_long_are_not_skipped(workshop):
    write_jsonl(workshop.rows, [*pairs(20), {"question": "q", "answer": "a" * 500}])
    with pytest.raises(
        DataError, match="530 tokens, over data.max_length 128; data.max_length can"
    ):
        workshop.check(data__on_bad_row="skip")


def test_repaired_turns_are_counted_in_the_summary(workshop, capsys):
    chat = [{"role": role, "content": "x"} for role in ("user", "user", "assistant", "user")]
    write_jsonl(workshop.rows, [{"messages": chat}] * 9)
    workshop.check(data__repair_turns=True, data__template="question_answer")
    said = capsys.readouterr().out
    assert "repaired    turns of one role in a row joined (9 rows), a last turn of the" in said


def test_format_and_columns_are_reported(workshop, capsys):
    write_jsonl(workshop.rows, [{"Patient": "q", "answer": "a"}] * 9)
    workshop.check(data__columns={"question": "Patient"})
    wanted = "format      question_answer (detected), columns question from 'Patient', answer"
    assert wanted in capsys.readouterr().out


def test_settings_of_answers_reach_the_tokens(workshop, capsys):
    """The first answer is an example of its own, without its thoughts and with its characters."""
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<|im_end|>", "thinking": "hm"},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"},
    ]  # fmt: skip
    write_jsonl(workshop.rows, [{"messages": turns}] * 9)
    given = {"data__loss_on": "each_turn", "data__thinking": "drop", "data__template": "chatml"}
    with pytest.raises(
        DataError, match=r"'<\|im_end\|>', .* set data\.special_tokens_in_text: text"
    ):
        workshop.check(**given)
    workshop.check(**given, data__special_tokens_in_text="text")
    said = capsys.readouterr().out
    assert "data        9 rows -> 18 examples" in said
    assert "<|im_start|>assistant\n  | [[<|im_end|><|im_end|>]]\n" in said
    assert "hm" not in said


# Several sources.


@pytest.fixture
def sources(workshop):
    names = [str(workshop.folder / f"{name}.jsonl") for name in "abc"]
    for number, name in enumerate(names):
        rows = [{"question": f"{number} {n}", "answer": "x" * 10} for n in range(20)]
        write_jsonl(workshop.folder / name, rows)
    return names


def mixed_rows(prepared: examples.Examples, mixed: examples.Examples) -> list[int]:
    """Return how often each source occurs."""
    return [int((mixed.source == number).sum()) for number in range(len(prepared.sources))]


def test_sources_come_in_the_shares_that_are_given(workshop, sources, capsys):
    a, b, _ = sources
    run = workshop.train(
        data__train=sources, data__weights={a: 2.5, b: 0.25}, train__epochs=1,
        train__max_steps=None, train__global_batch_size=5, train__micro_batch_size=5,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "60 rows: 15 left out by data.weights, 45 trained on -> 75 examples" in said
    [mix] = [line for line in said.splitlines() if line.startswith("mix ")]
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the tokens", mix)]
    assert shares == pytest.approx([100 * 50 / 75, 100 * 5 / 75, 100 * 20 / 75], abs=1)
    assert len(read_jsonl(run / "metrics.jsonl")) == 15


def test_a_mix_is_the_same_each_time_and_has_whole_rows(workshop, sources, bytes_tokenizer):
    from finetune.data import chat_templates, source_files, tokenised

    options = tokenised.Options("auto", {}, "line", None, "completion", 100, "error")
    template = chat_templates.load(
        "plain", "question_answer", None, bytes_tokenizer.special_tokens_map, {}
    )
    found = source_files.sources(sources, None).train
    all_rows = examples.prepare(
        found, template, bytes_tokenizer, options, str(workshop.folder / "cache")
    )
    of_row = int(all_rows.lengths[0])  # of "0 0"; from "0 10" on a token more
    shares = [
        examples.Share("a", [0], weight=1.5), examples.Share("b", [1], tokens=45 * of_row),
        examples.Share("c", [2], tokens=3 * of_row + 1),
    ]  # fmt: skip
    mixed = examples.mixed(all_rows, shares, 7)
    again = examples.mixed(all_rows, shares, 7)
    other = examples.mixed(all_rows, shares, 8)
    assert [mixed.place(n) for n in range(len(mixed))] == [
        again.place(n) for n in range(len(again))
    ]
    assert mixed.digests() == again.digests() != other.digests()
    assert mixed_rows(all_rows, mixed)[0] == 30
    tokens_of = [int(mixed.lengths[mixed.source == n].sum()) for n in range(3)]
    assert 44 * of_row - 1 <= tokens_of[1] <= 45 * of_row
    assert 2 * of_row <= tokens_of[2] <= 3 * of_row + 1
    with pytest.raises(DataError, match=r"data\.token_budgets: c: 3 is less than one of its 20"):
        examples.mixed(all_rows, [examples.Share("c", [2], tokens=3)], 7)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__weights": {"other.jsonl": 2}}, "other.jsonl is not a name of data.train"),
        ({"data__weights": {"ROWS": 2}, "data__token_budgets": {"ROWS": 9}}, "has a weight in"),
        ({"data__weights": {"ROWS": 0}}, "data.weights: should be greater than 0"),
        ({"data__format": "preference"}, "data.format: preference gives answers that are rated"),
        ({"schedule__warmup_steps": 2, "schedule__warmup_ratio": 0.1}, "remove one of them"),
        ({"schedule__warmup_ratio": 1}, "schedule.warmup_ratio: should be"),
        (
            {"data__template_arguments": {"a": [float("nan")]}},
            "data.template_arguments: holds a value that JSON has not",
        ),
        (
            {
                "data__format": "text", "objective__kind": "clm",
                "data__template_arguments": {"enable_thinking": False},
            },
            "data.template_arguments: would be ignored: rows of text have no turns",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(workshop, changes, says):
    rows = str(workshop.rows)
    replaced = {
        key: {rows if n == "ROWS" else n: v for n, v in value.items()}
        if isinstance(value, dict) else value
        for key, value in changes.items()
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        workshop.check(**replaced)
    assert says.replace("ROWS", rows) in str(caught.value)


# What users of other trainers write.


def test_part_of_an_epoch_is_rounded_up_to_a_step(workshop):
    run = workshop.train(train__epochs=1.3, train__max_steps=None)  # 5 steps an epoch
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == list(range(1, 8))
    assert read_jsonl(run / "metrics.jsonl")[-1]["epoch"] == pytest.approx(1.4)


def test_warm_up_may_be_a_fraction_of_the_run():
    for ratio, num_steps, steps in ((0.1, 30, 3), (0.1, 31, 4), (0.0, 31, 0)):
        schedule = fields.Schedule(warmup_ratio=ratio)
        assert optim.warmup_steps(schedule, num_steps) == steps
        same = fields.Schedule(warmup_steps=steps)
        for step in range(num_steps):
            rates = (optim.lr_at(step, num_steps, 1.0, each) for each in (schedule, same))
            assert len(set(rates)) == 1


def test_a_complete_run_with_more_epochs_names_the_way_on(workshop):
    workshop.train(train__epochs=1, train__max_steps=None)
    changes = {"train__epochs": 3, "train__max_steps": None}
    with pytest.raises(RunDirectoryError) as caught:
        workshop.train(**changes)
    advice = str(caught.value).partition("start a new run from its model: ")[2]
    assert workshop.main("run", shlex.split(advice), **changes) == 0
    assert read_jsonl(workshop.run_dir("run-2") / "metrics.jsonl")[-1]["epoch"] == 2


PAIRWISE = """
from torch.nn.functional import logsigmoid

from finetune.objectives import Objective, Term


class Pairwise(Objective):
    def loss(self, policy, batch, settings, prepared):
        sums = policy.per_document(policy(batch, {"logprobs"}).logprobs, batch)
        assert batch.columns["label"].tolist() == [1.0, 0.0] * (len(sums) // 2)
        ahead = 0.05 * (sums[::2] - sums[1::2])
        return [Term("loss", -logsigmoid(ahead).sum(), per="examples")]
"""


def test_preference_rows_train_an_objective_of_ones_own(workshop):
    (workshop.folder / "pairwise.py").write_text(PAIRWISE)
    rows = [{"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(20)]
    write_jsonl(workshop.rows, rows)
    kind = f"{workshop.folder}/pairwise.py:Pairwise"
    run = workshop.train(data__format="preference", objective__kind=kind)
    found = [line["loss"] for line in read_jsonl(run / "metrics.jsonl")]
    assert found[-1] < found[0]
    with pytest.raises(DataError, match=r"for an objective of your own set data\.format: prefer"):
        workshop.check("other")
