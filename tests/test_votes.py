"""Votes, what models are worth by them, and how far a judge agrees with people."""

import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import read_jsonl, short
from scipy.optimize import minimize

from finetune.data import rows
from finetune.data.problems import Problems
from finetune.errors import DataError, UserError
from finetune.evaluation import agreement, ratings, votes
from finetune.evaluation.votes import Vote


def vote(better="second", models=("base", "tuned"), question="why", answers=("no", "because")):
    prompt = ({"role": "user", "content": question},)
    return Vote("rows.jsonl:1", prompt, models, answers, better)


def several(counts, models=("base", "tuned")):
    """Votes on different questions: {"second": 3} are three that prefer the second model."""
    return [
        vote(better, models, f"question {models} {better} {number}")
        for better, count in counts.items()
        for number in range(count)
    ]


# ---------------------------------------------------------------------------------------- files


def test_votes_are_read_as_they_were_written(tmp_path):
    given = [
        vote("first", answers=("naïve \n\u2028", "b")),
        vote("tie"),
        vote(question="\U0001f642"),
    ]
    votes.write(tmp_path / "votes.jsonl", given)
    assert votes.read([str(tmp_path / "votes.jsonl")]) == given


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"better": "left"}, "'better' should be first, second or tie, got left"),
        ({"models": ["a"]}, "'models' should be a list of two texts"),
        ({"models": ["a", "a"]}, "'models' should name two models"),
        ({"answers": ["a", 3]}, "'answers' should be a list of two texts"),
        ({"prompt": "why"}, "'prompt' should be a list of messages"),
        ({"prompt": []}, "'prompt' should be a list of messages"),
        ({"prompt": [{"role": "user"}]}, "'prompt' should be a list of messages"),
        ({"rater": None}, "'rater' should be text"),
    ],
)
def test_a_line_that_is_no_vote_is_named(tmp_path, change, what):
    path = tmp_path / "votes.jsonl"
    path.write_text(vote().as_line() + json.dumps(json.loads(vote().as_line()) | change))
    with pytest.raises(DataError, match=f"{path}:2: {what}"):
        votes.read([str(path)])


@pytest.mark.parametrize("data", [b"\xff\xfe\n", b"[1]\n", b"{" * 100_000, b'{"a": \n', b"\0"])
def test_bytes_that_are_no_votes_are_refused(tmp_path, data):
    (tmp_path / "votes.jsonl").write_bytes(data)
    with pytest.raises(DataError, match="votes.jsonl:1: should be"):
        votes.read([str(tmp_path / "votes.jsonl")])


def test_missing_and_empty_files_of_votes_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, what in (("none.jsonl", "should be a file of votes"), ("empty.jsonl", "no votes")):
        with pytest.raises(DataError, match=what):
            votes.read([str(tmp_path / name)])


def test_half_characters_of_a_vote_are_replaced(tmp_path):
    line = vote().as_line().replace('"because"', '"\\ud800 \\ud83d\\ude42"')
    (tmp_path / "votes.jsonl").write_text(line)
    [found] = votes.read([str(tmp_path / "votes.jsonl")])
    assert found.answers[1] == "\ufffd \U0001f642"
    votes.write(tmp_path / "again.jsonl", [found])


# ----------------------------------------------------------------------------- preference rows


def test_votes_become_preference_rows_that_training_reads(tmp_path):
    given = [
        vote("second"),
        vote("first"),
        vote("second"),
        vote("tie"),
        vote("first", question="?"),
    ]
    path = tmp_path / "preferences.jsonl"
    votes.write_preferences(path, given, "--preferences")
    problems = Problems()
    samples = list(rows.samples([str(path)], "preference", {}, "line", None, problems, Counter()))
    problems.raise_if_any()
    texts = [[c.messages[-1].content for c in sample.conversations] for sample in samples]
    assert texts == [["because", "no"], ["no", "because"]]
    assert [sample.fields["label"] for sample in samples] == [(1.0, 0.0)] * 2
    assert [sample.conversations[0].messages[0].content for sample in samples] == ["why", "?"]


