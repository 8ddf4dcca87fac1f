"""What a run exports opens elsewhere, and a folder that does not match is never called complete."""

import errno
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_LLAMA, short
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError, ModelError, Outage
from finetune.export.load import load, load_tokenizer
from finetune.export.merge import _relative_difference, merge
from finetune.export.save import NOT_TO_FETCH, TO_FETCH, Base, _copy_files_of, save
from finetune.export.verify import TOLERANCE, disagreement, probe_logits, verify
from finetune.models import attention_probe

pytestmark = pytest.mark.slow


def as_adapter(base):
    return {
        "model__init": "pretrained", "model__path": str(base / "model"), "model__config": None,
        "model__tokenizer": None,
        "adapter__kind": "lora",
    }  # fmt: skip


def test_full_weights_open_with_plain_transformers(workshop):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = workshop.train()
    model, tokenizer = (
        c.from_pretrained(run / "model") for c in (AutoModelForCausalLM, AutoTokenizer)
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "### Question:\nhi\n\n### Answer:\n"
    assert model.config._attn_implementation == "sdpa", (
        "the export must not ask for this package's attention"
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert torch.isfinite(model(**tokenizer(text, return_tensors="pt")).logits).all()


def test_an_adapter_opens_with_plain_peft(workshop):
    from peft import AutoPeftModelForCausalLM

    run = workshop.train("lora", **as_adapter(workshop.train("base")))
    model = AutoPeftModelForCausalLM.from_pretrained(run / "model")
    assert not (run / "model/model.safetensors").exists()
    assert json.loads((run / "model/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(workshop.run_dir("base") / "model")
    assert load_tokenizer(run / "model").chat_template
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2]])).logits).all()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", short(["float32", "bfloat16"], "bfloat16"))
def test_tied_and_untied_models_of_each_dtype_are_saved_whole(workshop, tied, dtype):
    run = workshop.train(
        model__config={**TINY_LLAMA, "tie_word_embeddings": tied}, model__dtype=dtype
    )
    saved = load_file(run / "model/model.safetensors")
    assert ("lm_head.weight" in saved) != tied
    assert {str(t.dtype) for t in saved.values()} == {f"torch.{dtype}"}


