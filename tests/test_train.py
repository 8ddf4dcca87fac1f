"""The command line: exit codes, what a run leaves behind, and what bad input gets."""

import contextlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import TINY_LLAMA, Workshop, losses, pairs, pretrained, read_jsonl, short, write_jsonl
from safetensors.torch import load_file, save_file

from finetune import config as configs
from finetune.data.conversations import Message
from finetune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RunDirectoryError,
    TopologyError,
    UserError,
)
from finetune.export.load import load_tokenizer
from finetune.generation import generate

FEW = {"train__max_steps": 2, "train__micro_batch_size": 8}
CHATML = {"data__template": "chatml"}


@pytest.fixture(scope="module")
def chatml_model(tmp_path_factory):
    """Return a model with the template chatml."""
    return Workshop(tmp_path_factory.mktemp("base")).train("base", **FEW, **CHATML) / "model"


@pytest.fixture
def base(chatml_model, tmp_path):
    """Return a copy of it, to be changed."""
    return shutil.copytree(chatml_model, tmp_path / "base")


def change_weights(model, change):
    """Change the tensors of a model, which `change` gets by name."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_a_run_leaves_every_promised_file(workshop):
    run = workshop.train(data__eval_fraction=0.2, evaluation__every_steps=2)
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "receipt.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "outcome.json",
        "model", ".lock", "saves.jsonl", "held_out.jsonl",
    }  # fmt: skip
    kept = read_jsonl(run / "held_out.jsonl")
    assert len(kept) == 8
    assert [row for row in pairs() if row in kept] == kept
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4], "32 of 40 rows in steps of 8"
    assert lines[0].keys() == {
        "step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens",
        "tokens_per_second", "seconds", "memory_gb",
    }  # fmt: skip
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in read_jsonl(run / "eval.jsonl")] == [2, 4]
    assert isinstance(read_jsonl(run / "eval.jsonl")[-1]["eval_tokens"], int)
    assert read_jsonl(run / "eval.jsonl")[-1]["perplexity"] == pytest.approx(
        math.exp(read_jsonl(run / "eval.jsonl")[-1]["eval_loss"])
    )
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["train_data"]["rows"] == 40
    assert receipt["versions"]["torch"] == importlib.metadata.version("torch")
    assert receipt["code"]["sha256"]
    saved = configs.from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    assert saved.optimizer.lr == 1e-2
    newest = max((run / "checkpoints").iterdir())
    manifest = json.loads((newest / "manifest.json").read_text())
    assert {name: file["bytes"] for name, file in manifest["files"].items()} == {
        str(
            p.relative_to(newest),
        ): p.stat().st_size for p in newest.rglob("*") if p.is_file() and p.name != "manifest.json"
    }  # fmt: skip


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(workshop):
    one, same, other = (
        workshop.train(name, run__seed=seed, **FEW) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert losses(one) == losses(same)
    assert losses(one) != losses(other)


@pytest.mark.slow
def test_clm_supervises_every_token_of_text(workshop):
    text = workshop.folder / "text.txt"
    text.write_text(
        "".join(f"line {i} of a text that goes on and on {'la ' * (i % 40)}\n" for i in range(60))
    )
    run = workshop.train(
        data__train=str(text),
        objective__kind="clm",
        data__packing=True,
        data__truncation="split",
        data__max_length=64,
    )
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["train_data"]["examples"] > 60, "long lines are split, not cut"
    assert receipt["train_data"]["truncated"] > 0
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.slow
def test_check_prints_a_summary_and_writes_nothing(workshop, capsys):
    workshop.check(data__packing=True)
    output = capsys.readouterr().out
    assert "35,296 parameters" in output
    assert "[[0<|eos|>]]" in output
    assert not workshop.run_dir().exists()


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_key_value_heads": 3},
        {"hidden_size": 30},
        {"num_attention_heads": 3, "num_key_value_heads": 2},
    ],
    ids=str,
)
def test_an_architecture_that_cannot_run_forward_is_refused_early(workshop, sizes):
    with pytest.raises(ModelError, match="heads"):
        workshop.train(model__config={**TINY_LLAMA, **sizes})
    assert not workshop.run_dir().exists()


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("bert", "auto"), ("bert", "sdpa"), ("electra", "auto"), ("gemma3_text", "auto")],
)
def test_a_model_that_is_not_causal_is_refused(workshop, kind, attention):
    """It would learn to copy the answer it is shown."""
    config = {**TINY_LLAMA, "model_type": kind}
    config |= {"use_bidirectional_attention": True, "head_dim": 8} if kind == "gemma3_text" else {}
    config = {
        k: v for k, v in config.items() if kind == "gemma3_text" or k != "num_key_value_heads"
    }
    says = "not a causal language model" if kind == "gemma3_text" else "is an encoder, and"
    with pytest.raises(ModelError, match=says):
        workshop.train(model__config=config, model__attention=attention)
    assert not workshop.run_dir().exists()


def test_a_misspelt_setting_of_the_architecture_is_refused(workshop):
    with pytest.raises(
        ModelError, match="llama has no setting 'num_hiden_layers'; did you mean num_hidden_layers"
    ):
        workshop.train(model__config={**TINY_LLAMA, "num_hiden_layers": 9})


@pytest.mark.slow
def test_nan_weights_are_refused(workshop, base):
    change_weights(base, lambda of: of["model.norm.weight"][3].fill_(float("nan")))
    with pytest.raises(
        ModelError, match=r"1 of its weights hold NaN or infinity, such as model\.norm\.weight"
    ):
        workshop.train(**pretrained(base))


@pytest.mark.slow
def test_settings_that_would_fail_the_export_are_errors_before_training(workshop, base):
    (base / "generation_config.json").write_text('{"max_new_tokens": -1}')
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be saved again"):
        workshop.train(**pretrained(base))
    with pytest.raises(ModelError, match="saved with a model of type qwen2 it opens as"):
        workshop.train("other", model__config={**TINY_LLAMA, "model_type": "qwen2"})


@pytest.mark.slow
def test_a_generation_config_without_do_sample_is_exported(workshop, base):
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    run = workshop.train(**pretrained(base), **FEW)
    saved = json.loads((run / "model/generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.5, True)


@pytest.mark.slow
def test_evaluating_on_training_rows_is_refused_or_noted(workshop, capsys):
    path = write_jsonl(workshop.folder / "eval.jsonl", pairs())
    with pytest.raises(DataError, match="holds the same rows as data.train"):
        workshop.check(data__eval=str(path))
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="40 of its 40 examples are also trained on"):
        workshop.check(data__eval=str(path))
    write_jsonl(path, [*pairs(3), *({"question": f"{n}?", "answer": "new"} for n in range(40))])
    workshop.check(data__eval=str(path))
    assert "43 examples; 3 of them are also trained on" in capsys.readouterr().out


@pytest.mark.slow
def test_the_summary_lists_read_unread_and_useless_rows(workshop, capsys):
    folder = workshop.folder / "folder"
    folder.mkdir()
    values = pairs(20)
    write_jsonl(
        folder / "train.jsonl", [*values[:15], *(row | {"category": "c"} for row in values[15:])]
    )
    (folder / "more.csv").write_text("question;answer\nwhy;because\n")
    write_jsonl(folder / "test.jsonl", [{"question": "new", "answer": "new"}])
    workshop.check(data__train=str(folder), data__eval=str(folder / "test.jsonl"))
    says = capsys.readouterr().out
    assert "data        21 rows -> " in says
    assert (
        f"files       {folder}/more.csv (separated by a semicolon), {folder}/train.jsonl\n" in says
    )
    assert f"eval files  {folder}/test.jsonl\n" in says
    assert "not read    columns category (5 rows)\n" in says
    assert (
        f"note        data.train does not read {folder}/test.jsonl (named as test rows)\n" in says
    )
    assert "3 steps will change the model very little" in says


@pytest.mark.slow
def test_text_unit_is_for_the_text_files_of_a_folder(workshop):
    folder = workshop.folder / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/a.txt").write_text("one\ntwo\n\nthree " * 5)
    run = workshop.train(
        data__train=str(folder), data__text_unit="file", objective__kind="clm", train__max_steps=1
    )
    assert json.loads((run / "receipt.json").read_text())["train_data"]["rows"] == 1
    write_jsonl(folder / "deep/rows.jsonl", [{"text": "x"}])
    (folder / "deep/a.txt").unlink()
    with pytest.raises(
        ConfigError, match="data.text_unit: would be ignored: no source is a .txt or .md file"
    ):
        workshop.check(data__train=str(folder), data__text_unit="file", objective__kind="clm")


def test_rows_are_checked_before_anything_is_downloaded(workshop):
    """Without the Hub, what is wrong with rows can be mended all the same."""
    hub = pretrained("owner/no-such-model")
    write_jsonl(workshop.rows, [*pairs(), {"question": "q", "answer": ""}])
    with pytest.raises(DataError, match=r"rows.jsonl:41: column 'answer' is empty"):
        workshop.check(**hub)
    write_jsonl(workshop.rows, pairs())
    with pytest.raises(ModelError, match="owner/no-such-model"):
        workshop.check(**hub)


THINKS = (  # as Qwen3, with the date of Llama 3
    "{{ 'Today: ' + strftime_now('%d %b %Y') }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not "
    "enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}\n"
)


@contextlib.contextmanager
def on_the_day_of(zone, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.slow
def test_a_template_with_the_date_keeps_that_of_the_first_start(workshop, monkeypatch, capsys):
    template = workshop.folder / "dated.jinja"
    template.write_text(THINKS)
    settings = {"data__template": str(template), **FEW}
    with on_the_day_of("AAA12", monkeypatch):
        first = workshop.train(**settings)
    day = json.loads((first / "receipt.json").read_text())["template_date"]
    assert (
        f"the template writes the date: {day}, that of the first start" in capsys.readouterr().out
    )
    with on_the_day_of(
        "BBB-14", monkeypatch
    ):  # 26 hours later in local time, so never the same day
        (first / "outcome.json").unlink()
        workshop.train(**settings)
        assert "resumed from" in capsys.readouterr().out
        with monkeypatch.context() as patched:
            patched.setenv("FINETUNE_REPLAY_OF", str(first))
            workshop.train("again", **settings)
        other = workshop.train("other", **settings)
    assert losses(workshop.run_dir("again")) == losses(first)
    assert json.loads((other / "receipt.json").read_text())["template_date"] != day


@pytest.mark.slow
def test_the_export_gets_the_prompts_of_training(workshop):
    """The template's text before an answer ends every caller's prompt, unless it sets thinking."""
    template = workshop.folder / "thinks.jinja"
    template.write_text(THINKS)
    tokenizer = load_tokenizer(workshop.train(**FEW, data__template=str(template)) / "model")

    def asked(**arguments):
        question = [{"role": "user", "content": "q"}]
        text = tokenizer.apply_chat_template(
            question, tokenize=False, add_generation_prompt=True, **arguments
        )
        return text.rpartition("q<|im_end|>\n")[2]

    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert generate.chat_prompt(tokenizer, [Message("user", "q")]).endswith(empty)
    assert asked() == asked(enable_thinking=False) == empty
    assert asked(enable_thinking=True) == "<|im_start|>assistant\n"


@pytest.mark.slow
def test_rows_with_thoughts_export_without_forced_empty_thoughts(workshop):
    template = workshop.folder / "thinks.jinja"
    template.write_text(THINKS.replace("loop.last", "'<think>' not in m.content"))
    rows = [*pairs(), {"question": "why", "answer": "<think>hm</think>so"}]
    path = write_jsonl(workshop.folder / "thoughts.jsonl", rows)
    run = workshop.train(**FEW, data__template=str(template), data__train=str(path))
    assert generate.chat_prompt(load_tokenizer(run / "model"), [Message("user", "q")]).endswith(
        "assistant\n"
    )
    with pytest.raises(DataError, match=r"data\.eval: some of its answers do not begin with"):
        workshop.check("other", data__template=str(template), data__eval=str(path))


TURNS = ["user", "assistant", "user", "assistant"]
KINDS = {"one turn": TURNS[:2], "several turns": TURNS, "system, several turns": ["system", *TURNS]}
REFUSED = {  # everything else trains
    ("qwen3", "several turns"): "message 2 differently once later turns are there",
    ("qwen3", "system, several turns"): "message 3 differently once later turns are there",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", short(["qwen2.5", "qwen3", "gemma-3", "smollm3"], "qwen3"))
def test_a_real_template_trains_or_is_refused_with_its_reason(real_data, workshop, name, kind):
    turns = [{"role": role, "content": f"{role} says {n}"} for n, role in enumerate(KINDS[kind])]
    rows = write_jsonl(workshop.folder / "chats.jsonl", [{"messages": turns}] * 8)
    given = {
        "data__template": str(real_data / "chat_templates" / f"{name}.jinja"),
        "data__max_length": 4096,
        "data__train": str(rows),
        "train__max_steps": 1,
        "model__config": TINY_LLAMA | {"max_position_embeddings": 4096},
        "model__new_tokens": ["<start_of_turn>", "<end_of_turn>"],
    }  # fmt: skip
    if reason := REFUSED.get((name, kind)):
        with pytest.raises(DataError, match=reason):
            workshop.check(**given)
        given["data__loss_on"] = "last_turn"
    assert (workshop.train(**given) / "model").is_dir()


@pytest.mark.proof  # test_tokens.py checks what is learned of real rows
@pytest.mark.parametrize("name", ["phi-2", "phi-3-mini"])
def test_a_real_tokenizer_and_its_template_train(real_data, workshop, name):
    run = workshop.train(model__tokenizer=str(real_data / "tokenizers" / name), train__max_steps=1)
    assert load_tokenizer(run / "model").chat_template


@pytest.mark.parametrize(
    "wrong",
    [
        "{% for m in messages %}{{ m.content "
        "}}", "{{ messages | nofilter }}", "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}", "{{ nothing.at_all }}", "{{ messages[9].content }}",
        "{% for i in range(10 ** 9) %}{% endfor %}", "{{ datetime.now() }}",
    ],
)  # fmt: skip
def test_a_failing_template_is_reported_with_a_row(workshop, wrong):
    template = workshop.folder / "own.jinja"
    template.write_text(wrong)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: data\.template '.*own\.jinja' fails: "):
        workshop.check(data__template=str(template))


@pytest.mark.slow
def test_a_template_that_rejects_a_sample_prompt_is_reported_before_training(workshop):
    template = workshop.folder / "own.jinja"
    template.write_text(
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + THINKS
    )
    rows = [
        {"messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]}
    ] * 8
    given = {
        "data__template": str(template),
        "data__train": str(write_jsonl(workshop.folder / "rows2.jsonl", rows)),
    }
    workshop.check(**given)
    with pytest.raises(
        DataError, match=r"evaluation\.sample_prompts:1: data\.template .* no system"
    ):
        workshop.check(**given, evaluation__sample_prompts=["hi"])


@pytest.mark.slow
def test_a_template_that_replaces_the_models_own_is_noted(workshop, chatml_model, capsys):
    rows = [{"prompt": str(n), "completion": "x"} for n in range(8)]
    path = write_jsonl(workshop.folder / "plain.jsonl", rows)
    for changes, noted in (
        ({"data__train": str(path)}, "plain replaces"),
        ({"data__template": "llama2"}, "llama2 replaces"),
        (CHATML, None),
        ({}, None),
    ):
        workshop.check(**pretrained(chatml_model), **changes)
        output = capsys.readouterr().out
        assert ("the model has a chat template of its own" in output) == bool(noted), changes
        assert (noted or "") in output


@pytest.mark.slow
def test_an_unused_broken_template_is_ignored(workshop, base, capsys):
    (base / "chat_template.jinja").write_text("{% if %}")
    workshop.check(**pretrained(base), data__template="question_answer")
    assert "template    question_answer, objective sft\n" in capsys.readouterr().out


@pytest.mark.slow
def test_check_of_an_existing_run_checks_the_data_first(workshop):
    workshop.train(**FEW)
    with pytest.raises(DataError, match="nothing.jsonl: no such file"):
        workshop.check(**FEW, data__train="nothing.jsonl")
    with pytest.raises(RunDirectoryError, match="holds another run"):
        workshop.check(**FEW, optimizer__lr=1e-4)


@pytest.mark.slow
def test_a_model_with_attention_sinks_trains_in_padded_batches(workshop):
    """gpt-oss adds a learned logit to every softmax, which neither packs nor SDPA know."""
    config = {
        **TINY_LLAMA,
        "model_type": "gpt_oss",
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    run = workshop.train(model__config=config, **FEW)
    assert json.loads((run / "receipt.json").read_text())["attention"] == "eager"


@pytest.mark.slow
def test_wrong_config_is_exit_2_with_every_problem(workshop, capsys):
    arguments = ["--optimizer.learning_rate", "1"]
    assert workshop.main(arguments=arguments, train__epochs=0, model__pth="x") == 2
    output = capsys.readouterr().err
    for part in (
        "3 problems",
        "--optimizer.learning_rate: unknown option; did you mean optimizer.lr?",
        "train.epochs",
        "model.pth: unknown key; did you mean model.path?",
    ):
        assert part in output


@pytest.mark.slow
def test_a_bad_row_is_exit_2_and_leaves_no_run_directory(workshop, capsys):
    write_jsonl(workshop.rows, [*pairs(3), {"question": "q", "answer": None}])
    assert workshop.main() == 2
    output = capsys.readouterr().err
    assert f"{workshop.rows}:4: column 'answer' should be text, got null" in output
    assert "Traceback" not in output
    assert not workshop.run_dir().exists()


@pytest.mark.slow
def test_divergence_stops_before_the_weights_move_and_names_step_rate_and_rows(
    workshop, base, capsys
):
    """Weights of 1e38 overflow float32 in the first product."""
    change_weights(base, lambda of: of["lm_head.weight"].mul_(1e38))
    assert workshop.main(**pretrained(base)) == 1
    assert re.search(
        r"step 1: loss .*gradient norm (inf|nan).*learning rate 0.01; .* its rows: .*rows.jsonl:\d",
        capsys.readouterr().err,
    )
    outcome = workshop.outcome()
    assert (outcome["state"], outcome["step"]) == ("failed", 0)
    assert not list((workshop.run_dir() / "checkpoints").iterdir())
    assert not (workshop.run_dir() / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "why"),
    [
        (["q_prj", "v_proj"], "no linear layer is called 'q_prj'.*did you mean q_proj?"),
        (".*nothing", r"adapter.target_modules: '\.\*nothing'"),
    ],
    ids=["a name", "a pattern"],
)
def test_unknown_target_modules_are_errors(workshop, chatml_model, modules, why):
    with pytest.raises(ModelError, match=why):
        workshop.train(
            **pretrained(chatml_model), adapter__kind="lora", adapter__target_modules=modules
        )


def test_a_tokenizer_larger_than_the_embedding_is_an_error(workshop):
    with pytest.raises(ModelError, match="ids up to 260, but the embedding has 200 rows"):
        workshop.train(model__config={**TINY_LLAMA, "vocab_size": 200})


def test_a_model_that_is_not_there_is_an_error(workshop):
    with pytest.raises(ModelError, match="model.path: /no/such/folder: no such folder"):
        workshop.train(**pretrained("/no/such/folder"))


def test_flash_attention_without_a_gpu_is_an_error(workshop):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match="flash_attention_2 needs a CUDA device"):
        workshop.train(model__attention="flash_attention_2")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        workshop.train(train__precision="fp16")


def test_where_a_gpu_must_be_seen_nothing_trains_on_the_cpu(workshop, monkeypatch):
    """In a cluster a driver that is not found would else cost days."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("FINETUNE_NEEDS_GPU", "true")
    with pytest.raises(UserError, match="FINETUNE_NEEDS_GPU: true; it must be 1, or 0"):
        workshop.train()
    monkeypatch.setenv("FINETUNE_NEEDS_GPU", "1")
    with pytest.raises(
        TopologyError, match="FINETUNE_NEEDS_GPU is 1, and PyTorch sees no GPU here"
    ):
        workshop.train()
    assert not (workshop.run_dir() / "config.yaml").exists()
    assert json.loads((workshop.run_dir() / "outcome.json").read_text())["state"] == "failed"
    workshop.check()