def test_votes_without_a_majority_and_equal_answers_make_no_rows():
    swapped = vote("first", ("tuned", "base"), answers=("because", "no"))
    found = votes.to_preferences([
        vote("first"), swapped, vote(answers=("a", "a")), vote(answers=("", "a"), question="empty"),
        vote(question="else"),
    ])  # fmt: skip
    assert [row["prompt"][0]["content"] for row in found.rows] == ["else"]
    assert (found.num_ties, found.num_unfit) == (1, 2)


def test_preference_rows_replace_no_file_and_are_never_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="prefer no answer"):
        votes.write_preferences(path, [vote("tie")], "--preferences")
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(UserError, match="exists, and is not replaced"):
        votes.write_preferences(path, [vote()], "--preferences")
    assert path.read_text() == "mine"
    votes.write_preferences(tmp_path / "new.jsonl", [vote()], "--preferences")
    assert len(read_jsonl(tmp_path / "new.jsonl")) == 1


# -------------------------------------------------------------------------------------- ratings


def apart(found, one="base", other="tuned"):
    return found.models[other].rating.value - found.models[one].rating.value


def test_the_rating_of_two_models_is_the_log_of_their_odds():
    found = ratings.rate(several({"second": 30, "first": 10, "tie": 4}), draws=100)
    assert apart(found) == pytest.approx(400 * math.log10((30 + 2) / (10 + 2)))
    assert list(found.models) == ["tuned", "base"]
    tuned = found.models["tuned"]
    assert (tuned.wins, tuned.ties, tuned.losses) == (30, 4, 10)
    assert tuned.rating.low < tuned.rating.value < tuned.rating.high
    assert sum(each.rating.value for each in found.models.values()) == pytest.approx(2_000)


def test_ratings_of_many_models_are_those_of_another_optimizer():
    random = np.random.default_rng(0)
    names = ["a", "b", "c", "d"]
    given = []
    for one, other in [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)]:
        chances = random.dirichlet([3, 3, 2])
        counts = dict(zip(("first", "second", "tie"), random.multinomial(20, chances)))
        given += several(counts, (names[one], names[other]))

    def loss(b):
        b = dict(zip(names, b))
        each = (b[v.models[1]] - b[v.models[0]] for v in given)
        return sum(math.log1p(math.exp(x)) - v.points * x for x, v in zip(each, given))

    wanted = minimize(loss, np.zeros(4), tol=1e-12).x
    found = ratings.rate(given, draws=0)
    values = np.array([found.models[name].rating.value for name in names])
    assert (values - values[0]) / ratings.POINTS == pytest.approx(wanted - wanted[0], abs=1e-4)


def styled(count, random, length=0.0, bold=0.0):
    """Votes between equal models, swayed by how much longer and bolder an answer is."""
    given = []
    for number in range(count):
        words, marks = random.integers(1, 60, 2), random.integers(0, 4, 2)
        texts = ["word " * w + "**b** " * m for w, m in zip(words, marks)]
        probe = vote(answers=tuple(texts), question=f"{number} {random.random()}")
        by_length, by_bold = ratings.features([probe], ["length", "bold"])[0]
        chance = 1 / (1 + math.exp(-(length * by_length + bold * by_bold)))
        better = "second" if random.random() < chance else "first"
        given.append(vote(better, answers=probe.answers, question=probe.prompt[0]["content"]))
    return given


def test_the_weight_of_style_is_recovered_from_votes():
    given = styled(1_500, np.random.default_rng(1), length=1.5, bold=-0.7)
    found = ratings.rate(given, ("length", "bold", "lists"), draws=60)
    length, bold, lists = found.covariates.values()
    for wanted, weight in ((1.5, length), (-0.7, bold)):  # within four standard errors
        assert abs(weight.value - wanted) < weight.high - weight.low < 0.8
    assert lists == ratings.UNBOUNDED, "no answer has a list"


def test_a_model_that_wins_by_length_alone_has_no_higher_rating_at_equal_length():
    random = np.random.default_rng(2)
    given = []
    for number in range(800):
        words = random.integers(5, 40), random.integers(20, 60)
        gain = 2 * (words[1] - words[0]) / sum(words)
        better = "second" if random.random() < 1 / (1 + math.exp(-gain)) else "first"
        answers = tuple("word " * count for count in words)
        given.append(vote(better, answers=answers, question=f"{number} {random.random()}"))
    plain, held = ratings.rate(given, draws=0), ratings.rate(given, ("length",), draws=0)
    assert apart(plain) > 100
    assert abs(apart(held)) < 50


