"""What a run exports opens elsewhere, and a folder that does not match is never called complete."""

import json

import pytest
import torch
from conftest import TINY_LLAMA
from safetensors.torch import load_file, save_file

from finetune import export
from finetune.errors import ExportError, ModelError

pytestmark = pytest.mark.slow


def as_adapter(base):
    return {
        "model__init": "pretrained", "model__path": str(base / "model"), "model__config": None, "model__tokenizer": None,
        "adapter__kind": "lora",
    }  # fmt: skip


def test_full_weights_open_with_plain_transformers(workshop):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = workshop.train()
    model, tokenizer = (c.from_pretrained(run / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "### Question:\nhi\n\n### Answer:\n"
    assert model.config._attn_implementation == "sdpa", "the export must not ask for this package's attention"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert torch.isfinite(model(**tokenizer(text, return_tensors="pt")).logits).all()


def test_an_adapter_opens_with_plain_peft(workshop):
    from peft import AutoPeftModelForCausalLM

    run = workshop.train("lora", **as_adapter(workshop.train("base")))
    model = AutoPeftModelForCausalLM.from_pretrained(run / "model")
    assert not (run / "model/model.safetensors").exists()
    assert json.loads((run / "model/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        workshop.run_dir("base") / "model"
    )
    assert export.load_tokenizer(run / "model").chat_template
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2]])).logits).all()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_and_untied_models_of_each_dtype_are_saved_whole(workshop, tied, dtype):
    run = workshop.train(model__config={**TINY_LLAMA, "tie_word_embeddings": tied}, model__dtype=dtype)
    saved = load_file(run / "model/model.safetensors")
    assert ("lm_head.weight" in saved) != tied
    assert {str(t.dtype) for t in saved.values()} == {f"torch.{dtype}"}


