"""The loss of references under a model is the loss that its training evaluates."""

import math
import re

import pytest
from conftest import read_jsonl, tiny_llama, write_jsonl
from test_scores import completion
from transformers import AutoModelForCausalLM

from finetune.data.built_in_templates import BUILT_IN
from finetune.evaluation import held_out, scores
from finetune.evaluation.scores.reference_loss import requests_of
from finetune.export.load import load, load_tokenizer
from finetune.generation.completions import Score


@pytest.mark.slow
@pytest.mark.parametrize("template", ["chatml", pytest.param("plain", marks=pytest.mark.proof)])
def test_it_is_the_loss_of_the_evaluation_while_training(workshop, template):
    rows = write_jsonl(
        workshop.folder / "dev.jsonl",
        [
            {"question": f"what {'is ' * n}{n}", "answer": "so " * (n % 5) + str(n)}
            for n in range(9)
        ],
    )
    run = workshop.train(
        data__eval=str(rows), evaluation__every_steps=5, data__template=template
    )  # the last evaluation is of the weights that are exported
    wanted = read_jsonl(run / "eval.jsonl")[-1]
    prompts = held_out.read(str(rows))
    model, tokenizer = load(run / "model"), load_tokenizer(run / "model")
    [scorer] = scores.choose(["reference-loss"])
    scorer.read("tuned", model, tokenizer, prompts)
    found = scorer.by_model["tuned"]
    counts = [len(each.continuation) for each in requests_of(tokenizer, prompts)]
    loss = sum(each.value * count for each, count in zip(found, counts)) / sum(counts)
    assert loss == pytest.approx(wanted["cross_entropy"], rel=1e-4)
    perplexity = f"{math.exp(loss):,.2f}"
    assert scorer.details([]) == [
        f"perplexity under tuned: {perplexity}, over {sum(counts):,} tokens"
    ]
    without = [completion("", None).prompt, *prompts]
    scorer.read("tuned", model, tokenizer, without)
    again = scorer.by_model["tuned"]
    assert again[0] == Score(None, "the row has no reference")
    assert [each.value for each in again[1:]] == pytest.approx([each.value for each in found])


def test_saved_answers_have_no_loss():
    [scorer] = scores.choose(["reference-loss"])
    [found] = scorer([completion("a", "b")])
    assert found.value is None
    assert "only a model that is loaded" in found.reason


def test_what_a_model_cannot_read_is_a_gap(bytes_tokenizer):
    model = AutoModelForCausalLM.from_config(tiny_llama(max_position_embeddings=64)).eval()
    [scorer] = scores.choose(["reference-loss"])
    prompts = [completion("", "a" * length).prompt for length in (10, 200)]
    bytes_tokenizer.chat_template = BUILT_IN["plain"]
    scorer.read("tuned", model, bytes_tokenizer, prompts)
    short, long = scorer.by_model["tuned"]
    assert short.value > 0
    assert re.fullmatch(r"has 20\d tokens, and the model positions for 65", long.reason)
    assert long.value is None
    model.lm_head.weight.data.fill_(math.nan)
    scorer.read("tuned", model, bytes_tokenizer, prompts)
    assert scorer.by_model["tuned"][0] == Score(
        None, "the model's log-probabilities are not finite"
    )
    assert scorer.details([]) == []
