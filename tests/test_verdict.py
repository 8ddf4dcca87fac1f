"""The verdict of an evaluation, its table, and the groups of its rows."""

from dataclasses import replace

import pytest

from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.errors import DataError
from finetune.evaluation import held_out, table, verdict
from finetune.evaluation.results import Results
from finetune.evaluation.scores.base import OfAnswer
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
        name: OfAnswer(name, "", lambda _: 0.0, name != "errors", name != "length")
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


def test_equal_answers_to_40_rows_say_how_many_would_show_that_nothing_differs():
    found = verdict.of(results(exact=shares(40, 20, 20)))
    assert found.kind == "too few rows"
    assert "40 rows; about 73 would show whether exact differs by 5.0 points" in found.sentence


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


def test_answers_that_failed_and_that_were_cut_are_counted():
    found = results(exact=shares(3, 0, 1))
    base, tuned = (list(given) for given in found.answers.values())
    base[0] = replace(base[0], finish_reason="failed", why="the model refuses: no")
    tuned[1:] = [replace(each, finish_reason="length") for each in tuned[1:]]
    shown = table.text(replace(found, answers={"base": base, "tuned": tuned}), 0, 8)
    assert (
        "failed                 1       0   answers that did not come, mostly: the model refuses:"
        in shown
    )
    assert "cut                    0       2   answers not ended after 8 tokens" in shown
