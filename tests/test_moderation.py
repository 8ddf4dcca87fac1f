"""What moderation refuses, by rules and by a classifier that finetune has trained."""

import argparse
import itertools
import json
import random

import pytest
from conftest import Workshop, write_jsonl
from invariants import families

from finetune import moderation
from finetune.__main__ import main
from finetune.data.conversations import Message
from finetune.errors import DataError, UserError
from finetune.evaluation.scores import table
from finetune.generation.completions import Completion, Prompt
from finetune.generation.streaming import Sampling, Streamed
from finetune.moderation import Moderation, Rules
from finetune.serving import api
from finetune.serving.service import Service

RULES = """
- pattern: '(?i)credit card'
  side: input
  refusal: I cannot talk about payments.
- pattern: 'secret-\\d+'
  side: output
- pattern: bomb
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


def test_a_rule_that_backtracks_is_named(tmp_path, monkeypatch):
    path = tmp_path / "rules.yaml"
    path.write_text(r"- pattern: '(\w+\s?)+$'")
    monkeypatch.setattr(moderation, "SECONDS", 0.1)
    with pytest.raises(DataError, match=r"rule 1: pattern .* on word word .* not done after 0.1 s"):
        Rules.read(path).find("word " * 24 + "!", "input")


@pytest.mark.parametrize(
    ("text", "side", "refusal"),
    [
        ("my Credit Card", "input", "I cannot talk about payments."),
        ("my credit card", "output", None),
        ("it is secret-12", "output", moderation.REFUSAL), ("it is secret-12", "input", None),
        ("a bomb", "input", moderation.REFUSAL), ("a bomb", "output", moderation.REFUSAL),
        ("a bum", "input", None), ("", "input", None),
    ],
)  # fmt: skip
def test_rules_refuse_on_their_side(rules, text, side, refusal):
    found = moderation.of([str(rules)]).find(text, side)
    assert (found.refusal if found else None) == refusal


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "should be a list of rules"), ("a: b", "should be a list of rules"),
        ("- a", "rule 1: should have a pattern in quotes"),
        ("- pattern: a\n- pattern: '('", "rule 2: pattern \\("),
        ("- pattern: 'a*'", "rule 1: pattern a\\* matches every text"),
        ("- {pattern: a, side: never}", "side should be input, output or both, got never"),
        ("- {pattern: a, refuse: b}", "has 'refuse'; a rule has pattern, side and refusal"),
        ("- {pattern: a, refusal: ''}", "refusal should be text"),
        ("- {pattern: 3}", "rule 1: should have a pattern in quotes"),
        ("a: [", "is not YAML in UTF-8"),
    ],
)  # fmt: skip
def test_wrong_rules_are_named(tmp_path, text, words):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        Rules.read(path)


def test_other_bytes_and_missing_files_are_named(tmp_path, capsys):
    path = tmp_path / "rules.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not YAML in UTF-8"):
        Rules.read(path)
    with pytest.raises(DataError, match="no.yaml: cannot be read"):
        Rules.read(tmp_path / "no.yaml")


def f1(scores, is_right, threshold):
    found = moderation.measured(scores, is_right, threshold)
    right, wrong = found.flagged_rightly, found.flagged_wrongly + found.missed
    return 2 * right / (2 * right + wrong) if right else 0.0


def test_the_threshold_has_the_best_f1_of_all():
    source = random.Random(0)
    for _ in range(100):
        count = source.randrange(2, 12)
        scores = [source.choice((0.1, 0.2, 0.5, 0.7, 0.9)) for _ in range(count)]
        is_right = [source.random() < 0.5 for _ in range(count)]
        if not any(is_right):
            continue
        chosen = moderation.threshold_of(scores, is_right)
        best = max(f1(scores, is_right, each) for each in scores)
        assert f1(scores, is_right, chosen) == pytest.approx(best)
        same = [each for each in scores if f1(scores, is_right, each) == pytest.approx(best)]
        assert chosen == max(same)


def test_precision_and_recall_by_hand():
    found = moderation.measured([0.9, 0.8, 0.4, 0.1], [True, False, True, False], 0.5)
    assert (found.precision, found.recall) == (0.5, 0.5)
    assert moderation.measured([0.1], [False], 0.5).precision is None


class Parrot(Service):
    """Answers with the message, without a model."""

    def __init__(self, moderation):
        class Tokenizer:
            chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"

        super().__init__(argparse.Namespace(tokenizer=lambda name: Tokenizer()), moderation)
        self.generated = 0

    def _answer(self, name, prompt, sampling, listen):
        self.generated += 1
        for letter in prompt:
            listen(letter, ())
        return Streamed(prompt, "stop", 1, 1)


def test_a_service_refuses_before_and_after_the_model_and_streams_no_refused_text(rules):
    service, seen = Parrot(moderation.of([str(rules)])), []

    def ask(text):
        seen.clear()
        return service.complete("tuned", text, Sampling(), lambda text, _: seen.append(text))

    assert ask("my credit card").text == "I cannot talk about payments."
    assert (service.generated, seen) == (0, ["I cannot talk about payments."])
    answer = ask("say secret-1")
    assert (answer.text, seen, service.generated) == (moderation.REFUSAL, [answer.text], 1)
    assert api.reason_of(answer) == "content_filter"
    assert ask("hello").text == "hello"
    assert api.reason_of(ask("hello")) == "stop"
    off = Parrot(Moderation())
    off.complete("tuned", "abc", Sampling(), lambda text, _: seen.append(text))
    assert seen[-3:] == ["a", "b", "c"]


def test_evaluate_counts_what_moderation_refuses(rules):
    [score] = table.choose([f"moderation={rules}"])
    asked = [("my credit card", "ok"), ("hi", "secret-5"), ("hi", "hello")]
    completions = [
        Completion(Prompt(conversation(question)), answer) for question, answer in asked
    ]  # fmt: skip
    assert [each.value for each in score(completions)] == [1, 1, 0]
    assert score.higher is False


def conversation(text):
    from finetune.data.conversations import Conversation
    from finetune.data.places import Place

    return Conversation((Message("user", text),), Place("rows", 1))


# --------------------------------------------------------------------------------- classifiers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A two-layer classifier of texts by their first letter, and rows of dev and test."""
    shop = Workshop(tmp_path_factory.mktemp("moderation"))
    words = ["".join(each) for each in itertools.product("abcd", "xyz", "xyz", "pq")]
    random.Random(0).shuffle(words)
    rows = [{"text": w, "label": "unsafe" if w[0] in "ab" else "fine"} for w in words]
    write_jsonl(shop.rows, rows[:48])
    write_jsonl(shop.folder / "dev.jsonl", rows[48:60])
    write_jsonl(shop.folder / "test.jsonl", rows[60:])
    run = shop.train(
        "classifier", objective__kind="sequence_classification", train__max_steps=60,
        train__epochs=20, train__global_batch_size=16, train__micro_batch_size=16,
        model__config=families.BERT, optimizer__lr=3e-3, optimizer__head_lr=1e-2,
    )  # fmt: skip
    return run, shop.folder


