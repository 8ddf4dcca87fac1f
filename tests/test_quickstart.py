"""The commands of `make quickstart`, taken from the Makefile and cut short: they fit together."""

import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, launch


def recipe() -> list[list[str]]:
    """What make would run, as lists of words."""
    text = subprocess.run(
        ["make", "-n", "-o", "install", "quickstart"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words and words[0].endswith("python")]


@pytest.mark.proof
def test_the_quickstart_runs_from_rows_to_a_comparison(tmp_path):
    """Few steps and rows; .ci/run runs it all and expects 9 of 10 tuned answers to be right."""
    short = {
        "data_scripts/pig_latin.py": ["--words", "600", "--train", "320", "--held-out", "16"],
        "configs/quickstart_pretrain.yaml": [
            "--train.max_steps",
            "2",
            "--schedule.warmup_steps",
            "1",
        ],
        "configs/quickstart.yaml": ["--train.max_steps", "2", "--schedule.warmup_steps", "1"],
    }
    commands = recipe()
    assert len(commands) == 4
    for words in commands:
        arguments = [
            sys.executable,
            *words[1:],
            *next((extra for name, extra in short.items() if name in words), []),
        ]
        arguments = [
            a.replace("data/pig_latin", f"{tmp_path}/data").replace("runs/", f"{tmp_path}/runs/")
            for a in arguments
        ]
        if "train.py" in arguments:
            arguments += ["--run.dir", f"{tmp_path}/runs", "--data.cache_dir", f"{tmp_path}/cache"]
            rows = "sentences.txt" if "pretrain" in " ".join(arguments) else "train.jsonl"
            arguments += ["--data.train", f"{tmp_path}/data/{rows}"]
            if "pretrain" not in " ".join(arguments):
                arguments += [
                    "--data.eval",
                    f"{tmp_path}/data/dev.jsonl",
                    "--model.path",
                    f"{tmp_path}/runs/quickstart_base/model",
                ]
        result = launch(arguments)
        assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
    assert "16 held-out rows" in result.stdout
    assert result.stdout.count("\ntuned ") == 5