def test_packing_a_model_that_cannot_keep_documents_apart_is_an_error(workshop):
    """Mamba's state runs through the whole row."""
    mamba = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    with pytest.raises(UserError, match="can only train padded batches"):
        workshop.train(model__config=mamba, data__packing=True)


def test_a_model_that_leaks_between_documents_fails_before_the_first_step(workshop, monkeypatch):
    """An attention that ignores the bounds, as plain causal attention over a pack would."""
    from transformers import AttentionInterface

    from finetune.models import attention

    def leaking(module, query, key, value, mask, cu_seq_lens_q=None, **keywords):
        whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
        return attention.attend_within_documents(
            module, query, key, value, mask, cu_seq_lens_q=whole, **keywords
        )

    monkeypatch.setitem(AttentionInterface._global_mapping, "documents", leaking)
    with pytest.raises(ModelError, match="lets a document see the one before it"):
        workshop.train(data__packing=True)
    assert not workshop.run_dir().exists()


def test_a_directory_without_a_run_is_not_touched(workshop):
    workshop.run_dir().mkdir(parents=True)
    (workshop.run_dir() / "thesis.txt").write_text("precious")
    with pytest.raises(RunDirectoryError, match="exists and is not a run directory"):
        workshop.train()
    assert [p.name for p in workshop.run_dir().iterdir()] == ["thesis.txt"]