def tamper(change):
    """Save as usual, then change a tensor of what was written."""

    def broken(model, weights, tokenizer, template, target, *rest, **others):
        save(model, weights, tokenizer, template, target, *rest, **others)
        [path] = target.glob("*model.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return broken


def test_half_a_saved_model_is_never_complete(workshop, monkeypatch):
    def half(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][tensors[name].shape[0] // 2 :] = 0  # as if one process's shard had been saved

    monkeypatch.setattr("finetune.export.publish.save", tamper(half))
    with pytest.raises(
        ExportError, match="weight model.layers.0.mlp.up_proj.weight differs from training"
    ):
        workshop.train()
    assert json.loads((workshop.run_dir() / "outcome.json").read_text())["state"] == "failed"


def test_a_missing_weight_is_never_complete(workshop, monkeypatch):
    monkeypatch.setattr(
        "finetune.export.publish.save", tamper(lambda tensors: tensors.pop("model.norm.weight"))
    )
    with pytest.raises(ExportError, match="model.norm.weight"):
        workshop.train()


def test_an_adapter_that_did_not_train_is_never_complete(workshop, monkeypatch):
    settings = as_adapter(workshop.train("base"))

    def nothing(tensors):
        for name in tensors:
            if "lora_B" in name:
                tensors[name] = torch.zeros_like(tensors[name])

    monkeypatch.setattr("finetune.export.publish.save", tamper(nothing))
    with pytest.raises(ExportError, match="14 adapters are zero"):
        workshop.train("lora", **settings)


def test_a_run_that_moved_no_weight_is_never_complete(workshop):
    """An update below the smallest float32 moves no weight, not even a weight of 0."""
    with pytest.raises(
        ExportError, match=r"no weight changed in 5 steps; is optimizer.lr too small"
    ):
        workshop.train(model__dtype="bfloat16", optimizer__lr=1e-60)


def test_factors_that_cannot_move_in_the_first_step_are_not_reported(workshop, capsys):
    settings = as_adapter(workshop.train("base"))
    capsys.readouterr()
    workshop.train("lora", **settings, train__max_steps=1)
    assert "did not change" not in capsys.readouterr().out


def test_weights_that_did_not_move_are_reported(workshop, capsys):
    # Norms are 1, where float32 steps by 6e-8: an update of 2e-8 is lost; what is near 0 takes it.
    workshop.train(optimizer__lr=2e-8)
    assert (
        "note: 5 of 21 weight tensors did not change, such as model.layers.0.input_layernorm"
        in capsys.readouterr().out
    )


def test_a_failed_export_is_repeated_from_the_last_checkpoint(workshop, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "finetune.export.publish.save",
            tamper(lambda tensors: tensors["model.norm.weight"].zero_()),
        )
        with pytest.raises(ExportError):
            workshop.train()
    run = workshop.train()
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["state"], outcome["step"], outcome["reason"]) == (
        "complete",
        5,
        "the last weights, of step 5, exported and verified",
    )
    assert (
        outcome["model"]["model.safetensors"]["bytes"]
        == (run / "model/model.safetensors").stat().st_size
    )


def test_merge_command_writes_full_weights(workshop, capsys):
    from finetune.__main__ import main

    run = workshop.train("lora", **as_adapter(workshop.train("base")))
    target = workshop.folder / "merged"
    assert main(["export", "--merge", "--model", str(run / "model"), "--output", str(target)]) == 0
    assert "merged; logits differ from base plus adapter by at most" in capsys.readouterr().out
    assert (target / "model.safetensors").exists()
    assert (target / "chat_template.jinja").read_text() == (
        run / "model/chat_template.jinja"
    ).read_text()
    assert main(["export", "--merge", "--model", str(run / "model"), "--output", str(target)]) == 2
    assert "exists; choose another --output" in capsys.readouterr().err


def test_an_unwritable_destination_is_refused_before_loading(tmp_path):
    """Root may write anywhere, says os.access."""
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "base_model_name_or_path": "base"}'
    )
    save_file({"a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "adapter_model.safetensors")
    for target in ("/proc/x", "/proc/x/y"):
        with pytest.raises(ModelError, match=f"--output: {target}: /proc cannot be written"):
            merge([tmp_path], Path(target))


@pytest.mark.slow
def test_a_merge_that_fills_the_disk_is_reported_and_cleaned_up(workshop, monkeypatch):
    run, target = (
        workshop.train("lora", **as_adapter(workshop.train("base"))),
        workshop.folder / "merged",
    )

    def full(*_, **__):
        target.with_name(".writing-merged").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finetune.export.merge.save", full)
    with pytest.raises(Outage, match=f"{target} cannot be written now: the disk is full"):
        merge([run / "model"], target)
    assert not list(workshop.folder.glob("*merged*"))


def test_merging_full_weights_is_an_error(workshop):
    run = workshop.train()
    with pytest.raises(ModelError, match="nothing to merge"):
        merge([run / "model"], workshop.folder / "merged", "auto")


def test_an_adapter_and_its_merge_store_the_token_that_ends_an_answer(workshop):
    """ChatML ends answers with <|im_end|>, not with EOS; peft itself saves no generation config."""
    run = workshop.train("lora", data__template="chatml", **as_adapter(workshop.train("base")))
    stop = load_tokenizer(run / "model").convert_tokens_to_ids("<|im_end|>")
    assert stop in load(run / "model").generation_config.eos_token_id
    merge([run / "model"], workshop.folder / "merged", "auto")
    assert stop in load(workshop.folder / "merged").generation_config.eos_token_id


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "lm_head"], ".*(q_proj|lm_head)", ["embed_tokens"], ".*embed_tokens"],
    ids=str,
)
def test_an_adapter_on_tied_weights_is_refused(workshop, targets):
    base = workshop.train("base", model__config={**TINY_LLAMA, "tie_word_embeddings": True})
    with pytest.raises(
        ModelError, match="shares its weights|no linear layer is called 'embed_tokens'"
    ):
        workshop.train("lora", adapter__target_modules=targets, **as_adapter(base))


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    short(
        [*itertools.product(("float32", "bfloat16"), ("auto", "float32", "bfloat16", "float16"))],
        ("float32", "bfloat16"),
    ),
)
def test_an_adapter_knows_its_base_in_any_dtype(workshop, dtype, wanted):
    base = workshop.train("base", model__dtype=dtype)
    run = workshop.train("lora", model__dtype="bfloat16", **as_adapter(base))
    merge([run / "model"], workshop.folder / "merged", wanted)
    merged = load_file(workshop.folder / "merged/model.safetensors")
    expected = dtype if wanted == "auto" else wanted
    assert {str(weight.dtype) for weight in merged.values()} == {f"torch.{expected}"}


