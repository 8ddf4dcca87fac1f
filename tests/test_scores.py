"""Scores of answers: rules, words in common, labels, form, a user's own; gaps are counted."""

import json
import math
import random
import signal
from dataclasses import replace
from functools import cache

import pytest
from conftest import read_jsonl, short

from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.errors import ConfigError, DataError, UserError
from finetune.evaluation import scores
from finetune.evaluation.scores import normalise, overlap
from finetune.evaluation.scores.base import OfAnswer
from finetune.evaluation.scores.form import repeated
from finetune.evaluation.scores.labels import Label
from finetune.generation.completions import Completion, Prompt, Score
from finetune.time_limit import TimeLimit


def completion(answer, reference="", question="what?", line=1, **changes):
    conversation = Conversation((Message("user", question),), Place("rows.jsonl", line))
    fields = changes.pop("fields", {})
    return Completion(Prompt(conversation, reference, fields), answer, **changes)


def value(name, answer, reference="", **changes):
    [scorer] = scores.choose([name])
    [found] = scorer([completion(answer, reference, **changes)])
    return found.value


RIGHT, WRONG = 1, 0


@pytest.mark.parametrize(
    ("name", "answer", "reference", "wanted"),
    [
        ("exact-match", " Paris\n", "Paris", RIGHT),
        ("exact-match", "paris", "Paris", WRONG),
        ("exact-match", "a  b", "a b", WRONG),
        ("exact match=case", "paris", "Paris", RIGHT),
        ("exact_match=case", "paris.", "Paris", WRONG),
        ("exact-match=punctuation", "“Paris”, or so!", "Paris or so", RIGHT),
        ("exact-match=punctuation", "-5", "5", WRONG),
        ("exact-match=punctuation", "3.5", "35", WRONG),
        ("exact-match=case,articles", "The cat", "a  cat", RIGHT),
        ("exact-match=articles", "athens", "thens", WRONG),
        ("exact-match=numbers", "it is 1,000.0", "it is 1000", RIGHT),
        ("exact-match=numbers", "it is 1e400", "it is 1e400", RIGHT),
        ("exact-match=numbers", "10-5", "10 -5", WRONG),
        ("exact-match=json", '{"b": 1.0, "a": [1]}', '{"a": [1], "b": 1}', RIGHT),
        ("exact-match=json", 'Sure!\n```json\n{"a": 1}\n```', '{"a": 1}', RIGHT),
        ("exact-match=json", 'Here it is: {"a": 1}.', '{"a": 1}', RIGHT),
        ("exact-match=json", '{"a": "1"}', '{"a": 1}', WRONG),
        ("exact-match=json", "[" * 100_000, '{"a": 1}', WRONG),
        ("contains", "Sure! It is paris.", "Paris", RIGHT),
        ("contains", "Parisian", "Paris", WRONG),
        ("contains", "it costs $1,000", "1000.0", RIGHT),
        ("contains", "0.5", "5", WRONG),
        ("contains", "Ответ: ДА.", "да", RIGHT),
        ("contains", "答案是东京。", "东京", RIGHT),
        ("contains", "ok :-)", ":-)", RIGHT),
        ("contains=by noon", "We close by noon!", "", RIGHT),
        ("regex=^\\d+$", "42", "", RIGHT),
        ("regex=^\\d+$", "42 apples", "", WRONG),
        ("stop-words=sorry,as an AI", "Of course", "", RIGHT),
        ("stop-words=sorry,as an AI", "As an AI, I cannot", "", WRONG),
        ("number", "So 3 + 4 = 7 apples.", "#### 7", RIGHT),
        ("number", "It is $1,234.50!", "1234.5", RIGHT),
        ("number", "minus: \u22123", "-3", RIGHT),
        ("number", "7, not 8", "7", WRONG),
        ("number", "no idea", "7", WRONG),
        ("number=0.01", "3.14", "3.1416", RIGHT),
        ("word-error-rate", "a x c d", "a b c", 2 / 3),
        ("token-f1", "Sure! The Eiffel Tower", "Eiffel tower", 4 / 5),
        ("rouge-l", "c b a", "a b c", 1 / 3),
        ("length-ratio", "one two three", "one two", 3 / 2),
        ("words", "one two, three!", "", 3),
        ("spelling", "this is an old mispeling", "", 4 / 5),
        ("spelling", "Zxqv said gsm8k was at foo.com and zblorf", "zblorf", 1),
        pytest.param("spelling=de", "das ist ganz falsc", "", 3 / 4, marks=pytest.mark.proof),
    ],
)
def test_score_of_an_answer(name, answer, reference, wanted):
    assert value(name, answer, reference) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "answer", "reference", "reason"),
    [
        ("number", "7", "seven", "the reference holds no number"),
        ("exact-match=json", "{}", "none", "the reference holds no JSON"),
        ("rouge-l", "a", "!", "the reference has no words"),
        ("word-error-rate", "a", "!", "the reference has no words"),
        ("contains", "a", None, "the row has no reference"),
        ("label", "a", None, "the row has no reference"),
        ("bleu", "a", None, "the row has no reference"),
        ("consistency", "a", "", "no other answer to the same question"),
        ("consistency=topic", "a", "", "the row has no topic"),
        ("seconds", "a", "", "the time was not measured"),
        ("spelling", "42", "", "the answer has no word in lower case"),
    ],
)
def test_what_cannot_be_scored_is_a_gap_with_its_reason(name, answer, reference, reason):
    [scorer] = scores.choose([name])
    assert scorer([completion(answer, reference)]) == [Score(None, reason)]
    failed = completion("", "7", finish_reason="failed")
    if name != "consistency=topic":
        assert scorer([failed]) == [Score(None, "no answer came")]


