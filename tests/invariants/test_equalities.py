"""What must not change the result: how a step is cut up, packed, padded, shared or recomputed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, Workshop, losses, pairs, read_jsonl, short, write_jsonl
from safetensors.torch import load_file

from finetune import loop
from finetune.data.batches import Batches
from finetune.data.examples import prepare
from finetune.data.order import Sequences
from finetune.data.source_files import sources
from finetune.data.tokenised import Options
from finetune.objectives.sft import Sft

# float32 sums in another order: 5 to 20 steps of a tiny model stay within a few ulps of each other.
REORDERED = 1e-5


def weights(run):
    return load_file(run / "model/model.safetensors")


def assert_same_weights(one, other, tolerance=2e-4):
    """Compare weights; Adam's root of the second moment enlarges roundings near zero."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A run of five steps that several tests compare theirs with, or train on."""
    workshop = Workshop(tmp_path_factory.mktemp("shop"))
    workshop.train("plain")
    return workshop


@pytest.mark.slow
@pytest.mark.parametrize("tied", short([False, True], True), ids=["untied", "tied"])
def test_accumulation_1x8_equals_8x1(workshop, tied):
    config = {**TINY_LLAMA, "tie_word_embeddings": tied}
    runs = [
        workshop.train(
            f"micro{size}",
            model__config=config,
            train__micro_batch_size=size,
            train__max_steps=6,
            train__epochs=2,
        )
        for size in (8, 2, 1)
    ]
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=REORDERED)
        assert_same_weights(run, runs[0])


def test_accumulation_by_a_mean_of_means_would_be_caught(workshop, monkeypatch):
    """The test above can fail: the rows differ enough for a wrong average to show."""
    settings = {"train__micro_batch_size": 1, "train__max_steps": 2}
    right = workshop.train("right", **settings)
    whole = loop.train_step

    def mean_of_means(
        topology, policy, optimizer, objective, settings, batches, totals, **keywords
    ):
        supervised = totals["tokens"]

        class Wrong(Sft):
            def loss(self, policy, batch, settings, prepared):
                [term] = super().loss(policy, batch, settings, prepared)
                return [
                    replace(term, sum=term.sum / batch.counts["tokens"] * supervised / len(batches))
                ]

        return whole(topology, policy, optimizer, Wrong(), settings, batches, totals, **keywords)

    monkeypatch.setattr(loop, "train_step", mean_of_means)
    wrong = workshop.train("wrong", **settings)
    assert losses(wrong) != pytest.approx(losses(right), rel=1e-2)


LAYOUTS = {
    "padded by sdpa": {"model__attention": "sdpa"},
    "padded by eager": {"model__attention": "eager"},
    "recomputed": {"train__gradient_checkpointing": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_gradient_checkpointing_change_nothing(shop, layout):
    run, plain = shop.train(layout.replace(" ", "_"), **LAYOUTS[layout]), shop.run_dir("plain")
    assert losses(run) == pytest.approx(losses(plain), rel=REORDERED)
    assert_same_weights(run, plain)


def tiny_model(**changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**TINY_LLAMA, "vocab_size": 261, **changes}
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=values.get("attention", "documents")
    ).eval()


def token_losses(model, batch):
    """Loss of every supervised token, in the order of the batch."""
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.positions]
    return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {
            "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
            "max_window_layers": 0,
        },
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
        {
            "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16,
            "query_pre_attn_scalar": 8,
        },
    ],
    ids=lambda a: a.get("model_type", "llama"),
)  # fmt: skip
def test_packed_and_unpacked_give_the_same_loss_for_every_token(
    tmp_path, bytes_tokenizer, architecture
):
    """Also with sliding windows shorter than the documents."""
    from finetune.data import chat_templates
    from finetune.models import attention  # noqa: F401  registers "documents"

    template = chat_templates.load(
        "question_answer", "question_answer", None, bytes_tokenizer.special_tokens_map, {}
    )
    options = Options("question_answer", {}, "line", None, "completion", 256, "error")
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs(12))
    examples = prepare(
        sources(str(rows), None).train, template, bytes_tokenizer, options, str(tmp_path / "cache")
    )
    model = tiny_model(**architecture)

    def losses_by_example(packing):
        sequences = Sequences(examples, packing, 256, seed=0)
        batches = Batches(sequences, seed=0, global_batch_size=1, micro_batch_size=1)
        found = {}
        for number, [batch] in enumerate(batches.epoch()):
            [sequence] = batches.of_step(number)
            members = sequences.members(sequence)
            counts = examples.num_supervised[members].tolist()
            for example, part in zip(members, token_losses(model, batch).split(counts)):
                found[int(example)] = part.detach()
        return found

    packed, alone = losses_by_example(True), losses_by_example(False)
    assert packed.keys() == alone.keys() == set(range(12))
    for example in alone:
        torch.testing.assert_close(packed[example], alone[example], atol=1e-5, rtol=1e-5)