@pytest.mark.parametrize("command", short(["merge", "chat", "evaluate"], "merge"))
def test_an_adapter_beside_another_base_is_refused(workshop, capsys, command):
    """Same path, same shapes, other weights: what comes out would be neither model."""
    from finetune.__main__ import main

    run = workshop.train("lora", **as_adapter(workshop.train("base")))
    workshop.run_dir("base").rename(workshop.folder / "old")
    base, model = workshop.train("base", run__seed=1) / "model", str(run / "model")
    arguments = {
        "merge": [
            "export",
            "--merge",
            "--model",
            model,
            "--output",
            str(workshop.folder / "merged"),
        ],
        "chat": ["chat", "--model", model, "--prompt", "hi"],
        "evaluate": [
            "evaluate",
            "--base",
            str(base),
            "--tuned",
            model,
            "--data",
            str(workshop.rows),
        ],
    }
    assert main(arguments[command]) == 2
    assert "its base has changed since the adapter was trained" in capsys.readouterr().err
    assert not (workshop.folder / "merged").exists()


@pytest.mark.parametrize(
    "own_bos", [False, True], ids=["BOS left to the tokenizer", "BOS in the template"]
)
def test_the_exported_chat_template_gives_the_tokens_that_were_trained(
    workshop, bytes_tokenizer, own_bos
):
    """One BOS, for a tokenizer that adds one, whether the template writes it or not."""
    from tokenizers.processors import TemplateProcessing

    bos = bytes_tokenizer.bos_token
    bytes_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bytes_tokenizer.bos_token_id)]
    )
    bytes_tokenizer.save_pretrained(workshop.folder / "tokenizer")
    jinja = workshop.folder / "my.jinja"
    jinja.write_text(
        (bos if own_bos else "") + "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    run = workshop.train(
        model__tokenizer=str(workshop.folder / "tokenizer"), data__template=str(jinja)
    )
    tokenizer = load_tokenizer(run / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_the_system_prompt_of_training_is_there_when_asked(workshop):
    """Without it a tuned model would be asked by a prompt that it never saw."""
    run = workshop.train(data__system_prompt='Say "so" {{ often }} 😀.', data__template="chatml")
    tokenizer = load_tokenizer(run / "model")

    def asked(*messages):
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )

    user = {"role": "user", "content": "hi"}
    assert asked(user).startswith(
        '<|im_start|>system\nSay "so" {{ often }} 😀.<|im_end|>\n<|im_start|>user'
    )
    assert asked({"role": "system", "content": "Other."}, user).count("system") == 1


def test_a_broken_file_after_saving_is_exit_1_not_the_users_fault(workshop, monkeypatch):

    def broken(model, weights, tokenizer, template, target, *rest):
        save(model, weights, tokenizer, template, target, *rest)
        path = target / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    monkeypatch.setattr("finetune.export.publish.save", broken)
    with pytest.raises(ExportError, match="cannot be loaded"):
        workshop.train()


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
    ],
    ids=["experts in one weight", "Conv1D"],
)  # fmt: skip
def test_adapters_on_other_architectures_export_correctly(workshop, architecture):
    config = TINY_LLAMA if architecture["model_type"] == "mixtral" else {}
    base = workshop.train("base", model__config={**config, **architecture})
    run = workshop.train("lora", **as_adapter(base))
    merge([run / "model"], workshop.folder / "merged")
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (base / "model", workshop.folder / "merged")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before), (
        "what was learned is in it"
    )


