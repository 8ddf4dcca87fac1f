"""Every recipe of configs/ runs unchanged, with a two-layer model of the same architecture."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY_LLAMA, Workshop, forget_process_state, losses, tracked, write_jsonl

from finetune import config as configs

RECIPES = [
    ROOT / name for name in tracked() if re.fullmatch(r"configs/(?!quickstart)\w+\.yaml", name)
]
SOME = ("llama2_7b_chat_qlora_medical", "qwen25_7b_long_context")  # each runs by make proofs
SIZES = {k: v for k, v in TINY_LLAMA.items() if k != "model_type"}
# What stands in for a published model: the smallest of its kind. Llama-3.1 and Phi-3.5 bring a chat
# template.
KINDS = {
    "meta-llama": {"model_type": "llama"},
    "TinyLlama": {"model_type": "llama"},
    "EleutherAI": {"model_type": "gpt_neox"},
    "facebook": {
        "model_type": "opt",
        "ffn_dim": 64,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "microsoft": {"model_type": "phi3"},
    "Qwen": {"model_type": "qwen2"},
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(kind: str, bytes_tokenizer, has_chat: bool):
    if kind == "qwen2":  # transformers opens the tokenizer beside this kind with a class of its own
        from transformers import Qwen2Tokenizer

        tokenizer = Qwen2Tokenizer(
            vocab=json.loads(bytes_tokenizer.backend_tokenizer.to_str())["model"]["vocab"],
            merges=[],
        )
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    else:
        tokenizer = bytes_tokenizer
    tokenizer.chat_template = CHATML if has_chat else None
    return tokenizer


def stand_in(workshop: Workshop, path: str, bytes_tokenizer) -> str:
    kind = KINDS[path.split("/")[0]]
    tokenizer = tokenizer_of(kind["model_type"], bytes_tokenizer, has_chat="nstruct" in path)
    tokenizer.save_pretrained(workshop.folder / "tokenizer")
    settings = {
        "model__config": {**SIZES, **kind},
        "model__tokenizer": str(workshop.folder / "tokenizer"),
    }
    return str(
        workshop.train("stand_in", **settings, data__template="question_answer", train__max_steps=1)
        / "model"
    )


def rows_for(recipe: dict, folder: Path) -> str:
    data = recipe["data"]
    if data["train"].endswith(".txt"):
        path = folder / "field.txt"
        path.write_text("\n\n".join(f"paragraph {n} says {'words ' * (n % 9)}" for n in range(400)))
        return str(path)
    names = {name: data.get("columns", {}).get(name, name) for name in ("question", "answer")}
    turns = [(f"what is {n} times three", f"{3 * n}, {'so it is ' * (n % 7)}") for n in range(80)]
    if "conversations" in data["train"]:
        return str(
            write_jsonl(
                folder / "r.jsonl",
                [
                    {
                        "messages": [
                            {"role": "user", "content": q},
                            {"role": "assistant", "content": a},
                        ]
                    }
                    for q, a in turns
                ],
            )
        )
    if "instructions" in data["train"]:
        return str(
            write_jsonl(folder / "r.jsonl", [{"instruction": q, "output": a} for q, a in turns])
        )
    return str(
        write_jsonl(
            folder / "r.jsonl", [{names["question"]: q, names["answer"]: a} for q, a in turns]
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in SOME else pytest.mark.proof) for p in RECIPES],
    ids=lambda p: p.stem,
)
def test_a_recipe_runs_as_it_is(workshop, bytes_tokenizer, path):
    from finetune import loop
    from finetune.survival.preemption import StopFlag

    recipe = yaml.safe_load(path.read_text())
    model = stand_in(workshop, recipe["model"]["path"], bytes_tokenizer)
    arguments = {
        "run.dir": workshop.folder / "runs", "model.path": model,
        "data.train": rows_for(recipe, workshop.folder),
        "data.cache_dir": workshop.folder / "cache", "data.max_length": 250,
        "schedule.warmup_steps": 1, "train.max_steps": 3,
        "checkpoint.every_steps": 2,
    }  # fmt: skip
    if "eval" in recipe["data"]:
        arguments["data.eval"] = write_jsonl(
            workshop.folder / "eval.jsonl", [{"question": "new?", "answer": "yes"}]
        )
    if recipe["train"].get("precision") == "fp16":
        arguments["train.precision"] = "fp32"  # fp16 needs a GPU
    if recipe["schedule"]["kind"] == "constant":
        del arguments["schedule.warmup_steps"]
    if recipe["data"].get("packing"):
        arguments |= {"train.global_batch_size": recipe["train"]["micro_batch_size"] * 2}
    forget_process_state()
    config, check = configs.parse(
        ["--config", str(path), *(f"--{key}={value}" for key, value in arguments.items())]
    )
    loop.run(config, check, StopFlag())
    run = workshop.run_dir(config.run.name)
    assert len(losses(run)) == 3
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"


def test_the_medical_recipe_is_the_one_that_was_asked_for():
    config = configs.from_dict(
        configs.read_yaml(ROOT / "configs/llama2_7b_chat_qlora_medical.yaml")
    )
    train, data, adapter = config.train, config.data, config.adapter
    assert (train.epochs, train.global_batch_size, train.max_grad_norm) == (1, 4, 0.3)
    assert (config.optimizer.kind, config.optimizer.lr, config.optimizer.weight_decay) == (
        "paged_adamw_32bit",
        4e-5,
        0.001,
    )
    assert config.schedule.kind == "constant"
    assert (data.max_rows, config.run.seed, data.group_by_length, data.packing, data.template) == (
        3000,
        1234,
        True,
        False,
        "llama2",
    )
    assert (adapter.kind, adapter.quantization, adapter.compute_dtype) == (
        "qlora",
        "nf4",
        "float16",
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_its_command_and_its_hardware(path):
    head = "".join(
        line for line in path.read_text().splitlines(keepends=True) if line.startswith("#")
    )
    assert f"python train.py --config configs/{path.name}" in head
    assert " GB (estimated)" in head
    assert configs.from_dict(configs.read_yaml(path)).run.name == path.stem
