"""Where the tuned model is weak, what to ask for next, and what became of it since."""

import json
import random
from dataclasses import replace

import chat_server
import pytest
from conftest import read_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_results import Asked, Rule, results

from finetune.__main__ import main
from finetune.errors import DataError, UserError
from finetune.evaluation import analysis, next_data, rounds, slices, statistics, verdict
from finetune.evaluation import nearest as nearest_rows
from finetune.evaluation.nearest import TrainingRow
from finetune.evaluation.results_file import Decides, read, write
from finetune.preparation import request


def analysed(made, decides=None, **more):
    chosen = decides or analysis.decides_of(made)
    return analysis.of_results(made, verdict.of(made), chosen, **more)


def with_hole(wrong_vowels=20, wrong_others=2):
    """80 rows of two kinds: of the 40 about vowels `wrong_vowels` are wrong."""
    rows = []
    for number in range(80):
        kind = "vowels" if number % 2 else "consonants"
        wrong = number // 2 < (wrong_vowels if number % 2 else wrong_others)
        right = f"word{number} number {number}"
        answer = f"no number {number}" if wrong else right
        fields = {"kind": kind, "id": f"id {number}", "weight": number / 3}
        rows.append(Asked(f"say it {number}", right, answer, "nothing", fields=fields))
    return results(rows)


# ------------------------------------------------------------------------------------ slices


def test_the_slice_that_fails_more_is_weak_and_comes_first():
    found = analysed(with_hole())
    first = found.slices[0]
    assert (first.name, first.failures, len(first.rows)) == ("kind: vowels", 20, 40)
    assert [each.name for each in found.slices if each.is_weak] == ["kind: vowels"]
    assert first.means["tuned"].mean == 0.5
    assert first.change.mean == 0.5
    assert first.change.low > 0.3
    assert not first.is_small


def test_equal_slices_are_not_weak():
    assert not any(each.is_weak for each in analysed(with_hole(5, 5)).slices)


def test_p_of_a_slice_is_that_of_fishers_exact_test():
    from scipy.stats import hypergeom

    parts = [slices.Slice("a", "x", tuple(range(10))), slices.Slice("a", "y", tuple(range(10, 30)))]
    failed = {row: row < 6 or row in (12, 20) for row in range(30)}
    (p, is_weak), (other, _) = slices.failing_more(parts, failed)
    # 6 or more of the 8 wrong ones among 10 of 30 rows; twice, for two slices.
    assert p == pytest.approx(2 * hypergeom.sf(5, 30, 8, 10))
    assert is_weak
    assert other == pytest.approx(hypergeom.sf(1, 30, 8, 20))


def test_slices_come_from_columns_lengths_files_and_clusters():
    rows = [
        Asked("a " * (1 + n % 6), "b", "b", fields={"source": "web" if n < 30 else None, "n": [n]})
        for n in range(60)
    ]
    made = results(rows, clusters=[min(n, 50) for n in range(60)])
    found = {(each.column, each.value): len(each.rows) for each in slices.of_results(made)}
    assert found["source", "web"] == found["source", "none"] == 30
    lengths = {
        value: n for (column, value), n in found.items() if column == "words of the question"
    }
    assert sum(lengths.values()) == 60
    assert set(lengths) == {"1", "2", "3 to 4", "5 to 6"}
    assert found["near-duplicates of", "a a a"] == 10
    assert not {column for column, _ in found} & {"n", "file", "messages"}


def test_an_interval_of_a_mean_is_wilsons_or_students():
    low, high = statistics.interval([1.0] * 8 + [0.0] * 2)
    z, share, n = 1.959964, 0.8, 10
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    assert (low, high) == pytest.approx((middle - reach, middle + reach), abs=1e-6)
    source = random.Random(0)
    values = [source.random() for _ in range(40)]
    twice = statistics.interval(values + values, [*range(40), *range(40)])
    assert statistics.interval(values) == pytest.approx(twice)  # repeating rows adds nothing
    assert statistics.interval(values[:29]) == (None, None)


# ------------------------------------------------------------------------------------ what is wrong


def test_the_first_strict_share_decides_and_a_graded_one_where_answers_are_long():
    assert analysis.decides_of(with_hole()) == Decides(score="exact match", below=0.5)
    long = [Asked("a", "w " * 20, "w " * 19), Asked("b", "v " * 20, "v " * 19)]
    given = {"F1": {"base": [0.1, 0.2], "tuned": [0.9, 0.3]}}
    graded = results(long, scores=given)
    short = [Asked("a", "w", "w"), Asked("b", "v", "v")]
    made = results(short, scores=given)
    turned = replace(made, scorers=dict(reversed(made.scorers.items())))
    assert analysis.decides_of(turned) == Decides(score="exact match", below=0.5)
    assert analysis.decides_of(graded) == Decides(score="F1", below=0.5)
    assert [row.failed for row in analysed(graded).rows] == [False, True]
    assert analysis.decides_of(graded, ("exact match", 1.0)).score == "exact match"
    with pytest.raises(UserError, match="'words' cannot say .* choose one of exact match"):
        analysis.decides_of(made, ("words", 0.5))