def test_an_output_directory_that_is_a_file_is_an_error(workshop):
    (workshop.folder / "runs").write_text("a file")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        workshop.train()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_without_permission_is_an_error(workshop):
    (workshop.folder / "runs").mkdir()
    os.chmod(workshop.folder / "runs", stat.S_IRUSR)
    with pytest.raises(RunDirectoryError, match="no permission"):
        workshop.train()


@pytest.mark.slow
def test_resume_never_refuses_where_there_are_checkpoints(workshop):
    workshop.train(**FEW)
    with pytest.raises(RunDirectoryError, match="checkpoint.resume is never"):
        workshop.train(**FEW, checkpoint__resume="never")


def test_sft_on_plain_text_is_an_error(workshop):
    write_jsonl(workshop.rows, [{"text": "only text"}])
    with pytest.raises(DataError, match=r"rows.jsonl:1.*use objective.kind: clm"):
        workshop.train()


@pytest.mark.slow
def test_the_eos_is_supervised_when_it_is_also_the_pad_token(workshop, bytes_tokenizer):
    """The tuned model ends its answer, although every pad is the same token as the end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = workshop.folder / "tokenizer"
    bytes_tokenizer.pad_token = bytes_tokenizer.eos_token
    bytes_tokenizer.save_pretrained(folder)
    write_jsonl(
        workshop.rows,
        [{"question": q, "answer": "ok"} for q in ("a", "bb", "c c c", "dd dd dd dd")],
    )
    run = workshop.train(
        model__tokenizer=str(folder),
        model__attention="sdpa",
        train__global_batch_size=4,
        train__micro_batch_size=4,
        train__epochs=40,
        train__max_steps=40,
    )
    model, tokenizer = (
        c.from_pretrained(run / "model") for c in (AutoModelForCausalLM, AutoTokenizer)
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "bb"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert out.tolist() == [*tokenizer("ok")["input_ids"], tokenizer.eos_token_id]


def test_files_of_different_formats_are_an_error(workshop):
    other = write_jsonl(workshop.folder / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(
        DataError, match="rows of different formats .*question_answer.*prompt_completion"
    ):
        workshop.train(data__train=[str(workshop.rows), str(other)])


def test_rows_longer_than_the_model_are_an_error(workshop):
    with pytest.raises(
        UserError,
        match=(
            r"rows.jsonl:\d+ has \d+ tokens, but the model has only 32 positions .* set "
            "data.max_length: 32 and data.truncation to"
        ),
    ):
        workshop.train(model__config={**TINY_LLAMA, "max_position_embeddings": 32})


def test_a_warmup_longer_than_the_run_is_an_error(workshop):
    with pytest.raises(UserError, match="the learning rate would never reach optimizer.lr"):
        workshop.train(schedule__warmup_steps=5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "the launcher sets gradient_accumulation_steps to 4",
        ),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP 1; set fsdp_version: 2"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "the topology file has no deepspeed_config_file"),
        ("ACCELERATE_USE_CPU", "true", "one process and ignores num_processes"),
    ],
)
def test_settings_the_launcher_would_silently_change_are_errors(
    workshop, monkeypatch, name, value, message
):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        workshop.train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", short(["mixtral", "qwen3_moe"], "mixtral"))
def test_a_mixture_of_experts_trains_packed(workshop, kind):
    """Other tokens in one document change the rounding in another through experts: not a leak."""
    experts = {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    }[kind]
    config = {**TINY_LLAMA, **experts, "model_type": kind, "num_experts_per_tok": 2}
    run = workshop.train(model__config=config, data__packing=True, train__epochs=3)
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.slow
def test_chunked_attention_is_not_taken_for_full(workshop):
    """Llama 4's chunks are a mask, so it trains in padded batches with its own attention."""
    config = {
        **TINY_LLAMA, "model_type": "llama4_text", "attention_chunk_size": 16, "head_dim": 8,
        "num_local_experts": 2, "intermediate_size_mlp": 64,
    }  # fmt: skip
    run = workshop.train(model__config=config, **FEW)
    assert json.loads((run / "receipt.json").read_text())["attention"] in ("sdpa", "eager")