def test_gaps_are_counted_and_never_zeros():
    given = [completion("a", "a"), completion("b", None), completion("c", None)]
    given.append(completion("", "d", finish_reason="failed"))
    found = scores.of(scores.choose(["exact-match", "label"]), {"base": given})
    for each in ("exact match", "label"):
        assert scores.gaps(found[each]["base"]) == {
            "the row has no reference": 2, "no answer came": 1,
        }  # fmt: skip
        assert [score.value for score in found[each]["base"]] == [1, None, None, None]


def random_texts(count):
    random.seed(0)
    words = "a b c d the e f".split()
    for _ in range(count):
        yield tuple(" ".join(random.choices(words, k=random.randint(0, 9))) for _ in "12")


@cache
def table(one, other, edits):
    """Levenshtein's distance, or the longest common subsequence, by their recurrences."""
    if not one or not other:
        return max(len(one), len(other)) if edits else 0
    if one[0] == other[0]:
        return table(one[1:], other[1:], edits) + (not edits)
    ways = [table(one[1:], other, edits), table(one, other[1:], edits)]
    return 1 + min(*ways, table(one[1:], other[1:], edits)) if edits else max(ways)


def test_edit_distance_and_rouge_l_are_those_of_their_recurrences():
    for one, other in random_texts(300):
        first, second = tuple(one.split()), tuple(other.split())
        assert overlap.edit_distance(first, second) == table(first, second, True)
        if second:
            common = table(first, second, False)
            score = 2 * common / (len(first) + len(second))
            assert value("rouge-l", one, other) == pytest.approx(score)


def test_f1_is_that_of_pairs_counted_one_by_one():
    for one, other in random_texts(300):
        given, wanted = (
            [w for w in text.split() if w not in ("a", "the")] for text in (one, other)
        )
        left, shared = list(wanted), 0
        for word in given:
            if word in left:
                left.remove(word)
                shared += 1
        score = float(given == wanted)
        if given and wanted and shared:
            precision, recall = shared / len(given), shared / len(wanted)
            score = 2 * precision * recall / (precision + recall)
        assert value("token-f1", one, other) == pytest.approx(score)


