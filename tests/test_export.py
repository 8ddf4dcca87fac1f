"""What a run exports opens elsewhere, and a folder that does not match is never called complete."""

import copy
import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_LLAMA, Workshop, short
from safetensors.torch import load_file, save_file

from finetune.__main__ import main
from finetune.data.conversations import Message
from finetune.errors import DataError, ExportError, ModelError, Outage
from finetune.export.load import load, load_tokenizer
from finetune.export.merge import _relative_difference, merge
from finetune.export.save import NOT_TO_FETCH, TO_FETCH, Base, _copy_files_of, save
from finetune.export.verify import TOLERANCE, disagreement, probe_logits, verify
from finetune.generation import generate
from finetune.models import attention_probe

pytestmark = pytest.mark.slow


QUICK = {"train__max_steps": 1, "train__micro_batch_size": 8}
TIED = {**TINY_LLAMA, "tie_word_embeddings": True}


def on(base, **changes):
    return {
        "model__init": "pretrained", "model__path": str(base), "model__config": None,
        "model__tokenizer": None, **QUICK, **changes,
    }  # fmt: skip


def as_adapter(base, **changes):
    return on(base, adapter__kind="lora", **changes)


def written(path):
    return json.loads(path.read_text())


def rewrite(path, **changes):
    path.write_text(json.dumps(written(path) | changes))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Runs that tests only read."""
    return Workshop(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def base(shared):
    return shared.train("base") / "model"


@pytest.fixture(scope="module")
def other(shared):
    """Other weights of the same shape."""
    return shared.train("other", **QUICK, run__seed=1) / "model"


@pytest.fixture(scope="module")
def tied(shared):
    return shared.train("tied", **QUICK, model__config=TIED) / "model"


@pytest.fixture(scope="module")
def lora(shared, base):
    return shared.train("lora", **as_adapter(base)) / "model"


@pytest.fixture(scope="module")
def merged(shared, lora):
    merge([lora], shared.folder / "merged")
    return shared.folder / "merged"


@pytest.fixture
def own_base(base, tmp_path):
    """A copy of the base that a test may change."""
    return shutil.copytree(base, tmp_path / "own_base")


@pytest.fixture
def own_lora(lora, own_base, tmp_path):
    """A copy of the adapter, on that base."""
    folder = shutil.copytree(lora, tmp_path / "own_lora")
    rewrite(folder / "adapter_config.json", base_model_name_or_path=str(own_base))
    return folder


def test_full_weights_open_with_plain_transformers(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(base) for c in (AutoModelForCausalLM, AutoTokenizer))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "### Question:\nhi\n\n### Answer:\n"
    assert model.config._attn_implementation == "sdpa", (
        "the export must not ask for this package's attention"
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert torch.isfinite(model(**tokenizer(text, return_tensors="pt")).logits).all()


def test_an_adapter_opens_with_plain_peft(lora, base):
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(lora)
    assert not (lora / "model.safetensors").exists()
    assert written(lora / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert load_tokenizer(lora).chat_template
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2]])).logits).all()


@pytest.mark.parametrize("shape", [TINY_LLAMA, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", short(["float32", "bfloat16"], "bfloat16"))
def test_tied_and_untied_models_of_each_dtype_are_saved_whole(workshop, shape, dtype):
    run = workshop.train(model__config=shape, model__dtype=dtype, **QUICK)
    saved = load_file(run / "model/model.safetensors")
    assert ("lm_head.weight" in saved) == (shape is TINY_LLAMA)
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


UP = "model.layers.0.mlp.up_proj.weight"


def zero_half(tensors):
    """As if one process's shard had been saved."""
    tensors[UP] = tensors[UP].clone()
    tensors[UP][tensors[UP].shape[0] // 2 :] = 0


def drop_norm(tensors):
    del tensors["model.norm.weight"]


def zero_adapters(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (zero_half, f"weight {UP} differs from training"),
        (drop_norm, "model.norm.weight"),
        (zero_adapters, "14 adapters are zero"),
    ],
)
def test_what_differs_from_training_is_never_complete(workshop, base, monkeypatch, change, says):
    monkeypatch.setattr("finetune.export.publish.save", tamper(change))
    with pytest.raises(ExportError, match=says):
        workshop.train(**(as_adapter(base) if change is zero_adapters else QUICK))
    assert workshop.outcome()["state"] == "failed"


def test_a_run_that_moved_no_weight_is_never_complete(workshop):
    """An update below the smallest float32 moves no weight, not even a weight of 0."""
    with pytest.raises(
        ExportError, match=r"no weight changed in 5 steps; is optimizer.lr too small"
    ):
        workshop.train(model__dtype="bfloat16", optimizer__lr=1e-60)


