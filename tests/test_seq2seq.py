"""Encoder-decoders: their rows, spans and gaps that are drawn anew, and what they learn."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, losses, pretrained, read_jsonl, short, write_jsonl
from faults.forked import forget, weights
from invariants import families
from test_masked import examples_of

from finetune.data import chat_templates, source_files
from finetune.data.batches import Batches
from finetune.data.examples import prepare
from finetune.data.frames import tokenise
from finetune.data.order import Sequences
from finetune.data.tokenised import Options
from finetune.data.views import Infilling, Pairs, Spans
from finetune.errors import UserError
from finetune.models.families import SEQ2SEQ
from finetune.models.load import bytes_tokenizer as bytes_tokenizer_of

START, MASK, SENTINELS, END = 90, 91, np.arange(100, 132), np.array([2])
LENGTHS = [3, 4, 5, 9, 40, 203]


def spans(seed=0):
    return Spans(START, SENTINELS, END, 0.15, 3.0, seed)


def gaps(seed=0):
    return Infilling(START, MASK, END, 0.3, 3.0, seed)


def drawn(view, epochs=4):
    """Yield (text, ids of the encoder without its frame, labels, decoder's input) of documents."""
    examples = examples_of(LENGTHS, view)
    counts = examples.num_supervised
    for epoch in range(epochs):
        for number in range(len(LENGTHS)):
            made = view.document(examples, number, number, epoch)
            assert (made.ids[0], made.ids[-1]) == (1, 2), "the frame stays"
            assert len(made.labels) == len(made.positions) == counts[number], "known beforehand"
            assert made.target.tolist() == [START, *made.labels[:-1].tolist()]
            again = view.document(examples, number, number, epoch)
            assert np.array_equal(made.ids, again.ids)
            text = examples.input.ids[examples.input.span(number)][1:-1].tolist()
            yield text, made.ids[1:-1].tolist(), made.labels.tolist()


def test_spans_and_sentinels_put_back_together_are_the_text():
    found = set()
    for text, source, labels in drawn(spans()):
        assert labels[-1] == END[0]
        hidden, order = {}, []
        for token in labels[:-1]:
            if token in SENTINELS:
                order.append(token)
                hidden[token] = []
            else:
                hidden[order[-1]].append(token)
        assert order == SENTINELS[: len(order)].tolist()
        assert all(hidden.values()), "no span is empty"
        whole = [part for token in source for part in hidden.get(token, [token])]
        assert whole == text
        expected = min(max(1, round(0.15 * len(text))), max(len(text) - 1, 1))
        assert sum(map(len, hidden.values())) == expected
        found.add((len(text), tuple(source)))
    assert len(found) > 2 * len(LENGTHS), "other spans in other epochs"


def test_gaps_hide_exactly_their_share_and_the_target_is_the_whole_text():
    empty = 0
    for text, source, labels in drawn(gaps(), epochs=20):
        assert labels == [1, *text, 2, *END]
        hidden = max(1, int(0.3 * len(text) + 0.5))
        kept = [token for token in source if token != MASK]
        assert len(kept) == len(text) - hidden
        assert len(source) <= len(text), "never longer than the text"
        rest = iter(text)
        assert all(token in rest for token in kept), "in the order of the text"
        empty += len(source) - len(kept) > hidden
    lengths = np.concatenate([gaps()._gaps(300, np.random.default_rng(n)) for n in range(20)])
    assert lengths.mean() == pytest.approx(3, abs=0.2)
    assert (lengths == 0).any(), "some only insert a mask"


def test_too_many_spans_for_the_sentinels_are_refused():
    view = Spans(START, SENTINELS[:2], END, 0.15, 3.0, 0)
    with pytest.raises(UserError, match="hides 10 spans .* has 2 sentinels .*; lower data.max_len"):
        view.num_labels(examples_of(LENGTHS, view))


@pytest.mark.parametrize("view", [spans(), gaps()])
def test_the_totals_of_every_step_are_known_beforehand(view):
    sequences = Sequences(examples_of(range(3, 30), view), False, 64, seed=0)
    batches = Batches(sequences, seed=0, global_batch_size=4, micro_batch_size=2, padded=True)
    for step in range(2 * batches.steps_per_epoch):
        made = batches.at(step)
        assert batches.totals(step)["tokens"] == sum(len(batch.labels) for batch in made)


def rows_of(tmp_path, rows, max_length=64, truncation="error", format="auto", **options):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    own = Options(
        format, {}, "line", None, "completion", max_length, truncation, framed=True, **options
    )
    return [str(path)], bytes_tokenizer_of(SEQ2SEQ), own


def test_pairs_are_laid_out_for_encoder_and_decoder(tmp_path):
    rows = [
        {"question": "abc", "answer": "de"},
        {"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        ]},
        {"instruction": "x", "input": "y", "output": "z"},
    ]  # fmt: skip
    for row, wanted in zip(
        rows, ([("p: abc", "de")], [("p: a", "b"), ("p: a\n\nb\n\nc", "d")], [("p: x\ny", "z")])
    ):
        sources, tokenizer, options = rows_of(tmp_path, [row], source_prefix="p: ")
        made = tokenise(sources, tokenizer, options)
        found = [tuple(map(tokenizer.decode, pair)) for pair in zip(made.ids, made.target_ids)]
        assert found == [(source, f"{answer}<|eos|>") for source, answer in wanted]
    sources, tokenizer, options = rows_of(
        tmp_path, rows[:1] * 2 + [{"question": "a", "answer": "b"}]
    )
    template = chat_templates.load("auto", "text", None, tokenizer.special_tokens_map, {})
    found = source_files.sources(sources[0], None).train
    examples = prepare(found, template, tokenizer, options, str(tmp_path / "cache"))
    sequences = Sequences(replace(examples, view=Pairs(START)), False, 64, seed=0)
    batches = Batches(sequences, seed=0, global_batch_size=3, micro_batch_size=3, padded=True)
    [batch] = batches.at(0)
    assert batch.inputs["input_ids"].shape == (3, 3)
    assert batch.inputs["attention_mask"].sum().item() == 7
    decoder = batch.inputs["decoder_input_ids"]
    assert decoder.shape == (3, 3)
    assert (decoder[:, 0] == START).all()
    behind = [decoder.flatten()[place + 1] for place in batch.positions if (place + 1) % 3]
    labels = [label for label, place in zip(batch.labels, batch.positions) if (place + 1) % 3]
    eos = tokenizer.eos_token_id
    assert all(b == label for b, label in zip(behind, labels) if label != eos)


BAD = {
    "too long": ({"question": "a" * 99, "answer": "b"}, "99 tokens, over data.max_length 64"),
    "a long answer": ({"question": "a", "answer": "b" * 99}, "100 tokens, over data.max_length 64"),
    "a control token": ({"question": "<|eos|>", "answer": "b"}, "contains '<|eos|>'"),
    "no answer": ({"question": "a", "answer": ""}, "column 'answer' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_wrong_pair_is_named_with_its_line(tmp_path, bad):
    row, says = BAD[bad]
    with pytest.raises(UserError) as refused:
        tokenise(*rows_of(tmp_path, [{"question": "a", "answer": "b"}, row]))
    assert "rows.jsonl:2" in str(refused.value)
    assert says in str(refused.value)


def train(workshop, name, kind, rows=None, **changes):
    path = write_jsonl(workshop.folder / f"{name}.jsonl", rows or families.ROWS[kind](60))
    own = {
        "data__train": str(path), "data__eval_fraction": 0.2, "train__epochs": 99,
        "optimizer__lr": 3e-3, "train__micro_batch_size": 8, "train__max_steps": 8,
    }  # fmt: skip
    return workshop.train(name, **families.SETTINGS[kind] | own | changes)


LEARNING = {"seq2seq": (5e-3, 300), "span_corruption": (1e-2, 250), "text_infilling": (5e-3, 80)}


def loss_of_related_and_unrelated(workshop, kind, related):
    rows = families.reversals(related=related) if kind == "seq2seq" else families.texts(80)
    if kind != "seq2seq" and not related:
        rows = families.shuffled(rows)
    rate, steps = LEARNING[kind]
    run = train(workshop, "run", kind, rows, optimizer__lr=rate, train__max_steps=steps)
    return read_jsonl(run / "eval.jsonl")[-1]["cross_entropy"], families.guesses(run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", short([*LEARNING], "text_infilling"))
def test_an_encoder_decoder_beats_the_best_guess(workshop, kind):
    loss, guess = loss_of_related_and_unrelated(workshop, kind, related=True)
    assert loss < guess - 0.3


@pytest.mark.proof
@pytest.mark.parametrize("kind", [*LEARNING])
def test_an_encoder_decoder_learns_nothing_where_nothing_is_related(workshop, kind):
    loss, guess = loss_of_related_and_unrelated(workshop, kind, related=False)
    assert loss > guess - 0.1


def resume(workshop, kind):
    same = {"train__max_steps": 6, "checkpoint__every_steps": 4, "checkpoint__keep_last": 9}
    run = train(workshop, "resumed", kind, **same)
    before, at_end = losses(run), weights(run)
    forget(run, 4)
    train(workshop, "resumed", kind, **same)
    assert losses(run) == before
    assert all(bool((weights(run)[name] == at_end[name]).all()) for name in at_end)
    return run


@pytest.mark.parametrize("kind", short(["seq2seq", "span_corruption", "text_infilling"]))
def test_a_resumed_run_is_the_same_and_its_export_opens(workshop, kind):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    run = resume(workshop, kind)
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = torch.tensor([tokenizer("one two")["input_ids"]])
    assert model.generate(ids, max_new_tokens=3)[0, 0] == tokenizer.pad_token_id


@pytest.mark.slow
def test_sample_prompts_are_answered_and_adapters_train(workshop):
    own = {
        "objective__source_prefix": "turn: ", "evaluation__sample_prompts": ["red tall", "new"],
        "evaluation__sample_max_new_tokens": 4, "train__max_steps": 2,
    }  # fmt: skip
    base = train(workshop, "base", "seq2seq", **own)
    [first, second] = read_jsonl(base / "samples.jsonl")
    assert (first["prompt"], second["prompt"]) == ("red tall", "new")
    run = train(workshop, "lora", "seq2seq", **own, **pretrained(base / "model"),
                adapter__kind="lora")  # fmt: skip
    saved = json.loads((run / "model/adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_of_more_tokens_than_positions_are_refused(workshop, streaming):
    """Also with the token that ends the target, which a tokenizer of bytes does not add."""
    few = families.BART | {"max_position_embeddings": 32}
    own = {"model__config": few, "data__streaming": streaming, "data__eval_fraction": 0.0}
    says = "33 tokens, but the model has only 32 positions"
    with pytest.raises(UserError, match=says):
        train(workshop, "answer", "seq2seq", [{"question": "a", "answer": "b" * 32}], **own)
    with pytest.raises(UserError, match=says):
        train(workshop, "gaps", "text_infilling", [{"text": "b" * 32}], **own)


WRONG = {
    "a causal model": ("seq2seq", {"model__config": TINY_LLAMA}, "take objective.kind: sft"),
    "for sft": ("seq2seq", {"objective__kind": "sft"}, "take objective.kind: seq2seq, span_corr"),
    "an encoder": ("seq2seq", {"model__config": families.BERT}, "take objective.kind: mlm, seque"),
    "new tokens": (
        "seq2seq", {"adapter__kind": "lora", "model__new_tokens": ["<a>"]},
        "cannot train beside adapters",
    ),
    "packing": ("seq2seq", {"data__packing": True}, "in padded batches; set it to false"),
    "a kernel": ("seq2seq", {"model__attention": "documents"}, "takes no padded batches"),
    "a template": ("seq2seq", {"data__template": "chatml"}, "data.template: would be ignored"),
    "text": ("seq2seq", {"data__format": "text"}, "reads prompt_completion or question_answer or"),
    "no sentinels": ("span_corruption", {"model__tokenizer": "TEXT"}, "which this tokenizer lacks"),
    "no mask": ("text_infilling", {"model__tokenizer": "TEXT"}, "this tokenizer has none; take"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_before_weights_load(workshop, bytes_tokenizer, wrong):
    kind, changes, says = WRONG[wrong]
    if changes.get("model__tokenizer"):
        bytes_tokenizer.save_pretrained(workshop.folder / "tokenizer")
        changes = {"model__tokenizer": str(workshop.folder / "tokenizer")}
    with pytest.raises(UserError) as refused:
        train(workshop, "wrong", kind, **changes)
    assert says in str(refused.value)
