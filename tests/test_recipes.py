"""Every recipe of configs/ runs unchanged, with a two-layer model of the same architecture."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import (
    ROOT,
    TINY_LLAMA,
    Workshop,
    forget_process_state,
    losses,
    read_jsonl,
    tracked,
    write_jsonl,
)
from invariants import families, sampled

from finetune import config as configs

RECIPES = [
    ROOT / name for name in tracked() if re.fullmatch(r"configs/(?!quickstart)\w+\.yaml", name)
]
STAGES = [path for path in RECIPES if path.stem.startswith("stages_")]
SOME = ("llama2_7b_chat_qlora_medical", "qwen25_7b_long_context")  # each runs by make proofs
SIZES = {k: v for k, v in TINY_LLAMA.items() if k != "model_type"}
# What stands in for a published model: the smallest of its kind. Llama-3.1 and Phi-3.5 bring a chat
# template.
KINDS = {
    "meta-llama": {"model_type": "llama"},
    "TinyLlama": {"model_type": "llama"},
    "EleutherAI": {"model_type": "gpt_neox"},
    "facebook": {
        "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "microsoft": {"model_type": "phi3"},
    "Qwen": {"model_type": "qwen2"},
}  # fmt: skip
# The same of models that are not causal: by their names.
OTHER_FAMILIES = {
    "ModernBERT": {
        **families.BERT, "model_type": "modernbert", "max_position_embeddings": 512,
        "cls_token_id": 1, "sep_token_id": 1,
    },
    # Positions count from the pad token's number, which is 258 here.
    "roberta": {**families.BERT, "model_type": "roberta", "max_position_embeddings": 600},
    "bert-": {**families.BERT, "max_position_embeddings": 512},
    "t5": families.T5,
    "bart": {**families.BART, "max_position_embeddings": 512},
}  # fmt: skip
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
    for name, values in OTHER_FAMILIES.items():
        if name in path:
            objective = "seq2seq" if values in (families.T5, OTHER_FAMILIES["bart"]) else "mlm"
            own = families.settings(workshop, objective) | {"model__config": values}
            return str(workshop.train("stand_in", **own, train__max_steps=1) / "model")
    kind = KINDS[path.split("/")[0]]
    tokenizer = tokenizer_of(kind["model_type"], bytes_tokenizer, has_chat="nstruct" in path)
    tokenizer.save_pretrained(workshop.folder / "tokenizer")
    settings = {
        "model__config": {**SIZES, **kind},
        "model__tokenizer": str(workshop.folder / "tokenizer"),
    }
    made = {"data__template": "question_answer", "train__max_steps": 1}
    return str(workshop.train("stand_in", **settings, **made) / "model")


def rows_for(recipe: dict, folder: Path) -> str:
    data, objective = recipe["data"], recipe.get("objective", {}).get("kind")
    if objective == "seq2seq":
        asked = [{"prompt": r["question"], "completion": r["answer"]} for r in families.orders(80)]
        return str(write_jsonl(folder / "r.jsonl", asked))
    if objective in families.ROWS:
        return str(write_jsonl(folder / "r.jsonl", families.ROWS[objective](300)))
    if "puzzles" in data["train"]:
        pytest.importorskip("reasoning_gym")
        from reasoning_gym import create_dataset

        entries = create_dataset("chain_sum", size=40, seed=0)
        puzzles = [{**entry, "task": "chain_sum", "entry": entry} for entry in entries]
        return str(write_jsonl(folder / "r.jsonl", puzzles))
    if data["train"].endswith(".txt"):
        path = folder / "field.txt"
        path.write_text("\n\n".join(f"paragraph {n} says {'words ' * (n % 9)}" for n in range(400)))
        return str(path)
    asked = [(f"what is {n} times three", f"{3 * n}, {'so it is ' * (n % 7)}") for n in range(80)]
    question, answer = (data.get("columns", {}).get(name, name) for name in ("question", "answer"))
    if "instructions" in data["train"]:
        question, answer = "instruction", "output"
    values: list[dict] = [{question: q, answer: a} for q, a in asked]
    if "conversations" in data["train"]:
        values = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in asked
        ]
    return str(write_jsonl(folder / "r.jsonl", values))


def short_rollouts(recipe: dict) -> dict:
    """What makes rollouts of a random model short, and their rewards differ."""
    objective = recipe["objective"]
    rollouts = {
        **objective["rollouts"], "group_size": 2, "max_new_tokens": 8, "cut_answers": "learn",
    }  # fmt: skip
    rewards = [*objective["rewards"], sampled.WORDS]
    return {
        "objective.rollouts": json.dumps(rollouts), "objective.rewards": json.dumps(rewards),
        "train.global_batch_size": 8, "train.micro_batch_size": 2,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=() if p.stem in SOME else pytest.mark.proof)
        for p in RECIPES
        if p not in STAGES
    ],
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
        "checkpoint.every_steps": 2, "tracking.log_every_steps": 1,
    }  # fmt: skip
    if "teacher" in recipe.get("objective", {}):
        arguments["objective.teacher"] = model
    if "eval" in recipe["data"]:
        new = {"question": "new?", "answer": "yes", "task": "chain_sum", "entry": {"answer": "1"}}
        arguments["data.eval"] = write_jsonl(workshop.folder / "eval.jsonl", [new])
    if recipe["train"].get("precision") == "fp16":
        arguments["train.precision"] = "fp32"  # fp16 needs a GPU
    if recipe["schedule"]["kind"] == "constant":
        del arguments["schedule.warmup_steps"]
    if recipe["data"].get("packing"):
        arguments |= {"train.global_batch_size": recipe["train"]["micro_batch_size"] * 2}
    if "rollouts" in recipe.get("objective", {}):
        arguments |= short_rollouts(recipe)
    forget_process_state()
    config, check = configs.parse(
        ["--config", str(path), *(f"--{key}={value}" for key, value in arguments.items())]
    )
    loop.run(config, check, StopFlag())
    run = workshop.run_dir(config.run.name)
    assert len(losses(run)) == 3
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"


@pytest.mark.proof
def test_three_stages_follow_each_other(workshop, bytes_tokenizer):
    """Answers, a model that scores them, and a policy that it rewards: the files as they are."""
    from finetune import loop
    from finetune.survival.preemption import StopFlag

    made = {
        "stages_1_sft": families.orders(), "stages_2_reward": families.preferences(),
        "stages_3_ppo": [{"prompt": each["prompt"]} for each in families.preferences()],
    }  # fmt: skip
    base, runs = stand_in(workshop, "Qwen/Qwen2.5-0.5B", bytes_tokenizer), workshop.folder / "runs"
    for path in sorted(STAGES):
        recipe = yaml.safe_load(path.read_text().replace("runs/stages_", f"{runs}/stages_"))
        if recipe["model"]["path"].startswith("Qwen"):
            recipe["model"]["path"] = base
        recipe["run"]["dir"] = str(runs)
        recipe["data"] |= {
            "train": str(write_jsonl(workshop.folder / f"{path.stem}.jsonl", made[path.stem])),
            "cache_dir": str(workshop.folder / "cache"),
        }
        recipe["train"] |= {"max_steps": 4, "global_batch_size": 8, "micro_batch_size": 4}
        if "rollouts" in recipe.get("objective", {}):
            recipe["objective"]["rollouts"] |= {"max_new_tokens": 8}
        (workshop.folder / "stage.yaml").write_text(yaml.safe_dump(recipe))
        forget_process_state()
        config, check = configs.parse(["--config", str(workshop.folder / "stage.yaml")])
        loop.run(config, check, StopFlag())
        outcome = json.loads((runs / path.stem / "outcome.json").read_text())
        assert outcome["state"] == "complete"
    first = read_jsonl(runs / "stages_3_ppo/metrics.jsonl")[0]
    assert first["kl"] == 0
    assert first["ratio"] == 1
    assert first["reward_std"] > 0


def test_the_medical_recipe_is_the_one_that_was_asked_for():
    path = ROOT / "configs/llama2_7b_chat_qlora_medical.yaml"
    settings = configs.flatten(configs.from_dict(configs.read_yaml(path)).model_dump())
    expected = {
        "train.epochs": 1, "train.global_batch_size": 4, "train.max_grad_norm": 0.3,
        "optimizer.kind": "paged_adamw_32bit", "optimizer.lr": 4e-5,
        "optimizer.weight_decay": 0.001, "schedule.kind": "constant", "data.max_rows": 3000,
        "run.seed": 1234, "data.group_by_length": True, "data.packing": False,
        "data.template": "llama2", "adapter.kind": "qlora", "adapter.quantization": "nf4",
        "adapter.compute_dtype": "float16", "checkpoint.every_steps": 50,
        "tracking.log_every_steps": 10, "tracking.trackers": ["tensorboard"],
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_its_command_and_its_hardware(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"python train.py --config configs/{path.name}" in "\n".join(head)
    assert " GB (estimated)" in "\n".join(head)
    assert configs.from_dict(configs.read_yaml(path)).run.name == path.stem