def test_factors_that_cannot_move_in_the_first_step_are_not_reported(workshop, base, capsys):
    workshop.train("lora", **as_adapter(base))
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
    outcome = workshop.outcome()
    assert (outcome["state"], outcome["step"]) == ("complete", 5)
    assert outcome["reason"] == "the last weights, of step 5, exported and verified"
    size = (run / "model/model.safetensors").stat().st_size
    assert outcome["model"]["model.safetensors"]["bytes"] == size


def test_merge_command_writes_full_weights(lora, tmp_path, capsys):
    target = tmp_path / "merged"
    command = ["export", "--merge", "--model", str(lora), "--output", str(target)]
    assert main(command) == 0
    assert "merged; logits differ from base plus adapter by at most" in capsys.readouterr().out
    assert (target / "model.safetensors").exists()
    template = "chat_template.jinja"
    assert (target / template).read_text() == (lora / template).read_text()
    assert main(command) == 2
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


def test_merging_full_weights_is_an_error(base, tmp_path):
    with pytest.raises(ModelError, match="nothing to merge"):
        merge([base], tmp_path / "merged", "auto")


def test_an_adapter_and_its_merge_store_the_token_that_ends_an_answer(workshop, base):
    """ChatML ends answers with <|im_end|>, not with EOS; peft itself saves no generation config."""
    run = workshop.train("lora", data__template="chatml", **as_adapter(base))
    stop = load_tokenizer(run / "model").convert_tokens_to_ids("<|im_end|>")
    assert stop in load(run / "model").generation_config.eos_token_id
    merge([run / "model"], workshop.folder / "merged", "auto")
    assert stop in load(workshop.folder / "merged").generation_config.eos_token_id


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "lm_head"], ".*(q_proj|lm_head)", ["embed_tokens"], ".*embed_tokens"],
    ids=str,
)
def test_an_adapter_on_tied_weights_is_refused(workshop, tied, targets):
    with pytest.raises(
        ModelError, match="shares its weights|no linear layer is called 'embed_tokens'"
    ):
        workshop.train("lora", **as_adapter(tied, adapter__target_modules=targets))


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    short(
        [*itertools.product(("float32", "bfloat16"), ("auto", "float32", "bfloat16", "float16"))],
        ("float32", "bfloat16"),
    ),
)
def test_an_adapter_knows_its_base_in_any_dtype(workshop, base, dtype, wanted):
    if dtype != "float32":
        base = workshop.train("base", model__dtype=dtype, **QUICK) / "model"
    run = workshop.train("lora", **as_adapter(base, model__dtype="bfloat16"))
    merge([run / "model"], workshop.folder / "merged", wanted)
    merged = load_file(workshop.folder / "merged/model.safetensors")
    expected = dtype if wanted == "auto" else wanted
    assert {str(weight.dtype) for weight in merged.values()} == {f"torch.{expected}"}


def opens(command, model, folder):
    """Return the command line of a command that opens this model."""
    answers = ["--max-new-tokens", "1"]
    return {
        "merge": ["export", "--merge", "--model", model, "--output", str(folder / "merged")],
        "chat": ["chat", "--model", model, "--prompt", "hi", *answers],
        "evaluate": [
            "evaluate", "--tuned", model, "--data", str(folder / "rows.jsonl"), "--limit", "1",
            *answers,
        ],
    }[command]  # fmt: skip