def test_metrics_are_json_also_where_a_number_is_infinite(tmp_path):
    from finetune.engine.logs import Log

    Log(tmp_path / "m.jsonl", print).add({"step": 1, "grad_norm": math.inf})
    assert json.loads(
        (tmp_path / "m.jsonl").read_text(), parse_constant=lambda c: pytest.fail(c)
    ) == {"step": 1, "grad_norm": None}


EVALUATED = {"data__eval_fraction": 0.2, "evaluation__every_steps": 1, "checkpoint__keep_last": 1}
OVERFITS = {
    **EVALUATED,
    "optimizer__lr": 1.0,
    "schedule__kind": "constant",
    "train__max_steps": 12,
    "train__epochs": 9,
}


def eval_losses(run):
    return {line["step"]: line["eval_loss"] for line in read_jsonl(run / "eval.jsonl")}


@pytest.fixture(scope="module")
def best_exported(tmp_path_factory):
    """A run with a rate of 1.0: the loss goes up and down, so the last is not the best."""
    workshop = Workshop(tmp_path_factory.mktemp("best"))
    return workshop.train(**OVERFITS, evaluation__export_best=True)


@pytest.fixture
def again(best_exported, workshop):
    """Return its best step, its run directory without outcome, and what starts it again."""
    run = workshop.copy_of(best_exported)

    def start(export_best):
        (run / "outcome.json").unlink(missing_ok=True)
        workshop.train(**OVERFITS, evaluation__export_best=export_best)
        return workshop.outcome()["exported_step"], load_file(run / "model/model.safetensors")

    found = eval_losses(best_exported)
    return min(found, key=found.get), run, start


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_the_best_weights_are_exported_where_that_is_asked_for(again):
    best, run, start = again
    assert best < 12
    names = {f"step-{best:08d}", "step-00000012"}
    assert {p.name for p in (run / "checkpoints").iterdir()} == names
    assert json.loads((run / "outcome.json").read_text())["exported_step"] == best
    exported = load_file(run / "model/model.safetensors")
    step, weights = start(export_best=True)
    assert step == best
    assert same(weights, exported)
    step, weights = start(export_best=False)
    assert step == 12
    assert not same(weights, exported)


