"""A two-layer model learns each of the sets made by rule, by its recipe, and beats its base."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import ROOT, Workshop, forget_process_state, read_jsonl, short
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune import config as configs
from finetune import loop
from finetune.__main__ import main
from finetune.evaluation.scores import word_accuracy
from finetune.preparation import yoda
from finetune.survival.preemption import StopFlag

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
# The base of LoRA keeps its embeddings, so they should differ from the start: 0.2, not 0.02.
LLAMA = {"model_type": "llama", "initializer_range": 0.2}
PHI = {**LLAMA, "model_type": "phi3", "pad_token_id": None, "bos_token_id": None,
       "eos_token_id": None}  # fmt: skip
NEOX = {"model_type": "gpt_neox"}
FORM = "form"


@dataclass(frozen=True)
class Case:
    """A set, its recipe, and sizes: of the set, of the training of base and tuned model."""

    name: str
    recipe: str
    model: dict[str, Any]
    rows: int
    base_steps: int
    steps: int
    least: float
    """Word accuracy on held-out rows that the tuned model reaches."""
    learns: str = "all"
    """FORM: two layers learn how an answer begins and ends, and hardly what it is about."""
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.steps}"


COMPANY = Case("company", "pythia_410m_company", NEOX, 200, 10, 120, 0.6)
YODA = Case("yoda", "phi35_mini_lora_yoda", PHI, 1000, 100, 100, 0.15)
CASES = [
    COMPANY,
    YODA,
    Case("yoda", "phi35_mini_lora_yoda", PHI, 2000, 300, 600, 0.45),
    Case("pig_latin", "phi35_mini_lora_pig_latin", PHI, 2000, 200, 300, 0.35),
    Case("moderation", "qwen25_05b_lora_moderation", LLAMA, 2000, 200, 250, 0.75),
    Case("retrieval", "qwen25_15b_lora_retrieval", LLAMA, 4000, 200, 300, 0.4, FORM),
    Case("patient_doctor", "llama2_7b_chat_qlora_medical", LLAMA, 3000, 200, 200, 0.34, "all",
         {"train.global_batch_size": 32, "train.micro_batch_size": 32, "train.precision": "fp32",
          "optimizer.lr": 5e-3}),
]  # fmt: skip


def tokenizer_of(texts: list[str]) -> Any:
    """Return a tokenizer for which most words of the texts are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = ["<|bos|>", "<|eos|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, min_frequency=1, show_progress=False, special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tokens[0], eos_token=tokens[1], pad_token=tokens[2],
        clean_up_tokenization_spaces=False, chat_template=CHAT,
    )  # fmt: skip


def make_rows(case: Case, folder: Path) -> Path:
    """Make the set; of Pig Latin from sentences of a few words, as of a user's own."""
    sizes = ["--train", str(case.rows), "--held-out", str(min(100, case.rows // 10))]
    if case.name == "pig_latin":
        source = random.Random(0)
        found = [yoda.compose(source)[1]["question"] for _ in range(case.rows)]
        (folder / "mine.txt").write_text("\n".join(dict.fromkeys(found)))
        sizes = ["--sentences", str(folder / "mine.txt")]
    assert main(["data", case.name, "--output", str(folder / "rows"), *sizes]) == 0
    return folder / "rows"


def make_base(case: Case, workshop: Workshop, rows: list[dict[str, str]]) -> Path:
    """Train a model from random weights that knows the words, and begins to repeat sentences."""
    texts = [text.replace("\n", " ") for row in rows for text in row.values()]
    lines = [f"user: {text} assistant: {text}" for text in texts]
    (workshop.folder / "tokenizer").mkdir()
    tokenizer_of(lines).save_pretrained(workshop.folder / "tokenizer")
    (workshop.folder / "text.txt").write_text("\n".join(lines))
    return workshop.train(
        "base", model__config={**SIZE, **case.model},
        model__tokenizer=str(workshop.folder / "tokenizer"), objective__kind="clm",
        data__train=str(workshop.folder / "text.txt"), train__max_steps=case.base_steps,
        train__global_batch_size=16, train__micro_batch_size=16, schedule__warmup_steps=5,
    ) / "model"  # fmt: skip


def tune(case: Case, workshop: Workshop, base: Path, rows: Path) -> Path:
    """Train by the recipe; a small model takes higher rates, and all of a batch at once."""
    path = ROOT / f"configs/{case.recipe}.yaml"
    recipe = configs.from_dict(configs.read_yaml(path))
    settings = {
        "run.dir": workshop.folder / "runs", "data.cache_dir": workshop.folder / "cache",
        "model.path": base, "data.train": rows / "train.jsonl", "train.max_steps": case.steps,
        "train.epochs": 100, "optimizer.lr": 2e-2 if case.model is PHI else 1e-2,
        "train.micro_batch_size": recipe.train.global_batch_size, **case.settings,
    }  # fmt: skip
    if recipe.data.eval:
        settings |= {"data.eval": rows / "dev.jsonl", "evaluation.every_steps": case.steps}
    config, check_only = configs.parse(
        ["--config", str(path), *(f"--{key}={value}" for key, value in settings.items())]
    )
    forget_process_state()
    loop.run(config, check_only, StopFlag())
    forget_process_state()
    return workshop.run_dir(config.run.name)


@pytest.mark.slow
@pytest.mark.parametrize("case", short(CASES, COMPANY), ids=str)
def test_the_tuned_model_beats_its_base_on_rows_it_has_never_seen(case, workshop):
    rows = make_rows(case, workshop.folder)
    base = make_base(case, workshop, read_jsonl(rows / "train.jsonl"))
    tuned = tune(case, workshop, base, rows)
    answers = workshop.folder / "answers.jsonl"
    main(
        ["evaluate", "--base", str(base), "--tuned", str(tuned), "--max-new-tokens", "48",
         "--data", str(rows / "test.jsonl"), "--output", str(answers), "--scores", "word-accuracy"]
    )  # fmt: skip
    lines = read_jsonl(answers)
    wanted = [line["wanted"] for line in lines]
    # The right answers of other rows: what a model reaches that knows the form alone.
    form = fmean(word_accuracy(other, own) for other, own in zip(wanted[1:], wanted))
    scores = {name: fmean(line[f"word_accuracy_{name}"] for line in lines)
              for name in ("base", "tuned")}  # fmt: skip
    print(f"word accuracy: {scores}, of another row's answer {form}")
    assert scores["base"] < 0.1
    assert scores["tuned"] > case.least
    assert case.learns == FORM or case.least > form + 0.03