def test_without_references_an_answer_is_wrong_by_itself():
    answers = ["fine", "on and " * 20, "", "1" + "0" * 40, "3,000,000,000"]
    found = analysed(results([Asked(f"q {n}", None, text) for n, text in enumerate(answers)]))
    assert found.decides is None
    assert [row.failed for row in found.rows] == [None, True, True, True, None]
    errors = [row.errors for row in found.rows]
    assert errors == [[], ["repetition"], ["no answer"], ["repetition"], []]
    assert found.score("exact match").missing["tuned"] == {"the row has no reference": 5}


def test_scores_that_are_not_finite_are_gaps():
    given = {"perplexity": {"base": [2.0, 3.0], "tuned": [float("inf"), float("nan")]}}
    rows = [Asked("a", "b", "b"), Asked("c", "d", "d")]
    made = results(rows, scores=given, scorers={"perplexity": Rule("perplexity", False, False)})
    found = analysis.of_results(made, verdict.Verdict("no scores", "none"), None)
    assert found.score("perplexity").means.keys() == {"base"}
    assert found.rows[0].scores["perplexity"] == {"base": 2.0, "tuned": None}


def test_failures_have_the_nearest_rows_that_were_trained_on():
    pytest.importorskip("wordllama")
    rows = [
        Asked("how do I return a parcel?", "by mail", "never"),
        Asked("what does it cost?", "10", "10"),
    ]
    known = [
        TrainingRow("train.jsonl:1", "the weather in Paris", "mild"),
        TrainingRow("train.jsonl:2", "how can I send a parcel back?", "by mail"),
        TrainingRow("train.jsonl:3", "prices of all things", "10"),
    ]
    wrong, right = analysed(results(rows), trained=lambda: known).rows
    assert wrong.nearest[0].place == "train.jsonl:2"
    assert len(wrong.nearest) == 3
    assert wrong.nearest[0].similarity > wrong.nearest[1].similarity
    assert right.nearest == []


def test_a_missing_package_is_a_note(monkeypatch):
    monkeypatch.setattr(nearest_rows, "is_possible", lambda: False)
    found = analysed(with_hole(), trained=lambda: [TrainingRow("a:1", "b", "c")])
    assert found.notes == [nearest_rows.MISSING]


# ------------------------------------------------------------------------------------ next data


def test_the_request_asks_for_the_weak_slice_and_its_reader_takes_it(tmp_path):
    asked_for = {"tuned": "runs/a", "data": ["test.jsonl", "more.jsonl"]}
    found = analysed(replace(with_hole(), settings=asked_for))
    path = tmp_path / "request.json"
    next_data.write(path, next_data.request_of(found))
    asked = request.read(str(path))
    assert (asked.model, asked.data) == ("runs/a", "test.jsonl, more.jsonl")
    [vowels] = asked.slices
    assert vowels.name == "kind: vowels"
    assert vowels.count == 20 * 20
    assert "of 40 rows 20 are wrong" in vowels.description
    assert "wrong in a way that none of these rules knows" in vowels.description
    assert len(vowels.examples) == 7
    assert vowels.examples[0].prompt == "say it 1"
    assert vowels.examples[0].reference == "word1 number 1"
    assert vowels.examples[0].answer == "no number 1"
    assert vowels.examples[0].score == 0
    assert vowels.constraints == ["answers have 3 words"]


def test_failures_outside_weak_slices_are_asked_for_by_their_type(tmp_path):
    rows = [Asked(f"q {n}", f"label{n % 2}", "I cannot help you" if n < 4 else f"label{n % 2}")
            for n in range(12)]  # fmt: skip
    [refused] = next_data.request_of(analysed(results(rows))).slices
    assert refused.name == "refusal"
    assert refused.count == 80
    assert refused.constraints == ["the answer is one of: label0, label1"]