@pytest.mark.proof
def test_a_classifier_is_trained_measured_and_refuses(classifier, capsys):
    run, folder = classifier
    given = ["--dev", str(folder / "dev.jsonl"), "--test", str(folder / "test.jsonl")]
    with pytest.raises(UserError, match="moderation.json is missing; run .* moderate"):
        moderation.of([str(run)])
    assert main(["moderate", str(run), *given, "--refusal", "No."]) == 0
    assert "refused from unsafe" in capsys.readouterr().out
    note = json.loads((run / "model" / moderation.FILE).read_text())
    assert note["test"]["rows"] == 12
    found = moderation.Measured(**note["test"])
    assert (found.precision, found.recall) == (1, 1)
    checks = moderation.of([str(run)])
    assert checks.find("axxp", "input").refusal == "No."
    assert checks.find("cxxp", "output") is None
    texts = [json.loads(line)["text"] for line in (folder / "test.jsonl").read_text().splitlines()]
    classifier = checks.checks[0]
    together = moderation.probabilities(classifier.model, classifier.tokenizer, texts, "unsafe")
    for text, value in zip(texts, together):
        [alone] = moderation.probabilities(
            classifier.model, classifier.tokenizer, [text], "unsafe"
        )  # fmt: skip
        assert value == pytest.approx(alone, abs=1e-5)


@pytest.mark.proof
def test_wrong_rows_and_labels_are_exit_2(classifier, tmp_path, capsys):
    run, folder = classifier
    dev, test = str(folder / "dev.jsonl"), str(folder / "test.jsonl")
    assert main(["moderate", str(run), "--dev", dev, "--test", dev]) == 2
    assert "of its texts are also in --dev" in capsys.readouterr().err
    assert main(["moderate", str(run), "--dev", dev, "--test", test, "--label", "x"]) == 2
    assert "has no label 'x'; it has" in capsys.readouterr().err
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "c", "label": "fine"}])
    assert main(["moderate", str(run), "--dev", dev, "--test", str(rows)]) == 2
    assert "no row has the label 'unsafe'" in capsys.readouterr().err
    assert main(["moderate", "/no/such", "--dev", dev, "--test", test]) == 2


def test_chat_prints_the_refusal_in_place_of_the_answer(rules, monkeypatch, capsys):
    from finetune import chat

    options = argparse.Namespace(
        system=None, probs=False, max_new_tokens=2, temperature=0.0, moderation=[str(rules)],
        trust_remote_code=False,
    )  # fmt: skip
    talk = chat.Chat(argparse.Namespace(names=["tuned"]), options)
    monkeypatch.setattr(talk, "_generated", lambda: "it is secret-7")
    talk.ask("hello")
    talk.ask("a bomb")
    seen = capsys.readouterr()
    assert seen.out == f"{moderation.REFUSAL}\n" * 2
    assert "rules.yaml: rule 2: secret-" in seen.err
    assert talk.messages[1] == Message("assistant", moderation.REFUSAL)
