"""A column of a teacher's likeliest tokens: written, read, and refused where it does not fit."""

import base64
import json

import chat_server
import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, read_jsonl, write_jsonl
from test_head import Largest

from finetune.__main__ import main
from finetune.data.taught import Scored, Taught
from finetune.errors import ConfigError, DataError
from finetune.models import cross_entropy
from finetune.models.load import bytes_tokenizer

pytestmark = pytest.mark.slow
STEPS = {"objective__kind": "distill", "train__max_steps": 2, "objective__beta": 0.3}


@pytest.fixture
def teacher(workshop):
    larger = {**TINY_LLAMA, "hidden_size": 48}
    return workshop.train("teacher", model__config=larger, run__seed=1) / "model"


def teach(workshop, teacher, *more, top=261, name="taught", code=0):
    """Run `finetune data teach` and return the rows it wrote."""
    config = workshop.write(workshop.config("config", objective__kind="distill"))
    output = workshop.folder / f"{name}.jsonl"
    words = ["--config", config, "--model", teacher, "--top", top, "--output", output, *more]
    assert main(["data", "teach", str(workshop.rows), *map(str, words)]) == code
    return output


def values(run, name="divergence"):
    return [line[name] for line in read_jsonl(run / "metrics.jsonl")]


def test_all_tokens_stored_train_as_the_teacher_itself(workshop, teacher):
    rows = teach(workshop, teacher)
    beside = workshop.train("beside", **STEPS, objective__teacher=str(teacher))
    stored = workshop.train("stored", **STEPS, data__train=str(rows))
    assert values(stored) == pytest.approx(values(beside), rel=1e-6, abs=1e-7)
    assert values(stored, "grad_norm") == pytest.approx(values(beside, "grad_norm"), rel=1e-4)
    with pytest.raises(ConfigError, match=r"objective.teacher: rows hold what a teacher said"):
        workshop.check(**STEPS, data__train=str(rows), objective__teacher=str(teacher))


@pytest.mark.proof
def test_a_teachers_logits_are_there_for_a_few_tokens_at_once(workshop, teacher, monkeypatch):
    """Of answers of 70 tokens, several rows at once; a layer's states have 64 numbers a token."""
    rows = [{"question": "why", "answer": f"{number:02} " + 67 * "a"} for number in range(16)]
    write_jsonl(workshop.rows, rows)
    with Largest() as usual:
        teach(workshop, teacher, top=4)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 8 * 261)
    with Largest() as few:
        teach(workshop, teacher, top=4, name="again")
    assert usual.numbers >= 4 * 70 * 261, "else this shows nothing"
    assert few.numbers < usual.numbers / 2


def test_every_token_of_plain_text_is_taught_as_clm_learns_it(workshop, teacher):
    """Also of rows that are split: each part is a document of its row."""
    rows = [{"text": "to be, or not to be " * (1 + number % 9)} for number in range(24)]
    own = {
        "data__train": str(write_jsonl(workshop.folder / "text.jsonl", rows)),
        "data__format": "text", "data__truncation": "split", "data__max_length": 64,
        "train__max_steps": 2,
    }  # fmt: skip
    clm = workshop.train("clm", **own, objective__kind="clm")
    own |= STEPS
    beside = workshop.train("beside", **own, objective__teacher=str(teacher))
    config, output = workshop.write(workshop.config("config", **own)), workshop.folder / "taught"
    words = ["--config", config, "--model", teacher, "--top", 261, "--output", f"{output}.jsonl"]
    assert main(["data", "teach", own["data__train"], *map(str, words)]) == 0
    stored = workshop.train("stored", **own | {"data__train": f"{output}.jsonl"})
    assert values(stored) == pytest.approx(values(beside), rel=1e-6, abs=1e-7)
    tokens = [values(run, "supervised_tokens") for run in (clm, beside, stored)]
    assert tokens[0] == tokens[1] == tokens[2]
    with pytest.raises(ConfigError, match="distill trains on every token of rows of text"):
        workshop.check("run", **own, data__loss_on="last_turn")
    with pytest.raises(DataError, match=r"set data.format: text, to learn every token"):
        workshop.check("run", **own | {"data__format": "auto", "data__truncation": "drop"})


@pytest.mark.proof
def test_fewer_tokens_say_less_however_the_step_is_cut_up(workshop, teacher):
    rows = teach(workshop, teacher, top=8)
    own = {**STEPS, "data__train": str(rows), "data__eval_fraction": 0.2}
    beside = workshop.train("beside", **STEPS, objective__teacher=str(teacher))
    four = workshop.train("four", **own)
    one = workshop.train("one", **own, train__micro_batch_size=1, data__packing=False)
    padded = workshop.train("padded", **own, model__attention="sdpa")
    for run in (one, padded):
        assert values(run) == pytest.approx(values(four), rel=1e-4)
    assert 0 < values(four)[0] < values(beside)[0]


