"""Messages name the command as the user calls it."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from finetune import places
from finetune.__main__ import COMMANDS, OTHERS, main


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/venv/bin/finetune", "finetune"), ("finetune.exe", "finetune"),
        ("/x/finetune/__main__.py", "python -m finetune"), ("train.py", "python -m finetune"),
    ],
)  # fmt: skip
def test_messages_name_the_command_that_started_the_program(program, command, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    places.note_command(program)
    assert places.command() == command


def test_the_installed_command_names_itself(tmp_path):
    """A console script, as pip writes it; the processes that it starts name it too."""
    script = tmp_path / "finetune"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom finetune.__main__ import "
        "main\nsys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "launch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "launch needs a script: finetune launch train.py my_run.yaml" in done.stderr


@pytest.mark.parametrize("name", sorted({*COMMANDS, *OTHERS} - {"launch", "check"}))
def test_the_help_of_a_command_is_its_own(name, capsys, monkeypatch):
    """All but launch, which takes signals, and check, whose help is that of train."""
    monkeypatch.setenv("FINETUNE_COMMAND", "finetune")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: finetune {name} ")


def test_check_is_train_with_check(workshop, monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(workshop.write(workshop.config()))])
    assert (ended.value.code, workshop.run_dir().exists()) == (0, False)
    assert "first example" in capsys.readouterr().out
