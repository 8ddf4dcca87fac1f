"""Models side by side, answers token by token, chat in the terminal and over HTTP."""

import argparse
import io
import random

import pytest
import torch
from conftest import Workshop, pretrained, write_jsonl

from finetune import chat
from finetune.__main__ import main
from finetune.data.conversations import Message
from finetune.errors import ModelError
from finetune.export import lineup
from finetune.export.lineup import Lineup
from finetune.export.load import load, load_tokenizer
from finetune.generation import generate, streaming
from finetune.generation.streaming import Sampling

QUESTION = [Message("user", "ab")]


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
        ids = streaming.encoded(opened.model, opened.tokenizer, asked)
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
        ids = streaming.encoded(opened.model, opened.tokenizer, asked)
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
        assert "".join(pieces) == found.text == generate._decode(bytes_tokenizer, ids)


def test_tokenizers_of_models_stream_what_they_decode(real_data):
    from transformers import AutoTokenizer

    text = " Hello, naïve  café 漢字 😀👩‍👩‍👧\n\n\tif x:  y(1)  don't"
    for folder in sorted((real_data / "tokenizers").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found, pieces = scripted(tokenizer, ids)
        assert "".join(pieces) == found.text == generate._decode(tokenizer, ids), folder


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


@pytest.mark.proof
def test_the_system_message_changes_in_a_chat_and_begins_a_new_one(runs):
    options = argparse.Namespace(system=None, probs=False, max_new_tokens=2, temperature=0.0)
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