def test_another_temperature_or_loss_is_refused_with_the_line(workshop, teacher):
    rows = teach(workshop, teacher, "--temperature", 2.0, top=4)
    own = {**STEPS, "data__train": str(rows)}
    with pytest.raises(DataError, match="temperature 2, and objective.temperature is 1"):
        workshop.check("run", **own)
    own["objective__temperature"] = 2.0
    workshop.check("run", **own)
    with pytest.raises(DataError, match=r"taught.jsonl:1: column teacher was scored on other tok"):
        workshop.check("run", **own, data__system_prompt="Be brief.")
    lines = read_jsonl(rows)
    lines[3]["answer"] += "!"
    write_jsonl(rows, lines)
    with pytest.raises(DataError, match=r"taught.jsonl:4: column teacher was .* other tokens: fr"):
        workshop.check("run", **own)
    del lines[3]["teacher"]
    lines[5]["teacher"][0]["ids"] = "no base64"
    write_jsonl(rows, lines)
    with pytest.raises(DataError, match=r"2 of 40 rows") as refused:
        workshop.check("run", **own)
    assert "taught.jsonl:4: column teacher is missing; write it with" in str(refused.value)
    assert "taught.jsonl:6: column teacher is damaged" in str(refused.value)


@pytest.mark.parametrize("name", ["tokens", "ids", "logprobs"])
def test_a_digit_that_changed_is_damage_though_the_numbers_could_be_right(name):
    held = Taught(np.arange(4), np.array([2, 3]), np.array([[1, 2]] * 2), -np.ones((2, 2))).values()
    assert Taught.read(held | {"temperature": 1}).temperature == 1.0
    bytes_of = bytearray(base64.b64decode(held[name]))
    bytes_of[1] ^= 4
    with pytest.raises(ValueError, match="is damaged: it has another hash"):
        Taught.read(held | {name: base64.b64encode(bytes_of).decode()})


def test_numbers_that_are_no_distribution_are_refused():
    good = Taught(np.arange(4), np.array([2, 3]), np.array([[1, 2]] * 2), -np.ones((2, 2)))
    again = Taught.read(json.loads(json.dumps(good.values())))
    assert (again.ids == good.ids).all()
    assert (again.logprobs == good.logprobs).all()
    wrong = {
        "cannot be log-probabilities": {"logprobs": np.zeros((2, 2))},
        "names a token twice": {"ids": np.array([[1, 1]] * 2)},
        "places that the document does not have": {"scored": np.array([2, 4])},
        "below 0": {"ids": np.array([[-1, 2]] * 2)},
    }
    for what, changed in wrong.items():
        with pytest.raises(ValueError, match=what):
            Taught.read(Taught(**{**vars(good), **changed}).values())


def test_a_column_of_scored_tokens_has_zeros_elsewhere():
    column = Scored(np.array([5, 2]), np.array([[5.0], [2.0]]), 8)
    assert column[slice(1, 6)][:, 0].tolist() == [0, 2, 0, 0, 5]
    assert column[slice(6, 8)].shape == (2, 1)


# --------------------------------------------------------------------------------------- a server


def vllm(teacher, cuts=None, words=False):
    """Answer as vLLM does: log-probabilities of the prompt, whose tokens it names by their ids."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokenizer = cuts or bytes_tokenizer()

    def answer(body):
        assert body["echo"]
        assert body["return_tokens_as_token_ids"]
        given = body["prompt"]
        ids = tokenizer.encode(given, add_special_tokens=False) if isinstance(given, str) else given
        with torch.no_grad():
            log = model(input_ids=torch.tensor([ids]).clamp(max=260)).logits[0].log_softmax(-1)
        tops = [None]
        for place, token in enumerate(ids[1:]):
            found = log[place].topk(body["logprobs"])
            top = dict(zip(found.indices.tolist(), found.values.tolist()))
            tops.append(
                {f"token_id:{n}": v for n, v in {**top, token: float(log[place, token])}.items()}
            )
        names = ["x" if words else f"token_id:{each}" for each in [*ids, 5]]
        logprobs = {"tokens": names, "top_logprobs": [*tops, {"token_id:5": -0.5}]}
        return {"choices": [{"text": "", "finish_reason": "length", "logprobs": logprobs}]}

    return answer


@pytest.mark.proof
def test_a_server_says_what_the_model_itself_says(workshop, teacher):
    here = read_jsonl(teach(workshop, teacher, top=5))
    with chat_server.running(answer=vllm(teacher)) as server:
        there = read_jsonl(
            teach(workshop, "any", "--endpoint", server.url, top=5, name="from_server")
        )
    assert [row["teacher"][0]["ids"] for row in there] == [row["teacher"][0]["ids"] for row in here]
    for one, other in zip(there, here):
        mine, its = (Taught.read(row["teacher"][0]).logprobs for row in (one, other))
        np.testing.assert_allclose(mine, its, atol=1e-5)


@pytest.mark.proof
def test_a_server_that_cannot_say_it_is_refused(workshop, teacher, capsys):
    other = bytes_tokenizer()
    other.add_tokens(["Hello"])
    for answer, what in [
        (vllm(teacher, words=True), "names tokens by their text"),
        (vllm(teacher, cuts=other), "has another tokenizer"),
        (chat_server.echoed, "returns no log-probabilities of its prompt"),
    ]:
        with chat_server.running(answer=answer) as server:
            teach(workshop, "any", "--endpoint", server.url, top=5, code=2)
        assert what in capsys.readouterr().err
    teach(workshop, "any", "--endpoint", "http://x", "--temperature", 2, code=2)
    assert "--temperature: a server's" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        teach(workshop, teacher, "--temperature", 0)
    assert "should be from 0.001 to 100, got '0'" in capsys.readouterr().err
    teach(workshop, teacher, "--key", "NAME", code=2)
    assert "--key: would be ignored" in capsys.readouterr().err
    teach(workshop, workshop.folder / "missing", code=2)
    assert "--model: " in capsys.readouterr().err