def test_features_compare_length_and_markdown():
    plain, marked = "one two", "# Title\n- **one** two\n- three\n1. four\nfive six"
    [found] = ratings.features([vote(answers=(plain, marked))], list(ratings.COVARIATES))
    assert found == pytest.approx([(11 - 2) / (11 + 2), 1, 1, 1])
    [none] = ratings.features([vote(answers=("", ""))], list(ratings.COVARIATES))
    assert (none == 0).all()


def test_models_with_all_votes_on_one_side_have_no_rating():
    given = several({"second": 9}) + several({"first": 5, "second": 5}, ("tuned", "other"))
    found = ratings.rate(given, draws=50)
    assert found.models["base"].rating == ratings.UNBOUNDED
    assert found.models["tuned"].rating.value == pytest.approx(1_000)
    assert found.models["base"].elo < found.models["other"].elo
    alone = ratings.rate(several({"second": 9}), draws=50)
    assert {each.rating for each in alone.models.values()} == {ratings.UNBOUNDED}
    assert list(alone.models) == ["tuned", "base"]


def test_a_single_loss_leaves_an_interval_open():
    found = ratings.rate(several({"second": 12, "first": 1}), draws=200)
    assert found.models["tuned"].rating.high is None
    assert found.models["base"].rating.low is None
    assert found.models["tuned"].rating.low > 1_000


def test_ties_alone_do_not_bound_a_rating():
    """A bootstrap draws nothing else from them."""
    found = ratings.rate(several({"tie": 20}))
    assert found.models["tuned"].rating == ratings.Estimate(1000.0, None, None)


def test_models_that_no_votes_connect_are_refused():
    given = several({"second": 2}) + several({"first": 2}, ("c", "d"))
    with pytest.raises(UserError, match="no votes compare 'c' with 'base'"):
        ratings.rate(given)
    with pytest.raises(UserError, match="'colour' should be one of length"):
        ratings.rate(several({"tie": 1}), ("colour",))


def test_votes_on_one_prompt_do_not_narrow_an_interval():
    once = ratings.rate(several({"second": 12, "first": 6}), draws=300)
    often = ratings.rate(several({"second": 12, "first": 6}) * 10, draws=300)
    assert often.num_prompts == once.num_prompts == 18
    assert often.models["tuned"].rating.low == pytest.approx(once.models["tuned"].rating.low)


def test_elo_moves_by_what_surprises():
    assert ratings.elo([vote()], k=32) == pytest.approx({"base": 984, "tuned": 1_016})
    assert ratings.elo([vote("tie")]) == {"base": 1_000, "tuned": 1_000}
    strong = ratings.elo(several({"second": 900, "first": 300}))
    assert strong["tuned"] - strong["base"] == pytest.approx(400 * math.log10(3), abs=40)


# ------------------------------------------------------------------------------------ agreement


def test_kappa_takes_away_what_chance_agrees_on():
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert agreement.kappa(first, second) == pytest.approx(0.4)
    assert agreement.kappa(first, first) == 1
    assert agreement.kappa([1, 1], [1, 1]) is None


# Krippendorff's own example: four raters, twelve units ("Computing Krippendorff's alpha", 2011).
RATED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


