"""Scores by models: vectors, inference, classifiers; labels count by name, not by number."""

import json
import re
import shutil

import pytest
import torch
from conftest import made_once
from test_scores import completion

from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.errors import ModelError
from finetune.evaluation import scores
from finetune.evaluation.scores import nli_pairs
from finetune.evaluation.scores.classifiers import classifier
from finetune.evaluation.scores.entailment import context_of, sentences
from finetune.generation.completions import Completion, Prompt, Score

WORDS = "[PAD] [UNK] [CLS] [SEP] it is the a not in paris rome city capital of france . ?".split()
NLI = ["entailment", "neutral", "contradiction"]


def save(folder, labels, order=None, **changes):
    """Save a two-layer classifier; `order` puts the rows of its head in another order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=32, num_labels=len(labels),
            id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
            initializer_range=1.0, **changes,
        )
    )  # fmt: skip
    if order:
        with torch.no_grad():
            model.classifier.weight.copy_(model.classifier.weight[order].clone())
            model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with classifiers; "swapped" is "plain" with its labels in another order."""

    def make(folder):
        save(folder / "plain", NLI)
        save(folder / "swapped", ["CONTRADICTION", "Entailment", "neutral"], order=[2, 0, 1])
        save(folder / "binary", ["entailment", "not_entailment"])
        save(folder / "unnamed", ["LABEL_0", "LABEL_1", "LABEL_2"])
        save(folder / "harms", ["toxic", "insult"], problem_type="multi_label_classification")
        save(folder / "single", ["LABEL_0"])
        save(folder / "safety", ["unsafe", "safe"])

    return made_once(tmp_path_factory, "classifiers", make)