@pytest.mark.parametrize("command", short(["merge", "chat", "evaluate"], "merge"))
def test_an_adapter_beside_another_base_is_refused(
    workshop, own_lora, own_base, other, capsys, command
):
    """Same path, same shapes, other weights: what comes out would be neither model."""
    shutil.copytree(other, own_base, dirs_exist_ok=True)
    more = ["--base", str(own_base)] if command == "evaluate" else []
    assert main([*opens(command, str(own_lora), workshop.folder), *more]) == 2
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
    own = {"model__tokenizer": str(workshop.folder / "tokenizer"), "data__template": str(jinja)}
    run = workshop.train(**own, **QUICK)
    tokenizer = load_tokenizer(run / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_the_system_prompt_of_training_is_there_when_asked(workshop):
    """Without it a tuned model would be asked by a prompt that it never saw."""
    prompt = 'Say "so" {{ often }} 😀.'
    run = workshop.train(data__system_prompt=prompt, data__template="chatml", **QUICK)
    tokenizer = load_tokenizer(run / "model")

    def asked(*messages):
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )

    user = {"role": "user", "content": "hi"}
    assert asked(user).startswith(f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user")
    assert asked({"role": "system", "content": "Other."}, user).count("system") == 1


def test_an_exported_model_answers_with_the_template_arguments_of_training(workshop, capsys):
    jinja = workshop.folder / "my.jinja"
    jinja.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %};{% endfor %}{% if add_generation_prompt %}assistant: "
        "{% if enable_thinking is defined and not enable_thinking %}(quick) {% endif %}{% endif %}"
    )
    given = {"data__template": str(jinja), "data__template_arguments": {"enable_thinking": False}}
    with pytest.raises(DataError, match="renders the prompt of message 2 differently"):
        workshop.train(**given, **QUICK)
    jinja.write_text(
        jinja.read_text().replace("{{ m.content }}", "{{ '(quick) ' if m.role == 'assistant' and "
        "enable_thinking is defined }}{{ m.content }}")
    )  # fmt: skip
    asked = {"evaluation__sample_prompts": ["hi"], "evaluation__sample_max_new_tokens": 2}
    run = workshop.train(**given, **asked, **QUICK)
    assert "my.jinja with {enable_thinking: false}, objective sft\n" in capsys.readouterr().out
    tokenizer = load_tokenizer(run / "model")
    messages = [{"role": "user", "content": "hi"}]
    plain = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert plain == "user: hi;assistant: (quick) "
    assert generate.chat_prompt(tokenizer, [Message("user", "hi")]) == plain
    given["data__template_arguments"] = {"quick": True}
    assert workshop.main(**given, **asked, **QUICK) == 2
    now = "data.template_arguments: was {enable_thinking: false}, now {quick: true}"
    assert now in capsys.readouterr().err
    assert workshop.main("other", **given, **QUICK) == 2
    assert "does not read it, and it reads enable_thinking; " in capsys.readouterr().err


def test_a_broken_file_after_saving_is_exit_1_not_the_users_fault(workshop, monkeypatch):
    def broken(model, weights, tokenizer, template, target, *rest):
        save(model, weights, tokenizer, template, target, *rest)
        path = target / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    monkeypatch.setattr("finetune.export.publish.save", broken)
    with pytest.raises(ExportError, match="cannot be loaded"):
        workshop.train(**QUICK)


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
    base = workshop.train("base", model__config={**config, **architecture}, **QUICK) / "model"
    run = workshop.train("lora", **as_adapter(base))
    merge([run / "model"], workshop.folder / "merged")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base, workshop.folder / "merged")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before), (
        "what was learned is in it"
    )


def test_a_multimodal_model_gets_adapters_in_its_language_part(workshop):
    text = {**TINY_LLAMA, "head_dim": 8, "vocab_size": 300}
    del text["model_type"]
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 1}
    base = workshop.train("base", model__config={"model_type": "gemma3", **config}, **QUICK)
    run = workshop.train("lora", **as_adapter(base / "model"))
    adapted = load_file(run / "model/adapter_model.safetensors")
    assert adapted
    assert not [name for name in adapted if "vision" in name]


def test_an_adapter_opens_from_any_folder(workshop, base, monkeypatch, tmp_path_factory):
    """The base is named by its absolute path, also when the config named it by a relative one."""
    monkeypatch.chdir(base.parent)
    run = workshop.train("lora", **as_adapter("model") | {"model__path": "./model"})
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
    base = workshop.train("base", train__ema_decay=0.9, **QUICK) / "model"
    for kind in ("lora", "qlora"):
        alive.clear()
        workshop.train(kind, **on(base, adapter__kind=kind, train__ema_decay=0.9))


def test_exported_files_have_the_mode_that_the_umask_says(workshop, base, lora, merged):
    before = os.umask(0o027)
    try:
        private = workshop.train("private", **QUICK)
    finally:
        os.umask(before)
    usual = 0o666 & ~before
    for folder, mode in (
        (base.parent, usual),
        (lora.parent, usual),
        (merged, usual),
        (private, 0o640),
    ):
        modes = {
            path.name: oct(path.stat().st_mode & 0o777)
            for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"
        }
        assert set(modes.values()) == {oct(mode)}, modes


