"""Classifiers of rows and of words: their rows, their labels, and what they learn."""

import json

import numpy as np
import pytest
import torch
from conftest import losses, pretrained, read_jsonl, short, write_jsonl
from faults.forked import forget, weights
from invariants import families

from finetune.data.frames import _of_tokens, frame_of, tokenise
from finetune.data.tokenised import Options
from finetune.errors import UserError

ROWS, TAGS = "sequence_classification", "token_classification"
FORMATS = {ROWS: "text_label", TAGS: "token_labels"}


def tokenised(tmp_path, bytes_tokenizer, kind, rows, **options):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    own = Options(
        FORMATS[kind], {}, "line", None, "all", options.pop("max_length", 64), "error", framed=True,
        **options,
    )  # fmt: skip
    return tokenise([str(path)], bytes_tokenizer, own)


def test_labels_are_numbered_in_the_order_of_their_names(tmp_path, bytes_tokenizer):
    rows = [{"text": "x", "label": label} for label in ("no", "yes", "maybe", "no")]
    made = tokenised(tmp_path, bytes_tokenizer, ROWS, rows)
    assert made.counts["labels"] == ["maybe", "no", "yes"]
    assert made.columns["label"] == [1, 2, 0, 1]
    rows = [{"text": "x", "label": label} for label in (10, 2, 2.0, "10")]
    made = tokenised(tmp_path, bytes_tokenizer, ROWS, rows)
    assert (made.counts["labels"], made.columns["label"]) == (["2", "10"], [1, 0, 0, 1])


def test_labels_may_be_known_beforehand_by_name_or_number(tmp_path, bytes_tokenizer):
    rows = [{"text": "x", "label": label} for label in ("b", 0, "1", "b")]
    made = tokenised(tmp_path, bytes_tokenizer, ROWS, rows, labels=("a", "b"))
    assert (made.counts["labels"], made.columns["label"]) == (["a", "b"], [1, 0, 1, 1])


def test_the_first_token_of_a_word_has_its_label(tmp_path, bytes_tokenizer):
    rows = [
        {"tokens": ["ann", "é", "x"], "labels": ["P", None, "O"]},
        {"tokens": "in rome", "labels": "O L"},
    ]
    made = tokenised(tmp_path, bytes_tokenizer, TAGS, rows)
    assert made.counts["labels"] == ["L", "O", "P"]
    assert made.target_ids[0].tolist() == [2, -1, -1, -1, -1, -1, -1, 1]
    for supervised, labels in zip(made.supervised, made.target_ids):
        assert supervised.tolist() == (labels >= 0).tolist()
    assert made.target_ids[1].tolist() == [1, -1, -1, 0, -1, -1, -1]


def test_special_tokens_may_stay_as_text(tmp_path, bytes_tokenizer):
    rows = [{"tokens": ["<|eos|>", "b"], "labels": ["X", "Y"]}]
    made = tokenised(tmp_path, bytes_tokenizer, TAGS, rows, special_tokens_in_text="text")
    assert bytes_tokenizer.eos_token_id not in made.ids[0].tolist()
    assert bytes_tokenizer.decode(made.ids[0]) == "<|eos|> b"
    assert made.target_ids[0].tolist() == [0, *[-1] * 7, 1]


def test_tokens_that_hold_the_space_before_a_word_have_its_label():
    """As those of GPT-2: ' b' begins at the space."""
    assert _of_tokens(["aa", "b", "c"], [3, 4, 5], np.array([0, 1, 2, 4])).tolist() == [3, -1, 4, 5]


def test_a_word_without_tokens_leaves_the_labels_of_others():
    """As BERT's tokenizer drops characters that have no width; one may begin a word, too."""
    assert _of_tokens(["aa", "\u200b", "b"], [3, 4, 5], np.array([0, 5])).tolist() == [3, 5]
    assert _of_tokens(["\u200b", "b"], [4, 5], np.array([2])).tolist() == [5]
    assert _of_tokens(["b", "\u200b"], [5, 4], np.array([0])).tolist() == [5]
    assert _of_tokens(["aa", "\u200bb"], [3, 4], np.array([0, 4])).tolist() == [3, 4]


