"""Masked language modelling: which tokens are hidden, in which epoch, and what is learned."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, losses, pretrained, read_jsonl, write_jsonl
from faults.forked import forget, weights
from invariants import families
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from finetune.data.batches import Batches
from finetune.data.examples import Examples, Ragged
from finetune.data.frames import tokenise
from finetune.data.order import Sequences
from finetune.data.tokenised import Options
from finetune.data.views import Masked, part_of
from finetune.errors import UserError
from finetune.models.families import MASKED
from finetune.models.load import bytes_tokenizer as bytes_tokenizer_of

MASK, TEXT = 99, np.arange(3, 60)


def examples_of(lengths, view):
    """Documents of random text between two tokens that are never hidden."""
    random, lengths = np.random.default_rng(0), np.array(lengths)
    ends = np.cumsum(lengths)
    ids, supervised = random.choice(TEXT, ends[-1]).astype(np.int32), np.ones(ends[-1], bool)
    for at, token in ((ends - lengths, 1), (ends - 1, 2)):
        ids[at], supervised[at] = token, False
    count = np.arange(len(lengths))
    return Examples(
        {"input": Ragged(ids, ends - lengths, ends)}, supervised, count, count, count,
        ["rows"] * len(lengths), "f", len(lengths), 0, 0, view=view,
    )  # fmt: skip


def test_exactly_k_of_n_tokens_are_hidden_and_others_in_each_epoch():
    lengths = [3, 5, 12, 40, 802]
    view = Masked(MASK, TEXT, 0.15, seed=7)
    examples = examples_of(lengths, view)
    wanted = [max(1, round(0.15 * (length - 2))) for length in lengths]
    assert examples.num_supervised.tolist() == wanted == [1, 1, 2, 6, 120]
    drawn = set()
    for epoch in range(3):
        for number, length in enumerate(lengths):
            made, again = (view.document(examples, number, number, epoch) for _ in range(2))
            before = examples.input.ids[examples.input.span(number)]
            assert np.array_equal(made.ids, again.ids), "a pure function"
            assert len(set(made.positions.tolist())) == len(made.labels) == wanted[number]
            assert np.array_equal(made.labels, before[made.positions])
            untouched = np.setdiff1d(np.arange(length), made.positions)
            assert np.array_equal(made.ids[untouched], before[untouched])
            assert {0, length - 1}.isdisjoint(made.positions.tolist())
            drawn.add((number, tuple(made.positions.tolist())))
    assert len(drawn) > 9, "other tokens in other epochs"
    other = Masked(MASK, TEXT, 0.15, seed=8).document(examples, 4, 4, 0)
    assert not np.array_equal(other.positions, view.document(examples, 4, 4, 0).positions)


def test_of_the_hidden_tokens_most_are_masked_and_some_are_others_or_stay():
    view = Masked(MASK, TEXT, 0.15, seed=0)
    examples = examples_of([20_002], view)
    made = view.document(examples, 0, 0, 0)
    seen = made.ids[made.positions]
    shares = [(seen == MASK).mean(), ((seen != MASK) & (seen != made.labels)).mean()]
    assert shares == pytest.approx([0.8, 0.1 * (1 - 1 / len(TEXT))], abs=0.025)
    assert set(seen.tolist()) <= {MASK, *TEXT.tolist()}


def test_a_fraction_is_rounded_to_the_nearest_and_never_to_none():
    assert part_of(np.array([1, 2, 3, 10, 17, 100]), 0.15).tolist() == [1, 1, 1, 2, 3, 15]
    assert part_of(np.array([1, 4]), 0.99).tolist() == [1, 4]


def test_the_totals_of_every_step_are_known_beforehand():
    examples = examples_of(range(3, 43), Masked(MASK, TEXT, 0.15, seed=0))
    for packing in (True, False):
        sequences = Sequences(examples, packing, 64, seed=0)
        batches = Batches(sequences, seed=0, global_batch_size=4, micro_batch_size=2)
        for step in range(2 * batches.steps_per_epoch):
            made = batches.at(step)
            assert batches.totals(step)["tokens"] == sum(len(batch.labels) for batch in made)
            ids = torch.cat([batch.inputs["input_ids"].flatten() for batch in made])
            assert (ids == MASK).any()


def train(workshop, name, rows, **changes):
    path = write_jsonl(workshop.folder / f"{name}.jsonl", rows)
    own = {
        "data__train": str(path), "data__packing": True, "data__eval_fraction": 0.2,
        "optimizer__lr": 1e-2, "train__epochs": 50, "train__max_steps": 70,
        "train__micro_batch_size": 8, "objective__kind": "mlm", "model__config": families.BERT,
    }  # fmt: skip
    return workshop.train(name, **own | changes)


@pytest.mark.slow
def test_an_encoder_learns_what_stands_around_a_gap(workshop):
    run = train(workshop, "ordered", families.texts(60))
    line = read_jsonl(run / "eval.jsonl")[-1]
    assert line["cross_entropy"] < families.guesses(run) - 0.5
    assert line["perplexity"] == pytest.approx(math.exp(line["cross_entropy"]))


def test_evaluation_rows_of_more_tokens_than_positions_are_refused_before_training(workshop):
    few = families.BERT | {"max_position_embeddings": 32}
    rows = write_jsonl(workshop.folder / "eval.jsonl", [{"text": "one two " * 5}])
    with pytest.raises(UserError, match=r"eval.jsonl:1 has 40 tokens, but the model has only 32"):
        train(
            workshop, "long", [{"text": "one"}, {"text": "two"}], model__config=few,
            data__eval=str(rows), data__eval_fraction=0.0,
        )  # fmt: skip


@pytest.mark.proof
def test_an_encoder_learns_nothing_of_shuffled_text(workshop):
    run = train(workshop, "shuffled", families.shuffled(families.texts(60)))
    assert read_jsonl(run / "eval.jsonl")[-1]["cross_entropy"] > families.guesses(run) - 0.15


def test_a_resumed_run_draws_the_same_masks(workshop):
    same = {"train__max_steps": 6, "checkpoint__every_steps": 4, "checkpoint__keep_last": 9}
    run = train(workshop, "resumed", families.texts(), **same)
    before, at_end = losses(run), weights(run)
    forget(run, 4)
    train(workshop, "resumed", families.texts(), **same)
    assert losses(run) == before
    assert all(bool((weights(run)[name] == at_end[name]).all()) for name in at_end)


XLM = {
    "model_type": "xlm", "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.slow
def test_xlm_is_an_encoder_unless_its_config_says_causal(workshop):
    """The class of its models has one name for both."""
    one = {"train__max_steps": 1, "data__packing": False}
    run = train(workshop, "xlm", families.texts(), model__config=XLM, **one)
    with pytest.raises(UserError, match="'xlm' is an encoder, and objective.kind: sft trains"):
        workshop.check("answers", **pretrained(run / "model"))
    causal = XLM | {"causal": True}
    workshop.train("causal", train__max_steps=1, model__config=causal)
    with pytest.raises(UserError, match="'xlm' is a model that continues text, and"):
        train(workshop, "gaps", families.texts(), model__config=causal, **one)


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        (400, "has 160 tokens, but the model has only 141 positions"),
        (128, "counts positions from its pad token, 258, so .* more than 259; it is 128"),
    ],
)
def test_positions_are_those_after_the_pad_token_of_the_tokenizer(workshop, positions, says):
    roberta = families.BERT | {"model_type": "roberta", "max_position_embeddings": positions}
    with pytest.raises(UserError, match=says):
        train(
            workshop, "long", [{"text": "one two " * n} for n in range(16, 21)],
            model__config=roberta, data__max_length=200,
        )  # fmt: skip


# Why transformers' own code cannot train them so, or what the run finds before its first step.
PADDING = "lets tokens see padding"
REFUSED = {
    **dict.fromkeys(("bart", "mbart", "mvp"), "is an encoder-decoder"),
    **dict.fromkeys(("convbert", "fnet", "funnel", "nystromformer", "yoso"), PADDING),
    "mobilebert": "lets a document see the one before it",  # it mixes neighbouring embeddings
    "mra": "lets no token see another",  # without its kernel it gives zeros
    "neomme": "lets no token see another",  # its projections start at zero
    "perceiver": "are not a layer with a row for each token",
    "reformer": "with axial_pos_embds trains only on sequences of exactly",
    "ultrabert": "use eager",
}
ENCODERS = sorted(MODEL_FOR_MASKED_LM_MAPPING, key=lambda config_class: config_class.model_type)


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")  # about defaults of configs
@pytest.mark.parametrize("config_class", ENCODERS, ids=lambda each: each.model_type)
def test_every_encoder_of_transformers_trains_or_says_why(workshop, config_class):
    own = {"model__config": families.small(config_class), "train__max_steps": 1}
    own |= {"data__packing": False, "data__eval_fraction": 0.0}
    if why := REFUSED.get(config_class.model_type):
        with pytest.raises(UserError, match=why):
            train(workshop, "refused", families.texts(), **own)
    else:
        train(workshop, "encoder", families.texts(), **own)


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ("{'prompt': 'a', 'completion': 'b'}", "prompts and answers"),
        ("{'documents': [{'text': 'a'}, {'text': 'b'}]}", "several documents"),
        ("{'text': 'a', 'fields': {'reward': 1.0}}", "fields"),
    ],
)
def test_an_own_format_that_gives_more_than_a_text_is_refused(workshop, returned, what):
    (workshop.folder / "own.py").write_text(f"def rows(row):\n    return {returned}\n")
    with pytest.raises(UserError, match=f"data.format returns {what}, but this objective learns"):
        train(workshop, "own", families.texts(), data__format=f"{workshop.folder}/own.py:rows")


def test_a_tokenizer_saved_with_truncation_and_padding_is_the_same_at_each_start():
    """Where it has no BOS, nothing but reading rows switches them off, which a cache saves."""
    from finetune.data.tokens import tokenizer_fingerprint
    from finetune.models.load import bytes_tokenizer

    tokenizer = bytes_tokenizer()
    tokenizer.bos_token = None
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding()
    assert tokenizer_fingerprint(tokenizer) == fingerprint


@pytest.mark.slow
def test_the_export_opens_as_a_masked_language_model_and_trains_on(workshop):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    run = train(workshop, "exported", families.texts(), train__max_steps=2)
    model = AutoModelForMaskedLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = torch.tensor([tokenizer(f"one {tokenizer.mask_token} three")["input_ids"]])
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    again = train(
        workshop, "again", families.texts(), **pretrained(run / "model"), adapter__kind="lora",
        train__max_steps=2,
    )  # fmt: skip
    assert (again / "model/adapter_model.safetensors").exists()
    # The biases of BERT's head stand under two names, and grow with its words.
    more = train(
        workshop, "more", families.texts(), **pretrained(run / "model"), train__max_steps=1,
        model__new_tokens=["<a>"],
    )  # fmt: skip
    opened = AutoModelForMaskedLM.from_pretrained(more / "model")
    assert opened.get_output_embeddings().bias.shape == (len(tokenizer) + 1,)


@pytest.mark.parametrize(
    ("truncation", "wanted"),
    [
        ("right", ["abc"]), ("left", ["hij"]), ("split", ["abc", "def", "ghi", "j"]),
        ("drop", []),
    ],
)  # fmt: skip
def test_a_long_text_is_cut_inside_the_tokenizers_frame(tmp_path, truncation, wanted):
    from tokenizers.processors import TemplateProcessing

    tokenizer = bytes_tokenizer_of(MASKED)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|eos|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=ends
    )
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": "abcdefghij"}])
    options = Options("text", {}, "line", None, "all", 5, truncation, framed=True)
    made = tokenise([str(path)], tokenizer, options)
    assert [tokenizer.decode(ids) for ids in made.ids[1:]] == [
        f"<|bos|>{text}<|eos|>" for text in wanted
    ]
    for ids, supervised in zip(made.ids, made.supervised):
        assert supervised.tolist() == [False, *[True] * (len(ids) - 2), False]
    counts = made.counts["num_dropped"], made.counts["num_truncated"]
    assert counts == ((1, 0) if truncation == "drop" else (0, 1))


WRONG = {
    "a causal model": (
        {"objective__kind": "mlm", "model__config": TINY_LLAMA},
        "model_type 'llama' is a model that continues text, and objective.kind: mlm trains an "
        "encoder, such as BERT, RoBERTa or ModernBERT; take objective.kind: sft",
    ),
    "an encoder for clm": (
        {"objective__kind": "clm"},
        "model_type 'bert' is an encoder, and objective.kind: clm trains a model that continues "
        "text, such as Llama or Qwen; take objective.kind: mlm",
    ),
    "rows of answers": (
        {"data__format": "question_answer"},
        "data.format: question_answer, but objective.kind: mlm reads text; set it to auto",
    ),
    "a template": ({"data__template": "chatml"}, "data.template: would be ignored: objective.kin"),
    "prompts": ({"evaluation__sample_prompts": ["a"]}, "does not write answers; remove it"),
    "a share of all": ({"objective__mlm_probability": 1.0}, "should be less than 1"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_before_weights_load(workshop, wrong):
    changes, says = WRONG[wrong]
    with pytest.raises(UserError) as refused:
        train(workshop, "wrong", families.texts(), **changes)
    assert says in str(refused.value)


def test_a_saved_model_of_another_family_is_refused_by_its_objective(workshop):
    saved = train(workshop, "bert", families.texts(), train__max_steps=1) / "model"
    with pytest.raises(UserError, match=r"a masked language model, .* take objective.kind: mlm"):
        workshop.train("wrong", **pretrained(saved))
    llama = workshop.train("llama", train__max_steps=1) / "model"
    with pytest.raises(UserError, match=r"\(LlamaForCausalLM\), and objective.kind: mlm trains"):
        train(workshop, "wrong", families.texts(), **pretrained(llama))
    with pytest.raises(UserError, match="hides tokens behind the tokenizer's mask token"):
        train(workshop, "wrong", families.texts(), model__tokenizer=str(llama))