@pytest.mark.parametrize(
    ("scale", "wanted"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_is_krippendorffs(scale, wanted):
    assert agreement.alpha(RATED, scale) == pytest.approx(wanted, abs=5e-4)


def test_alpha_needs_values_to_compare():
    columns = [[value for value in column if value is not None] for column in zip(*RATED)]
    for scale in ("nominal", "ordinal", "interval"):
        twice = agreement.alpha([2 * list(rater) for rater in RATED], scale)
        assert agreement.alpha_of([*columns, *columns[::-1]], scale) == pytest.approx(twice)
    assert agreement.alpha([[1, 2], [None, None]]) is None
    assert agreement.alpha([[1, 1], [1, 1]]) is None
    assert agreement.alpha([[1, 2, 3], [1, 2, 3]], "interval") == 1


def continuous(random, n=200):
    """A biased judge of correlation 0.9: labels of mean 3, of which 30 are known."""
    labels = random.normal(3, 1, n)
    return 0.9 * labels + 0.45 * random.normal(0, 1, n) + 0.5, labels, 3.0, None


def right_or_wrong(random, n=600):
    """A judge that is right in 85 of 100 cases, on labels of mean 0.6."""
    labels = (random.random(n) < 0.6) * 1.0
    return np.where(random.random(n) < 0.85, labels, 1 - labels), labels, 0.6, None


def useless(random, n=600):
    """A judge that knows nothing."""
    return random.normal(0, 1, n), random.normal(3, 1, n), 3.0, None


def clustered(random, n=400):
    """Rows that share half of their label, and of the judge's error, with three others."""
    groups = np.repeat(np.arange(n // 4), 4)
    labels = 3 + (random.normal(0, 0.7, n // 4)[groups] + random.normal(0, 0.7, n))
    errors = random.normal(0, 0.4, n // 4)[groups] + random.normal(0, 0.6, n)
    return labels + errors, labels, 3.0, groups


def corrected(random, draw, num_labelled, weight=None):
    scores, labels, truth, groups = draw(random)
    known = set(random.choice(len(labels), num_labelled, replace=False).tolist())
    shown = [label if place in known else None for place, label in enumerate(labels)]
    return agreement.prediction_powered(scores, shown, groups, weight), truth


@pytest.mark.parametrize(
    ("draw", "num_labelled"),
    [(continuous, 40), (right_or_wrong, 60), (useless, 40), (clustered, 100)],
)
@pytest.mark.parametrize("times", short([300, 6_000], 300))
def test_corrected_intervals_hold_the_mean_in_95_of_100_cases(draw, num_labelled, times):
    random, hits = np.random.default_rng(4), 0
    for _ in range(times):
        found, truth = corrected(random, draw, num_labelled)
        hits += found.low <= truth <= found.high
    deviations = 3 * math.sqrt(0.95 * 0.05 / times)
    assert hits / times == pytest.approx(0.95, abs=max(0.015, deviations))


def test_a_good_judge_narrows_an_interval_and_a_bad_one_does_not_widen_it():
    def width(draw, weight):
        found = [corrected(np.random.default_rng(n), draw, 40, weight)[0] for n in range(40)]
        return np.mean([each.high - each.low for each in found])

    assert width(continuous, None) < 0.7 * width(continuous, 0.0)
    assert width(useless, None) < 1.03 * width(useless, 0.0)
    assert width(useless, 1.0) > 1.2 * width(useless, 0.0), "what the chosen weight prevents"


def test_the_first_form_is_the_mean_of_scores_plus_the_mean_error_of_labelled_rows():
    scores, labels = [1.0, 2.0, 3.0, 5.0], [None, None, 3.5, 4.0]
    found = agreement.prediction_powered(scores, labels, weight=1.0)
    assert found.mean == pytest.approx((1 + 2) / 2 + (0.5 - 1) / 2)
    assert (found.by_people, found.by_judge) == (3.75, 2.75)
    assert (found.low, found.num_labelled, found.num_rows) == (None, 2, 4)


def test_without_labels_nothing_is_corrected_and_with_all_people_decide():
    with pytest.raises(UserError, match="no labels"):
        agreement.prediction_powered([1.0], [None])
    labels = np.random.default_rng(5).normal(0, 1, 50).tolist()
    found = agreement.prediction_powered([9.0] * 50, labels)
    assert (found.mean, found.weight) == (pytest.approx(np.mean(labels)), 0)


def test_elo_and_ratings_order_models_alike():
    names = ["a", "b", "c"]
    given = [v for pair in pairwise(names) for v in several({"second": 8, "first": 3}, pair)]
    found = ratings.rate(given, draws=0)
    assert list(found.models) == ["c", "b", "a"]
    assert found.models["c"].elo > found.models["b"].elo > found.models["a"].elo
