"""A run prints lines, one bar on a terminal, errors on stderr, and the next commands."""

import fcntl
import logging
import os
import pty
import re
import select
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from finetune import chat
from finetune.__main__ import main
from finetune.engine import metrics
from finetune.engine.metrics import Metrics
from finetune.engine.progress import Progress
from finetune.evaluation import held_out
from finetune.generation import generate

QUICK = {"train__max_steps": 1, "train__micro_batch_size": 8}


def test_a_run_reports_on_standard_output_and_prints_two_samples(workshop, capsys):
    asked = {"sample_prompts": ["one", "two", "three"], "sample_max_new_tokens": 4}
    samples = {f"evaluation__{name}": value for name, value in asked.items()}
    run = workshop.train(**samples, data__eval_fraction=0.1, train__max_steps=2)
    output = capsys.readouterr()
    steps = ("step 1/2  epoch", "step 2/2  eval loss", "complete at step 2")
    for part in ("model       llama", *steps):
        assert part in output.out
    assert output.err == ""
    lines = [line for line in output.out.splitlines() if line.startswith("step 2/2  ")]
    assert [line.split("  ")[2] for line in lines if "  sample  " in line] == ["one", "two"]
    assert lines[-1].endswith(f"1 more in {run}/samples.jsonl")


HOSTILE = "\x1b]0;owned\x07 \x1b[2J\r\x7f\x9b1m"


@pytest.mark.parametrize(
    "show",
    [
        lambda: chat._print(HOSTILE, None), lambda: chat._log(HOSTILE),
        lambda: metrics.log(HOSTILE), lambda: generate.log(HOSTILE),
        lambda: held_out.note(HOSTILE), lambda: main(["votes", HOSTILE]),
    ],
    ids=["answer", "chat", "run", "generation", "evaluation", "error"],
)  # fmt: skip
def test_a_terminal_obeys_no_text_of_models_rows_or_files(show, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show()
    printed = "".join(capsys.readouterr())
    assert not re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)
    assert "␛]0;owned␇ ␛[2J␍␡\\x9b1m" in printed


def test_a_complete_run_names_the_commands_that_come_next(workshop, capsys):
    base = workshop.train("base", **QUICK) / "model"
    own = {
        "model__init": "pretrained", "model__path": str(base), "model__config": None,
        "model__tokenizer": None,
    }  # fmt: skip
    capsys.readouterr()
    run = workshop.train("lora", adapter__kind="lora", **own, **QUICK)
    after = capsys.readouterr().out.partition("\nnext:\n")[2].splitlines()
    commands = {line.split()[0]: re.split(r"python -m finetune ", line)[1] for line in after}
    assert commands == {
        "chat": f"chat {run}",
        "compare": f"evaluate {run} --data HELD_OUT_ROWS",
        "draw": f"curves {run}",
        "merge": f"merge {run} --output {run}/merged",
    }
    assert main(commands["draw"].split()) == 0
    assert main(commands["merge"].split()) == 0
    assert main([*commands["chat"].split(), "--prompt", "hi", "--max-new-tokens", "1"]) == 0


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that redirects streams to an 80-column terminal and returns its content."""
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w")
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def written(*names):
        for name in names:  # in the test: pytest puts its own streams back after each fixture
            monkeypatch.setattr(sys, name, stream)
        stream.flush()
        text = b""
        while select.select([ours], [], [], 0.2)[0]:
            text += os.read(ours, 1 << 16)
        return text.decode()

    yield written
    stream.close()
    os.close(ours)


def metrics_of(folder):
    names = ("metrics", "evals", "samples", "saves")
    place = SimpleNamespace(logs=SimpleNamespace(**{name: folder / name for name in names}))
    return Metrics(
        place, num_steps=3, start=0, every=1, is_main=True, num_processes=1, flops_per_token=0
    )


def steps(reporter):
    for number in range(1, 4):
        result = SimpleNamespace(
            loss=2.5, terms={}, other_terms={}, grad_norm=1.0, tokens=10, skipped=False
        )
        reporter.step(Progress(step=number), result, lr=1e-3, epoch=number / 3, memory_gb=0.5)


def test_a_terminal_shows_lines_and_a_bar_that_disappears(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LINE_SECONDS", -1)
    terminal("stdout", "stderr")
    reporter = metrics_of(tmp_path)
    steps(reporter)
    during = terminal()
    assert re.search(r"\r *\d+%\|.{30,}\| \d/3 \[", during)
    assert [f"step {n}/3  epoch" in during for n in (1, 2, 3)] == [True] * 3
    reporter.close_bar()
    metrics.log("complete")
    after = terminal()
    reporter.close()
    assert after.replace("\r", "").strip() == "complete"
    assert "|" not in after


def test_a_bar_is_not_written_into_a_pipe(terminal, tmp_path, monkeypatch):
    """With `train.py | tee log` the bar would reach the terminal and the lines the pipe."""
    import io

    terminal("stderr")
    monkeypatch.setattr(sys, "stdout", pipe := io.StringIO())
    reporter = metrics_of(tmp_path)
    steps(reporter)
    reporter.close()
    sys.stderr.write("end")
    assert terminal() == "end"
    assert "step 3/3" in pipe.getvalue()


def test_progress_of_answers_is_printed_without_a_terminal(workshop, monkeypatch, capsys):
    from finetune.export.load import load, load_tokenizer

    path = workshop.train("base", **QUICK) / "model"
    model, tokenizer = load(path), load_tokenizer(path)
    capsys.readouterr()
    monkeypatch.setattr(generate, "LINE_SECONDS", -1)
    prompts = ["a", "b", "c"]
    generate.answers(model, tokenizer, prompts, max_new_tokens=1, batch_size=2, title="base")
    assert capsys.readouterr().err.splitlines() == ["base: 2 of 3 answers", "base: 3 of 3 answers"]


def test_a_chat_writes_its_answer_as_it_comes(workshop, monkeypatch, capsys):
    run = workshop.train("base", **QUICK)
    seen, show = [], chat._print
    monkeypatch.setattr(
        chat, "_print", lambda text, tokens: (seen.append(text), show(text, tokens))
    )
    capsys.readouterr()
    assert main(["chat", str(run), "--prompt", "hi", "--max-new-tokens", "5"]) == 0
    output = capsys.readouterr()
    assert len(seen) > 1
    assert output.out == "".join(seen) + "\n"
    assert "cut after 5 tokens" in output.err or not output.err


def test_a_chat_without_a_model_explains_the_option(capsys):
    assert main(["chat"]) == 2
    assert "chat runs/my_run" in capsys.readouterr().err


def test_an_unresponsive_hub_is_reported_once_with_advice(caplog):
    logger = logging.getLogger("huggingface_hub.utils._http")
    for _ in range(3):
        logger.warning(
            "'no name' thrown while requesting HEAD "
            "https://huggingface.co/a/b/resolve/main/config.json"
        )
        logger.warning("Retrying in 1s [Retry 1/5].")
    [record] = caplog.records
    assert "https://huggingface.co does not answer" in record.message
    assert "HF_HUB_OFFLINE=1" in record.message


def test_deepspeed_is_silent_about_machines_without_a_gpu(caplog):
    logging.getLogger("DeepSpeed").warning(
        "Setting accelerator to CPU. If you have GPU or other accelerator, ..."
    )
    logging.getLogger("DeepSpeed").warning("something else")
    assert [record.message for record in caplog.records if record.name == "DeepSpeed"] == [
        "something else"
    ]
