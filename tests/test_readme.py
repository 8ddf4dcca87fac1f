"""Every command and config in the README and CONTRIBUTING does what the text says."""

import json
import math
import re
import shlex

import pytest
import yaml
from conftest import ROOT, launch, pairs, read_jsonl, tracked, write_jsonl

from finetune import config as configs
from finetune.__main__ import main
from finetune.config import reader

README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str = README) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash", text) for line in block.splitlines()]
    inline = re.findall(r"`((?:pip|python) [^`]+)`", text)
    return [line for line in [*lines, *inline] if line]


def test_the_makefile_has_every_target_that_is_named():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        c.split()[1] for c in commands() + commands((ROOT / "CONTRIBUTING.md").read_text()) if c.startswith("make ")
    }
    assert {"install", "quickstart", "test"} <= named | {"install"} <= targets
    assert named <= targets


def test_every_kind_of_command_is_run_by_a_test_here():
    """A new kind of command in the README needs a test in this file; `pip install .` has test_package.py."""
    known = ("make ", "source .venv", "python train.py --config configs/my_run.yaml", "python -m finetune chat", "accelerate launch",
             "python -m finetune plan", "python -m finetune evaluate", "python -m finetune export", "python train.py --help", "python -m finetune launch", "pip install --no-build-isolation", "pip install .")  # fmt: skip
    assert [c for c in commands() if not c.startswith(known)] == []


@pytest.fixture(scope="module")
def my_run(tmp_path_factory):
    """The README's own run, typed as printed, with a two-layer model in place of the one from the Hub."""
    from conftest import Workshop, forget_process_state

    folder = tmp_path_factory.mktemp("own")
    base = Workshop(folder).train("base") / "model"
    forget_process_state()
    [row] = blocks("json")
    write_jsonl(folder / "my_rows.jsonl", [json.loads(row), *pairs(39)])
    write_jsonl(folder / "my_held_out_rows.jsonl", pairs(4))
    [text] = blocks("yaml")
    (folder / "my_run.yaml").write_text(text)
    values = configs.read_yaml(folder / "my_run.yaml")
    configs.from_dict(values)
    values["model"]["path"] = str(base)
    values["run"]["dir"] = str(folder / "runs")
    values["data"]["train"] = str(folder / "my_rows.jsonl")
    values["data"]["cache_dir"] = str(folder / "cache")
    (folder / "my_run.yaml").write_text(yaml.safe_dump(values))
    return folder


def typed(command: str, folder) -> list[str]:
    """A README command with the test's own folder and model in place of the reader's."""
    import sys

    for name, place in (
        ("configs/my_run.yaml", folder / "my_run.yaml"), ("runs/my_run", folder / "runs/my_run"),
        ("my_held_out_rows.jsonl", folder / "my_held_out_rows.jsonl"), ("Qwen/Qwen2.5-0.5B-Instruct", folder / "runs/base/model"),
        ("accelerate_configs/ddp.yaml", ROOT / "accelerate_configs/ddp.yaml"), ("train.py", ROOT / "train.py"),
    ):  # fmt: skip
        command = command.replace(name, str(place))
    words = shlex.split(command)
    return (
        [sys.executable, *words[1:]]
        if words[0] == "python"
        else [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    )


@pytest.mark.slow
def test_the_commands_of_the_readme_in_order(my_run):
    """plan, --check, train, chat, evaluate, merge; then the same with several processes."""
    [plan] = [c for c in commands() if c.startswith("python -m finetune plan")]
    assert main(typed(plan, my_run)[3:]) == 0
    chosen = [
        c
        for c in commands()
        if c.startswith(("python train.py --config", "python -m finetune evaluate", "python -m finetune export"))
    ]
    assert len(chosen) == 4
    for command in chosen:
        result = launch(typed(command, my_run))
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    [chat] = [c for c in commands() if c.startswith("python -m finetune chat")]
    assert main(["chat", *typed(chat, my_run)[4:], "--prompt", "hi", "--max-new-tokens", "4"]) == 0
    [several] = [c for c in commands() if c.startswith("accelerate launch")]
    result = launch([*typed(several, my_run), "--run.name", "several"])
    assert result.returncode == 0, result.stderr


def test_help_names_every_setting_without_torch():
    result = launch(typed("python train.py --help", ROOT) + ["all"])
    assert result.returncode == 0
    for section, model in reader._sections():
        assert all(f"--{section}.{name}" in result.stdout for name in model.model_fields)


@pytest.mark.parametrize(
    "path", [ROOT / name for name in tracked() if re.fullmatch(r"configs/.+\.yaml", name)], ids=lambda p: p.name
)
def test_every_recipe_passes_the_config_check(path):
    config, check_only = configs.parse(["--config", str(path)])
    assert config.run.name
    assert not check_only


def test_the_objective_of_contributing_trains_and_its_perplexity_is_of_cross_entropy(workshop, monkeypatch, tmp_path):
    from finetune import objectives

    [source] = [text for text in blocks("python", (ROOT / "CONTRIBUTING.md").read_text()) if "def loss(" in text]
    (tmp_path / "written_down.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    import written_down

    monkeypatch.setitem(objectives.OBJECTIVES, "sft", written_down.Dft())
    run = workshop.train(data__eval_fraction=0.2, evaluation__every_steps=2)
    first, last = read_jsonl(run / "eval.jsonl")
    assert last["eval_loss"] < last["cross_entropy"] < first["cross_entropy"]
    assert last["perplexity"] == pytest.approx(math.exp(last["cross_entropy"]))


def test_the_schema_is_that_of_the_config():
    assert json.loads((ROOT / "configs/schema.json").read_text()) == configs.json_schema(), "run make schema"


def test_links_and_files_are_in_the_repository():
    files = {ROOT / line for line in tracked()}
    there = files | {folder for file in files for folder in file.parents}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).resolve() in there, f"{page.name}: {target}"
    for file in re.findall(r"`((?:finetune|accelerate_configs|configs|tests)/[\w./]+\.\w+)`", README + (ROOT / "docs/architecture.md").read_text()):  # fmt: skip
        assert ROOT / file in there or file == "configs/my_run.yaml", file


def test_the_architecture_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text()
    for path in ROOT.glob("finetune/**/*.py"):
        if path.name != "__init__.py":
            folder = str(path.parent.relative_to(ROOT)) + "/"
            assert path.name in text or f"`{folder}`" in text, path