def test_saving_does_not_modify_its_input(base, bytes_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from finetune.data import chat_templates

    model = AutoModelForCausalLM.from_pretrained(base)
    bytes_tokenizer.chat_template, model.generation_config.temperature = "before", 0.5

    def state():
        return (
            copy.deepcopy(bytes_tokenizer.chat_template),
            model.generation_config.to_dict(),
            model.config.to_dict(),
        )

    before = copy.deepcopy(state())
    template = chat_templates.load(
        "question_answer", "question_answer", None, bytes_tokenizer.special_tokens_map, {}
    )
    weights, saved = dict(model.state_dict()), tmp_path / "saved"
    save(model, weights, bytes_tokenizer, template, saved, "a system prompt")
    assert state() == before
    assert "a system prompt" in (saved / "chat_template.jinja").read_text()
    assert written(saved / "generation_config.json")["temperature"] == 0.5


COMPANIONS = {
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE", "NOTICE.txt",
}  # fmt: skip


def add_companions(folder):
    """Add what published models have beside weights and tokenizer."""
    for name in COMPANIONS:
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("about the base")
    (folder / "modeling_own.py").write_text("raise RuntimeError")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("rag {{ messages }}")
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools {{ messages }}")
    rewrite(folder / "generation_config.json", top_p=0.7, temperature=0.6)


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_other_files_of_a_base_are_exported(workshop, own_base, kind):
    add_companions(own_base)
    adapter = "full" if kind == "full" else "lora"
    run = workshop.train("tuned", data__template="chatml", **on(own_base, adapter__kind=adapter))
    folder = run / "model"
    if kind == "merged":
        merge([folder], workshop.folder / "merged")
        folder = workshop.folder / "merged"
    found = {path.name for path in folder.iterdir()}
    assert found >= COMPANIONS
    assert not {"README.md", "modeling_own.py"} & found, (
        "not what describes the base, and no code without trust_remote_code"
    )
    again = load_tokenizer(folder)
    assert again.chat_template["rag"] == "rag {{ messages }}"
    assert again.chat_template["tool_use"] == "tools {{ messages }}"
    asked = again.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert "<|im_start|>" in asked
    settings = written(folder / "generation_config.json")
    assert (settings["top_p"], settings["temperature"], settings["do_sample"]) == (0.7, 0.6, True)


TERMS = (
    "license.txt", "LICENSE.md", "LICENCE", "COPYING", "COPYING.LESSER", "NOTICE", "notice.md",
    "USE_POLICY.md", "LICENSES/MIT.txt", "licenses/a/b.txt", "LLAMA_LICENSE.txt",
    "ThirdPartyNotices.txt", "Acceptable-Use-Policy.pdf", "TERMS_OF_USE.md", "UNLICENSE",
)  # fmt: skip


def test_licence_files_are_exported_under_any_spelling(tmp_path):
    others = (
        "README.md", "noticed.txt", "determs.txt", "license.safetensors", ".git/LICENSE",
        "data/LICENSE", "license_check.py",
    )  # fmt: skip
    for name in (*TERMS, *others):
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    (tmp_path / "out").mkdir()
    _copy_files_of(Base(str(tmp_path / "base")), tmp_path / "out")
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "out").as_posix() for path in found} == set(TERMS)


def test_all_files_to_export_are_fetched_from_the_hub():
    from huggingface_hub.utils import filter_repo_objects

    code = ["kernels/own.py", "custom_generate/requirements.txt"]
    wanted = [*TERMS, *code, "video_preprocessor_config.json"]
    weights = ["model.safetensors", "LICENSED.bin"]
    fetched = filter_repo_objects(
        [*wanted, *weights], allow_patterns=TO_FETCH, ignore_patterns=NOT_TO_FETCH
    )
    assert list(fetched) == wanted


@pytest.fixture
def two_ends(own_base):
    """A base whose config says tied, and whose head and embedding are two."""
    rewrite(own_base / "config.json", tie_word_embeddings=True)
    return own_base


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_base_wrongly_configured_as_tied_is_refused(workshop, two_ends, kind):
    with pytest.raises(ModelError, match="tie_word_embeddings: true.* are saved and differ"):
        workshop.train("run", **on(two_ends, adapter__kind=kind))