@pytest.mark.slow
def test_a_run_recovers_from_a_damaged_best_checkpoint(again):
    best, run, start = again
    [shard] = (run / "checkpoints" / f"step-{best:08d}").rglob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError,
        match=r"the best evaluation, cannot be loaded.*--evaluation.export_best false",
    ):
        start(export_best=True)
    assert start(export_best=False)[0] == 12


@pytest.mark.slow
def test_if_the_best_checkpoint_is_lost_the_next_best_is_exported(again, capsys):
    best, run, start = again
    shutil.rmtree(run / "checkpoints" / f"step-{best:08d}")
    assert start(export_best=True)[0] == 12
    assert (
        f"the evaluation of step {best} was better, but its checkpoint was not kept"
        in capsys.readouterr().out
    )


def test_a_run_stops_early_when_patience_runs_out(workshop):
    run = workshop.train(
        **OVERFITS,
        evaluation__patience=2,
        evaluation__sample_prompts=["hi"],
        evaluation__sample_every_steps=1,
        evaluation__sample_max_new_tokens=2,
        tracking__log_every_steps=100,
    )
    outcome = json.loads((run / "outcome.json").read_text())
    assert "stopped early, of 12 steps" in outcome["reason"]
    assert outcome["exported_step"] == outcome["step"] == len(eval_losses(run))
    sampled = [line["step"] for line in read_jsonl(run / "samples.jsonl")]
    assert sampled == list(range(1, outcome["step"] + 1)), "each once"
    found = list(eval_losses(run).values())
    assert len(found) < 12
    assert min(found[-2:]) >= min(found[:-2])
    assert outcome["state"] == "complete"
    logged = [line["step"] for line in read_jsonl(run / "metrics.jsonl")]
    assert logged == [outcome["step"]], "the last step is on record"


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_samples_do_not_affect_training(workshop, chatml_model, adapter):
    settings = {
        "train__max_steps": 2,
        "data__packing": True,
        "train__global_batch_size": 2,
        "train__micro_batch_size": 2,
        "train__epochs": 9,
    }
    if adapter:
        settings |= pretrained(chatml_model) | {"adapter__kind": "lora", "adapter__dropout": 0.1}
    plain = workshop.train("plain", **settings)
    sampled = workshop.train(
        "sampled",
        **settings,
        evaluation__sample_prompts=["what is 2 times three", "hi"],
        evaluation__sample_every_steps=1,
        evaluation__sample_max_new_tokens=5,
    )
    assert losses(sampled) == losses(plain)
    lines = read_jsonl(sampled / "samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (1, "what is 2 times three"), (1, "hi"), (2, "what is 2 times three"), (2, "hi"),
    ]  # fmt: skip
    config = [
        json.loads((run / "model/generation_config.json").read_text()) for run in (plain, sampled)
    ]
    assert config[0] == config[1]


