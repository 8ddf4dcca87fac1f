"""The client of OpenAI-compatible servers, against a real server that misbehaves in every way."""

import socket
import threading
import time

import chat_server
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import endpoint
from finetune.endpoint import Budget, Client, Refused, Reply, Request, Server
from finetune.errors import Outage, UserError

pytestmark = pytest.mark.slow

CHAT = Request([{"role": "user", "content": "two plus two?"}], max_tokens=8)
TEXT = Request("two plus two is", max_tokens=8)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with chat_server.running() as running:
        yield running


def client(server, **settings) -> Client:
    given = {"url": server.url, "model": "good-model", "timeout": 5.0} | settings
    return Client(Server(**given))


def asked(server, request=CHAT, **settings) -> Reply:
    with client(server, **settings) as made:
        return made.ask(request)


def test_both_methods_answer_with_text_usage_and_reason(server):
    reply = asked(server)
    assert reply == Reply("re: two plus two?", "stop", 10, 5)
    assert server.seen[0] == {
        "model": "good-model", "messages": CHAT.prompt, "max_tokens": 8, "temperature": 0.0,
    }  # fmt: skip
    assert asked(server, TEXT).text == "re: two plus two is"
    assert server.seen[1]["prompt"] == TEXT.prompt
    assert server.keys == [None, None]
    server.usage = None
    assert asked(server).prompt_tokens is None


@pytest.mark.parametrize("prompt", [CHAT.prompt, TEXT.prompt])
def test_log_probabilities_are_passed_through(server, prompt):
    reply = asked(server, Request(prompt, top_logprobs=2))
    assert reply.top_logprobs == ({"a": -0.1, "b": -2.5},)
    body = server.seen[0]
    assert body["logprobs"] == (True if prompt is CHAT.prompt else 2)
    server.faults = ['raw {"choices": [{"text": "a", "message": {"content": "a"}}]}']
    with pytest.raises(UserError, match="returns no log-probabilities"):
        asked(server, Request(prompt, top_logprobs=2))


@pytest.mark.parametrize(
    "fault", ["429", "500", "503", "529", "html 502", "cut", "reset", 'raw {"choices": [{"te']
)
def test_what_another_try_may_mend_is_tried_again(server, fault):
    server.faults = [fault] * 3
    assert asked(server).text == "re: two plus two?"
    assert (server.tries, len(server.seen)) == (4, 1)


def test_slow_answers_time_out_and_are_tried_again(server):
    server.faults = ["slow 2", "drip 0.1"]
    reply = asked(server, timeout=0.5)
    assert reply.text == "re: two plus two?"
    assert reply.tries >= 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("429", r"it answers 429 \(fault 429\), 3 times; run the same command again later"),
        ("html 502", "it answers 502"),
        ("cut", "the connection broke .*, 3 times"),
        ("raw nonsense", r"its answer is cut, or no JSON \(nonsense\), 3 times"),
        ("raw " + "[" * 100_000, "its answer is cut, or no JSON"),
    ],
)
def test_a_server_that_keeps_failing_is_an_outage(server, fault, message):
    server.faults = [fault] * 9
    with pytest.raises(Outage, match=f"{server.url}: {message}"):
        asked(server, retries=2)
    assert server.tries == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("html", r"answers with a page, not JSON \(<!DOCTYPE html>.*; the URL .* ends in /v1"),
        ("redirect http://elsewhere/v1", "redirects to http://elsewhere/v1; give that URL"),
        ("quota", "the account has no quota left: no money"),
        ("401", r"refuses the key \(401: fault 401\); name the variable that holds your key"),
        ("raw [1]", r"answers with \[1\]; the URL of an API often ends in /v1"),
        ('raw {"choices": []}', "answers with"),
        ('raw {"choices": [{"message": {"content": 5}}]}', "answers with"),
        ('raw {"error": {"message": "too long"}}', r"refuses the request \(400: too long\)"),
        ("404", "has no model 'good-model' .fault 404.; it has good-model, other-model"),
        ("413", r"refuses the request \(413"),
    ],
)
def test_what_no_try_can_mend_is_the_users_error(server, fault, message):
    server.faults = [fault] * 9
    with pytest.raises(UserError, match=f"{server.url}: {message}"):
        asked(server)
    assert server.tries == 1


def test_one_request_that_is_refused_differs_from_a_wrong_server(server):
    server.faults = ["422", "401"]
    with pytest.raises(Refused):
        asked(server)
    with pytest.raises(UserError) as raised:
        asked(server)
    assert not isinstance(raised.value, Refused)


def test_an_error_inside_an_answer_counts_as_its_code(server):
    server.faults = ['raw {"error": {"message": "busy", "code": 503}}']
    assert asked(server).tries == 2


def test_wrong_models_and_urls_are_named(server):
    with pytest.raises(UserError, match="has no model 'wrong-model' .*it has good-model, other-mo"):
        asked(server, model="wrong-model")
    with pytest.raises(UserError, match=r"404: 404 page not found; the URL .* ends in /v1"):
        asked(server, url=server.url.removesuffix("/v1"))
    assert asked(server, url=f"{server.url}/chat/completions/").text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://h/v1",
        "http://",
        "http://[::1",
        "http://me:k@h/v1",
        "http://h/v1?key=k",
        "http://\0",
    ],
)
def test_what_is_no_url_is_an_error(url):
    with pytest.raises(UserError):
        Client(Server(url, "m"))