def test_bleu_and_chrf_are_those_of_sacrebleu():
    from sacrebleu.metrics import BLEU, CHRF

    texts = [("the cat sat on the mat .", "the cat is on the mat ."), ("a b c d e", "a b c d f")]
    given = [completion(*each) for each in texts] + [completion("x", None)]
    answers, references = zip(*texts)
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        [scorer] = scores.choose([name])
        corpus = metric.corpus_score(list(answers), [list(references)]).score
        counts = scorer.counts(given[:2])
        assert scorer.of_counts(counts) == pytest.approx(corpus / 100)
        alone = metric.corpus_score([answers[1]], [[references[1]]]).score
        assert scorer.of_counts(counts[1:]) == pytest.approx(alone / 100)
        one = BLEU(effective_order=True) if name == "bleu" else metric
        values = [one.sentence_score(a, [r]).score / 100 for a, r in texts]
        assert [each.value for each in scorer(given)] == [*map(pytest.approx, values), None]


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("It is $\\frac{1}{2}$", "0.5", RIGHT), ("so 42", "#### 42", RIGHT), ("no", "3", WRONG),
        ("$\\{1,2\\}$", "$\\{2,1\\}$", RIGHT), ("a", "only words", None),
    ],
)  # fmt: skip
def test_answers_are_equal_as_mathematics(answer, reference, wanted):
    pytest.importorskip("math_verify")
    assert value("math", answer, reference) == wanted


