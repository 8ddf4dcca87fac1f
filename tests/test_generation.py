"""Engines answer alike, whatever the batch; answers on disk survive a kill."""

import threading
from dataclasses import replace

import chat_server
import pytest
import torch
from conftest import read_jsonl, tiny_llama, write_jsonl
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from finetune import endpoint
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.errors import DataError, ModelError, Outage
from finetune.evaluation import benchmarks, continuations
from finetune.evaluation.prompting import with_context
from finetune.evaluation.scores.form import num_words
from finetune.generation import answers, batching
from finetune.generation.answers import Answers, answered
from finetune.generation.completions import Completion, Prompt, Score
from finetune.generation.engines import SHARD, Decoding, Local
from finetune.generation.remote import Remote
from finetune.models.load import bytes_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
GREEDY = Decoding(max_new_tokens=12)


def prompt(text, line=1, **fields):
    asked = Conversation((Message("user", text),), Place("rows.jsonl", line))
    return Prompt(asked, text.upper(), fields)


PROMPTS = [prompt("what " * (n * 5 % 9) + f"is {n}", n + 1) for n in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    made = bytes_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model(tokenizer):
    """Weights large enough that no two tokens are nearly as likely; some answers end early."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        tiny_llama(vocab_size=len(tokenizer), initializer_range=0.4)
    )
    made.generation_config.eos_token_id = [tokenizer.eos_token_id, 124, 131, 197]
    return made.eval()


def complete(model, tokenizer, decoding=GREEDY, prompts=PROMPTS, wanted=None, **options):
    engine = Local(model, tokenizer, "model", log=lambda text: None, **options)
    found = dict(engine.complete(prompts, decoding, wanted))
    return [found[number] for number in sorted(found)]


def essence(completions):
    return [(each.text, each.finish_reason, each.token_ids, each.seed) for each in completions]


def test_greedy_answers_do_not_depend_on_the_batch_or_the_engine(model, tokenizer):
    """Padded in batches of 1 and 8, and packed with 1, 5 and all prompts at once, in float32."""
    alone = essence(complete(model, tokenizer, at_once=1, batches=False))
    assert {reason for _, reason, *_ in alone} == {"stop", "length"}
    assert len({len(ids) for *_, ids, _ in alone}) > 3
    assert essence(complete(model, tokenizer, at_once=8, batches=False)) == alone
    for at_once in (1, 5, 64):
        assert essence(complete(model, tokenizer, at_once=at_once)) == alone


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_a_model_whose_logits_are_nan_is_an_error(tokenizer, kind):
    """Without it, the likeliest token is always the first, and benchmarks have accuracies."""
    config = tiny_llama(vocab_size=len(tokenizer))
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    pair = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
    broken = (
        AutoModelForCausalLM.from_config(config)
        if kind == "causal"
        else T5ForConditionalGeneration(pair)
    )
    next(broken.parameters()).data.fill_(float("nan"))
    for decoding in (GREEDY, Decoding(temperature=1.0)):
        with pytest.raises(ModelError, match="tuned: the model's logits are NaN"):
            complete(broken, tokenizer, decoding, title="tuned")
    if kind == "causal":
        item = benchmarks.Item("rows.jsonl:1", "q", ("a", "b"), 0)
        scorer = continuations.Continuations(broken, tokenizer)
        with pytest.raises(ModelError, match="rows.jsonl:1: the model's logits are NaN"):
            benchmarks.logprobs(benchmarks.Benchmark("odd", [item]), scorer, tokenizer)


def test_batching_leaves_the_model_and_the_generators_as_they_were(model, tokenizer):
    model.train()
    attention, state = model.config._attn_implementation, torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:  # a caller that stops in the middle
        patch.setattr(batching, "WAIT_SECONDS", 0.05)
        engine = Local(model, tokenizer, "model", log=lambda text: None)
        running = engine.complete(PROMPTS, GREEDY)
        next(running)
        running.close()
    assert not [each for each in threading.enumerate() if "_run_generation_loop" in each.name]
    complete(model, tokenizer)
    assert model.config._attn_implementation == attention
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_a_failing_engine_is_noted_and_generate_goes_on(model, tokenizer, monkeypatch):
    expected = essence(complete(model, tokenizer, batches=False))
    notes = []
    whole = batching.complete

    def breaks(*arguments, **options):
        for number, found in enumerate(whole(*arguments, **options)):
            if number == 3:
                raise batching.NotServed("no")
            yield found

    monkeypatch.setattr(batching, "complete", breaks)
    engine = Local(model, tokenizer, "model", log=notes.append)
    found = dict(engine.complete(PROMPTS, GREEDY))
    assert essence(found[number] for number in range(len(PROMPTS))) == expected
    assert notes == ["note: continuous batching cannot serve this model (no); slower"]


def test_drawn_answers_follow_the_seed_and_the_shard(model, tokenizer):
    many = [prompt(f"is {n}", n + 1) for n in range(SHARD + 4)]
    drawing = Decoding(max_new_tokens=6, temperature=1.0, seed=7)
    state = torch.get_rng_state()
    first = essence(complete(model, tokenizer, drawing, many))
    torch.manual_seed(5)
    assert essence(complete(model, tokenizer, drawing, many)) == first
    torch.set_rng_state(state)
    # One missing answer of the last shard: it is drawn as before.
    [again] = complete(model, tokenizer, drawing, many, wanted=[SHARD + 2])
    assert essence([again]) == first[SHARD + 2 : SHARD + 3]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({seed for *_, seed in first}) == 2
    other = Decoding(max_new_tokens=6, temperature=1.0, seed=8)
    assert essence(complete(model, tokenizer, other, many))[:SHARD] != first[:SHARD]


def test_encoder_decoders_are_served_by_generate(tokenizer):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pair = T5ForConditionalGeneration(config).eval()
    asked = lambda each: each.question  # noqa: E731
    alone = complete(pair, tokenizer, at_once=1, asked=asked)
    assert essence(complete(pair, tokenizer, at_once=8, asked=asked)) == essence(alone)
    assert not batching.serves(pair)


class Counting:
    """An engine that notes what it is asked, and may stop after some answers."""

    identity = "counting"

    def __init__(self, most=100):
        self.most, self.numbers = most, []

    def complete(self, prompts, decoding, wanted=None):
        for number in wanted:
            if len(self.numbers) == self.most:
                raise Outage("killed")
            self.numbers.append(number)
            yield number, Completion(prompts[number], f"to {prompts[number].question}", "length")


def ask(path, engine, decoding=GREEDY, prompts=PROMPTS, share=(0, 1), notes=None):
    saved = Answers(path, (notes if notes is not None else []).append)
    texts = [each.question for each in prompts]
    return answered(
        lambda: engine, engine.identity, "base", prompts, texts, decoding, saved, share
    )  # fmt: skip


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    path, killed, notes = tmp_path / "new" / "answers.jsonl", Counting(most=5), []
    with pytest.raises(Outage):
        ask(path, killed)
    assert killed.numbers == [0, 1, 2, 3, 4]
    line = read_jsonl(path)[0]
    assert (line["answer"], line["finish_reason"]) == ("to is 0", "length")
    assert (line["model"], line["identity"], line["seed"]) == ("base", "counting", None)
    path.write_bytes(path.read_bytes()[:-30])  # the kill cut the last line
    again = Counting()
    found = ask(path, again, notes=notes)
    assert again.numbers == [4, *range(5, 12)]
    assert [each.text for each in found] == [f"to {each.question}" for each in PROMPTS]
    assert [each.prompt for each in found] == PROMPTS
    assert notes == [f"note: {path}:5 holds no answer, and is left out"]
    rescored = Counting(most=0)
    assert ask(path, rescored) == found
    other = Counting()
    ask(path, other, Decoding(max_new_tokens=13))
    assert len(other.numbers) == 12, "answers to other settings are not these"


def test_equal_prompts_are_asked_once(tmp_path):
    engine = Counting()
    rows = [prompt("a", 1), prompt("b", 2), prompt("a", 3)]
    found = ask(tmp_path / "answers.jsonl", engine, prompts=rows)
    assert engine.numbers == [0, 1]
    assert [each.text for each in found] == ["to a", "to b", "to a"]
    assert [each.prompt.place for each in found] == [row.place for row in rows]


def test_processes_share_the_prompts_and_the_first_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "POLL_SECONDS", 0.01)
    rows = [prompt(f"is {n}", n + 1) for n in range(3 * SHARD)]
    path, engines, found = tmp_path / "answers.jsonl", [Counting(1000), Counting(1000)], []
    first = threading.Thread(
        target=lambda: found.append(ask(path, engines[0], prompts=rows, share=(0, 2)))
    )
    first.start()
    assert ask(path, engines[1], prompts=rows, share=(1, 2)) is None
    first.join()
    assert engines[1].numbers == list(range(SHARD, 2 * SHARD))
    assert len(engines[0].numbers) == 2 * SHARD
    assert [each.text for each in found[0]] == [f"to {each.question}" for each in rows]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", "1"), ("seconds", float("nan")), ("seed", True), ("token_ids", 5),
        ("token_ids", ["a"]), ("row", ["rows.jsonl", "1", 0]), ("reference", 5), ("model", None),
        ("prompt", [{"role": "user", "content": "a", "context": 5}]), ("fields", []),
    ],
)  # fmt: skip
def test_an_edited_line_is_left_out_and_noted(tmp_path, name, value):
    path, notes = tmp_path / "answers.jsonl", []
    saved = Answers(path)
    for number, each in enumerate(PROMPTS[:2]):
        saved.add(str(number), "base", "x", Completion(each, "a"))
    first, second = read_jsonl(path)
    write_jsonl(path, [first | {name: value}, second])
    [left] = answers.read(str(path), notes.append)["base"]
    assert left.prompt == PROMPTS[1]
    again = Answers(path, notes.append)
    assert notes == 2 * [f"note: {path}:1 holds no answer, and is left out"]
    assert again.get("0", PROMPTS[0]) is None


def test_saved_answers_are_read_without_rows_or_models(tmp_path):
    path = tmp_path / "answers.jsonl"
    saved = Answers(path)
    for model, rows in (("base", PROMPTS[:3]), ("tuned", PROMPTS[1:4]), ("tuned", PROMPTS[1:2])):
        for each in rows:
            key = f"{model} {each.place} {len(read_jsonl(path))}"
            saved.add(key, model, "x", Completion(each, f"{model} {len(read_jsonl(path))}"))
    found = answers.read(str(path))
    assert {model: [each.text for each in of] for model, of in found.items()} == {
        "base": ["base 1", "base 2"],
        "tuned": ["tuned 6", "tuned 4"],
    }
    assert [each.prompt for each in found["base"]] == PROMPTS[1:3]
    for text in ("", "[1, 2]\n\xff\n{}\n"):
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(DataError, match="holds no answers"):
            answers.read(str(path))
    saved = Answers(path)
    for model, row in (("base", PROMPTS[0]), ("tuned", PROMPTS[1])):
        saved.add(model, model, "x", Completion(row, "a"))
    with pytest.raises(DataError, match="no row has an answer of every model"):
        answers.read(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        answers.read(str(tmp_path))


def test_saved_answers_of_models_with_context_and_of_equal_rows_are_read(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [replace(each, reference="right", fields={"page": f"p{n}"})
            for n, each in enumerate(PROMPTS[:3])]  # fmt: skip
    rows[1] = replace(
        rows[1], conversation=replace(rows[1].conversation, messages=rows[0].messages)
    )
    for model, own in (("base", rows), ("base with context", with_context(rows, "page"))):
        texts = [each.question for each in own]
        answered(lambda: Counting(1000), model, model, own, texts, GREEDY, Answers(path))
    found = answers.read(str(path))
    assert {model: len(of) for model, of in found.items()} == {"base": 3, "base with context": 3}
    # What stood at a place before, and was answered by one model alone, is left out.
    changed = replace(rows[2], reference="another")
    Answers(path).add("new", "base", "x", Completion(changed, "a"))
    assert [each.prompt.place for each in answers.read(str(path))["base"]] == [
        each.place for each in rows[:2]
    ]


@pytest.mark.parametrize(
    ("message", "reason", "why"),
    [
        ({"refusal": "I cannot help."}, "stop", "the model refuses: I cannot help."),
        ({"tool_calls": [{"id": "a"}]}, "tool_calls", "the model calls a tool instead"),
        ({"reasoning_content": "So"}, "length", "the limit of tokens ended it in its reasoning"),
        ({"content": "", "reasoning": "So"}, "stop", "the model ended after its reasoning"),
        ({}, "content_filter", "the server has filtered it"),
        ({}, "stop", "the server sends content: null"),
        ({"content": ""}, "stop", ""),
    ],
)
def test_content_that_is_null_is_no_answer_and_says_why(tmp_path, message, reason, why):
    sent = {"choices": [{"message": {"content": None, **message}, "finish_reason": reason}]}
    saved, notes = Answers(tmp_path / "answers.jsonl"), []
    with chat_server.running(answer=lambda body: sent) as server:
        engine = Remote(f"good-model@{server.url}", log=notes.append)
        for _ in range(2):  # the second time from the file
            [found] = answered(lambda: engine, "x", "base", PROMPTS[:1], ["a"], GREEDY, saved)
            saved = Answers(tmp_path / "answers.jsonl")
            assert (found.finish_reason, found.why) == ("failed" if why else "stop", why)
    assert len(server.seen) == 1
    noted = [f"note: {PROMPTS[0].place}: no answer: {why}"] if why else []
    assert [note for note in notes if "no answer" in note] == noted
    [score] = num_words()([found])
    assert score == (Score(None, f"no answer came: {why}") if why else Score(0.0))


def test_a_server_answers_as_a_model_and_what_it_refuses_is_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    notes = []
    with chat_server.running() as server:
        engine = Remote(f"good-model@{server.url}", "Be brief.", at_once=1, log=notes.append)
        server.faults = ['400 {"error": {"message": "too long"}}']
        found = dict(engine.complete(PROMPTS[:3], GREEDY))
    assert [found[n].finish_reason for n in range(3)] == ["failed", "stop", "stop"]
    assert [found[n].text for n in range(3)] == [
        "",
        "re: what what what what what is 1",
        "re: what is 2",
    ]
    assert [found[n].billed for n in range(3)] == [None, (10, 5), (10, 5)]
    saved = Answers(tmp_path / "answers.jsonl")
    for name in ("base", "tuned"):
        saved.add(f"{name} 1", name, "x", found[1])
    assert answers.read(str(tmp_path / "answers.jsonl"))["tuned"][0].billed == (10, 5)
    assert server.seen[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert server.seen[-1]["model"] == "good-model"
    assert "rows.jsonl:1" in notes[0]