def expected(folder, pairs):
    """Return the probabilities of one pair at a time, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(**tokenizer(*each, return_tensors="pt")).logits.softmax(-1)[0].tolist()
                for each in pairs]  # fmt: skip


GIVEN = [("It is Paris. Paris is not in Rome.", "the capital of France is Paris"),
         ("Rome", "it is the city of Rome")]  # fmt: skip


def test_labels_of_inference_are_found_by_their_names(models):
    given = [completion(*each) for each in GIVEN]
    pairs = [(GIVEN[0][1], "It is Paris."), (GIVEN[0][1], "Paris is not in Rome."),
             (GIVEN[1][1], "Rome")]  # fmt: skip
    one, two, three = expected(models / "plain", pairs)
    wanted = {"entailment": [(one[0] + two[0]) / 2, three[0]],
              "contradiction": [max(one[2], two[2]), three[2]]}  # fmt: skip
    for name, values in wanted.items():
        for folder in ("plain", "swapped"):
            [scorer] = scores.choose([f"{name}={models / folder}"])
            found = scorer(given)
            assert [each.value for each in found] == pytest.approx(values, abs=1e-5), folder
            assert scorer.higher == (name == "entailment")
    worst = "It is Paris." if one[2] > two[2] else "Paris is not in Rome."
    assert [each.reason for each in found] == [worst, ""]


def test_the_accuracy_of_the_model_stands_beside_the_score(models):
    [scorer] = scores.choose([f"entailment={models / 'plain'}"])
    [line] = scorer.details([])
    assert line.endswith("of 200 pairs with known labels; chance is 33%, or 67%")
    pairs = nli_pairs.pairs()
    model = classifier(str(models / "plain"), "--scores entailment")
    found = model([each.premise for each in pairs], [each.hypothesis for each in pairs])
    hits = sum(NLI[n] == each.label for n, each in zip(found.argmax(1), pairs))
    assert f"is right in {hits / 200:.1%} of three labels" in line
    assert scores.choose([f"entailment={models / 'swapped'}"])[0].details([]) == [line]
    [binary] = scores.choose([f"entailment={models / 'binary'}"])
    assert "three labels" not in binary.details([])[0]


def test_pairs_with_known_labels_differ_and_balance():
    pairs = nli_pairs.pairs()
    assert len(set(pairs)) == 200
    counts = [sum(each.label == label for each in pairs) for label in NLI]
    assert max(counts) - min(counts) <= 1
    assert not [each for each in pairs if "{" in each.premise + each.hypothesis]


@pytest.mark.parametrize(
    ("name", "folder", "says"),
    [
        ("entailment", "unnamed", "names LABEL_0, LABEL_1, LABEL_2, and of these not exactly one "
         "begins with entail"),
        ("contradiction", "binary", "not exactly one begins with contradict"),
        ("entailment", "nowhere", "no such folder; name one with a classifier"),
        ("relevancy", "unnamed", "names none that says so by itself: LABEL_0, LABEL_1, LABEL_2; "
         "name one as relevancy="),
        ("responsibility", "safety,bad", "has no label bad: unsafe, safe; name one as"),
    ],
)  # fmt: skip
def test_a_model_without_the_labels_is_named(models, name, folder, says):
    with pytest.raises(ModelError, match=re.escape(says)):
        scores.choose([f"{name}={models / folder}"])


def test_a_model_that_is_no_trained_classifier_is_refused(models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models / "plain", broken)
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k},
              broken / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(ModelError, match=r"have no classifier\.bias, so it was not trained"):
        scores.choose([f"entailment={broken}"])
    (broken / "config.json").write_text(json.dumps({"model_type": "none"}))
    with pytest.raises(ModelError, match="holds no classifier of texts"):
        scores.choose([f"contradiction={broken}"])


def test_groundedness_takes_the_context_of_the_row(models):
    [grounded] = scores.choose([f"groundedness={models / 'plain'}"])
    [entailed] = scores.choose([f"entailment={models / 'plain'}"])
    context = "Paris is the capital of France."
    message = Message("user", "Which city?", context=context)
    by_input = Completion(
        Prompt(Conversation((message,), Place("a", 1)), reference="Rome"), "it is Paris"
    )
    by_column = completion("it is Paris", "Rome", fields={"context": context})
    assert context_of(by_input.prompt) == context_of(by_column.prompt) == context
    wanted = entailed([completion("it is Paris", context)])[0].value
    assert [each.value for each in grounded([by_input, by_column])] == pytest.approx([wanted] * 2)
    assert grounded([completion("a"), completion("", fields={"context": "b"})]) == [
        Score(None, "the row has no context"), Score(None, "the answer is empty"),
    ]  # fmt: skip


def test_long_premises_are_cut_and_counted(models):
    [scorer] = scores.choose([f"entailment={models / 'binary'}"])
    long = completion("Paris", "Paris is " * 100)
    short = completion("Paris", "Paris is " * 14)
    assert len(scorer.details([])) == 1
    assert scorer([long])[0].value == pytest.approx(scorer([short])[0].value, abs=1e-5)
    assert re.match(r"\d premises were cut to the length", scorer.details([])[1])
    assert scorer([completion("Paris " * 100, "Rome")])[0].value is not None


def test_relevancy_and_responsibility_are_probabilities_of_a_label(models):
    answer = completion("it is Paris", question="Which city?")
    pair = expected(models / "safety", [("Which city?", "it is Paris")])[0]
    alone = expected(models / "safety", [("it is Paris",)])[0]
    for spec, wanted, label in (
        (f"relevancy={models / 'safety'},unsafe", pair[0], "unsafe"),
        (f"responsibility={models / 'safety'}", alone[1], "safe"),
        (f"responsibility={models / 'safety'},unsafe", alone[0], "unsafe"),
    ):
        [scorer] = scores.choose([spec])
        assert scorer([answer])[0].value == pytest.approx(wanted, abs=1e-5)
        assert scorer.details([]) == [f"probability of: {label}"]
    assert scorer([completion(" ")]) == [Score(None, "the answer is empty")]


def test_independent_kinds_of_harm_all_have_to_be_absent(models):
    [scorer] = scores.choose([f"responsibility={models / 'harms'}"])
    model = classifier(str(models / "harms"), "--scores responsibility")
    assert model.is_independent
    found = model(["it is Paris"])[0]
    assert found.sum() != pytest.approx(1)
    assert scorer([completion("it is Paris")])[0].value == pytest.approx(1 - found.max())
    assert scorer.details([]) == ["probability of: none of its labels"]
    [single] = scores.choose([f"relevancy={models / 'single'}"])
    assert 0 < single([completion("it is Paris")])[0].value < 1


def test_batches_of_any_size_give_the_same_probabilities(models):
    model = classifier(str(models / "plain"), "--scores entailment")
    texts = ["it is " * n for n in range(1, 40)]
    alone = [model([text], ["Paris"])[0].tolist() for text in texts]
    assert model(texts, ["Paris"] * len(texts)).tolist() == [
        pytest.approx(a, abs=1e-5) for a in alone
    ]


def test_similarity_is_the_cosine_of_vectors():
    from finetune.preparation import embeddings

    [scorer] = scores.choose(["similarity"])
    pairs = [("A dog barks.", "The hound is barking."), ("A dog barks.", "Stocks fell.")]
    given = [completion(*each) for each in pairs]
    near, far = scorer(given)
    vectors = embeddings.embedder(None)(pairs[0])
    assert near.value == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-6)
    assert near.value > far.value
    assert scorer([completion("", "a"), completion("a", None)]) == [
        Score(None, "the answer or the reference has no word with a vector"),
        Score(None, "the row has no reference"),
    ]  # fmt: skip
    with pytest.raises(ModelError, match="--scores similarity: /no/such: no such folder"):
        scores.choose(["similarity=/no/such"])


def test_answers_are_split_into_sentences():
    assert sentences("It is 3.5 km. See J. Smith? Yes!\n1. one\n\n") == [
        "It is 3.5 km.", "See J. Smith?", "Yes!", "1. one",
    ]  # fmt: skip
    assert sentences(" \n") == []
