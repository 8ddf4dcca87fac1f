"""Reward models: what they learn, and that plain transformers opens them with the same scores."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, pretrained, write_jsonl
from invariants import families

from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.generation.reward_model import RewardModel

pytestmark = pytest.mark.slow


def settings(workshop, rows=None, **more):
    """The settings of a run on pairs."""
    path = write_jsonl(workshop.folder / "pairs.jsonl", rows or families.preferences())
    return {
        "data__train": str(path), "objective__kind": "reward", "optimizer__lr": 1e-3,
        "model__config": TINY_LLAMA, **more,
    }  # fmt: skip


def conversation(*texts):
    turns = zip(["user", "assistant"] * len(texts), texts)
    return Conversation(tuple(Message(*turn) for turn in turns), Place("asked", 1))


ASKED = [conversation("1", "+bcdef"), conversation("1", "jkla"), conversation("22", "+a")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that was trained on answers."""
    from conftest import Workshop

    return str(Workshop(tmp_path_factory.mktemp("base")).train("base") / "model")


# ---------------------------------------------------------------------------------- the export


def test_plain_transformers_opens_the_export_with_the_same_scores(workshop):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    own = settings(workshop, data__packing=True, data__template="chatml")
    run = workshop.train(**own, optimizer__head_lr=1e-2)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert (model.config.num_labels, model.config.id2label) == (1, {0: "score"})
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [
        tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in each.messages], tokenize=False
        )
        for each in ASKED
    ]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits[:, 0].tolist()
    assert RewardModel(run)(ASKED) == pytest.approx(wanted, abs=1e-6)
    assert len({round(each, 4) for each in wanted}) == 3


@pytest.mark.parametrize("kind", ["lora", pytest.param("qlora", marks=pytest.mark.proof)])
def test_peft_opens_an_adapter_with_its_head(workshop, base, kind):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    own = settings(workshop) | pretrained(base) | {"optimizer__lr": 1e-2}
    run = workshop.train(**own, adapter__kind=kind)
    saved = json.loads((run / "model/adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
    assert "score" in saved["modules_to_save"]
    scores = RewardModel(run)
    if kind == "lora":
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        plain.config.pad_token_id = scores.tokenizer.pad_token_id
        model = PeftModel.from_pretrained(plain, run / "model").eval()
        documents = scores.documents(ASKED)
        with torch.no_grad():
            wanted = [
                model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits.item()
                for ids in documents
            ]
        assert scores(ASKED) == pytest.approx(wanted, abs=1e-6)
    assert len(set(scores(ASKED))) == 3