@pytest.mark.slow
def test_a_model_makes_the_rows_that_are_asked_for(tmp_path, capsys):
    """data generate takes the file as it is; a server that answers by rule stands for a model."""
    path = tmp_path / "request.json"
    next_data.write(path, next_data.request_of(analysed(with_hole(6, 0))))

    def answer(body):
        asked = body["messages"][-1]["content"]
        source = random.Random(asked)
        words = (" ".join(f"w{source.randrange(900)}" for _ in range(6)) for _ in range(5))
        return "\n\n".join(f"Question: say {text}?\nAnswer: {text}" for text in words)

    output = tmp_path / "more.jsonl"
    with chat_server.running(answer=answer) as server:
        given = ["--from-report", path, "--output", output, "--endpoint", server.url]
        assert main(["data", "generate", *map(str, given), "--model", "good-model"]) == 0
    rows = read_jsonl(output)
    assert [row["slice"] for row in rows] == ["kind: vowels"] * 120
    assert "Rows whose kind is vowels: of 40 rows 6" in server.seen[0]["messages"][-1]["content"]


def test_two_failures_are_no_reason_to_ask():
    with pytest.raises(UserError, match="2 of 80 rows are wrong, and none of a weak slice"):
        next_data.request_of(analysed(with_hole(0, 2)))


# ------------------------------------------------------------------------------------ rounds


@pytest.fixture
def first(tmp_path):
    path = tmp_path / "first.json"
    write(path, analysed(with_hole(20, 2)))
    return path


def test_a_later_round_says_what_was_fixed_and_what_broke(first):
    found = analysed(with_hole(3, 4), earlier=first).round
    assert (found.fixed, found.not_fixed, found.new, found.right) == (17, 5, 2, 56)
    assert found.sentence == (
        "Of 22 rows that were wrong, 17 are right now. Of 58 rows that were right, 2 are wrong now "
        f"(at most {found.most_broken:.1%})."
    )
    by_slice = {each.value: each for each in found.slices if each.column == "kind"}
    assert by_slice["vowels"].fixed == 17
    assert by_slice["vowels"].new == 0
    assert by_slice["consonants"].new == 2


def test_a_filled_hole_is_all_fixed_and_nothing_broke(first):
    found = analysed(with_hole(0, 2), earlier=first)
    assert found.round.sentence.startswith("Of 22 rows that were wrong, 20 are right now.")
    assert "every one still is (at most 6.2% of such rows broke)" in found.round.sentence
    # 0 of 58: (1 - share)^58 = 0.025
    assert found.round.most_broken == pytest.approx(1 - 0.025 ** (1 / 58))
    assert [row.since for row in found.rows[:4]] == ["not fixed", "fixed", "not fixed", "fixed"]


def test_rows_are_known_by_what_is_asked_not_by_their_place(first):
    made = with_hole(20, 2)
    order = list(range(80))[::-1]
    rows = [made.prompts[n] for n in order[:70]]
    shuffled = results(
        [Asked(p.question, p.reference, p.reference, fields=p.fields) for p in rows]
        + [Asked("new one", "a", "b")]
    )
    found = analysed(shuffled, earlier=first).round
    assert (found.only_before, found.only_now) == (10, 1)
    assert found.new == found.not_fixed == 0


def test_a_question_that_stands_twice_is_two_rows():
    twice = [Asked("a", "b", "b"), Asked("a", "b", "c")]
    found = analysed(results(twice))
    assert len(set(rounds.keys([row.messages for row in found.rows]))) == 2


def test_a_later_round_takes_the_rule_of_the_earlier_one_and_no_other(first, tmp_path):
    rule = Decides(score="exact match", below=0.5)
    assert rounds.rule(first, None, None) == rounds.rule(first, "exact match", 0.5) == rule
    for score, below in ((None, 1.0), ("exact match", 1.0), ("F1", 0.5)):
        now = f"exact match below 0.5, and is here by {score or 'exact match'} below {below:g}"
        with pytest.raises(UserError, match=now):
            rounds.rule(first, score, below)
    undecided = tmp_path / "undecided.json"
    undecided.write_text(json.dumps({**json.loads(first.read_text()), "decides": None}))
    with pytest.raises(UserError, match="no score said there which answers are wrong"):
        rounds.rule(undecided, None, None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "{", "is not what an evaluation wrote"),
        (lambda text: "\x00", "is not what an evaluation wrote"),
        (lambda text: json.dumps({**json.loads(text), "version": 2}), "version: Input should be 1"),
        (lambda text: text.replace('"failed"', '"fail"'), "and 154 more"),
    ],
)
def test_a_damaged_file_is_named(first, damage, message):
    first.write_text(damage(first.read_text()))
    with pytest.raises(DataError, match=r"first.json") as caught:
        read(first)
    assert message in str(caught.value)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.recursive(st.none(), st.lists).map(json.dumps).map(str.encode))
def test_any_bytes_are_results_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "results.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"results.json"):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.json: cannot be read"):
        analysed(with_hole(), earlier=tmp_path / "none.json")
