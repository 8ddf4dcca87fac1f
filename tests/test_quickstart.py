"""The commands of `make quickstart` and the two after it, cut short: they fit together."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, launch

SHORT = {
    "data_scripts/pig_latin.py": ["--words", "2400", "--train", "320", "--held-out", "16"],
    "train.py": ["--train.max_steps", "2", "--schedule.warmup_steps", "1"],
    "-m": [],
}
# A model of two steps gets no word right, and seldom ends an answer.
REWARDED = [
    "--objective.rewards", "[{kind: score, score: words}]",
    "--objective.rollouts", "{group_size: 8, max_new_tokens: 8, cut_answers: learn}",
]  # fmt: skip


def recipe(target: str) -> list[list[str]]:
    """What make would run, as lists of words."""
    made = ["-o", "install", "-o", "runs/quickstart/model"]
    text = subprocess.run(
        ["make", "-n", *made, target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words and words[0].endswith("python")]


def cut_short(words: list[str], folder: str) -> list[str]:
    """The same command with few rows and steps, whose files stand in a folder."""
    arguments = [*words[1:], *SHORT[words[1]]]
    if words[1] == "train.py":
        arguments += REWARDED if "reinforcement" in words[-1] else []
        config = yaml.safe_load((ROOT / words[words.index("--config") + 1]).read_text())
        for section, name in (("model", "path"), ("data", "train"), ("data", "eval")):
            if value := config[section].get(name):
                arguments += [f"--{section}.{name}", value]
        arguments += ["--run.dir", "runs/", "--data.cache_dir", f"{folder}/cache"]
    return [re.sub(r"^(data/|runs/)", rf"{folder}/\1", word) for word in arguments]


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_the_quickstarts_run_from_rows_to_a_comparison(tmp_path):
    """.ci/run runs the first whole, and expects 9 of 10 tuned answers to be right."""
    for target, count in (("quickstart", 4), ("preference", 4), ("reinforcement", 4)):
        commands = recipe(target)
        assert len(commands) == count
        for words in commands:
            arguments = cut_short(words, str(tmp_path))
            result = launch([sys.executable, *arguments])
            told = f"{' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
            assert result.returncode == 0, told
        assert "16 held-out rows" in result.stdout
        assert result.stdout.count("\ntuned ") == 5
