"""A vLLM server that samples for training, by a server that speaks its protocol."""

import time

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from vllm_server import running

from finetune.endpoint import Client, Server
from finetune.errors import Outage, UserError
from finetune.generation.vllm_server import VllmServer, _sampled

pytestmark = pytest.mark.slow
ENDS = {2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models and an adapter of the first."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=50))
        model.save_pretrained(folder / name)
        if name == "first":
            settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            get_peft_model(model, settings).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def vllm(folders, monkeypatch):
    monkeypatch.setattr("finetune.endpoint.FIRST_WAIT", 0.01)
    with running(folders / "first") as found:
        yield found


def asked(server, **changes):
    settings = {"count": 3, "max_new_tokens": 6, "temperature": 0.7, "seed": 5, "ends": ENDS}
    return server.sample([1, 7, 9], **settings | changes)


def logprobs(folder, ids, start, temperature, adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
    with torch.no_grad():
        chances = (model(torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)
    return np.array([chances[n - 1, ids[n]] for n in range(start, len(ids))])


def test_tokens_come_with_their_log_probabilities_at_the_temperature(vllm, folders):
    with Client(Server(vllm.url, "policy")) as client:
        found = asked(VllmServer(client))
        assert [each.ids for each in found] == [each.ids for each in asked(VllmServer(client))]
    assert len({each.ids for each in found}) == 3
    for each in found:
        wanted = logprobs(folders / "first", [1, 7, 9, *each.ids], 3, 0.7)
        np.testing.assert_allclose(each.logprobs, wanted, atol=1e-5)
        assert each.finish_reason == ("stop" if each.ids[-1] in ENDS else "length")


def test_an_adapter_takes_the_place_of_the_one_before(vllm, folders):
    with Client(Server(vllm.url, "policy")) as client:
        server = VllmServer(client)
        for name in ("step-1", "step-2"):
            server.load_adapter(name, folders / "adapter")
            assert list(vllm.adapters) == [name]
        [found] = asked(server, count=1)
        wanted = logprobs(folders / "first", [1, 7, 9, *found.ids], 3, 0.7, folders / "adapter")
        np.testing.assert_allclose(found.logprobs, wanted, atol=1e-5)
        vllm.restart()
        server.load_adapter("step-3", folders / "adapter")  # it forgot step-2
        with pytest.raises(UserError, match="No adapter found .*--enable-lora"):
            server.load_adapter("step-4", folders / "none")


def test_an_adapter_of_too_high_a_rank_is_an_error_of_the_command_line(vllm, folders):
    """vLLM answers 500, as if it could be another time."""
    vllm.max_rank = 1
    with (
        Client(Server(vllm.url, "policy", retries=1)) as client,
        pytest.raises(UserError, match="rank 2 is greater .*--max-lora-rank of at least"),
    ):
        VllmServer(client).load_adapter("step-1", folders / "adapter")


def test_all_weights_are_read_again_also_after_sleep(vllm, folders):
    with Client(Server(vllm.url, "policy")) as client:
        server = VllmServer(client)
        server.sleep(keeps_weights=False)
        assert vllm.asleep
        server.wake_up("weights")
        server.load_weights(folders / "second")
        server.wake_up("kv_cache")
        [found] = asked(server, count=1)
        wanted = logprobs(folders / "second", [1, 7, 9, *found.ids], 3, 0.7)
        np.testing.assert_allclose(found.logprobs, wanted, atol=1e-5)
    assert vllm.calls == [
        "/sleep?level=2", "/wake_up?tags=weights", "/collective_rpc", "/reset_prefix_cache",
        "/wake_up?tags=kv_cache",
    ]  # fmt: skip


def test_a_slow_or_failing_server_is_asked_again_and_a_silent_one_is_an_outage(vllm):
    with Client(Server(vllm.url, "policy", retries=2, timeout=0.5)) as client:
        server = VllmServer(client)
        vllm.faults = ["503", "slow 1", ""]
        assert len(asked(server)) == 3
        vllm.faults = ["500"] * 3
        with pytest.raises(Outage, match="500"):
            asked(server)


def test_an_adapter_that_loads_slowly_is_loaded_once(vllm, folders, monkeypatch):
    inner = vllm._load_lora_adapter

    def slow(*given):
        found = inner(*given)
        time.sleep(0.6 * (found[0] == 200))
        return found

    monkeypatch.setattr(vllm, "_load_lora_adapter", slow)
    with Client(Server(vllm.url, "policy", timeout=0.4)) as client:
        VllmServer(client).load_adapter("step-1", folders / "adapter")
    assert list(vllm.adapters) == ["step-1"]
    assert vllm.calls == ["/v1/load_lora_adapter"] * 2


def test_a_token_without_a_log_probability_is_an_error():
    given = {"token_ids": [5, 7], "logprobs": {"token_logprobs": [-0.5, None]}}
    with pytest.raises(ValueError, match="finite log-probabilities"):
        _sampled({**given, "finish_reason": "stop"})


@pytest.mark.parametrize("without", ["token_ids", "logprobs"])
def test_a_server_without_tokens_or_log_probabilities_is_an_error(vllm, without):
    vllm.without = without
    with Client(Server(vllm.url, "policy")) as client, pytest.raises(UserError, match="0.10.2"):
        asked(VllmServer(client))


def test_an_answer_that_ends_with_another_token_is_an_error(vllm, monkeypatch):
    inner = vllm._choice
    monkeypatch.setattr(vllm, "_choice", lambda *given: inner(*given) | {"finish_reason": "stop"})
    with (
        Client(Server(vllm.url, "policy")) as client,
        pytest.raises(UserError, match="ends answers with 2"),
    ):
        asked(VllmServer(client), max_new_tokens=1)


def test_a_completion_that_another_program_ended_is_an_outage(vllm, monkeypatch):
    """Such as `abort`, when another program lets the server sleep: the policy had not finished."""
    inner = vllm._choice
    monkeypatch.setattr(vllm, "_choice", lambda *given: inner(*given) | {"finish_reason": "abort"})
    with Client(Server(vllm.url, "policy")) as client, pytest.raises(Outage, match="by abort"):
        asked(VllmServer(client))


def test_a_cache_of_earlier_weights_that_stays_is_an_error(vllm, folders):
    vllm.is_busy = True
    with Client(Server(vllm.url, "policy")) as client, pytest.raises(UserError, match="run alone"):
        VllmServer(client).load_weights(folders / "second")


def test_a_temperature_that_the_server_does_not_know_is_an_error_at_the_start(vllm):
    with Client(Server(vllm.url, "policy")) as client:
        VllmServer(client).require_tokens(2.0)
        with pytest.raises(UserError, match="temperature must be in"):
            VllmServer(client).require_tokens(2.5)
