"""Test suites: rules of rows, and what is wrong in a file, by its line."""

import json

import pytest
from conftest import ROOT

from finetune.errors import DataError
from finetune.evaluation import suites
from finetune.generation.completions import Completion, Score


def suite(tmp_path, text):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    return suites.read(str(path))


def broken(tmp_path, rules, answer, reference=None, reason=True):
    """Return what an answer breaks of the rules of a row."""
    row = {"prompt": "q", "rules": rules} | ({"reference": reference} if reference else {})
    made = suite(tmp_path, json.dumps({"rows": [row]}))
    [found] = made.scorer([Completion(made.prompts[0], answer)])
    assert found.value == (0 if found.reason else 1)
    return found.reason.removeprefix("breaks ")


@pytest.mark.parametrize(
    ("rules", "kept", "breaks", "what"),
    [
        ({"contains": ["11", "check out"]}, "Check out by 11!", "by 11", "contains check out"),
        ({"contains-any": ["yes", "sure"]}, "Sure.", "no", 'contains any of ["yes", "sure"]'),
        ({"stop-words": "as an AI"}, "Hello", "As an AI, hello", "without as an AI"),
        ({"regex": "^\\d+$"}, "12", "12 a", "regex ^\\d+$"),
        ({"exact-match": ["Yes", "No"], "ignoring": ["case"]}, "yes", "yes.",
         'exact match ["Yes", "No"]'),
        ({"number": 1.5}, "so 2 - 0.5 = 1.50", "1.5 or 2", "number 1.5"),
        ({"json": {"a": [1]}}, 'Here: {"a": [1.0]}', '{"a": 1}', 'json {"a": [1]}'),
        ({"json": None}, "null", "none", "json null"),
        ({"json-schema": {"required": ["a"]}}, '{"a": 1}', "{}",
         "json-schema ('a' is a required property)"),
        ({"fewest-words": 2}, "a b", "a", "fewest words 2"),
        ({"most-words": 1}, "a", "a b", "most words 1"),
        ({"most-words": 0}, "", "a", "most words 0"),
        ({"scores": {"repetition": 0.2}}, "a b c d", "a " * 20, "repetition at most 0.2 (0.941)"),
        pytest.param({"python-tests": "assert f(2) == 4"}, "```\ndef f(x): return 2 * x\n```",
                     "def f(x): return x", "python-tests (AssertionError)",
                     marks=pytest.mark.proof),
    ],
)  # fmt: skip
def test_a_rule_is_kept_or_broken(tmp_path, rules, kept, breaks, what):
    assert broken(tmp_path, rules, kept) == ""
    assert broken(tmp_path, rules, breaks) == what


def test_all_rules_of_a_row_count_and_each_broken_one_is_named(tmp_path):
    rules = {"contains": "a", "most-words": 2, "scores": {"token-f1": 0.9}}
    assert broken(tmp_path, rules, "b c d", "a") == (
        "contains a; most words 2; token-f1 at least 0.9 (0)"
    )


GOOD = """name: hotel
system: Be brief.
rows:
  - prompt: When?
    reference: By 11.
    fields: {topic: times}
    rules: {contains: "11"}

  - messages:
      - {role: user, content: Hi}
      - {role: assistant, content: Hello}
      - {role: user, content: Bye}
    rules:
      scores: {token-f1: 0.5}
"""


