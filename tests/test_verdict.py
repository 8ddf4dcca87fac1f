"""The verdict of an evaluation, and a run directory that knows what to compare."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Workshop, pretrained, write_jsonl

from finetune.__main__ import main
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.errors import DataError
from finetune.evaluation import held_out, table, verdict
from finetune.evaluation.results import Results
from finetune.evaluation.scores.plain import ByReference
from finetune.generation.completions import Completion, Prompt, Score


def results(clusters=None, **scores):
    """Results with the scores of base and tuned; `higher` and `is_share` by the name's letters."""
    count = len(next(iter(scores.values()))[0])
    prompts = [
        Prompt(Conversation((Message("user", f"q{n}"),), Place("rows", n + 1)), "a")
        for n in range(count)
    ]
    answers = {name: [Completion(prompt, "a") for prompt in prompts] for name in ("base", "tuned")}
    given = {
        name: {model: [Score(value) for value in values] for model, values in zip(answers, both)}
        for name, both in scores.items()
    }
    scorers = {
        name: ByReference(name, "", lambda *_: 0.0, name != "errors", name != "length")
        for name in scores
    }
    return Results(prompts, clusters or list(range(count)), answers, given, scorers)


def shares(count, base, tuned):
    """Scores of 0 and 1 of two models, of which the first rows are right."""
    return [float(n < base) for n in range(count)], [float(n < tuned) for n in range(count)]


def test_a_gain_that_cannot_be_chance_is_better():
    found = verdict.of(results(exact=shares(100, 0, 22)))
    assert found.kind == "better"
    assert found.sentence == (
        "tuned is better than base: exact 22.0% against 0.0% (+22.0, 95% interval +15.0 to +31.1)"
    )


def test_fewer_errors_are_better_and_more_are_worse():
    assert verdict.of(results(errors=shares(100, 50, 20))).kind == "better"
    assert verdict.of(results(errors=shares(100, 20, 50))).kind == "worse"
    assert verdict.of(results(exact=shares(100, 50, 20))).kind == "worse"


def test_scores_that_disagree_are_both_named():
    found = verdict.of(results(exact=shares(100, 0, 22), errors=shares(100, 0, 22)))
    assert found.kind == "mixed"
    assert "better than base in exact" in found.sentence
    assert "worse in errors" in found.sentence


def test_under_30_rows_are_too_few_whatever_they_say():
    found = verdict.of(results(exact=shares(29, 0, 29)))
    assert found.kind == "too few rows"
    assert "29 rows; at least 30 are needed" in found.sentence
    few = verdict.of(results(exact=shares(29, 3, 9)))
    assert "about 32 would show whether exact differs by 20.7 points" in few.sentence


def test_rows_of_few_clusters_are_too_few():
    found = verdict.of(results([n // 10 for n in range(200)], exact=shares(200, 0, 100)))
    assert found.kind == "too few rows"
    assert "200 rows in 20 clusters" in found.sentence


def test_the_smallest_effect_parts_no_difference_from_too_few_rows():
    same = results(exact=shares(400, 200, 202))
    assert verdict.of(same, smallest=5).kind == "no difference"
    wide = verdict.of(same, smallest=1)
    assert wide.kind == "too few rows"
    # Variance 0.004987 of a row: 1.96^2 of it over (0.01 - 0.005)^2, which is more than
    # 2.8016^2 of it over 0.01^2 = 391.
    assert "about 766 would show whether exact differs by 1.0 points" in wide.sentence


def test_a_gain_below_the_smallest_effect_is_named_so():
    found = verdict.of(results(exact=shares(2000, 100, 120)), smallest=5)
    assert found.kind == "better"
    assert found.sentence.endswith("; the difference is below --smallest-effect")


def test_many_scores_raise_what_each_must_show():
    """6 of 6 changed rows go up: p 0.031 alone, and no evidence as one of two scores."""
    gain = shares(100, 0, 6)
    assert verdict.of(results(exact=gain), smallest=20).kind == "better"
    assert verdict.of(results(exact=gain, other=gain), smallest=20).kind == "no difference"


def test_rows_without_a_score_are_left_out_and_counted():
    found = results(exact=([None, *[0.0] * 40], [1.0, *[0.0] * 39, None]))
    [finding] = verdict.of(found).findings
    assert finding.difference.num_rows == 39
    shown = table.text(found, 0, 8)
    assert "exact           without 1 of 41 rows of base" in shown


def test_groups_are_clusters_and_a_missing_group_is_named():
    def prompt(line, **fields):
        asked = Conversation((Message("user", "q"),), Place("rows", line))
        return Prompt(asked, "a", fields)

    prompts = [prompt(n, user=n % 2) for n in range(4)]
    assert held_out.grouped(prompts, "user") == [0, 1, 0, 1]
    assert held_out.grouped(prompts) == [0, 0, 0, 0]
    with pytest.raises(DataError, match=r"--group: rows:9 has no column user; it has \['id'\]"):
        held_out.grouped([*prompts, prompt(9, id=1)], "user")


SIZES = {"train__global_batch_size": 4, "train__micro_batch_size": 4, "train__max_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step that held out rows, with a base of random weights."""
    shared = Workshop(tmp_path_factory.mktemp("runs"))
    rows = [{"question": f"ab{n}", "answer": f"AB{n}", "user": n % 4} for n in range(40)]
    write_jsonl(shared.rows, rows)
    base = shared.train("base", **SIZES) / "model"
    columns = {"question": "question", "answer": "answer"}
    return shared.train(
        "tuned", **pretrained(base), **SIZES, data__eval_fraction=0.2, data__columns=columns
    )


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments), "--max-new-tokens", "2"])


def test_a_run_directory_knows_what_to_compare(run, capsys):
    assert evaluate(run) == 0
    printed = capsys.readouterr().out
    assert "8 held-out rows" in printed
    assert printed.endswith("8 rows; at least 30 are needed\n")
    assert f"{run}/held_out.jsonl" not in printed
    assert evaluate(run / "model", "--limit", 3, "--group", "user", "--also", f"me={run}") == 0
    printed = capsys.readouterr().out
    assert "3 held-out rows" in printed
    assert "tuned against me: exact match +0.0" in printed


def test_a_run_without_what_it_takes_says_what_to_give(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "held_out.jsonl").unlink()
    for arguments, says in (
        ([copy], "held out no rows, and has no data.eval; give rows"),
        ([run.parent / "base"], "began with random weights, so it has no base to compare with"),
        ([run, "--tuned", run], "--tuned: the tuned model is that of"),
        ([tmp_path / "no"], "no does not exist; give a run directory"),
        ([run.parent / "base" / "checkpoints"], "give a run directory"),
        ([], "name a run, as "),
        (["--base", run], "or give also --tuned and --data"),
    ):
        assert evaluate(*arguments) == 2
        assert says in capsys.readouterr().err
    shutil.rmtree(copy / "model")
    (copy / "outcome.json").write_text(json.dumps({"state": "preempted"}))
    assert evaluate(copy) == 2
    assert "has no model yet: its run is preempted" in capsys.readouterr().err
    config = (run / "config.yaml").read_text()
    (copy / "model").mkdir()
    (copy / "model" / "config.json").touch()
    named = str(Path(run.parent / "base" / "model"))
    (copy / "config.yaml").write_text(config.replace(named, "/gone/model"))
    assert evaluate(copy) == 2
    assert "give --base with the folder where it is now" in capsys.readouterr().err
