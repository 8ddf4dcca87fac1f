"""Models side by side, answers token by token, chat in the terminal and over HTTP."""

import argparse
import html
import io
import json
import random
import socket
import threading

import httpx2
import pytest
import torch
from browser import browse_url
from chat_server import serving
from conftest import Workshop, pretrained, read_jsonl, write_jsonl

from finetune import chat
from finetune.__main__ import main
from finetune.data.conversations import Message
from finetune.endpoint import Client, Refused, Request, Server
from finetune.errors import ModelError, UserError
from finetune.evaluation import votes
from finetune.export import lineup
from finetune.export.lineup import Lineup
from finetune.export.load import load, load_tokenizer
from finetune.generation import generate, streaming
from finetune.generation.streaming import Sampling, Streamed, Token
from finetune.serving import api, http, serve, web
from finetune.serving.service import Service

QUESTION = [Message("user", "ab")]
WEB = httpx2.Client(verify=False, timeout=60)  # once: reading certificates takes a while


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    WEB.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, two adapters on it and a whole tuned model, each with answers of its own."""
    shop = Workshop(tmp_path_factory.mktemp("serving"))
    sizes = {"train__global_batch_size": 4, "train__micro_batch_size": 4}
    base = shop.train("base", optimizer__lr=1e-12, train__max_steps=1, **sizes) / "model"
    steps = {**sizes, **pretrained(base), "train__max_steps": 10, "train__epochs": 10}
    lora = {"adapter__kind": "lora", "adapter__r": 4, "optimizer__lr": 0.05}
    given = {"lora": lora, "other": lora, "full": {"optimizer__lr": 0.02}}
    for (name, settings), letter in zip(given.items(), "xyz"):
        rows = [{"question": q, "answer": letter * 30} for q in ("ab", "cd", "ef", "gh")]
        own = write_jsonl(shop.folder / f"{name}.jsonl", rows)
        shop.train(name, **steps, **settings, data__train=str(own))
    return shop.folder / "runs"


def alone(path, prompt=QUESTION, count=12, template=None):
    """Return the greedy answer of a model that is opened by itself."""
    tokenizer = load_tokenizer(path)
    asked = generate.chat_prompt(tokenizer, prompt)
    [answer] = generate.answers(
        load(path), tokenizer, [asked], max_new_tokens=count, batch_size=1
    )  # fmt: skip
    return answer.text


def answered(models, name, sampling=None, prompt=QUESTION, listen=lambda text, tokens: None):
    asked = generate.chat_prompt(models.tokenizer(name), prompt)
    with models.use(name) as opened:
        ids = generate.encode(opened.model, opened.tokenizer, asked)
        sampling = sampling or Sampling(12)
        return streaming.stream(
            opened.model, opened.tokenizer, ids, sampling, opened.ends, listen
        )  # fmt: skip


# --------------------------------------------------------------------------------- the lineup


@pytest.mark.proof
def test_models_of_a_lineup_answer_as_they_do_alone(runs, monkeypatch):
    opened = []
    monkeypatch.setattr(
        lineup, "load", lambda path, **options: opened.append(str(path)) or load(path, **options)
    )
    whole, other = runs / "full/model", runs / "other/model"
    models = Lineup(str(runs / "lora/model"), [str(other), str(whole)])
    assert models.names == ["tuned", "base", "other", "full"]
    paths = {
        "tuned": runs / "lora/model", "base": runs / "base/model", "other": other, "full": whole
    }  # fmt: skip
    expected = {name: alone(path) for name, path in paths.items()}
    assert len(set(expected.values())) == 4, "each answers otherwise, or this shows nothing"
    for name in [*models.names, *reversed(models.names)]:
        assert answered(models, name).text == expected[name], name
    assert opened == [str(runs / "lora/model"), str(whole)], "the base is loaded once"


@pytest.mark.proof
def test_a_dropped_adapter_is_gone_and_the_others_answer_as_before(runs):
    models = Lineup(str(runs / "lora/model"), [str(runs / "other/model"), str(runs / "full/model")])
    before = {name: answered(models, name).text for name in models.names}
    peft_model = models.open("tuned").model
    for name in ("other", "full"):
        models.drop(name)
    assert list(peft_model.peft_config) == ["default"]
    assert not [name for name, _ in peft_model.named_parameters() if ".other." in name]
    assert models.names == ["tuned", "base"]
    assert {name: answered(models, name).text for name in models.names} == {
        name: before[name] for name in ("tuned", "base")
    }
    for name in ("base", "tuned", "other"):
        with pytest.raises(ModelError):
            models.drop(name)


@pytest.mark.proof
def test_the_base_of_a_run_of_full_weights_is_known_from_its_config(runs):
    models = Lineup(str(runs / "full/model"))
    assert models.names == ["tuned", "base"]
    assert answered(models, "base").text == alone(runs / "base/model")
    with pytest.raises(ModelError, match="the models are tuned, not 'base'; the base of"):
        Lineup(str(runs / "base/model")).require("base")


@pytest.mark.proof
def test_an_adapter_that_changes_its_base_is_not_put_beside_it(runs, tmp_path):
    shop = Workshop(tmp_path)
    base = runs / "base/model"
    given = {"adapter__kind": "lora", "adapter__init": "pissa", "adapter__r": 4}
    run = shop.train("pissa", **pretrained(base), **given, train__max_steps=1)
    models = Lineup(str(run / "model"))
    assert answered(models, "base").text == alone(base)
    assert answered(models, "tuned").text == alone(run / "model")


# ------------------------------------------------------------------------------ token by token


@pytest.mark.proof
def test_pieces_make_the_answer_and_probabilities_are_those_of_the_model(runs):
    models, pieces = Lineup(str(runs / "lora/model")), []
    found = answered(
        models, "tuned", Sampling(8, top_logprobs=2), listen=lambda *x: pieces.append(x)
    )
    assert "".join(text for text, _ in pieces) == found.text
    assert [token for _, tokens in pieces for token in tokens] == list(found.tokens)
    with models.use("tuned") as opened, torch.no_grad():
        asked = generate.chat_prompt(opened.tokenizer, QUESTION)
        ids = generate.encode(opened.model, opened.tokenizer, asked)
        answer = [token.id for token in found.tokens]
        logits = opened.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    by_hand = logits.float().softmax(-1).log()
    for token, row in zip(found.tokens, by_hand):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(
            row.topk(2).values.tolist(), abs=1e-4
        )
        assert token.id == int(row.argmax())


@pytest.mark.proof
def test_sampling_repeats_with_its_seed_and_leaves_the_generator(runs):
    models = Lineup(str(runs / "base/model"))
    drawn = {seed: answered(models, "tuned", Sampling(12, 1.0, seed=seed)).text for seed in (1, 2)}
    assert drawn[1] != drawn[2]
    state = torch.get_rng_state()
    again = answered(models, "tuned", Sampling(12, 1.0, seed=1)).text
    assert again == drawn[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert answered(models, "tuned", Sampling(12, 1.0, top_p=1e-6, seed=1)).text == alone(
        runs / "base/model"
    )


class Scripted(streaming._Writer):
    """Gets tokens from a list, as from a model."""

    def feed(self, ids):
        self.put(torch.tensor([[0]]))
        for token in ids:
            if not self.stopped.is_met:
                self.put(torch.tensor([token]))
        self.end()
        return self.whole(1)


def scripted(tokenizer, ids, stop=()):
    pieces = []
    writer = Scripted(tokenizer, Sampling(stop=stop), frozenset(), lambda t, _: pieces.append(t))
    return writer.feed(ids), pieces


@pytest.mark.parametrize("stop", ["END", "xx", "é", "\n\n"])
def test_a_stop_text_ends_the_answer_and_none_of_it_is_passed_on(bytes_tokenizer, stop):
    text = f"naïve x{'E' if stop == 'END' else 'y'} 漢字\n{stop}rest"
    ids = bytes_tokenizer(text, add_special_tokens=False)["input_ids"]
    found, pieces = scripted(bytes_tokenizer, ids, (stop, "never"))
    assert "".join(pieces) == found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"


def test_any_tokens_become_the_text_that_they_decode_to_at_once(bytes_tokenizer):
    source = random.Random(0)
    for _ in range(60):
        ids = [source.randrange(len(bytes_tokenizer)) for _ in range(source.randrange(1, 30))]
        if source.random() < 0.5:
            letters = "".join(source.choice("aé漢😀 \n") for _ in range(9))
            ids = bytes_tokenizer(letters, add_special_tokens=False)["input_ids"]
        found, pieces = scripted(bytes_tokenizer, ids)
        assert "".join(pieces) == found.text == generate.decode(bytes_tokenizer, ids)


def test_tokenizers_of_models_stream_what_they_decode(real_data):
    from transformers import AutoTokenizer

    text = " Hello, naïve  café 漢字 😀👩‍👩‍👧\n\n\tif x:  y(1)  don't"
    for folder in sorted((real_data / "tokenizers").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found, pieces = scripted(tokenizer, ids)
        assert "".join(pieces) == found.text == generate.decode(tokenizer, ids), folder


# ------------------------------------------------------------------------------- the terminal


@pytest.fixture
def typed(monkeypatch, capsys):
    """Return stdout and stderr of a chat in which these lines are typed."""

    def run(lines, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *map(str, arguments)]) == 0
        return capsys.readouterr()

    return run


@pytest.mark.proof
def test_chat_switches_models_and_keeps_the_conversation(runs, typed):
    lora = runs / "lora"
    lines = ["ab", "/base", "/retry", "/model other", "/retry", "/tuned", "/retry", "/model"]
    seen = typed(lines, lora, "--also", runs / "other", "--max-new-tokens", 12)
    names = ("lora", "base", "other", "lora")
    expected = "".join(f"{alone(runs / name / 'model')}\n" for name in names)
    assert seen.out.replace("> ", "") == expected
    assert "now base: " in seen.err
    assert "models: tuned, base, other; now tuned" in seen.err


@pytest.mark.proof
def test_chat_shows_probabilities_on_request(runs, typed):
    seen = typed(["/probs", "ab"], runs / "lora", "--max-new-tokens", 2)
    lines = seen.out.replace("> ", "").splitlines()
    assert "probabilities are shown" in seen.err
    assert len(lines) == 3
    assert all("%" in line and " of " in line for line in lines[1:])
    once = typed([], runs / "lora", "--max-new-tokens", 2, "--probs", "--prompt", "ab")
    assert once.out.splitlines() == lines


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ModelError("too long")])
def test_a_chat_goes_on_after_an_answer_that_is_stopped_or_fails(monkeypatch, capsys, stop):
    options = argparse.Namespace(
        system=None, probs=False, max_new_tokens=2, temperature=0.0, moderation=[],
        trust_remote_code=False, web=False, prompt=None, one_turn=False, blind=False, votes=None,
        port=None,
    )  # fmt: skip
    talk, answers = chat.Chat(None, options), [stop, "one", stop, "two"]

    def generated(self):
        answer = answers.pop(0)
        if not isinstance(answer, str):
            raise answer
        return f"{answer} of {len(self.messages)}"

    monkeypatch.setattr(chat.Chat, "_generated", generated)
    monkeypatch.setattr(chat, "Chat", lambda *given: talk)
    monkeypatch.setattr(chat, "require_system", lambda *given: None)
    lineups = argparse.Namespace(tokenizer=lambda name: None, open=lambda name: None)
    monkeypatch.setattr(chat.lineup, "of_arguments", lambda *given: lineups)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n/retry\nc\n"))
    chat.main(options)
    assert [each.content for each in talk.messages] == ["b", "one of 1", "c", "two of 3"]
    assert capsys.readouterr().err.count("too long" if stop is not KeyboardInterrupt else "stopped")


@pytest.mark.proof
def test_the_system_message_changes_in_a_chat_and_begins_a_new_one(runs):
    options = argparse.Namespace(
        system=None,
        probs=False,
        max_new_tokens=2,
        temperature=0.0,
        moderation=[],
        trust_remote_code=False,
    )
    talk = chat.Chat(Lineup(str(runs / "lora/model")), options)
    talk.ask("ab")
    assert [each.role for each in talk.messages] == ["user", "assistant"]
    talk.obey("/system be brief")
    assert talk.messages == [Message("system", "be brief")]
    talk.obey("/system")
    assert talk.messages == []


@pytest.mark.proof
def test_commands_that_cannot_run_say_why_and_the_chat_goes_on(runs, typed):
    lines = ["/bas", "/retry", "/base", "/model someone else", "/help", "ab"]
    seen = typed(lines, runs / "base", "--max-new-tokens", 2)
    assert "/bas is not a command; /help lists them" in seen.err
    assert "/retry: there is nothing to answer yet" in seen.err
    assert "the models are tuned, not 'base'; the base of" in seen.err
    assert "not 'someone else'" in seen.err
    assert all(command in seen.err for command in chat.COMMANDS)
    assert seen.out.replace("> ", "").strip()


@pytest.mark.proof
def test_a_further_model_that_does_not_exist_is_exit_2(runs, capsys):
    given = ["chat", str(runs / "lora"), "--also", "/no/such", "--prompt", "a"]
    assert main(given) == 2
    assert "--also: /no/such: no such folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- the server


def served(service, handler=serve.Handler, owner=None):
    """Serve in a thread; yield the server."""
    return serving(http.bind("127.0.0.1", 0, handler, owner or serve.Api(service, 9)))


class ByRule:
    """Answers as a service does, without a model: the last message, letter by letter."""

    def __init__(self):
        self.asked, self.pieces = [], 0
        self.models = argparse.Namespace(names=["tuned", "base"])

    def chat(self, name, messages, sampling, listen):
        return self.complete(name, messages[-1].content, sampling, listen)

    def complete(self, name, text, sampling, listen):
        self.asked.append((name, text, sampling))
        if text == "break":
            raise RuntimeError("a fault of this program")
        tokens = []
        for letter in text[: sampling.max_new_tokens]:
            self.pieces += 1
            top = ((letter, -0.1), ("?", -2.5))[: sampling.top_logprobs or 0]
            tokens.append(Token(0, letter, -0.1, top))
            listen(letter, tokens[-1:] if sampling.top_logprobs is not None else [])
        reason = "length" if len(text) > sampling.max_new_tokens else "stop"
        kept = tuple(tokens) if sampling.top_logprobs is not None else ()
        return Streamed("".join(t.text for t in tokens), reason, 3, len(tokens), kept)


@pytest.fixture(scope="module")
def rule_server():
    with served(ByRule()) as server:
        yield server


@pytest.fixture
def by_rule(rule_server):
    rule_server.owner = serve.Api(ByRule(), 9)
    return rule_server


def post(server, values, path="/v1/chat/completions", **headers):
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    given = {"Content-Type": "application/json", **headers}
    return WEB.post(server.url + path, content=data, headers=given)


HI = {"model": "tuned", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.slow
def test_the_projects_own_client_asks_it(by_rule):
    for prompt in ("hello", [{"role": "user", "content": "hello"}]):
        with Client(Server(f"{by_rule.url}/v1", "base")) as client:
            reply = client.ask(Request(prompt, max_tokens=3, top_logprobs=2))
        assert (reply.text, reply.finish_reason, reply.is_cut) == ("hel", "length", True)
        assert (reply.prompt_tokens, reply.completion_tokens) == (3, 3)
        assert list(reply.top_logprobs) == [{x: -0.1, "?": -2.5} for x in "hel"]
    with pytest.raises(UserError, match="has no model 'other'.*it has tuned, base"):
        ask_for(by_rule, "other", "hello")
    with pytest.raises(Refused, match="prompt: is empty"):
        ask_for(by_rule, "base", "")


def ask_for(server, model, prompt):
    with Client(Server(f"{server.url}/v1", model)) as client:
        return client.ask(Request(prompt))


def test_settings_of_a_request_reach_the_model(by_rule):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {
        "model": "base", "messages": [{"role": "developer", "content": parts}], "temperature": 0,
        "top_p": 0.5, "seed": 3, "stop": "x", "max_completion_tokens": 4, "logprobs": True,
        "top_logprobs": 2, "user": "me", "presence_penalty": 0, "tools": [], "n": None,
    }  # fmt: skip
    asked["messages"][0] |= {"refusal": None, "annotations": []}
    assert post(by_rule, asked).status_code == 200
    assert by_rule.owner.service.asked == [
        ("base", "ab", Sampling(4, 0.0, 0.5, 3, ("x",), 2))
    ]  # fmt: skip
    assert post(by_rule, HI).json()["choices"][0]["logprobs"] is None
    assert by_rule.owner.service.asked[-1][2] == Sampling(9, 1.0)


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_stream_makes_the_same_answer_in_pieces(by_rule):
    asked = {**HI, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    found = events(post(by_rule, asked))
    choices = [each["choices"][0] for each in found[:-1]]
    assert "".join(each["delta"].get("content", "") for each in choices) == "hello"
    assert [each["delta"].get("role") for each in choices][:2] == ["assistant", None]
    assert [each["finish_reason"] for each in choices] == [None] * 5 + ["stop"]
    assert choices[1]["logprobs"]["content"][0]["token"] == "e"
    assert found[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert {each["object"] for each in found} == {"chat.completion.chunk"}
    assert len({each["id"] for each in found}) == 1
    asked = {"model": "base", "prompt": ["ab", "c"], "stream": True, "logprobs": 0}
    found = events(post(by_rule, asked, "/v1/completions"))
    pieces = [(each["choices"][0]["index"], each["choices"][0]["text"]) for each in found]
    assert pieces == [(0, "a"), (0, "b"), (1, "c"), (0, ""), (1, "")]
    assert found[1]["choices"][0]["logprobs"]["text_offset"] == [1]


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        (b"{", 400, "the body is not JSON"), (b"[]", 400, "should be a JSON object, got list"),
        (b"[" * 100_000, 400, "nested too deeply"), (b"\xff", 400, "the body is not JSON"),
        ({**HI, "model": "x"}, 404, "the model 'x' does not exist; there are tuned, base"),
        ({"model": "base"}, 400, "messages: Field required"),
        ({**HI, "messages": []}, 400, "messages: List should have at least 1 item"),
        ({**HI, "messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role: Input"),
        ({**HI, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400,
         "messages.0.content.0.type: Input should be 'text'"),
        ({**HI, "messages": [{"role": "user", "content": "\ud83d"}]}, 400, "half a character"),
        ({**HI, "n": 2}, 400, "n: Input should be 1"),
        ({**HI, "tools": [{}]}, 400, "tools: this server does not support it"),
        ({**HI, "frequency_penalty": 0.5}, 400, "frequency_penalty: this server does not"),
        ({**HI, "temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({**HI, "temperature": 1e-9}, 400, "temperature: Value error, should be 0, or at least"),
        ({**HI, "temperature": "1"}, 400, "temperature: Input should be a valid number"),
        ({**HI, "max_tokens": 0}, 400, "max_tokens: Input should be greater than"),
        ({**HI, "stop": [""]}, 400, "stop"), ({**HI, "seed": 2**64}, 400, "seed"),
        ({**HI, "top_logprobs": 21}, 400, "top_logprobs"),
        ({**HI, "messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, 400,
         "messages.0.tool_calls: this server does not support it"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_an_error_as_openais(by_rule, values, status, words):
    answer = post(by_rule, values)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert by_rule.owner.service.asked == []


def test_other_paths_methods_and_large_bodies_are_refused(by_rule, monkeypatch):
    assert WEB.get(f"{by_rule.url}/v1/models").json() == api.models(["tuned", "base"])
    assert WEB.get(f"{by_rule.url}/v1/models/base").json()["id"] == "base"
    assert WEB.get(f"{by_rule.url}/v1/models/no").status_code == 404
    assert WEB.get(f"{by_rule.url}/etc/passwd").status_code == 404
    assert post(by_rule, HI, "/v2/chat").status_code == 404
    assert WEB.request("PUT", f"{by_rule.url}/v1/models").status_code == 501
    with socket.create_connection(by_rule.server_address) as raw:  # what no client sends
        head = f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {'9' * 5_000}\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(12) == b"HTTP/1.1 413"
    monkeypatch.setattr(http, "MOST_BYTES", 10)
    assert post(by_rule, HI).status_code == 413


def test_pages_of_other_sites_cannot_ask(by_rule):
    """Through a name that points here, from their own origin, or by a form."""
    assert post(by_rule, HI, Host="evil.example").status_code == 403
    assert post(by_rule, HI, Origin="http://evil.example").status_code == 403
    assert post(by_rule, HI, Origin="null").status_code == 403
    assert post(by_rule, HI, Origin="http://[").status_code == 403
    assert post(by_rule, HI, **{"Content-Type": "text/plain"}).status_code == 415
    assert by_rule.owner.service.asked == []
    assert post(by_rule, HI, Origin=by_rule.url).status_code == 200


def test_a_fault_ends_its_request_and_not_the_server(by_rule, capsys):
    asked = {**HI, "messages": [{"role": "user", "content": "break"}]}
    answer = post(by_rule, asked)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "RuntimeError" in capsys.readouterr().err
    assert post(by_rule, HI).status_code == 200


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_ends_when_its_client_leaves(by_rule, streams):
    service = by_rule.owner.service
    by_rule.owner.longest = 10**6
    left = threading.Event()
    listen = ByRule.complete

    def slow(self, name, text, sampling, listener):
        def waiting(piece, tokens):
            left.wait(5)
            listener(piece, tokens)

        try:
            return listen(self, name, text, sampling, waiting)
        finally:
            done.set()

    done = threading.Event()
    service.complete = slow.__get__(service)
    asked = {**HI, "messages": [{"role": "user", "content": "x" * 100_000}], "stream": streams}
    with pytest.raises(httpx2.TimeoutException):
        WEB.post(f"{by_rule.url}/v1/chat/completions", json=asked, timeout=0.05)
    left.set()
    assert done.wait(20)
    assert service.pieces < 100_000


def test_a_port_in_use_is_exit_2(by_rule):
    port = by_rule.server_address[1]
    with pytest.raises(UserError, match=f"--port {port}: cannot listen here.*another --port"):
        http.bind("127.0.0.1", port, serve.Handler, None)
    with pytest.raises(UserError, match="--port 70000: should be from 0 to 65535"):
        http.bind("127.0.0.1", 70_000, serve.Handler, None)


@pytest.mark.proof
def test_base_and_tuned_are_served_as_chat_answers(runs):
    models = Lineup(str(runs / "lora/model"))
    with served(Service(models)) as server:
        for name in ("base", "tuned", "base"):
            with Client(Server(f"{server.url}/v1", name)) as client:
                reply = client.ask(Request([{"role": "user", "content": "ab"}], 12))
                assert reply.text == answered(models, name).text
                assert client.ask(Request("ab", 3, top_logprobs=2)).top_logprobs
        long = {**HI, "messages": [{"role": "user", "content": "x" * 300}]}
        error = post(server, long).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "the model has positions for 256 tokens" in error["message"]
        stopped = post(server, {**HI, "temperature": 0, "stop": ["x"]}).json()["choices"][0]
        assert "x" not in stopped["message"]["content"]
        drawn = [post(server, {**HI, "seed": 5}).json()["choices"] for _ in range(2)]
        assert drawn[0] == drawn[1]


# ------------------------------------------------------------------------------------ the page


class Twice(ByRule):
    """The tuned model answers in capitals."""

    def chat(self, name, messages, sampling, listen):
        text = messages[-1].content + f" {len(messages)}"
        return self.complete(name, text.upper() if name == "tuned" else text, sampling, listen)


@pytest.fixture
def pages(tmp_path):
    """A server of the page, whose answers come by rule."""
    service = Twice()
    service.models.require = lambda name: name
    owner = web.Web(service, web.Votes(tmp_path / "votes.jsonl"), 20, 0.0, "", False)
    with served(service, web.Handler, owner) as server:
        yield server


def asked_pages(server, **changes):
    values = {
        "token": server.owner.token, "models": ["base", "tuned"], **changes,
        "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    response = post(server, values, "/ask")
    assert response.status_code == 200, response.text
    return [json.loads(line[6:]) for line in response.text.split("\n\n") if line]


def test_a_vote_is_a_line_with_what_was_asked_and_answered(pages):
    found = asked_pages(pages, probabilities=True)
    assert found[0] == {"names": ["base", "tuned"]}
    texts = ["".join(e["text"] for e in found if e.get("side") == side) for side in (0, 1)]
    assert texts == ["hi 1", "HI 1"]
    assert found[1]["tokens"] == [{"text": "h", "logprob": -0.1, "top": [["h", -0.1], ["?", -2.5]]}]
    vote = {"token": pages.owner.token, "round": found[-1]["round"], "better": "second"}
    assert post(pages, vote, "/vote").json() == {"names": ["base", "tuned"], "votes": 1}
    [read] = votes.read([str(pages.owner.votes.path)])
    assert read.prompt == ({"role": "user", "content": "hi"},)
    assert (read.models, read.answers) == (("base", "tuned"), ("hi 1", "HI 1"))
    assert (read.better, read.rater) == ("second", "person")
    again = post(pages, vote, "/vote")
    assert (again.status_code, "has its vote" in again.text) == (409, True)
    assert web.Votes(pages.owner.votes.path).count == 1


def test_a_vote_that_cannot_be_written_may_be_given_again(pages, tmp_path):
    found = asked_pages(pages)
    vote = {"token": pages.owner.token, "round": found[-1]["round"], "better": "first"}
    path, pages.owner.votes.path = pages.owner.votes.path, tmp_path
    assert post(pages, vote, "/vote").status_code >= 400
    pages.owner.votes.path = path
    assert post(pages, vote, "/vote").json()["votes"] == 1
    alone = asked_pages(pages, models=["base", "base"])
    refused = post(pages, {**vote, "round": alone[-1]["round"]}, "/vote")
    assert (refused.status_code, "of one model" in refused.text) == (400, True)
    assert web.Votes(path).count == 1


def test_blind_rounds_name_the_models_only_after_the_vote_and_draw_the_sides(pages):
    orders = set()
    for _ in range(24):
        found = asked_pages(pages, blind=True)
        assert "base" not in json.dumps(found)
        vote = {"token": pages.owner.token, "round": found[-1]["round"], "better": "first"}
        orders.add(tuple(post(pages, vote, "/vote").json()["names"]))
    assert orders == {("base", "tuned"), ("tuned", "base")}
    for line in read_jsonl(pages.owner.votes.path):
        assert line["answers"] == ["hi 1" if n == "base" else "HI 1" for n in line["models"]]


def test_the_page_answers_only_its_own_requests(pages):
    values = {"token": "wrong", "models": ["base", "tuned"], "messages": []}
    assert post(pages, values, "/ask").status_code == 403
    assert post(pages, {**values, "token": 7}, "/vote").status_code == 403
    wrong = {**values, "token": pages.owner.token}
    assert "messages: List should have" in post(pages, wrong, "/ask").text
    given = {"token": pages.owner.token, "round": "x", "better": "best"}
    assert "better: Input should be" in post(pages, given, "/vote").text
    assert WEB.get(f"{pages.url}/", headers={"Host": "evil.example"}).status_code == 403
    response = WEB.get(f"{pages.url}/")
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    assert pages.owner.token in response.text
    assert pages.owner.service.asked == []


def test_votes_are_never_mixed_with_something_else(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"question": "a"}\n')
    with pytest.raises(UserError, match="other.jsonl exists and does not begin with a vote"):
        web.Votes(path)
    with pytest.raises(UserError, match="cannot be written"):
        web.Votes(tmp_path / "no/votes.jsonl").require_writable()
    path.write_text('{"better": "tie"}\n{"bet')
    vote = votes.Vote("", (), ("a", "b"), ("c", "d"), "first")
    web.Votes(path).add(vote)
    assert path.read_text() == '{"better": "tie"}\n{"bet\n' + vote.as_line()


@pytest.mark.proof
def test_options_that_would_be_ignored_are_exit_2(runs, capsys):
    for given in (["--blind"], ["--votes", "a"], ["--port", "1"], ["--web", "--prompt", "a"]):
        assert main(["chat", str(runs / "lora"), *given]) == 2
    assert "--blind: only with --web" in capsys.readouterr().err
    assert main(["chat", str(runs / "base"), "--web"]) == 2
    assert "--web compares two models, and the base of" in capsys.readouterr().err


DRIVE = """<script>
const wait = async test => { while (!test()) await new Promise(done => setTimeout(done, 20)); };
(async () => {
  $('probs').checked = true;
  $('text').value = 'hi <b>';
  $('send').click();
  await wait(() => !votes[0].disabled);
  votes[2].click();
  await wait(() => $('note').textContent.includes('1 votes'));
  $('blind').checked = true;
  $('text').value = 'more';
  $('send').click();
  await wait(() => !votes[0].disabled && !busy);
  const whole = document.documentElement;
  document.title = JSON.stringify({ turns: turns, answers: answers, names: sides.map(
    side => side.querySelector('h2').textContent), tokens: document.querySelectorAll(
    '.token').length, wide: whole.scrollWidth - whole.clientWidth });
})();
</script></body>"""


class Driven(web.Handler):
    def send(self, status, values, *rest):
        is_page = isinstance(values, str)
        super().send(status, values.replace("</body>", DRIVE) if is_page else values, *rest)


@pytest.mark.proof
@pytest.mark.parametrize("size", ["1200,800", "500,900"])
def test_the_page_asks_shows_and_votes_in_a_browser(tmp_path, size):
    service = Twice()
    service.models.require = lambda name: name
    owner = web.Web(service, web.Votes(tmp_path / "votes.jsonl"), 20, 0.0, "", False)
    with served(service, Driven, owner) as server:
        seen = browse_url(f"{server.url}/", tmp_path, size, "--virtual-time-budget=20000")
    assert seen.console == []
    found = json.loads(html.unescape(seen.title))
    assert [turn["content"] for turn in found["turns"]] == ["hi <b>", "HI <B> 1", "more"]
    assert sorted(found["answers"]) == ["MORE 3", "more 3"]
    assert found["names"] == ["left", "right"], "blind"
    assert (found["tokens"], found["wide"]) == (12, 0)
    [vote] = read_jsonl(tmp_path / "votes.jsonl")
    assert (vote["better"], vote["answers"]) == ("second", ["hi <b> 1", "HI <B> 1"])
