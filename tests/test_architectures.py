"""What a head answers in chunks is what all logits give, in every architecture of transformers."""

import sys

import pytest
from conftest import ROOT

from finetune.models import cross_entropy, head, logits

sys.path.append(str(ROOT / "benchmarks"))
import architectures

pytestmark = [
    pytest.mark.proof,
    # About defaults of configs, while a model is built.
    pytest.mark.filterwarnings("ignore"),
]
HOLD_ALL_LOGITS = {"blt", "inkling2_text", "prophetnet"}
# A package is missing, or the config's defaults make no model.
NOT_BUILT = {
    "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody",
    "qwen4_exp",
}  # fmt: skip


def built(name):
    try:
        return architectures.build(name)[1]
    except Exception as exc:
        if name not in NOT_BUILT:
            raise
        pytest.skip(architectures.reason(exc))


@pytest.mark.parametrize("name", architectures.NAMES)
def test_losses_and_log_probabilities_in_chunks_are_those_of_all_logits(name):
    model = built(name)
    if head.install(model) is None:
        architectures.differences(model)
    else:
        assert name in HOLD_ALL_LOGITS


def one_chunk(num_rows, *_):
    return [slice(0, num_rows)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((head, "probe", lambda _: (head.LogitTransform(1.0, 15.1), None)), "logits differ"),
        ((logits.LogitTransform, "backward_", lambda *_: None), "gradient of the hidden states"),
        ((cross_entropy, "chunks", one_chunk), r"held logits of .*8"),
    ],
    ids=["another cap", "a gradient without the cap", "all logits at once"],
)
def test_a_wrong_answer_of_the_head_would_be_seen(monkeypatch, wrong, message):
    model = built("nanochat")
    monkeypatch.setattr(*wrong)
    assert head.install(model) is None
    with pytest.raises(ValueError, match=message):
        architectures.differences(model)
