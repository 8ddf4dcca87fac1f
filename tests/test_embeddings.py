"""New tokens in the embedding, noise on it."""

import pytest
import torch
from conftest import TINY_LLAMA, losses, pretrained, short, tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import DataError, ModelError
from finetune.export.load import load
from finetune.export.merge import merge
from finetune.models import embeddings

NEW = ["<|turn|>", "<|stop|>"]


@pytest.fixture
def plain(workshop, bytes_tokenizer):
    """A base model without ChatML's tokens, tied or not."""

    def make(tied: bool) -> dict:
        from transformers import PreTrainedTokenizerFast

        tokenizer = bytes_tokenizer.backend_tokenizer
        bare = PreTrainedTokenizerFast(
            tokenizer_object=type(tokenizer).from_str(without_chatml(tokenizer)),
            eos_token="<|eos|>",
            pad_token="<|pad|>",
        )
        bare.save_pretrained(workshop.folder / "tokenizer")
        config = TINY_LLAMA | {"tie_word_embeddings": tied}
        tokenizer = str(workshop.folder / "tokenizer")
        base = workshop.train(
            "base", model__config=config, model__tokenizer=tokenizer, train__max_steps=1
        )
        return pretrained(base / "model")

    return make


def without_chatml(tokenizer) -> str:
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if "im_" not in token["content"]
    ]
    return json.dumps(state)


@pytest.mark.parametrize(
    ("kind", "tied"),
    short(
        [(kind, tied) for kind in ("full", "lora", "qlora") for tied in (True, False)],
        ("full", True), ("qlora", True),
    ),
)  # fmt: skip
@pytest.mark.slow
def test_chatml_on_a_model_without_it(workshop, plain, kind, tied):
    settings = {**plain(tied), "adapter__kind": kind, "data__template": "chatml"}
    with pytest.raises(
        DataError, match=r"add them with model\.new_tokens: \[<\|im_start\|>, <\|im_end\|>\]"
    ):
        workshop.train("without", **settings)
    run = workshop.train(
        "chat",
        **settings,
        model__new_tokens=["<|im_start|>", "<|im_end|>"],
        train__max_steps=8,
        train__micro_batch_size=8,
        train__epochs=9,
    )
    assert losses(run)[-1] < losses(run)[0]
    model, tokenizer = load(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop == 260
    assert model.get_input_embeddings().weight.shape[0] == 261
    if kind != "full":
        saved = load_file(run / "model/adapter_model.safetensors")
        assert any("embed_tokens" in name for name in saved)
        merge([run / "model"], workshop.folder / "merged")
        plainly = AutoModelForCausalLM.from_pretrained(workshop.folder / "merged")
        assert plainly.get_output_embeddings().weight.shape[0] == 261


def test_new_rows_start_from_the_mean_of_the_old():
    model = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=261))
    old = [
        module.weight.detach().clone()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    embeddings.extend(model, [261, 262])
    for module, before in zip((model.get_input_embeddings(), model.get_output_embeddings()), old):
        assert torch.equal(module.weight[:261], before)
        assert torch.allclose(module.weight[261:], before.mean(0).expand(2, -1), atol=1e-7)


def test_an_existing_token_given_as_new_is_refused(workshop):
    with pytest.raises(ModelError, match=r"'<\|im_end\|>' is already in the vocabulary"):
        workshop.train(model__new_tokens=["<|im_end|>"])


def test_a_pad_token_of_the_vocabulary_is_taken_before_eos(workshop, bytes_tokenizer):
    from finetune.config import Model
    from finetune.models import load

    bytes_tokenizer.pad_token = None
    bytes_tokenizer.save_pretrained(workshop.folder / "tokenizer")
    tokenizer = load.load_tokenizer(Model(path="x", tokenizer=str(workshop.folder / "tokenizer")))
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == len(bytes_tokenizer)


def test_noise_reaches_models_in_16_bits():
    """length x width, 64 x 4,096, is more than float16 can hold."""
    config = tiny_llama(hidden_size=4096, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    embeddings.add_noise(model, alpha=5.0)
    ids, embedding = torch.ones(1, 64, dtype=torch.long), model.get_input_embeddings()
    next(iter(model._forward_pre_hooks.values()))(model, (), {"input_ids": ids})
    noise = (embedding(ids) - embedding.weight[ids]).detach().abs()
    assert float(noise.max()) == pytest.approx(5.0 / (64 * 4096) ** 0.5, rel=0.02)


@pytest.mark.parametrize("kind", short(["gpt2", "bloom", "gpt_neox"], "gpt2"))
@pytest.mark.slow
def test_new_tokens_beside_an_adapter_with_unusual_embedding_names(workshop, kind):
    """peft knows tied modules by name, but these have others; the run verifies its own export."""
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "gpt_neox": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "tie_word_embeddings": True,
        },
    }  # fmt: skip
    base = (
        workshop.train(
            "base", model__config={"model_type": kind, **sizes[kind]}, train__max_steps=1
        )
        / "model"
    )
    run = workshop.train(**pretrained(base), adapter__kind="lora", model__new_tokens=["<a>"])
    model = load(run / "model")
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert merge([run / "model"], workshop.folder / "merged").rounding < 1e-5


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_noise_is_as_large_as_its_formula_by_the_length_of_each_document(packed):
    model = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=99))
    embeddings.add_noise(model, alpha=5.0)
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    lengths = [4, 25]
    if packed:
        ids = torch.arange(29)[None]
        inputs = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 4, 29])}
    else:
        ids = torch.arange(50).reshape(2, 25)
        inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(25) < torch.tensor(lengths)[:, None]).long(),
        }
    model.train()
    model(**inputs)
    noise = (seen[0] - model.get_input_embeddings().weight[ids]).abs()
    parts = [noise[0, :4], noise[0, 4:]] if packed else [noise[0, :4], noise[1]]
    for part, length in zip(parts, lengths):
        reach = 5.0 / (length * 32) ** 0.5
        assert 0.9 * reach < part.max() <= reach * 1.0001
    model.eval()
    model(**inputs)
    assert torch.equal(seen[1], model.get_input_embeddings().weight[ids])


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [{"train__neftune_alpha": 5.0}, {"objective__label_smoothing": 0.2}],
    ids=["noise", "smoothing"],
)
def test_noise_and_smoothing_train_and_are_not_in_evaluations(workshop, setting):
    """Both runs start at the same evaluation loss, before training could change it."""
    settings = {"data__eval_fraction": 0.2, "optimizer__lr": 1e-9, "train__max_steps": 1}
    plain = workshop.train("plain", **settings)
    noisy = workshop.train("noisy", **settings, **setting)
    assert losses(noisy)[0] != pytest.approx(losses(plain)[0], rel=1e-4)
    evaluated = [
        float((run / "eval.jsonl").read_text().split('"eval_loss": ')[1].split(",")[0])
        for run in (plain, noisy)
    ]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-5)