def test_a_multimodal_model_gets_adapters_in_its_language_part(workshop):
    text = {
        **{k: v for k, v in TINY_LLAMA.items() if k != "model_type"},
        "head_dim": 8,
        "vocab_size": 300,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 1,
    }
    run = workshop.train("lora", **as_adapter(workshop.train("base", model__config=config)))
    assert not [
        name for name in load_file(run / "model/adapter_model.safetensors") if "vision" in name
    ]


def test_an_adapter_opens_from_any_folder(workshop, monkeypatch, tmp_path_factory):
    """The base is named by its absolute path, also when the config named it by a relative one."""
    workshop.train("base")
    monkeypatch.chdir(workshop.folder / "runs")
    run = workshop.train(
        "lora", **(as_adapter(workshop.run_dir("base")) | {"model__path": "base/model"})
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load(run / "model")


def test_the_trained_model_is_freed_before_the_export_is_opened(workshop, monkeypatch):
    """Otherwise the GPU would hold a quantised base twice, beside the optimizer."""
    import weakref

    from finetune import loop

    build, alive = loop.build, []

    def watched(run):
        build(run)
        state = run.state
        held = [state.optimizer.optimizer, *state.model.parameters(), *state.ema.weights.values()]
        alive.extend(map(weakref.ref, held))

    def opened(*arguments, **keywords):
        gone = [each() is None for each in alive]
        assert gone
        assert all(gone)
        return verify(*arguments, **keywords)

    monkeypatch.setattr(loop, "build", watched)
    monkeypatch.setattr("finetune.export.publish.verify", opened)
    base = workshop.train("base", train__ema_decay=0.9)
    for kind in ("lora", "qlora"):
        alive.clear()
        workshop.train(kind, **as_adapter(base) | {"adapter__kind": kind}, train__ema_decay=0.9)


def test_exported_files_have_the_mode_that_the_umask_says(workshop):
    import os

    base = workshop.train("base")
    lora = workshop.train("lora", **as_adapter(base))
    merge([lora / "model"], workshop.folder / "merged")
    before = os.umask(0o027)
    try:
        private = workshop.train("private")
    finally:
        os.umask(before)
    for folder, mode in (
        (base, 0o666 & ~before),
        (lora, 0o666 & ~before),
        (workshop.folder / "merged", 0o666 & ~before),
        (private, 0o640),
    ):
        modes = {
            path.name: oct(path.stat().st_mode & 0o777)
            for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"
        }
        assert set(modes.values()) == {oct(mode)}, modes


def test_saving_does_not_modify_its_input(workshop, bytes_tokenizer):
    import copy

    from transformers import AutoModelForCausalLM

    from finetune.data import chat_templates

    run = workshop.train()
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    bytes_tokenizer.chat_template, model.generation_config.temperature = "before", 0.5
    before = copy.deepcopy(
        (bytes_tokenizer.chat_template, model.generation_config.to_dict(), model.config.to_dict())
    )
    template = chat_templates.load(
        "question_answer", "question_answer", None, bytes_tokenizer.special_tokens_map, {}
    )
    save(
        model,
        dict(model.state_dict()),
        bytes_tokenizer,
        template,
        workshop.folder / "saved",
        "a system prompt",
    )
    assert (
        bytes_tokenizer.chat_template,
        model.generation_config.to_dict(),
        model.config.to_dict(),
    ) == before
    assert "a system prompt" in (workshop.folder / "saved/chat_template.jinja").read_text()
    assert (
        json.loads((workshop.folder / "saved/generation_config.json").read_text())["temperature"]
        == 0.5
    )


def add_companions(folder):
    """What published models have beside weights and tokenizer."""
    names = (
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "LICENSE",
        "NOTICE.txt",
    )
    for name in names:
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("about the base")
    (folder / "modeling_own.py").write_text("raise RuntimeError")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("rag {{ messages }}")
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools {{ messages }}")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "top_p": 0.7, "temperature": 0.6}))
    return set(names)


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_other_files_of_a_base_are_exported(workshop, kind):
    base = workshop.train("base")
    names = add_companions(base / "model")
    settings = as_adapter(base) | {"adapter__kind": "full" if kind == "full" else "lora"}
    folder = workshop.train("tuned", data__template="chatml", **settings) / "model"
    if kind == "merged":
        merge([folder], workshop.folder / "merged")
        folder = workshop.folder / "merged"
    found = {path.name for path in folder.iterdir()}
    assert names <= found
    assert not {"README.md", "modeling_own.py"} & found, (
        "not what describes the base, and no code without trust_remote_code"
    )
    again = load_tokenizer(folder)
    assert again.chat_template["rag"] == "rag {{ messages }}"
    assert again.chat_template["tool_use"] == "tools {{ messages }}"
    assert "<|im_start|>" in again.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )
    settings = json.loads((folder / "generation_config.json").read_text())
    assert (settings["top_p"], settings["temperature"], settings["do_sample"]) == (0.7, 0.6, True)