def tamper(change):
    """Save as usual, then change a tensor of what was written."""
    whole = export.save

    def save(model, weights, tokenizer, template, target, *rest):
        whole(model, weights, tokenizer, template, target, *rest)
        [path] = target.glob("*model.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return save


def test_half_a_saved_model_is_never_complete(workshop, monkeypatch):
    def half(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][tensors[name].shape[0] // 2 :] = 0  # as if one process's shard had been saved

    monkeypatch.setattr(export, "save", tamper(half))
    with pytest.raises(ExportError, match="weight model.layers.0.mlp.up_proj.weight is other than trained"):
        workshop.train()
    assert json.loads((workshop.run_dir() / "outcome.json").read_text())["state"] == "failed"


def test_a_missing_weight_is_never_complete(workshop, monkeypatch):
    monkeypatch.setattr(export, "save", tamper(lambda tensors: tensors.pop("model.norm.weight")))
    with pytest.raises(ExportError, match="model.norm.weight"):
        workshop.train()


def test_an_adapter_that_learned_nothing_is_never_complete(workshop, monkeypatch):
    settings = as_adapter(workshop.train("base"))

    def nothing(tensors):
        for name in tensors:
            if "lora_B" in name:
                tensors[name] = torch.zeros_like(tensors[name])

    monkeypatch.setattr(export, "save", tamper(nothing))
    with pytest.raises(ExportError, match="14 adapters are zero"):
        workshop.train("lora", **settings)


def test_a_run_that_moved_no_weight_is_never_complete(workshop):
    """Rounded by chance, updates of 1e-12 move a weight of 1e-2 once in tens of millions of steps."""
    with pytest.raises(ExportError, match=r"not one weight has moved in 5 steps; is optimizer.lr too small"):
        workshop.train(model__dtype="bfloat16", optimizer__lr=1e-12)


def test_weights_that_did_not_move_are_named(workshop, capsys):
    # Norms are 1, where float32 steps by 6e-8: an update of 2e-8 is lost; what is near 0 takes it.
    workshop.train(optimizer__lr=2e-8)
    assert (
        "note: 5 of 21 weight tensors have not moved, such as model.layers.0.input_layernorm" in capsys.readouterr().err
    )


def test_a_failed_export_is_done_again_from_the_last_checkpoint(workshop, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export, "save", tamper(lambda tensors: tensors["model.norm.weight"].zero_()))
        with pytest.raises(ExportError):
            workshop.train()
    run = workshop.train()
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["state"], outcome["step"], outcome["reason"]) == (
        "complete",
        5,
        "the last weights, of step 5, exported and verified",
    )
    assert outcome["model"]["model.safetensors"]["bytes"] == (run / "model/model.safetensors").stat().st_size


def test_merge_command_writes_full_weights(workshop, capsys):
    from finetune.__main__ import main

    run = workshop.train("lora", **as_adapter(workshop.train("base")))
    target = workshop.folder / "merged"
    assert main(["export", "--merge", "--model", str(run / "model"), "--output", str(target)]) == 0
    assert "merged; logits differ from base plus adapter by at most" in capsys.readouterr().out
    assert (target / "model.safetensors").exists()
    assert (target / "chat_template.jinja").read_text() == (run / "model/chat_template.jinja").read_text()
    assert main(["export", "--merge", "--model", str(run / "model"), "--output", str(target)]) == 2
    assert "exists; choose another --output" in capsys.readouterr().err


def test_merging_full_weights_is_an_error(workshop):
    run = workshop.train()
    with pytest.raises(ModelError, match="nothing to merge"):
        export.merge([run / "model"], workshop.folder / "merged", "auto")


def test_an_adapter_and_its_merge_know_the_token_that_ends_an_answer(workshop):
    """ChatML ends answers with <|im_end|>, not with EOS; peft itself saves no generation config."""
    run = workshop.train("lora", data__template="chatml", **as_adapter(workshop.train("base")))
    stop = export.load_tokenizer(run / "model").convert_tokens_to_ids("<|im_end|>")
    assert stop in export.load(run / "model").generation_config.eos_token_id
    export.merge([run / "model"], workshop.folder / "merged", "auto")
    assert stop in export.load(workshop.folder / "merged").generation_config.eos_token_id


@pytest.mark.parametrize(
    "targets", [["q_proj", "lm_head"], ".*(q_proj|lm_head)", ["embed_tokens"], ".*embed_tokens"], ids=str
)
def test_an_adapter_on_tied_weights_is_refused(workshop, targets):
    base = workshop.train("base", model__config={**TINY_LLAMA, "tie_word_embeddings": True})
    with pytest.raises(ModelError, match="shares its weights|no linear layer is called 'embed_tokens'"):
        workshop.train("lora", adapter__target_modules=targets, **as_adapter(base))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16", "float16"])
def test_an_adapter_knows_its_base_in_whatever_dtype_both_are(workshop, dtype, wanted):
    base = workshop.train("base", model__dtype=dtype)
    run = workshop.train("lora", model__dtype="bfloat16", **as_adapter(base))
    export.merge([run / "model"], workshop.folder / "merged", wanted)
    merged = load_file(workshop.folder / "merged/model.safetensors")
    expected = dtype if wanted == "auto" else wanted
    assert {str(weight.dtype) for weight in merged.values()} == {f"torch.{expected}"}


@pytest.mark.parametrize("command", ["merge", "chat", "evaluate"])
def test_an_adapter_beside_another_base_is_refused(workshop, capsys, command):
    """Same path, same shapes, other weights: what comes out would be neither model."""
    from finetune.__main__ import main

    run = workshop.train("lora", **as_adapter(workshop.train("base")))
    workshop.run_dir("base").rename(workshop.folder / "old")
    base, model = workshop.train("base", run__seed=1) / "model", str(run / "model")
    arguments = {
        "merge": ["export", "--merge", "--model", model, "--output", str(workshop.folder / "merged")],
        "chat": ["chat", "--model", model, "--prompt", "hi"],
        "evaluate": ["evaluate", "--base", str(base), "--tuned", model, "--data", str(workshop.rows)],
    }
    assert main(arguments[command]) == 2
    assert "its base has changed since the adapter was trained" in capsys.readouterr().err
    assert not (workshop.folder / "merged").exists()


@pytest.mark.parametrize("own_bos", [False, True], ids=["BOS left to the tokenizer", "BOS in the template"])
def test_the_exported_chat_template_gives_the_tokens_that_were_trained(workshop, bytes_tokenizer, own_bos):
    """One BOS, for a tokenizer that adds one, whether the template writes it or not."""
    from tokenizers.processors import TemplateProcessing

    bos = bytes_tokenizer.bos_token
    bytes_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bytes_tokenizer.bos_token_id)]
    )
    bytes_tokenizer.save_pretrained(workshop.folder / "tokenizer")
    jinja = workshop.folder / "my.jinja"
    jinja.write_text(
        (bos if own_bos else "")
        + "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    run = workshop.train(model__tokenizer=str(workshop.folder / "tokenizer"), data__template=str(jinja))
    tokenizer = export.load_tokenizer(run / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_the_system_prompt_of_training_is_there_when_asked(workshop):
    """Without it a tuned model would be asked by a prompt that it never saw."""
    run = workshop.train(data__system_prompt='Say "so" {{ often }} 😀.', data__template="chatml")
    tokenizer = export.load_tokenizer(run / "model")

    def asked(*messages):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    user = {"role": "user", "content": "hi"}
    assert asked(user).startswith('<|im_start|>system\nSay "so" {{ often }} 😀.<|im_end|>\n<|im_start|>user')
    assert asked({"role": "system", "content": "Other."}, user).count("system") == 1


def test_a_broken_file_after_saving_is_exit_1_not_the_users_fault(workshop, monkeypatch):
    whole = export.save

    def save(model, weights, tokenizer, template, target, *rest):
        whole(model, weights, tokenizer, template, target, *rest)
        path = target / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    monkeypatch.setattr(export, "save", save)
    with pytest.raises(ExportError, match="cannot be loaded"):
        workshop.train()


@pytest.mark.parametrize(
    "architecture",
    [{"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}],
    ids=["experts in one weight", "Conv1D"],
)  # fmt: skip
def test_adapters_on_other_architectures_come_home(workshop, architecture):
    config = TINY_LLAMA if architecture["model_type"] == "mixtral" else {}
    base = workshop.train("base", model__config={**config, **architecture})
    run = workshop.train("lora", **as_adapter(base))
    export.merge([run / "model"], workshop.folder / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base / "model", workshop.folder / "merged"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before), "what was learned is in it"


def test_a_model_that_also_sees_gets_adapters_where_text_goes(workshop):
    text = {**{k: v for k, v in TINY_LLAMA.items() if k != "model_type"}, "head_dim": 8, "vocab_size": 300}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision, "mm_tokens_per_image": 1}
    run = workshop.train("lora", **as_adapter(workshop.train("base", model__config=config)))
    assert not [name for name in load_file(run / "model/adapter_model.safetensors") if "vision" in name]


def test_an_adapter_opens_from_any_folder(workshop, monkeypatch, tmp_path_factory):
    """The base is named by its absolute path, also when the config named it by a relative one."""
    workshop.train("base")
    monkeypatch.chdir(workshop.folder / "runs")
    run = workshop.train("lora", **(as_adapter(workshop.run_dir("base")) | {"model__path": "base/model"}))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert export.load(run / "model")