@pytest.mark.parametrize(
    "own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", None]
)
def test_the_gpus_allocator_grows_its_blocks_unless_the_user_set_it(monkeypatch, own):
    import train

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    train.prepare_libraries()
    set_now = {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")}
    assert set_now == (
        {own: "max_split_size_mb:64"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    )


@pytest.mark.parametrize(
    ("given", "worked", "expected"),
    [
        ({}, [10.0, 10.0], None),
        ({}, [10.0, 10.09], "passive"),
        ({}, [None], None),  # another system than Linux
        ({"OMP_WAIT_POLICY": "active"}, [10.0, 10.09], "active"),
        ({"OMP_NUM_THREADS": "1"}, [10.0, 10.09], None),
    ],
    ids=["alone", "beside another", "unknown", "the user's own", "one thread"],
)
def test_threads_sleep_while_they_wait_beside_busy_processes(monkeypatch, given, worked, expected):
    import train
    from finetune import cores

    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that its value comes back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seconds = iter(worked)
    monkeypatch.setattr(cores, "_worked", lambda: next(seconds))
    train.prepare_libraries()
    assert os.environ.get("OMP_WAIT_POLICY") == expected


def test_a_busy_process_is_seen():
    from finetune import cores

    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.2)
        found = cores.busy(0.3)
        other.kill()
    assert found > 0.5