def test_repetition_counts_runs_of_four_words():
    assert repeated("one two three four five") == 0
    assert repeated("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated("no " * 13) == pytest.approx(9 / 10)
    assert repeated("") == 0


def test_labels_are_those_of_the_references():
    rows = [("Sure! positive.", "Positive"), ("not positive", "not positive"), ("ok", "negative"),
            ("Positive or negative?", "negative"), ("NEGATIVE", "negative")]  # fmt: skip
    given = [completion(*each) for each in rows]
    found = Label()(given)
    assert [(each.value, each.reason) for each in found] == [
        (1, "says Positive"), (1, "says not positive"), (0, "names no label"),
        (0, "names Positive, negative"), (1, "says negative"),
    ]  # fmt: skip
    lines = Label().details(given)
    assert lines[0] == "accuracy 60.0%, macro F1 83.3%, 5 rows, 3 labels"
    assert lines[2].split() == ["negative", "100.0%", "33.3%", "50.0%", "3"]
    assert lines[-2].split() == ["negative", "0", "1", "0", "2"]
    assert Label().details([]) == []


def test_consistency_compares_answers_to_the_same_question():
    samples = [completion("a b", question="x"), completion("a c", question="x"),
               completion("z", question="y"), completion("", question="x")]  # fmt: skip
    [scorer] = scores.choose(["consistency"])
    assert [each.value for each in scorer(samples)] == [0.25, 0.25, None, 0]
    [scorer] = scores.choose(["consistency=topic"])
    named = [completion(text, fields={"topic": 1}) for text in ("a b", "a b", "c d")]
    assert [each.value for each in scorer(named)] == [0.5, 0.5, 0]


def test_cost_comes_from_seconds_and_the_price_of_an_hour():
    assert value("seconds", "a", seconds=0.5) == 0.5
    assert value("cost=3.60", "a", seconds=0.5) == pytest.approx(0.5)
    prices = "cost=3.60,0.15,0.60"  # of an hour, and of a million tokens at a server
    assert value(prices, "a", seconds=0.5) == pytest.approx(0.5)
    assert value(prices, "a", seconds=0.5, billed=(1_000, 100)) == pytest.approx(0.15 + 0.06)


def test_json_is_checked_by_a_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["name"]}))
    assert value(f"json-schema={path}", 'Sure: {"name": "x"}') == 1
    [scorer] = scores.choose([f"json-schema={path}"])
    assert scorer([completion("{}"), completion("none")]) == [
        Score(0, "'name' is a required property"), Score(0, "holds no JSON"),
    ]  # fmt: skip
    for text, says in (("[", "cannot be read"), ('{"type": 3}', "not a JSON schema"),
                       ("[1]", "should be a JSON object")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            scores.choose([f"json-schema={path}"])
    with pytest.raises(UserError, match="no such file"):
        scores.choose(["json-schema=/no/such"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rouge-k", "no score rouge-k; did you mean rouge-l?"),
        ("qqq", "`--scores list` shows them all"),
        ("exact-match=kase", "'kase' should be one of json, numbers, case"),
        ("regex", "regex needs a value: regex=PATTERN"),
        ("regex=(", "is not a pattern"),
        ("words=3", "words takes no value, got 3"),
        ("number=x", "such as 0.01, got 'x'"),
        ("number=-1", "such as 0.01"),
        ("cost=nan", "such as cost=2.50"),
        ("cost=x", "such as cost=2.50"),
        ("cost=1,2", "such as cost=2.50,0.15,0.60, got '1,2'"),
        ("spelling=xx", "pyspellchecker has no words of this language; it has ar, de, en"),
        ("no_such.py:score", "no file no_such.py"),
    ],
)
def test_a_wrong_score_is_named(name, says):
    with pytest.raises(ConfigError, match=says.replace("(", "\\(")):
        scores.choose([name])


def test_the_list_has_a_line_for_each_score():
    lines = scores.listing().splitlines()
    assert len(lines) == len(scores.KINDS) + 1
    assert all(len(line) <= 130 and "  " in line for line in lines)
    assert any(line.startswith("regex=PATTERN ") for line in lines)
    assert any(line.startswith("number[=TOLERANCE] ") for line in lines)


LONG = "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen, in leaves."


@pytest.mark.parametrize(
    ("references", "why"),
    [
        (["Paris", "Rome", "forty two men", "Oslo"], "the references are short"),
        (["positive", "Negative", "negative"] * 3, "the references are 2 short labels"),
        (["7", "3 + 4 = 7\n#### 7", "$1,000"], "the references end in a number"),
        (['{"a": 1}', '{"b": [2]}'], "the references are JSON"),
        ([LONG, LONG + " It is old."], "the references are long"),
    ],
)
def test_scores_that_fit_the_references_take_a_right_answer_with_words_before_it(references, why):
    names, reason = scores.suitable([completion("", each).prompt for each in references])
    assert reason == why
    given = [completion(f"Sure! Here it is: {each}", each) for each in references]
    for scorer in scores.choose(names):
        assert not scorer.higher or all(each.value > 0.2 for each in scorer(given)), scorer.name


def test_rows_without_references_get_scores_that_need_none():
    prompts = [completion("", None).prompt]
    names, reason = scores.suitable(prompts)
    assert reason == "no row has a reference"
    for by_model in scores.of(scores.choose(names), {"base": [completion("a", None)]}).values():
        assert by_model["base"][0].value is not None


OWN = '''"""Scores of ours."""

def polite(completion):
    """Whether the answer is polite."""
    return "please" in completion.text, "by one word"

def length(completion):
    return None if not completion.text else len(completion.text)
length.is_share, length.higher = False, None

def broken(completion):
    return completion.prompt.fields["x"]

def large(completion):
    return 7

def hangs(completion):
    while True:
        try:
            while True: pass
        except Exception:
            pass
hangs.seconds = 0.05

class Slow:
    name, line, higher, is_share, seconds = "slow", "Hangs.", True, True, 0.05
    def __call__(self, completions):
        return sum(1 for _ in iter(int, 1))

slow = Slow()

def quick(completion):
    return 1
quick.seconds = "5"

class Scorer:
    name, line, higher, is_share = "of all", "All at once.", False, True
    def __call__(self, completions):
        return [1 / len(completions)] * self.times(len(completions))
    def times(self, count):
        return count if count < 3 else 1

of_all = Scorer()
'''


def test_a_score_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(OWN)
    polite, length, of_all = scores.choose(
        [f"score.py:{n}" for n in ("polite", "length", "of_all")]
    )
    assert (polite.name, polite.line) == ("polite", "Whether the answer is polite.")
    assert (polite.higher, polite.is_share) == (True, True)
    assert (length.higher, length.is_share) == (None, False)
    assert (of_all.name, of_all.line, of_all.higher) == ("of all", "All at once.", False)
    given = [completion("please"), completion("")]
    assert polite(given) == [Score(1, "by one word"), Score(0, "by one word")]
    assert length(given) == [Score(6), Score(None, "length gives no score")]
    assert of_all(given) == [Score(0.5), Score(0.5)]
    with pytest.raises(ConfigError, match=r"should return a list with a score for each of 4"):
        of_all(given * 2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("broken", r"rows.jsonl:9: --scores: score.py:12: KeyError: 'x'"),
        ("hangs", r"rows.jsonl:9: --scores: score.py:hangs: not done after 0.05 s; make it faster"),
        ("slow", r"rows.jsonl:9: --scores: score.py:slow: not done after 0.05 s; make it faster"),
        ("large", r"rows.jsonl:9: --scores: score.py:large returned 7, and scores are from 0 to 1"),
    ],
)
def test_an_own_score_that_fails_names_the_row_and_its_line(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(OWN)
    [scorer] = scores.choose([f"score.py:{name}"])
    with pytest.raises(DataError, match=says):
        scorer([completion("a", line=9)])


def test_seconds_of_an_own_score_are_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(OWN)
    with pytest.raises(ConfigError, match="score.py:quick: seconds should be above 0, got '5'"):
        scores.choose(["score.py:quick"])


BACKTRACKS, LONG = r"(\w+\s?)+$", "word " * 24 + "!"


@pytest.mark.parametrize(
    "name", [f"regex={BACKTRACKS}", "json-schema=schema.json"], ids=["regex", "schema"]
)
def test_a_pattern_that_backtracks_ends_with_the_row(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps({"pattern": BACKTRACKS}))
    [scorer] = scores.choose([name])
    given = [completion("a"), completion(json.dumps(LONG), line=9)]
    with pytest.raises(DataError, match=r"rows.jsonl:9: --scores: .*: not done after 0.1 s"):
        replace(scorer, seconds=0.1)(given)


def _hang_after(block):
    with block:
        pass
    while True:
        pass


def test_a_limit_of_time_leaves_an_outer_one_and_the_handler():
    def ours(*_):
        raise AssertionError

    left = signal.getitimer(signal.ITIMER_REAL)[0]
    before = signal.signal(signal.SIGALRM, ours)
    try:
        with pytest.raises(DataError, match="outer"), TimeLimit(0.2, "outer"):
            _hang_after(TimeLimit(5, "inner"))
        assert left - 5 < signal.getitimer(signal.ITIMER_REAL)[0] <= left  # of pytest-timeout
        assert signal.getsignal(signal.SIGALRM) is ours
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_own_score_that_is_not_a_function_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text("x = 3\nclass C: ...\n")
    for name, kind in (("x", "of type int"), ("C", "a class")):
        with pytest.raises(ConfigError, match=f"score.py:{name} is {kind}, not a function"):
            scores.choose([f"score.py:{name}"])


def test_words_of_any_script_are_split():
    assert normalise.words("The Grüße, 東京 and 1,000.50 don't") == [
        "grüsse", "東", "京", "and", "1000.5", "don", "t",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "columns", "wanted"),
    short(
        [
            ("gsm8k/test.jsonl", ("question", "answer"), "number"),
            ("dolly/dolly_hhrlhf_small.jsonl", ("prompt", "response"), "rouge-l"),
        ]
    ),
)
def test_scores_that_fit_real_references(real_data, file, columns, wanted):
    question, answer = columns
    rows = read_jsonl(real_data / file)
    names, _ = scores.suitable([completion("", row[answer], row[question]).prompt for row in rows])
    assert names[0] == wanted
    given = [completion(f"Sure!\n{row[answer]}", row[answer], row[question]) for row in rows]
    for scorer in scores.choose(names):
        values = [each.value for each in scorer(given) if each.value is not None]
        assert not scorer.higher or sum(each > 0 for each in values) >= 0.99 * len(rows)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_a_gap(value):
    """Such as of a classifier whose weights overflow: one would make every mean NaN."""
    score = OfAnswer("odd", "", lambda completion: value)
    [found] = scores.of([score], {"base": [completion("a")]})["odd"]["base"]
    assert found == Score(None, f"came out as {value}, not a finite number")
