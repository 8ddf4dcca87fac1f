"""`finetune data generate`: new rows from another model, nothing asked twice, within a budget."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import chat_server
import pytest
from conftest import ROOT, Workshop, read_jsonl, short, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_preparation import Bench

from finetune import endpoint
from finetune.data import clusters
from finetune.errors import DataError
from finetune.preparation import request as requests
from finetune.preparation import rouge, survey, tasks
from finetune.preparation.rouge import Texts
from finetune.preparation.tasks import Task

pytestmark = pytest.mark.slow

LENIENT = {"deadline": None, "suppress_health_check": list(HealthCheck)}
SEEDS = [
    {"question": f"Which animal is number {word}?", "answer": f"The {word} one."}
    for word in ("first", "second", "third", "fourth", "fifth")
]


def teacher(body) -> str:
    """Answer by the prompt alone: five tasks, of which every fifth resembles another."""
    prompt = body["messages"][-1]["content"]
    if "Write 5 new tasks" not in prompt:
        return f"It is {len(prompt)}."
    source = random.Random(prompt)
    made = []
    for number in range(5):
        words = " ".join(f"w{source.randrange(400)}" for _ in range(6))
        question = f"Which animal is number {source.choice(['first', 'second'])}?"
        made.append(f"Question: {question if number == 4 else f'What is {words}?'}")
        if "Answer:" in prompt:
            made[-1] += f"\nAnswer: a{number}"
    return "\n\n".join(made)


@pytest.fixture
def bench(tmp_path, capsys) -> Bench:
    return Bench(tmp_path, capsys)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    with chat_server.running(answer=teacher) as running:
        yield running


def options(bench, server, *more, output="out.jsonl"):
    files = ["--output", bench.folder / output, "--counts", bench.folder / "counts.json"]
    return ["generate", *files, "--endpoint", server.url, "--model", "good-model", *more]


def made(bench, server, *more, output="out.jsonl", force=True):
    given = options(bench, server, *more, output=output)
    assert bench.run(*given, *(["--force"] if force else [])) == 0, bench.stderr
    return read_jsonl(bench.folder / output)


# ------------------------------------------------------------------------------------- new tasks


@pytest.mark.parametrize("steps", short([[], ["--two-steps"]], []))
def test_tasks_grow_from_seeds(bench, server, steps):
    seeds = bench.rows(SEEDS)
    rows = made(bench, server, seeds, "--rows", 30, *steps, "--rejects", bench.folder / "r.jsonl")
    assert len(rows) == 30
    known = Texts(0.7)
    for seed in SEEDS:
        known.add(seed["question"])
    for row in rows:
        assert known.resembled(row["question"]) is None
        known.add(row["question"])
    assert {row["origin"] for row in rows} == {"generated"}
    assert {row["model"] for row in rows} == {"good-model"}
    answers = read_jsonl(bench.folder / "out.jsonl.answers")
    assert {row["prompt_hash"] for row in rows} <= {line["prompt_hash"] for line in answers}
    if steps:
        assert rows[0]["answer"] == f"It is {len(rows[0]['question'])}."
    dropped = bench.counts["dropped"]
    assert dropped["too much like a known question"] == len(
        [row for row in read_jsonl(bench.folder / "r.jsonl") if "much like" in row["reason"]]
    )
    assert bench.counts["requests"] == len(server.seen) == len(answers)
    shown = server.seen[0]["messages"][0]["content"]
    assert sum(seed["question"] in shown for seed in SEEDS) == 3


def test_no_row_at_all_is_a_failure_with_the_reason_and_replaces_nothing(bench, monkeypatch):
    refuses = {"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}
    (bench.folder / "out.jsonl").write_text("of before\n")
    with chat_server.running(answer=lambda body: {"choices": [refuses]}) as server:
        given = options(bench, server, "--prompts", bench.rows(SEEDS), "--force")
        assert bench.run(*given) == 1
        assert "failed: 5 requests made no row: 5 the model refuses" in bench.stderr
        assert bench.run(*given, "--most-requests", 2) == 1
        assert (bench.folder / "out.jsonl").read_text() == "of before\n"


def test_requests_show_new_tasks_too(bench, server):
    rows = made(bench, server, bench.rows(SEEDS), "--rows", 120, "--at-once", 1)
    later = [body["messages"][0]["content"] for body in server.seen[16:]]
    assert later
    assert all(any(row["question"] in prompt for row in rows) for prompt in later)


def test_the_report_counts_new_rows_as_generated(bench, server):
    rows = made(bench, server, bench.rows(SEEDS), "--rows", 3)
    column = next(name for name in survey.ORIGINS if name in rows[0])
    assert survey.origin_of(rows[0][column]) == "generated"


def test_a_model_that_repeats_itself_ends_the_work(bench, server):
    server.answer = lambda body: "Question: Which animal is number first?\nAnswer: a"
    assert bench.run(*options(bench, server, bench.rows(SEEDS), "--rows", 30)) == 1
    assert "20 requests in a row brought no new task: 0 of 30 rows" in bench.stderr
    assert "made no row: 25 too much like a known question; " in bench.stderr
    assert len(server.seen) <= 20 + 16


def test_a_template_of_the_users(bench, server):
    template = bench.folder / "my.jinja"
    template.write_text("Write 5 new tasks: {{ examples[0].question }} Answer:")
    made(bench, server, bench.rows(SEEDS), "--rows", 3, "--template", template)
    assert server.seen[0]["messages"][0]["content"].startswith("Write 5 new tasks: Which animal")
    template.write_text("{{ nothing }}")
    given = options(bench, server, bench.rows(SEEDS), "--rows", 3, "--template", template)
    assert bench.run(*given, "--force") == 2
    assert f"--template: {template}: 'nothing' is undefined; it gets examples" in bench.stderr
    for fails in ("{{ 1 / 0 }}", "{{ examples.x.y }}", "{{ count.join('a') }}", "{{ ''[::0] }}"):
        template.write_text(fails)
        assert bench.run(*given, "--force") == 2
        assert f"--template: {template}: " in bench.stderr
    template.write_text("a\n{% if %}")
    assert bench.run(*given, "--force") == 2
    assert f"--template: {template}:2: " in bench.stderr


def test_completions_go_on_with_a_question(bench, server):
    server.answer = lambda body: f" What is {body['prompt'][-9:]}?\nAnswer: a"
    rows = made(bench, server, bench.rows(SEEDS), "--rows", 1, "--completions")
    assert server.seen[0]["prompt"].endswith("\n\nQuestion:")
    assert rows[0]["question"] == "What is Question:?"


# ----------------------------------------------------------------------------- kills and budgets


@pytest.mark.parametrize("num_cuts", short([1, 30], 1))
@pytest.mark.parametrize("steps", [[], ["--two-steps"]])
def test_after_a_kill_the_same_command_goes_on(bench, server, steps, num_cuts):
    """Cut the file of answers anywhere: the rows are the same, and what it has is not asked."""
    given = [bench.rows(SEEDS), "--rows", 30, *steps]
    whole = made(bench, server, *given)
    answers = bench.folder / "out.jsonl.answers"
    data, num_asked = answers.read_bytes(), len(server.seen)
    source = random.Random(0)
    cuts = [1, data.index(b"\n") + 1, len(data) - 1]
    for cut in [*cuts, *source.sample(range(2, len(data) - 1), num_cuts)]:
        server.seen.clear()
        answers.write_bytes(data[:cut])
        assert made(bench, server, *given) == whole
        assert len(server.seen) == num_asked - data[:cut].count(b"\n")
        assert sorted(answers.read_bytes().splitlines()) == sorted(data.splitlines())


@pytest.mark.slow
def test_a_killed_process_has_kept_every_answer(bench, server):
    """The server sees again only what was under way when the process was killed."""
    server.delay = lambda body: 0.05
    seeds = bench.rows(SEEDS)
    given = [*map(str, options(bench, server, seeds, "--rows", "60", "--at-once", "2"))]
    command = [sys.executable, str(ROOT / "data_scripts/generate.py"), *given[1:]]
    answers = bench.folder / "out.jsonl.answers"
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (bench.folder / "out.jsonl").exists()
    assert not list(bench.folder.glob("out.jsonl.answers?*"))
    kept = answers.read_bytes().count(b"\n")
    time.sleep(0.1)
    before, server.delay = len(server.seen), lambda body: 0.0
    assert before - kept <= 2
    rows = made(bench, server, seeds, "--rows", 60, "--at-once", 2, force=False)
    assert rows == made(bench, server, seeds, "--rows", 60, output="another.jsonl")
    assert bench.counts["requests"] == read_jsonl(answers).__len__()


def test_rows_do_not_depend_on_how_fast_answers_come(bench, server):
    seeds = bench.rows(SEEDS)
    whole = made(bench, server, seeds, "--rows", 60, "--at-once", 1)
    source = random.Random(1)
    server.delay = lambda body: source.random() / 50
    server.faults = ["503", "cut"] * 3
    assert made(bench, server, seeds, "--rows", 60, "--at-once", 16, output="b.jsonl") == whole


def test_a_budget_ends_the_work_and_a_larger_one_goes_on(bench, server):
    seeds = bench.rows(SEEDS)
    whole = made(bench, server, seeds, "--rows", 80, output="whole.jsonl")
    num_asked = len(server.seen)
    server.seen.clear()
    rows = made(bench, server, seeds, "--rows", 80, "--most-requests", 7)
    assert len(server.seen) == 7
    assert whole[: len(rows)] == rows
    assert len(rows) < 80
    assert bench.counts["stopped"] == "budget"
    assert "the budget ended after 7 requests; the same command with a larger" in bench.stderr
    assert made(bench, server, seeds, "--rows", 80, "--most-requests", 7) == rows
    assert len(server.seen) == 7
    assert made(bench, server, seeds, "--rows", 80) == whole
    assert len(server.seen) == num_asked


def test_a_budget_of_money_holds(bench, server):
    prompts = bench.rows([{"prompt": f"prompt {number}"} for number in range(40)])
    price = ["--price", "1000,2000", "--max-tokens", 50]  # 0.01 for a prompt, 0.01 for an answer
    rows = made(bench, server, "--prompts", prompts, *price, "--most-money", 0.5)
    # Each costs 0.02, and until its usage is known up to 0.14, of which 16 may be under way.
    assert 3 <= len(rows) == len(server.seen) <= 25
    assert bench.counts["money"] == pytest.approx(0.02 * len(rows))
    assert bench.counts["tokens"] == {"prompt": 10 * len(rows), "answer": 5 * len(rows)}
    assert f"the answers cost {0.02 * len(rows):.4f}" in bench.stderr


def test_another_process_may_not_write_the_same_answers(bench, server):
    prompts = bench.rows([{"prompt": "a"}])
    made(bench, server, "--prompts", prompts)
    import fcntl

    with (bench.folder / "out.jsonl.answers").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert bench.run(*options(bench, server, "--prompts", prompts, "--force")) == 1
    assert "another process writes it" in bench.stderr


def test_what_is_no_file_of_answers_is_left_alone(bench, server):
    mine = bench.folder / "out.jsonl.answers"
    prompts = bench.rows([{"prompt": "a"}])
    replies = [f'{{"key": "a", "reply": {{"text": {text}}}}}\n' for text in ("5", "null", "[]")]
    replies.append('{"key": "a", "reply": {"text": "b", "tries": "1"}}\n')
    for text in ("mine\n", '{"key": 1}\n', '[]\n{"a"', '{"key": "a", "reply": []}\n', *replies):
        mine.write_text(text)
        assert bench.run(*options(bench, server, "--prompts", prompts)) == 2
        assert f"{mine}:1: holds no answer of this program" in bench.stderr
        assert mine.read_text() == text
    assert not server.seen


# --------------------------------------------------------------------------------------- prompts


def test_prompts_of_any_format_get_new_answers(bench, server):
    server.answer = lambda body: " / ".join(m["content"] for m in body["messages"])
    turns = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "old"}]
    rows = [
        {"prompt": "a", "completion": "old", "id": 7},
        {"question": "b", "answer": "old"},
        {"instruction": "c", "input": "d", "output": "old"},
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "f"}]},
        {"text": "g"},
        {"system": "s", "prompt": "h"},
    ]
    found = made(bench, server, "--prompts", bench.rows(rows), "--temperature", "none")
    texts = ["a", "b", "c\n\nd", "e", "f", "g", "s / h"]
    assert [row["messages"][-1]["content"] for row in found] == texts
    assert found[0]["id"] == 7
    assert all("old" not in json.dumps(row) for row in found)
    assert found[3]["messages"][:1] == turns[:1]
    assert all("temperature" not in body for body in server.seen)
    assert bench.counts["read"] == 7
    lines = bench.folder / "lines.txt"
    lines.write_text("one\ntwo\n")
    system = ["--system", "be short"]
    found = made(bench, server, "--prompts", lines, *system, output="b.jsonl")
    assert [row["messages"][-1]["content"] for row in found] == ["be short / one", "be short / two"]


def test_the_same_prompt_twice_is_asked_twice(bench, server):
    prompts = bench.rows([{"prompt": "a"}, {"prompt": "a"}])
    assert len(made(bench, server, "--prompts", prompts)) == len(server.seen) == 2
    made(bench, server, "--prompts", prompts)
    assert len(server.seen) == 2
    assert bench.counts["changed"]["answers of earlier starts"] == 2


def test_answers_that_teach_nothing_are_dropped(bench, server):
    def answer(body):
        return {"a": "fine", "b": " ", "c": "cut", "d": "cut"}[body["messages"][0]["content"]]

    server.answer = answer
    prompts = bench.rows([{"prompt": text} for text in "abcd"])
    server.faults = [
        "", "", 'raw {"choices": [{"text": "c", "finish_reason": "length"}]}',
        'raw {"choices": [{"text": "d", "finish_reason": "content_filter"}]}', "400",
    ]  # fmt: skip
    given = ["--prompts", prompts, "--at-once", 1, "--rejects", bench.folder / "r.jsonl"]
    rows = made(bench, server, *given)
    assert [row["messages"][-1]["content"] for row in rows] == ["fine"]
    cut = {"cut at --max-tokens": 1, "cut by the server's filter": 1}
    dropped = {"without an answer": 1} | cut
    assert bench.counts["dropped"] == dropped
    prompts.write_text(prompts.read_text() + '{"prompt": "too long"}\n')
    made(bench, server, *given)
    assert bench.counts["dropped"] == dropped | {"refused by the server": 1}
    assert "refuses the request (400: fault 400)" in (bench.folder / "r.jsonl").read_text()


def test_a_server_that_refuses_the_first_request_ends_the_work(bench, server):
    server.faults = ["400"] * 9
    prompts = bench.rows([{"prompt": text} for text in "abc"])
    assert bench.run(*options(bench, server, "--prompts", prompts)) == 2
    assert "refuses the request (400: fault 400)" in bench.stderr
    assert not list(bench.folder.glob("out*"))


def test_a_server_that_goes_away_keeps_what_it_has_answered(bench, server):
    prompts = bench.rows([{"prompt": f"{number}"} for number in range(8)])
    server.faults = ["", "", ""] + ["503"] * 99
    given = ["--prompts", prompts, "--at-once", 1, "--retries", 1]
    assert bench.run(*options(bench, server, *given)) == 1
    assert "it answers 503 (fault 503), 2 times; run the same command again later" in bench.stderr
    assert not bench.out.exists()
    server.faults = []
    assert len(made(bench, server, *given)) == 8
    assert len(server.seen) == 8


def test_all_wrong_prompts_are_listed_before_any_is_asked(bench, server):
    prompts = bench.rows(
        [{"prompt": "a"}, {"prompt": ""}, {"other": 1}, {"prompt": "a", "model": 1}]
    )
    assert bench.run(*options(bench, server, "--prompts", prompts)) == 2
    for what in ("3 of 4 rows are wrong", "2: ", "3: no prompt; it has ['other']", "'model' would"):
        assert what in bench.stderr
    assert not server.tries


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to begin with; give one of SEEDS, --prompts, --from-report"),
        (["in.jsonl", "--prompts", "in.jsonl"], "SEEDS and --prompts exclude each other"),
        (["in.jsonl"], "--rows says how many rows to make of SEEDS; add it"),
        (["--prompts", "in.jsonl", "--rows", "3"], "remove it, as there are none"),
        (["in.jsonl", "--rows", "3", "--most-money", "1"], "--most-money needs --price"),
        (["in.jsonl", "--rows", "3", "--price", "1"], "should be two numbers, as 0.15,0.6"),
        (["in.jsonl", "--rows", "3", "--temperature", "hot"], "from 0.001 to 100, got 'hot'"),
        (["in.jsonl", "--rows", "3", "--key", "NO_SUCH"], "the environment has no NO_SUCH"),
        (["in.jsonl", "--rows", "3", "--endpoint", "here"], "should begin with http://"),
        (["in.jsonl", "--rows", "0"], "at least 1"),
        (["--prompts", "in.jsonl", "--seed", "0"], "--seed is for new tasks, not for --prompts"),
        (["--prompts", "in.jsonl", "--two-steps"], "--two-steps is for new tasks"),
        (["--prompts", "in.jsonl", "--format", "text"], "--format is for SEEDS; remove it"),
        (["--from-report", "in.jsonl", "--columns", "a: b"], "--columns is for SEEDS and"),
        (["--prompts", "in.jsonl", "--trust-remote-code"], "is for a model on this machine"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--from-report", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_wrong_options_are_named(bench, server, monkeypatch, given, message):
    monkeypatch.chdir(bench.folder)
    bench.rows(SEEDS)
    assert bench.run(*options(bench, server), *given) == 2
    assert message in bench.stderr
    assert not server.tries


def test_options_of_a_server_need_one(bench):
    seeds = bench.rows(SEEDS)
    given = ["generate", seeds, "--rows", 3, "--output", bench.out, "--model", "m"]
    for option, value in (("--key", "OPENAI_API_KEY"), ("--retries", 0), ("--timeout", 300)):
        assert bench.run(*given, option, value) == 2
        assert f"{option} is for an --endpoint; add one, or remove it" in bench.stderr


def test_wrong_seeds_are_listed(bench, server):
    turn = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    rows = [*SEEDS, {"messages": [turn, answer, turn, answer]}, {"question": 5, "answer": "a"}]
    assert bench.run(*options(bench, server, bench.rows(rows), "--rows", 3)) == 2
    assert "2 of 7 rows are wrong" in bench.stderr
    assert "6: user, assistant, user, assistant are not one question" in bench.stderr
    assert bench.run(*options(bench, server, bench.rows([]), "--rows", 3)) == 2


# ---------------------------------------------------------------------- requests for more data

WANTED = {
    "version": 1,
    "model": "runs/mine",
    "slices": [
        {
            "name": "sums", "description": "Adds prices.", "count": 6, "topics": ["fruit"],
            "constraints": ["one sentence"],
            "examples": [
                {"prompt": "Add 2 and 3.", "reference": "5", "answer": "6", "score": 0.0},
                {"prompt": "Add 4 and 4."},
            ],
        },
        {"name": "names", "count": 3, "examples": [{"prompt": "Who wrote it?", "reference": "I"}]},
    ],
}  # fmt: skip


def test_a_request_for_more_data_is_met(bench, server):
    path = bench.folder / "request.json"
    path.write_text(json.dumps(WANTED))
    rows = made(bench, server, "--from-report", path)
    assert [row["slice"] for row in rows] == ["sums"] * 6 + ["names"] * 3
    prompt = server.seen[0]["messages"][0]["content"]
    for what in ("sums", "Adds prices.", "fruit", "- one sentence", "Add 2 and 3.", "answer: 6"):
        assert what in prompt
    assert "Add 2" not in server.seen[-1]["messages"][0]["content"]


def test_the_commands_and_the_request_of_the_documentation(bench, server, monkeypatch):
    """Each as it stands, with the local server in place of any other model, and fewer rows."""
    section = (ROOT / "docs/data.md").read_text().partition("\n## Rows from another model\n")[2]
    block, example = re.findall(r"```(?:bash|json)\n(.*?)```", section, re.DOTALL)[:2]
    monkeypatch.chdir(bench.folder)
    bench.rows(SEEDS, "seeds.jsonl")
    bench.rows([{"prompt": "a"}], "prompts.jsonl")
    Path("request.json").write_text(example.replace('"count": 200', '"count": 2'))
    commands = [line for line in block.replace("\\\n", " ").splitlines() if line[0] != "#"]
    assert len(commands) == 3
    for number, command in enumerate(commands):
        words = shlex.split(re.sub(r" --endpoint \S+", "", command).replace("1000", "9"))
        assert words[:4] == ["python", "-m", "finetune", "data"]
        assert bench.run(*words[4:], "--endpoint", server.url, "--force") == 0, bench.stderr
        assert ("9", "1", "2")[number] + (" rows" * (number > 0)) + " written" in bench.stderr


def changed(path: str, value) -> dict:
    """Return WANTED with one value changed; path: as slices.0.count."""
    values = json.loads(json.dumps(WANTED))
    *parts, last = path.split(".")
    inner = values
    for part in parts:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "the whole: Input should be an object"),
        ({}, "slices: Field required"),
        (changed("version", 2), "version: Input should be 1, got 2"),
        (changed("slices.0.count", 0), "slices[0].count: Input should be greater"),
        (changed("slices.1.count", "3"), "slices[1].count: Input should be a valid integer, got 3"),
        (changed("slices.0.examples", []), "slices[0].examples: List should have at least 1 item"),
        (changed("slices.0.examples.1.prompt", " "), "slices[0].examples[1].prompt: "),
        (changed("slices.0.exmples", 1), "slices[0].exmples: Extra inputs are not"),
        (changed("slices.1.name", "sums"), "two slices have the name 'sums'; rename one"),
        (changed("slices.0.examples.0.score", float("nan")), "slices[0].examples[0].score"),
    ],
)  # fmt: skip
def test_a_wrong_request_names_every_key(tmp_path, values, message):
    path = tmp_path / "request.json"
    path.write_text(json.dumps(values))
    with pytest.raises(DataError) as raised:
        requests.read(str(path))
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)


@settings(max_examples=15, **LENIENT)
@given(st.binary() | st.text().map(lambda text: json.dumps({"slices": [{"name": text}]}).encode()))
def test_any_bytes_are_a_request_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "request.json"
    path.write_bytes(data)
    with pytest.raises(DataError):
        requests.read(str(path))


def test_the_schema_of_a_request_is_up_to_date():
    written = json.loads((ROOT / "configs/request.json").read_text())
    assert written == requests.DataRequest.model_json_schema()
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(WANTED, written)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed("slices.0.count", 0), written)


# ------------------------------------------------------------------------------ answers, ROUGE-L


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Question: a\nAnswer: b\n\nQuestion: c\nAnswer: d", [("a", "b"), ("c", "d")]),
        ("Sure!\n1. **Question:** a\n   **Answer:** b\n e\n---\n2. **Question:** c\n**Answer:** d",
         [("a", "b\n e"), ("c", "d")]),
        ("### Task 1\nQuestion: a\nAnswer: b\n\n### Task 2:\nQUESTION 2: c\nanswer 2: 5",
         [("a", "b"), ("c", "5")]),
        ("Question: a\nAnswer:\n1\n2\n\n2.\nQuestion: c\nAnswer: 7", [("a", "1\n2"), ("c", "7")]),
        ("Question: a\nAnswer: 3\n\nQuestion: unanswered\n\nQuestion: c\nAnswer: d",
         [("a", "3"), ("c", "d")]),
        ('Question: Why "Answer: x"?\nAnswer: y', [('Why "Answer: x"?', "y")]),
    ],
)  # fmt: skip
def test_tasks_are_read_as_models_write_them(text, expected):
    assert [(task.question, task.answer) for task in tasks.read(text, True, False)] == expected


def test_the_last_task_of_a_cut_answer_is_left_out():
    text = "Question: a\nAnswer: b\n\nQuestion: c\nAnswer: the begin"
    assert tasks.read(text, True, True) == [Task("a", "b")]
    assert [task.question for task in tasks.read(text, False, True)] == ["a", "c"]
    for nothing in ("", "no label", "Question: a", "Answer: b"):
        with pytest.raises(DataError):
            tasks.read(nothing, True, False)


@settings(max_examples=100, **LENIENT)
@given(st.lists(st.text("ab1.:*#\n \tQ"), max_size=5), st.booleans(), st.booleans())
def test_any_answer_is_tasks_or_an_error(parts, with_answers, is_cut):
    try:
        found = tasks.read("Question:".join(parts), with_answers, is_cut)
    except DataError:
        return
    assert found


def slow_rouge(one, other) -> float:
    """ROUGE-L by the usual recursion."""

    @lru_cache(None)
    def common(i, j):
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + common(i + 1, j + 1)
        return max(common(i + 1, j), common(i, j + 1))

    return 2 * common(0, 0) / max(1, len(one) + len(other))


WORDS = st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=12)


@settings(max_examples=100, **LENIENT)
@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_definition(one, other):
    assert rouge.rouge_l(one, other) == pytest.approx(slow_rouge(one, other))


@settings(max_examples=100, **LENIENT)
@given(st.lists(WORDS.map(lambda words: b" ".join(words).decode()), max_size=8), st.floats(0.1, 1))
def test_the_index_finds_what_comparing_all_finds(texts, threshold):
    known = Texts(threshold)
    for number, text in enumerate(texts):
        split = clusters.words(text)
        near = [i for i in range(number)
                if slow_rouge(clusters.words(texts[i]), split) > threshold]  # fmt: skip
        assert known.resembled(text) == (near[0] if near else None)
        known.add(text)


@pytest.mark.parametrize("count", short([2_000, 10_000], 2_000))
def test_ten_thousand_questions_are_compared_in_seconds(count):
    source = random.Random(0)
    vocabulary = [f"w{number}" for number in range(3_000)]
    weights = [1 / (number + 1) for number in range(3_000)]
    known = Texts(0.7)
    start = time.process_time()
    for _ in range(count):
        text = " ".join(source.choices(vocabulary, weights, k=source.randrange(5, 40)))
        known.resembled(text)
        known.add(text)
    assert time.process_time() - start < count / 500  # ten times what it takes


# ------------------------------------------------------------------------------------ this machine


@pytest.mark.slow
def test_a_model_on_this_machine_answers_without_a_network(bench, tmp_path):
    workshop = Workshop(tmp_path)
    model = workshop.train(train__max_steps=1) / "model"
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{n} and?"} for n in range(3)])
    given = ["generate", "--prompts", prompts, "--model", model, "--max-tokens", 4]
    given += ["--output", bench.out, "--at-once", 2, "--temperature", 1, "--force"]
    assert bench.run(*given) == 1
    assert "failed: 3 requests made no row: 3 cut at --max-tokens" in bench.stderr
    answers = Path(f"{bench.out}.answers")
    first = read_jsonl(answers)
    assert len(first) == 3
    answers.unlink()
    assert bench.run(*given) == 1
    assert read_jsonl(answers) == first
    os.utime(model / "model.safetensors")  # as after another training: its answers do not count
    assert bench.run(*given) == 1
    assert len(read_jsonl(answers)) == 6