def test_packing_keeps_the_loss_of_an_epoch(workshop):
    """Untouched weights have one mean loss over all supervised tokens, packed or not."""
    evaluated = [
        read_jsonl(
            workshop.train(
                name,
                data__packing=packing,
                data__eval_fraction=0.5,
                optimizer__lr=1e-12,
                train__max_steps=1,
            )
            / "eval.jsonl"
        )[-1]
        for name, packing in (("packed", True), ("alone", False))
    ]
    assert evaluated[0]["eval_tokens"] == evaluated[1]["eval_tokens"]
    assert evaluated[0]["eval_loss"] == pytest.approx(evaluated[1]["eval_loss"], rel=1e-6)


def test_only_adapters_train_and_merged_equals_adapter(shop):
    """The base stays; the merged weight is W + (alpha / r) B A by hand; logits agree."""
    from finetune.export.merge import merge

    base = shop.run_dir("plain")
    before, in_base = (base / "model/model.safetensors").read_bytes(), weights(base)
    run = shop.train(
        "lora", model__init="pretrained", model__path=str(base / "model"), model__config=None,
        model__tokenizer=None, adapter__kind="lora", adapter__r=4, adapter__alpha=10.0,
        train__global_batch_size=40, train__micro_batch_size=8, train__epochs=5,
    )  # fmt: skip
    assert losses(run)[-1] < losses(run)[0]
    assert (base / "model/model.safetensors").read_bytes() == before
    adapter = load_file(run / "model/adapter_model.safetensors")
    linear = 2 * 7  # q k v o gate up down of two layers
    assert len(adapter) == 2 * linear
    assert all(tensor.any() for tensor in adapter.values())

    difference = merge([run / "model"], shop.folder / "merged", "auto")
    merged = load_file(shop.folder / "merged/model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(
        merged[f"{name}.weight"], in_base[f"{name}.weight"] + 10.0 / 4 * b @ a
    )
    assert not torch.equal(merged[f"{name}.weight"], in_base[f"{name}.weight"])
    assert difference.rounding < 1e-4
    assert difference.quantization is None


def test_reported_loss_is_sum_over_count(workshop):
    """Recompute the first step's loss by hand from the exported initial weights."""
    run = workshop.train(
        optimizer__lr=1e-9,
        train__max_steps=1,
        train__global_batch_size=40,
        train__micro_batch_size=1,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        c.from_pretrained(run / "model") for c in (AutoModelForCausalLM, AutoTokenizer)
    )
    total, count = 0.0, 0
    for row in pairs():
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        start = len(tokenizer(prompt)["input_ids"])
        logits = model(ids).logits[0, start - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
        count += ids.shape[1] - start
    line = read_jsonl(run / "metrics.jsonl")[0]
    assert line["supervised_tokens"] == count
    assert line["loss"] == pytest.approx(total / count, rel=1e-6)
    assert np.isfinite(line["grad_norm"])


def test_bf16_follows_fp32(shop):
    """Autocast keeps 8 bits in each product; the loss curve stays within a percent or two."""
    exact, mixed = shop.run_dir("plain"), shop.train("mixed", train__precision="bf16")
    assert losses(mixed) != losses(exact)
    assert losses(mixed) == pytest.approx(losses(exact), rel=2e-2)