def test_an_untied_model_is_never_exported_as_tied(two_ends, bytes_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model, saved = AutoModelForCausalLM.from_pretrained(two_ends), tmp_path / "saved"
    save(model, dict(model.state_dict()), bytes_tokenizer, None, saved)
    assert written(saved / "config.json")["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(saved / "model.safetensors")


def test_a_merge_of_tied_weights_that_train_stays_tied(workshop, tied):
    run = workshop.train("lora", **as_adapter(tied, model__new_tokens=["<new>"]))
    target = workshop.folder / "merged"
    merge([run / "model"], target)
    assert written(target / "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    model = load(target)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.fixture
def moved(own_lora, own_base, tmp_path):
    """(an adapter, where its base is now)"""
    return own_lora, own_base.rename(tmp_path / "moved")


@pytest.mark.parametrize("command", short(["merge", "chat", "evaluate"], "chat"))
def test_an_adapter_finds_its_moved_base(workshop, moved, other, capsys, command):
    model, base = map(str, moved)
    arguments = opens(command, model, workshop.folder)
    if command != "evaluate":  # it has --base in any case
        assert main(arguments) == 2
        assert "the folder of its base, " in (printed := capsys.readouterr().err)
        assert "give --base" in printed
    assert main([*arguments, "--base", str(other)]) == 2
    refused = f"--base: {other} is not the base of {model}: 21 of 21 weights differ"
    assert refused in capsys.readouterr().err
    assert main([*arguments, "--base", base]) == 0


def test_a_moved_base_is_compared_in_every_value(moved):
    adapter, base = moved
    load(adapter, base=str(base))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][1, 2] += 1  # flat 34, and a sample holds multiples of 130
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused = f"--base: {base} is not the base of {adapter}: 1 of 21 .*such as lm_head.weight"
    with pytest.raises(ModelError, match=refused):
        load(adapter, base=str(base))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            "{base}/gpt",
            "is not the base of {adapter}: model_type was llama there, and is gpt2 here; "
            "give the folder of",
        ),
        ("owner/name", "--base: 'owner/name' cannot be loaded: We couldn't connect"),
        ("{adapter}", "--base: {adapter} is itself an adapter; give the model"),
        (
            "{base}",
            "--base: {base} holds config.json of a whole model and "
            "adapter_config.json of an adapter",
        ),
        ("{base}/nowhere", "--base: {base}/nowhere: no such folder"),
    ],
    ids=["another architecture", "a Hub name", "an adapter", "both", "nowhere"],
)  # fmt: skip
def test_an_invalid_base_is_refused_by_its_option(workshop, moved, capsys, given, says):
    adapter, base = moved
    if given == "{base}/gpt":
        gpt = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}
        (workshop.train("gpt", **QUICK, model__config=gpt) / "model").rename(base / "gpt")
    if given == "{base}":
        shutil.copy(adapter / "adapter_config.json", base)
    given = given.format(adapter=adapter, base=base)
    assert main([*opens("merge", str(adapter), workshop.folder), "--base", given]) == 2
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


def cut_short(target):
    (target / "model.safetensors").write_bytes(b"broken")


def interrupt(target):
    raise KeyboardInterrupt


def fill_the_disk(target):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (cut_short, ExportError, None),
        (interrupt, KeyboardInterrupt, None),
        (fill_the_disk, Outage, "/merged cannot be written now: the disk is full"),
    ],
)
def test_a_merge_that_fails_leaves_no_folder(lora, tmp_path, monkeypatch, damage, error, says):
    """And a file that broke after it was saved is not the user's mistake."""

    def broken(model, weights, tokenizer, template, target, *rest, **others):
        save(model, weights, tokenizer, template, target, *rest, **others)
        damage(target)

    monkeypatch.setattr("finetune.export.merge.save", broken)
    with pytest.raises(error, match=says):
        merge([lora], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


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


def test_a_score_near_0_is_compared_with_1():
    """A reward model in bfloat16 gave 0.006 in training and -0.006 after reloading: a rounding."""
    near, other = torch.tensor([[0.006]]), torch.tensor([[-0.006]])
    assert disagreement(other, near, TOLERANCE["bf16"], has_experts=False) is None
    assert "differ" in disagreement(near + 0.1, near, TOLERANCE["bf16"], has_experts=False)
    of_tokens = torch.stack([near, near])[None, ..., 0]
    assert "differ" in disagreement(-of_tokens[..., None], of_tokens[..., None], 0.05, False)


@pytest.mark.parametrize(
    "content",
    [
        "[", "[]", "null", "", '{"eos_token_id": [[1]]}', '{"eos_token_id": "x"}',
        '{"eos_token_id": [2, 999999]}',
    ],
)  # fmt: skip
def test_a_generation_config_that_cannot_be_exported_is_refused_before_training(
    workshop, own_base, content
):
    (own_base / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match="generation_config.json cannot be saved again"):
        workshop.check("tuned", **on(own_base))


def test_an_adapter_refuses_a_base_with_another_config(own_base, own_lora):
    load(own_lora)
    rewrite(own_base / "config.json", hidden_act="gelu")
    with pytest.raises(ModelError, match="hidden_act was silu, now gelu"):
        load(own_lora)
    (own_lora / "base_weights.json").write_text("{}")
    with pytest.raises(ModelError, match=r"base_weights\.json: is damaged"):
        load(own_lora)