def test_a_server_that_is_not_there_is_tried_twice(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(Outage, match="no connection .*, 2 times; is the server running"):
            Client(Server(url, "m")).ask(CHAT)


# ------------------------------------------------------------------------------------------ keys


def test_a_key_comes_from_the_named_variable_alone(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("MY_KEY", " sk-mine\n")
    asked(server)
    asked(server, key_variable="MY_KEY")
    assert server.keys == [None, "Bearer sk-mine"]
    assert Server("https://api.openai.com/v1", "m").key() == "sk-openai"
    for other in ("http://api.openai.com/v1", "https://api.openai.com.example.org/v1"):
        assert Server(other, "m").key() is None
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="the environment has no MY_KEY; export MY_KEY="):
        asked(server, key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", "two\nlines")
    with pytest.raises(UserError, match="MY_KEY holds characters that no key has"):
        asked(server, key_variable="MY_KEY")


def test_no_message_shows_a_key(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server.faults = ["key"]
    with pytest.raises(UserError, match=r"provided: \*\*\*\); check the key in MY_KEY") as raised:
        asked(server, key_variable="MY_KEY")
    assert "sk-secret" not in str(raised.value)


# ------------------------------------------------------------------------------------------ waits


def test_waits_double_with_a_random_part_and_stop_at_a_minute(server, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.5)
    with client(server) as made:
        waits = []
        monkeypatch.setattr(made._closed, "wait", waits.append)
        for tries in range(1, 12):
            made._back_off(endpoint._Again("busy"), tries)
        made._back_off(endpoint._Again("busy", 0.0), 9)  # it asks for no wait
        assert waits.pop() >= 30
    for tries, wait in enumerate(waits, 1):
        most = min(60, 0.5 * 2 ** (tries - 1))
        assert most / 2 <= wait <= most
    assert len(set(waits)) == len(waits)


def test_what_one_request_is_asked_to_wait_all_wait(server):
    server.faults = ["429 0.5"]
    with client(server, at_once=3) as made:
        made.submit(CHAT, lambda reply: None)
        while not made._not_before:
            time.sleep(0.01)
        made.submit(CHAT, lambda reply: None).result()
    first, *others = server.times
    assert len(others) == 2
    assert all(later - first >= 0.5 for later in others)


def test_a_date_to_wait_for_and_a_wait_that_is_too_long(server):
    seconds = endpoint._retry_after({"retry-after": "Fri, 27 Nov 2099 10:00:00 GMT"})
    assert seconds is not None
    assert seconds > 1e8
    for nonsense in ("soon", "nan", "inf", "-5", "Fri, 99 Nov"):
        assert endpoint._retry_after({"retry-after": nonsense}) in (None, 0.0)
    server.faults = ["429 4000"]
    with pytest.raises(Outage, match="asks to wait 4,000 seconds; run the same command again then"):
        asked(server)


def test_requests_in_flight_are_limited(server):
    three = threading.Barrier(3)  # fewer at once never pass it
    server.delay = lambda body: three.wait(20) / 100
    noted = []
    with client(server, at_once=3) as made:
        futures = [made.submit(CHAT, noted.append) for _ in range(9)]
        assert {future.result().text for future in futures} == {"re: two plus two?"}
    assert server.most_in_flight == 3
    assert len(noted) == 9


def test_leaving_keeps_what_is_in_flight_and_sends_no_more(server):
    server.delay = lambda body: 0.2
    noted = []
    with client(server, at_once=2) as made:
        for _ in range(6):
            made.submit(CHAT, noted.append)
        while server.in_flight < 2:
            time.sleep(0.01)
    assert len(server.seen) == len(noted) == 2


def test_leaving_ends_a_long_wait(server):
    server.faults = ["429 500"]
    with client(server) as made:
        future = made.submit(CHAT, lambda reply: None)
        while not made._not_before:
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 100  # of 500
    with pytest.raises(Outage):
        future.result()


# ------------------------------------------------------------------------------------------ budget


def test_a_budget_counts_every_try():
    budget = Budget(requests=4)
    assert budget.take(CHAT)
    assert budget.take(TEXT)
    budget.settle(CHAT, Reply("", tries=2))
    budget.settle(TEXT, None)
    assert budget.num_requests == 3
    assert budget.take(CHAT)
    assert not budget.take(CHAT)


def test_money_is_held_back_until_the_usage_is_known():
    budget = Budget(money=1.0, price=(0.0, 100_000.0))  # 0.8 for eight tokens of an answer
    assert budget.take(CHAT)
    assert not budget.take(CHAT)
    budget.settle(CHAT, Reply("", prompt_tokens=1, completion_tokens=2))
    assert budget.spent == pytest.approx(0.2)
    assert budget.take(CHAT)
    budget.settle(CHAT, Reply(""))  # without usage, what it may have cost
    assert budget.spent == pytest.approx(1.0)
    assert not budget.take(CHAT)


LENIENT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@LENIENT
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=30), st.floats(0, 9))
def test_no_more_is_spent_than_allowed(usages, money):
    budget = Budget(money=money, price=(1e4, 1e5))
    for prompt, answer in usages:
        if budget.take(CHAT):
            most = endpoint._most_tokens(CHAT)
            budget.settle(CHAT, Reply("", "", min(prompt, most[0]), answer))
    assert budget.spent <= money + 1e-9


@LENIENT
@given(st.text(st.characters()))
def test_no_answer_holds_half_a_character(text):
    endpoint._whole(text).encode()
    assert endpoint._whole("a\ud83d\ude00b") == "a\U0001f600b"


def test_many_threads_share_one_client(server):
    with client(server, at_once=4) as made:
        replies = []
        threads = [
            threading.Thread(target=lambda: replies.append(made.ask(TEXT))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(replies) == 8
