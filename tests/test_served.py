"""Runs that sample at a vLLM server, by a server that speaks its protocol."""

import json
import threading
import time

import pytest
import torch
from conftest import ROOT, launch, launcher, pretrained, read_jsonl, tiny_llama
from invariants import sampled
from vllm_server import running

from finetune.config.engine_fields import ServerEngine
from finetune.engine.topology import Topology
from finetune.errors import ConfigError, Outage, UserError
from finetune.forecast import choice
from finetune.models.load import bytes_tokenizer
from finetune.rollouts.sampling import Stopped
from finetune.rollouts.served import Served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model that no run has trained."""
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("base"), bytes_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def vllm(base, monkeypatch):
    monkeypatch.setattr("finetune.endpoint.FIRST_WAIT", 0.01)
    with running(base) as found:
        yield found


def settings(workshop, vllm, engine=None, **more):
    engine = {"kind": "server", "url": vllm.url, "model": "policy"} | (engine or {})
    given = {"train__max_steps": 2, **pretrained(vllm.start)} | more
    return sampled.settings(workshop, rollouts={"engine": engine, "max_new_tokens": 5}, **given)


def groups(run, phase):
    lines = read_jsonl(run / f"rollouts/phase-{phase:05}.jsonl")
    return [line for line in lines if "rollouts" in line]


def of_policy(run):
    """Return how far sampler and policy are from each other, over all tokens of all phases."""
    found = []
    for path in sorted((run / "rollouts").glob("phase-*.jsonl")):
        for line in read_jsonl(path):
            for each in line.get("rollouts", ()):
                pairs = zip(each["sampler_logprobs"], each["old_logprobs"])
                found += [abs(sampler - policy) for sampler, policy in pairs]
    return max(found)


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.proof)])
def test_each_phase_is_sampled_with_the_weights_of_its_step(workshop, vllm, adapter):
    run = workshop.train(**settings(workshop, vllm, {"sleep": True}, adapter__kind=adapter))
    assert of_policy(run) < 1e-4
    assert len(groups(run, 2)) == 4
    assert vllm.asleep
    assert not list(run.glob("server_weights"))
    if adapter == "lora":
        names = [body["model"] for body in vllm.sampled]
        assert names[0] == "policy"  # before the first step
        assert len(set(names)) == 3
        assert names[1].startswith("run-phase-1-")
        assert not vllm.adapters
        assert vllm.calls[-1] == "/v1/unload_lora_adapter"
    seeds = [body["seed"] for body in vllm.sampled if body["seed"]]  # without probes
    assert len(set(seeds)) == len(seeds) == 8


@pytest.mark.proof
def test_a_server_on_the_same_gpu_sleeps_while_memory_is_measured_and_given_back(
    workshop, vllm, monkeypatch
):
    """Else its memory counts as taken, or the run keeps what the server wakes up to."""
    slept, measure, give_back = dict[str, list[bool]](), choice.capacity_here, Topology.give_back
    seen = slept.setdefault

    def measured(device):
        seen("measured", []).append(vllm.asleep)
        return measure(device)

    def given_back(topology):
        seen("given back", []).append(vllm.asleep)
        give_back(topology)

    monkeypatch.setattr(choice, "capacity_here", measured)
    monkeypatch.setattr(Topology, "give_back", given_back)
    auto = {"train__micro_batch_size": "auto", "adapter__kind": "lora"}
    workshop.train(**settings(workshop, vllm, {"sleep": True}, **auto))
    assert slept == {"measured": [True], "given back": [True, True]}, "two phases"


def test_a_server_with_other_weights_ends_the_run_before_it_samples(workshop, vllm):
    vllm.ignores_weights = True
    with pytest.raises(UserError, match=r"nats from the policy's, .* samples nothing with it"):
        workshop.train(**settings(workshop, vllm, adapter__kind="lora", adapter__init="random"))
    run = workshop.run_dir()
    assert not list(run.glob("rollouts/phase*"))
    assert workshop.outcome()["state"] == "failed"


def test_weights_pass_in_a_folder_of_the_run_alone(vllm, tmp_path):
    kept = tmp_path / "server_weights/kept.txt"
    kept.parent.mkdir()
    kept.write_text("not ours")
    engine = ServerEngine(kind="server", url=vllm.url, model="policy", folder=str(tmp_path))
    own = {"is_adapter": True, "temperature": 1.0, "ends": {2}, "log": print}
    with Served(engine, tmp_path / "runs/a", **own) as served:
        assert served._folder == tmp_path / "a/server_weights"
        (tmp_path / "a/server_weights").mkdir(parents=True)
    assert kept.read_text() == "not ours"
    assert not (tmp_path / "a/server_weights").exists()


@pytest.mark.proof
def test_log_probabilities_of_another_temperature_end_the_run(workshop, vllm):
    vllm.off_by = 0.05
    with pytest.raises(UserError, match="0.05 nats .* --logprobs-mode processed_logprobs"):
        workshop.train(**settings(workshop, vllm, adapter__kind="lora", adapter__init="random"))


def test_a_server_that_is_not_there_is_an_error_before_weights_load(workshop, vllm, monkeypatch):
    monkeypatch.setenv("VLLM_KEY", "very-secret")
    for changes, message in (
        ({"url": "http://127.0.0.1:9/v1"}, "is the server running"),
        ({"url": "localhost:8000"}, "should begin with http:// or https://"),
        ({"model": "other"}, "has no model 'other'"),
        ({"key_variable": "NO_SUCH_KEY"}, "the environment has no NO_SUCH_KEY"),
    ):
        with pytest.raises(ConfigError, match=f"objective.rollouts.engine: .*{message}"):
            workshop.check(**settings(workshop, vllm, changes))
    for changes, message in (
        ({"urll": "x"}, "engine.urll: unknown key; did you mean url"),
        ({"kind": "srv"}, "engine.kind: should be 'local' or 'server', got 'srv'"),
        ({"probe_tolerance": 2}, "engine.probe_tolerance: should be less than or equal to 1"),
    ):
        with pytest.raises(ConfigError, match=f"objective.rollouts.{message}"):
            workshop.check(**settings(workshop, vllm, changes))
    vllm.without = "token_ids"
    with pytest.raises(ConfigError, match="rollouts.engine: .* needs? vLLM 0.10.2 or newer"):
        workshop.check(**settings(workshop, vllm, {"key_variable": "VLLM_KEY"}))
    assert "Bearer very-secret" in vllm.keys
    for adapter, message in (
        ({"adapter__dora": True}, "adapter.dora: a vLLM server has no DoRA"),
        ({"adapter__init": "pissa"}, "adapter.init: pissa changes the base"),
    ):
        with pytest.raises(ConfigError, match=message):
            workshop.check(**settings(workshop, vllm, adapter__kind="lora", **adapter))


@pytest.mark.proof
def test_a_phase_goes_on_where_its_server_died(workshop, vllm, monkeypatch):
    """The server fails after two of four prompts, forgets its adapters, and comes back."""
    inner, asked = vllm._completions, []

    def dying(body):
        asked.append(body["seed"])
        return inner(body) if len(asked) <= 4 else (500, {"error": {"message": "gone"}})

    monkeypatch.setattr(vllm, "_completions", dying)
    own = settings(workshop, vllm, {"at_once": 1}, adapter__kind="lora", train__max_steps=1)
    with pytest.raises(Outage, match="gone"):
        workshop.train(**own)
    recorded = [
        group
        for path in workshop.run_dir().glob("rollouts/phase-00001.partial/*")
        for line in path.read_text().splitlines()
        for group in json.loads(line).get("groups", ())
    ]
    monkeypatch.undo()
    monkeypatch.setattr("finetune.endpoint.FIRST_WAIT", 0.01)
    vllm.restart()
    before = len(vllm.sampled)
    run = workshop.train(**own)
    after = [body["seed"] for body in vllm.sampled[before:] if body["seed"]]
    assert len(recorded) == 2
    assert len(after) == 2, "what was recorded is not sampled again"
    assert not set(after) & set(asked[2:4])
    assert of_policy(run) < 1e-4


def test_a_request_to_stop_does_not_wait_for_a_slow_answer(vllm, tmp_path):
    def beat():
        raise Stopped

    vllm.faults = ["slow 20"] * 3
    engine = ServerEngine(kind="server", url=vllm.url, model="policy")
    began = time.monotonic()
    with (
        Served(engine, tmp_path, is_adapter=True, temperature=1.0, ends={2}, log=print) as served,
        pytest.raises(Stopped),
    ):
        served.draw([[1], [2], [3]], [1, 2, 3], 2, 4, beat)
    assert time.monotonic() - began < 10
    waiting = [each for each in threading.enumerate() if "work" in each.name]
    assert waiting
    assert all(each.daemon for each in waiting)


@pytest.mark.proof
@pytest.mark.parametrize("topology", ["cpu_debug", "fsdp2_offload"])
def test_two_processes_hand_over_whole_weights_and_sample_their_shards(workshop, vllm, topology):
    """Shards of two prompts, so that each process samples; one process gives the same rollouts."""
    own = settings(workshop, vllm, adapter__kind="full", train__micro_batch_size=4)
    alone = workshop.train("alone", **own)
    config = workshop.write(workshop.config("both", **own))
    result = launch([*launcher(topology, 2), str(ROOT / "train.py"), "--config", str(config)])
    assert result.returncode == 0, result.stdout + result.stderr
    both = workshop.run_dir("both")
    assert workshop.receipt("both")["num_processes"] == 2
    assert of_policy(both) < 1e-4
    for phase in (1, 2):
        pairs = zip(groups(alone, phase), groups(both, phase), strict=True)
        for one, two in pairs:
            assert [r["ids"] for r in one["rollouts"]] == [r["ids"] for r in two["rollouts"]]