TERMS = (
    "license.txt", "LICENSE.md", "LICENCE", "COPYING", "COPYING.LESSER", "NOTICE", "notice.md",
    "USE_POLICY.md", "LICENSES/MIT.txt", "licenses/a/b.txt", "LLAMA_LICENSE.txt",
    "ThirdPartyNotices.txt", "Acceptable-Use-Policy.pdf", "TERMS_OF_USE.md", "UNLICENSE",
)  # fmt: skip


def test_licence_files_are_exported_under_any_spelling(tmp_path):
    others = (
        "README.md",
        "noticed.txt",
        "determs.txt",
        "license.safetensors",
        ".git/LICENSE",
        "data/LICENSE",
        "license_check.py",
    )
    for name in (*TERMS, *others):
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    (tmp_path / "out").mkdir()
    _copy_files_of(Base(str(tmp_path / "base")), tmp_path / "out")
    found = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert found == set(TERMS)


def test_all_files_to_export_are_fetched_from_the_hub():
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        *TERMS,
        "kernels/own.py",
        "custom_generate/requirements.txt",
        "video_preprocessor_config.json",
    ]
    weights = ["model.safetensors", "LICENSED.bin"]
    fetched = filter_repo_objects(
        [*wanted, *weights], allow_patterns=TO_FETCH, ignore_patterns=NOT_TO_FETCH
    )
    assert list(fetched) == wanted


@pytest.fixture
def two_ends(workshop):
    """A base whose config says tied, and whose head and embedding are two."""
    base = workshop.train("base") / "model"
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    return base


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_base_wrongly_configured_as_tied_is_refused(workshop, two_ends, kind):
    with pytest.raises(ModelError, match="tie_word_embeddings: true.* are saved and differ"):
        workshop.train("run", **as_adapter(two_ends.parent) | {"adapter__kind": kind})


