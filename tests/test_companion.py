"""A companion answers like its model, without gradient, dropout or trained weights."""

import numpy as np
import pytest
import torch
from conftest import forget_process_state, pretrained

from finetune import config as configs
from finetune.config import objective_fields as fields
from finetune.data.batches import _lay_end_to_end
from finetune.data.views import Document
from finetune.engine import companion
from finetune.engine.topology import Topology
from finetune.errors import ConfigError
from finetune.models import load
from finetune.objectives import chosen

pytestmark = pytest.mark.slow
COMPARED = fields.Grpo(kind="grpo", rewards=[{"kind": "number"}], beta=0.1)


def a_batch():
    """Two documents end to end; the last tokens of each are supervised."""
    documents = []
    for number, length in enumerate((9, 14)):
        ids, positions = np.arange(length) * (number + 3) % 256, np.arange(3, length - 1)
        documents.append(Document(ids, ids[positions + 1], positions, number, {}))
    return _lay_end_to_end(documents, 0)


def loaded(workshop, name="companion", precision="fp32", **settings):
    config, _ = configs.parse(["--config", str(workshop.write(workshop.config(name, **settings)))])
    forget_process_state()
    topology = Topology(precision)
    about = load.load_config(config.model)
    tokenizer = load.load_tokenizer(config.model)
    about = load.complete(about, config.model, tokenizer)
    return companion.load(
        config, topology, model_config=about, tokenizer=tokenizer, attention="documents"
    )


def plain(model, batch):
    """Log-probabilities of the labels by the model's own forward, a document at a time."""
    found, begin = [], 0
    for length in batch.lengths:
        ids = batch.inputs["input_ids"][:, begin : begin + length]
        logits = model(input_ids=ids).logits[0].float().log_softmax(-1)
        own = batch.positions[(batch.positions >= begin) & (batch.positions < begin + length)]
        found += [logits[each - begin, ids[0, each + 1 - begin]] for each in own.tolist()]
        begin += length
    return torch.stack(found).detach()


def test_a_companion_answers_like_its_model(workshop):
    from transformers import AutoModelForCausalLM

    model = workshop.train("teacher", model__init="random") / "model"
    batch = a_batch()
    found = loaded(workshop, **pretrained(model), train__neftune_alpha=5.0)
    answers = found(batch, {"logprobs", "distribution"})
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.testing.assert_close(answers.logprobs, plain(own, batch), rtol=1e-5, atol=1e-5)
    assert not answers.logprobs.requires_grad
    assert not any(p.requires_grad for p in found.policy.model.parameters())
    assert found.why_all_logits is None
    kept = answers.distribution
    logits = kept.logits(kept.states).log_softmax(-1)
    of_labels = logits.gather(1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(of_labels, answers.logprobs)


def test_its_fingerprint_is_that_of_its_weights(workshop):
    one, same, other = (loaded(workshop, run__seed=seed) for seed in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256


def test_what_a_frozen_copy_starts_from_follows_from_the_adapters(workshop):
    """Fresh adapters add 0, so those of any draw are alike; beside norms none is switched off."""

    def start(adapter, objective=COMPARED):
        config = configs.Config.model_validate(workshop.config() | {"adapter": adapter})
        config = config.model_copy(update={"objective": objective})
        return config, companion.start_of(config, chosen(config))

    whole, found = start({})
    assert found == whole
    assert start({}, fields.Sft())[1] is None
    for adapter in ({"kind": "lora"}, {"kind": "qlora"}, {"kind": "lora", "init": "eva"}):
        assert start(adapter)[1] is None, "the model itself, adapters off"
    for adapter in ({"kind": "qlora", "train_norms": True}, {"kind": "lora", "bias": "all"}):
        config, found = start(adapter)
        assert found == config
    found = start({"kind": "lora", "init": "eva", "train_norms": True})[1]
    assert found.adapter.init == "default"
    message = "adapter.init: pissa starts from other weights.*; use adapter.init: default, "
    with pytest.raises(ConfigError, match=message):
        start({"kind": "lora", "init": "pissa"})