def test_a_suite_gives_prompts_with_their_lines_and_one_score(tmp_path):
    made = suite(tmp_path, GOOD)
    one, two = made.prompts
    assert (one.place, two.place) == (f"{tmp_path}/suite.yaml:4", f"{tmp_path}/suite.yaml:9")
    assert [(m.role, m.content) for m in one.messages] == [
        ("system", "Be brief."), ("user", "When?"),
    ]  # fmt: skip
    assert (one.reference, one.fields) == ("By 11.", {"topic": "times"})
    assert [m.role for m in two.messages] == ["system", "user", "assistant", "user"]
    assert made.scorer.name == "hotel"
    found = made.scorer(
        [Completion(one, "11"), Completion(two, "Bye"), Completion(two, "", "failed")]
    )
    assert found[0] == Score(1)
    assert found[1] == Score(None, "token-f1 at least 0.5: the row has no reference")
    assert found[2] == Score(None, "no answer came")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "should be a mapping with rows, got [1]"),
        ("x: 1\nrows: []", "2 problems:\n  {}:2: rows: List should have at least 1 item"),
        ("name: a", ":1: rows: is missing"),
        ("rows:\n- prompt: a\n", ":2: rules: is missing; the row: {{\"prompt\": \"a\"}}"),
        ("rows:\n- prompt: a\n  rules: {{}}", ":3: rules: a row needs at least one rule; the row:"),
        ("rows:\n- prompt: a\n  messages: []\n  rules: {{number: 1}}",
         ":2: a row needs either prompt or messages"),
        ("rows:\n- messages: [{{role: assistant, content: a}}]\n  rules: {{number: 1}}",
         ":2: messages should end with one of role user"),
        ("rows:\n- prompt: a\n  rules:\n    contain: b",
         ":4: rules.contain: unknown key; did you mean contains?"),
        ("rows:\n- prompt: a\n  rules: {{number: 1}}\n  topic: b", ":4: topic: unknown key"),
        ("rows:\n- prompt: a\n  rules:\n    contains: 11",
         ":4: rules.contains: should be text or a list of texts, got 11; quote numbers"),
        ("rows:\n- prompt: a\n  rules: {{regex: '('}}", ":3: rules.regex: ( is not a pattern"),
        ("rows:\n- prompt: a\n  rules: {{number: yes}}", ":3: rules.number"),
        ("rows:\n- prompt: a\n  rules: {{json-schema: {{type: 7}}}}",
         ":3: rules.json-schema: not a JSON schema: 7 is not valid"),
        ("rows:\n- prompt: a\n  rules: {{scores: {{rouge-x: 1}}}}",
         ":3: rules.scores: no score rouge-x; did you mean rouge-l?"),
        ("rows:\n- prompt: a\n  rules: {{exact-match: a, ignoring: [x]}}",
         ":3: rules.ignoring: x should be one of numbers, case, punctuation, articles"),
        ("rows:\n- prompt: a\n  rules: {{contains: a, ignoring: [case]}}",
         ":3: rules: ignoring is of exact-match, which is missing"),
        ("rows: [", "not valid YAML"),
        ("rows:\n- &a {{prompt: *a}}", "not valid YAML: line 2: *a refers to itself"),
        ("a: 1\na: 2", "not valid YAML: line 2: 'a' is given twice"),
        ("", "should be a mapping with rows"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_line(tmp_path, text, says):
    path = tmp_path / "suite.yaml"
    with pytest.raises(DataError) as caught:
        suite(tmp_path, text.replace("{{", "{").replace("}}", "}"))
    message = str(caught.value)
    assert says.replace("{{", "{").replace("}}", "}").replace("{}", str(path)) in message
    assert message.startswith((str(path), "2 problems"))


def test_many_problems_are_counted_and_ten_shown(tmp_path):
    rows = "".join(f"- prompt: {n}\n" for n in range(30))
    with pytest.raises(DataError) as caught:
        suite(tmp_path, f"rows:\n{rows}")
    lines = str(caught.value).splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("60 problems:", 12, "  and 50 more")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"rows: \x00", b"[" * 10_000, b"1" * 5_000])
def test_bytes_that_are_no_suite_are_an_error(tmp_path, data):
    path = tmp_path / "suite.yaml"
    path.write_bytes(data)
    with pytest.raises(DataError):
        suites.read(str(path))
    with pytest.raises(DataError, match="no such file"):
        suites.read(str(tmp_path / "other.yaml"))
    with pytest.raises(DataError, match="cannot be read"):
        suites.read(str(tmp_path))


def test_the_schema_in_configs_is_that_of_the_code():
    assert (
        json.loads((ROOT / "configs/suite.json").read_text()) == suites.json_schema_of_suites()
    ), "run `make schema`"