def test_an_untied_model_is_never_exported_as_tied(workshop, two_ends, bytes_tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(two_ends)
    save(model, dict(model.state_dict()), bytes_tokenizer, None, workshop.folder / "saved")
    assert (
        json.loads((workshop.folder / "saved/config.json").read_text())["tie_word_embeddings"]
        is False
    )
    assert "lm_head.weight" in load_file(workshop.folder / "saved/model.safetensors")


def test_a_merge_of_tied_weights_that_train_stays_tied(workshop):
    base = workshop.train("base", model__config={**TINY_LLAMA, "tie_word_embeddings": True})
    run = workshop.train("lora", model__new_tokens=["<new>"], **as_adapter(base))
    merge([run / "model"], workshop.folder / "merged")
    assert (
        json.loads((workshop.folder / "merged/config.json").read_text())["tie_word_embeddings"]
        is True
    )
    assert "lm_head.weight" not in load_file(workshop.folder / "merged/model.safetensors")
    model = load(workshop.folder / "merged")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("command", short(["merge", "chat", "evaluate"], "chat"))
def test_an_adapter_finds_its_moved_base(workshop, capsys, command):
    from finetune.__main__ import main

    base = workshop.train("base")
    model = str(workshop.train("lora", **as_adapter(base)) / "model")
    moved = str(base.rename(workshop.folder / "moved") / "model")
    other = str(workshop.train("other", run__seed=1) / "model")
    arguments = {
        "merge": [
            "export",
            "--merge",
            "--model",
            model,
            "--output",
            str(workshop.folder / "merged"),
        ],
        "chat": ["chat", "--model", model, "--prompt", "hi", "--max-new-tokens", "1"],
        "evaluate": [
            "evaluate",
            "--tuned",
            model,
            "--data",
            str(workshop.rows),
            "--limit",
            "1",
            "--max-new-tokens",
            "1",
        ],
    }[command]
    if command != "evaluate":  # it has --base in any case
        assert main(arguments) == 2
        assert "the folder of its base, " in (printed := capsys.readouterr().err)
        assert "give --base" in printed
    assert main([*arguments, "--base", other]) == 2
    assert (
        f"--base: {other} is not the base of {model}: 21 of 21 weights differ"
        in capsys.readouterr().err
    )
    assert main([*arguments, "--base", moved]) == 0


@pytest.fixture
def moved(workshop):
    """(an adapter, where its base is now)"""
    base = workshop.train("base")
    adapter = workshop.train("lora", **as_adapter(base)) / "model"
    return adapter, base.rename(workshop.folder / "moved") / "model"


def test_a_moved_base_is_compared_in_every_value(moved):
    adapter, base = moved
    load(adapter, base=str(base))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][1, 2] += 1  # flat 34, and a sample holds multiples of 130
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError,
        match=f"--base: {base} is not the base of {adapter}: 1 of 21 .*such as lm_head.weight",
    ):
        load(adapter, base=str(base))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            "another architecture",
            "is not the base of {adapter}: model_type was llama there, and is gpt2 here; "
            "give the folder of",
        ),
        ("a Hub name", "--base: 'owner/name' cannot be loaded: We couldn't connect"),
        ("an adapter", "--base: {adapter} is itself an adapter; give the model"),
        (
            "both",
            "--base: {base} holds config.json of a whole model and "
            "adapter_config.json of an adapter",
        ),
        ("nowhere", "--base: {base}/nowhere: no such folder"),
    ],
)  # fmt: skip
def test_an_invalid_base_is_refused_by_its_option(workshop, moved, capsys, kind, says):
    from finetune.__main__ import main

    adapter, base = moved
    given = {
        "a Hub name": "owner/name",
        "an adapter": str(adapter),
        "nowhere": f"{base}/nowhere",
    }.get(kind, str(base))
    if kind == "another architecture":
        gpt = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}
        given = str(workshop.train("gpt", train__max_steps=1, model__config=gpt) / "model")
    if kind == "both":
        (base / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    arguments = [
        "--model",
        str(adapter),
        "--output",
        str(workshop.folder / "merged"),
        "--base",
        given,
    ]
    assert main(["export", "--merge", *arguments]) == 2
    assert says.format(adapter=adapter, base=base) in capsys.readouterr().err


def test_a_base_rounded_to_float16_is_recognised():
    """float16 holds fewer exponents than the bfloat16 that hashes compare."""
    from finetune.models import base_identity

    torch.manual_seed(0)
    base = torch.nn.Linear(100, 100)
    known = base_identity.hashes(base.half()), base_identity.values(base.half(), {"weight"})
    torch.manual_seed(0)
    base = torch.nn.Linear(100, 100)
    assert (
        base_identity.hashes(base, torch.float16),
        base_identity.values(base, {"weight"}, torch.float16),
    ) == known
    assert base_identity.values(base, {"weight"}) != known[1]


@pytest.mark.parametrize(
    ("damage", "error"),
    [(b"broken", ExportError), (None, KeyboardInterrupt)],
    ids=["a broken file", "Ctrl-C"],
)
def test_a_merge_that_fails_leaves_no_folder(workshop, monkeypatch, damage, error):
    """And a file that broke after it was saved is not the user's mistake."""
    run = workshop.train("lora", **as_adapter(workshop.train("base")))

    def broken(model, weights, tokenizer, template, target, *rest, **others):
        save(model, weights, tokenizer, template, target, *rest, **others)
        if damage is None:
            raise KeyboardInterrupt
        (target / "model.safetensors").write_bytes(damage)

    monkeypatch.setattr("finetune.export.merge.save", broken)
    before = sorted(workshop.folder.iterdir())
    with pytest.raises(error):
        merge([run / "model"], workshop.folder / "merged")
    assert sorted(workshop.folder.iterdir()) == before


def mixture(**changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {k: v for k, v in TINY_LLAMA.items() if k != "model_type"}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(vocab_size=64, initializer_range=0.2, **{**sizes, **experts, **changes})
    return MixtralForCausalLM(config).eval()


def test_a_flipped_expert_passes_the_export_check():
    """Another kernel may round a router's near-tie to another expert: one token may differ."""
    model = mixture()
    router, seen = model.model.layers[1].mlp.gate, []
    hook = router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    probe_logits(model)
    hook.remove()
    states = seen[0].reshape(-1, seen[0].shape[-1])
    scores = states @ router.weight.T
    second, third = scores.topk(3).indices[5, 1:]

    def raise_third(by):
        with torch.no_grad():
            router.weight[third] += by * states[5] / states[5].norm() ** 2

    raise_third(
        scores[5, second] - scores[5, third] - 1e-5
    )  # token 5 hardly prefers the second expert to the third
    wanted = probe_logits(model)
    raise_third(2e-5)  # and now the third to the second
    found = probe_logits(model)
    assert _relative_difference(found, wanted) > TOLERANCE["fp32"]
    assert disagreement(found, wanted, TOLERANCE["fp32"], has_experts=True) is None
    assert attention_probe.has_experts(model)
    assert "differ" in disagreement(found, wanted, TOLERANCE["fp32"], has_experts=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_theta": 10.0, "rope_type": "default"}},
        {"num_experts_per_tok": 1},
    ],
    ids=str,
)
def test_a_wrong_mixture_of_experts_is_refused(wrong):
    right, other = mixture(), mixture(**wrong)
    other.load_state_dict(right.state_dict(), strict=False)
    found, wanted = probe_logits(other), probe_logits(right)
    assert "differ" in disagreement(found, wanted, TOLERANCE["fp32"], has_experts=True)


def test_nan_logits_never_agree():
    wanted = torch.ones(1, 4, 3)
    assert disagreement(wanted * float("nan"), wanted, 0.1, has_experts=True)
    assert disagreement(wanted, wanted, 0.1, has_experts=False) is None


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "[]",
        "null",
        "",
        '{"eos_token_id": [[1]]}',
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [2, 999999]}',
    ],
)
def test_a_generation_config_that_cannot_be_exported_is_refused_before_training(workshop, content):
    base = workshop.train("base") / "model"
    (base / "generation_config.json").write_text(content)
    changes = {
        "model__path": str(base),
        "model__init": "pretrained",
        "model__config": None,
        "model__tokenizer": None,
    }
    with pytest.raises(ModelError, match="generation_config.json cannot be saved again"):
        workshop.check("tuned", **changes)


def test_an_adapter_refuses_a_base_with_another_config(workshop):
    base = workshop.train("base") / "model"
    changes = {
        "model__path": str(base),
        "model__init": "pretrained",
        "model__config": None,
        "model__tokenizer": None,
    }
    adapter = workshop.train("tuned", adapter__kind="lora", **changes) / "model"
    load(adapter)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ModelError, match="hidden_act was silu, now gelu"):
        load(adapter)
    (adapter / "base_weights.json").write_text("{}")
    with pytest.raises(ModelError, match=r"base_weights\.json: is damaged"):
        load(adapter)