def test_numbers_name_no_place_among_labels_that_are_numbers(tmp_path, bytes_tokenizer):
    rows = [{"text": "x", "label": label} for label in (0, 1)]
    with pytest.raises(UserError, match="label '0' is not one of the 3 known"):
        tokenised(tmp_path, bytes_tokenizer, ROWS, rows, labels=("1", "2", "3"))
    rows = [{"text": "x", "label": label} for label in ("\u00b2", "1")]
    made = tokenised(tmp_path, bytes_tokenizer, ROWS, rows)
    assert made.counts["labels"] == ["1", "\u00b2"]


def test_the_frame_is_what_the_tokenizer_puts_around_a_text(bytes_tokenizer):
    from tokenizers.processors import TemplateProcessing

    assert len(frame_of(bytes_tokenizer)) == 0
    ends = [
        (token, bytes_tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|eos|>")
    ]
    bytes_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=ends
    )
    frame = frame_of(bytes_tokenizer)
    assert frame.around(np.array([5], np.int32)).tolist() == [ends[0][1], 5, ends[1][1]]
    assert frame.around(np.array([7], np.int32), -1).tolist() == [-1, 7, -1]


BAD = {
    "no label": (ROWS, {"text": "a"}, "no column 'label'; this row has"),
    "no text": (ROWS, {"text": " ", "label": 1}, "column 'text' is empty"),
    "a fraction": (ROWS, {"text": "a", "label": 0.5}, "or a whole number from 0 on, got 0.5"),
    "a list": (ROWS, {"text": "a", "label": ["x"]}, "should hold labels"),
    "a control token": (ROWS, {"text": "a <|eos|>", "label": 1}, "contains '<|eos|>', a control"),
    "too few labels": (TAGS, {"tokens": ["a", "b"], "labels": ["O"]}, "has 1 labels for 2 words"),
    "no words": (TAGS, {"tokens": [], "labels": []}, "should be a list of words, got []"),
    "two words": (TAGS, {"tokens": ["a b"], "labels": ["O"]}, "word 1 of 'tokens' should be text"),
    "nothing to learn": (TAGS, {"tokens": ["a"], "labels": [-100]}, "has no label to learn"),
    "too long": (ROWS, {"text": "a" * 99, "label": 1}, "99 tokens, over data.max_length 64"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_wrong_row_is_named_with_its_line(tmp_path, bytes_tokenizer, bad):
    kind, row, says = BAD[bad]
    first = {ROWS: {"text": "a", "label": 1}, TAGS: {"tokens": ["a"], "labels": ["O"]}}[kind]
    with pytest.raises(UserError) as refused:
        tokenised(tmp_path, bytes_tokenizer, kind, [first, row])
    assert "rows.jsonl:2" in str(refused.value)
    assert says in str(refused.value)


def test_labels_that_are_not_known_and_a_single_label_are_refused(tmp_path, bytes_tokenizer):
    rows = [{"text": "a", "label": "x"}] * 2
    with pytest.raises(UserError, match="all rows have the label 'x'"):
        tokenised(tmp_path, bytes_tokenizer, ROWS, rows)
    with pytest.raises(UserError, match=r"label 'x' is not one of the 2 known: .*objective.labels"):
        tokenised(tmp_path, bytes_tokenizer, ROWS, rows, labels=("a", "b"))


def train(workshop, name, kind, rows=None, **changes):
    path = write_jsonl(workshop.folder / f"{name}.jsonl", rows or families.ROWS[kind](60))
    own = {
        "data__train": str(path), "data__eval_fraction": 0.25, "train__epochs": 20,
        "optimizer__lr": 3e-3, "optimizer__head_lr": 1e-2, "train__micro_batch_size": 8,
        "train__max_steps": 60, "objective__kind": kind, "model__config": families.BERT,
        "data__group_by_length": True,
    }  # fmt: skip
    return workshop.train(name, **own | changes)


def last(run):
    return read_jsonl(run / "eval.jsonl")[-1]


def shuffled(kind, rows):
    """The same rows with each other's labels."""
    random, name = np.random.default_rng(1), {ROWS: "label", TAGS: "labels"}[kind]
    if kind == ROWS:
        return [row | {name: str(label)} for row, label in zip(
            rows, random.permutation([row[name] for row in rows])
        )]  # fmt: skip
    return [row | {name: random.permutation(row[name]).tolist()} for row in rows]


def frequencies(kind, rows):
    """How often each label comes: half of the reviews praise, most words are neither kind."""
    labels = [label for row in rows for label in (row.get("labels") or [row.get("label")])]
    return np.unique(labels, return_counts=True)[1] / len(labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", short([ROWS, TAGS], TAGS))
def test_a_classifier_beats_the_most_frequent_label_and_not_with_shuffled_labels(workshop, kind):
    rows = families.ROWS[kind](80)
    shares = frequencies(kind, rows)
    found = last(train(workshop, "right", kind, rows))
    assert found["accuracy"] > max(0.9, shares.max() + 0.1)
    assert found["cross_entropy"] < -(shares * np.log(shares)).sum() - 0.2
    found = last(train(workshop, "wrong", kind, shuffled(kind, rows)))
    assert found["accuracy"] < shares.max() + 0.2


@pytest.mark.slow
def test_a_new_head_on_a_pretrained_encoder_is_saved_with_its_labels(workshop):
    """Also as an adapter, which brings the head; and such a classifier trains on."""
    from transformers import AutoModelForSequenceClassification

    from finetune.export.load import load

    texts = write_jsonl(workshop.folder / "texts.jsonl", families.texts())
    encoder = workshop.train(
        "encoder", **families.SETTINGS["mlm"], data__train=str(texts), train__max_steps=1
    )
    few = pretrained(encoder / "model", train__max_steps=3)
    run = train(workshop, "full", ROWS, **few)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.id2label == {0: "blame", 1: "praise"}
    adapter = train(workshop, "lora", ROWS, adapter__kind="lora", **few)
    assert load(adapter / "model").config.id2label == model.config.id2label
    saved = json.loads((adapter / "model/adapter_config.json").read_text())
    assert {"classifier", "bert.pooler"} <= set(saved["modules_to_save"])
    few = pretrained(run / "model", train__max_steps=1)
    again = train(workshop, "again", ROWS, **few)
    assert (again / "model").is_dir()
    rows = [row | {"label": "other"} for row in families.reviews()]
    with pytest.raises(UserError, match="label 'other' is not one of the 2 known"):
        train(workshop, "other", ROWS, rows, **few)


def test_a_resumed_classifier_ends_with_the_same_weights(workshop):
    same = {"train__max_steps": 6, "checkpoint__every_steps": 4, "checkpoint__keep_last": 9}
    run = train(workshop, "resumed", TAGS, data__packing=True, data__group_by_length=False, **same)
    before, at_end = losses(run), weights(run)
    forget(run, 4)
    train(workshop, "resumed", TAGS, data__packing=True, data__group_by_length=False, **same)
    assert losses(run) == before
    assert all(torch.equal(torch.as_tensor(weights(run)[name]), torch.as_tensor(at_end[name]))
               for name in at_end)  # fmt: skip


WRONG = {
    "packing": ({"data__packing": True, "data__group_by_length": False}, "data.packing: objective"),
    "another format": ({"data__format": "text"}, "reads text_label; set it to auto"),
    "loss_on": ({"data__loss_on": "all"}, "data.loss_on: would be ignored"),
    "split": ({"data__truncation": "split"}, "data.truncation: split would cut what"),
    "qlora": ({"adapter__kind": "qlora"}, "would quantise the new head"),
    "a label twice": ({"objective__labels": ["a", "a"]}, "two or more, each once"),
    "an unknown name": ({"objective__labels": ["a", "b"]}, "is not one of the 2 known"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_that_do_not_fit_are_refused(workshop, wrong):
    changes, says = WRONG[wrong]
    with pytest.raises(UserError) as refused:
        train(workshop, "wrong", ROWS, **changes)
    assert says in str(refused.value)
