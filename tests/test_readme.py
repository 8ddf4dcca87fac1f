"""Every command and config in the README and CONTRIBUTING does what the text says."""

import json
import math
import re
import shlex
import sys
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    ROOT,
    Workshop,
    forget_process_state,
    launch,
    losses,
    pairs,
    pretrained,
    read_jsonl,
    short,
    tracked,
    write_jsonl,
)
from faults.forked import fork
from transformers import AutoModelForCausalLM

import train
from finetune import config as configs
from finetune.__main__ import main
from finetune.config.sections import sections_of_config

README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str = README) -> list[str]:
    lines = [
        line.split("  #")[0].strip()
        for block in blocks("bash", text)
        for line in block.splitlines()
    ]
    inline = re.findall(r"`((?:pip|python) [^`]+)`", text)
    return [line for line in [*lines, *inline] if line]


def test_the_makefile_has_every_target_that_is_named():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        c.split()[1]
        for c in commands() + commands((ROOT / "CONTRIBUTING.md").read_text())
        if c.startswith("make ")
    }
    assert {"install", "quickstart", "test"} <= named | {"install"} <= targets
    assert named <= targets


def test_every_kind_of_command_is_run_by_a_test_here():
    """New kinds of commands need a test here; test_package.py has `pip install .`."""
    known = (
        "make ", "source .venv", "accelerate launch",
        "python train.py my_run.yaml", "python train.py --help",
        "python -m finetune chat", "python -m finetune plan", "python -m finetune evaluate",
        "python -m finetune merge", "python -m finetune launch", "python -m finetune show",
        "pip install --no-build-isolation", "pip install .",
    )  # fmt: skip
    assert [c for c in commands() if not c.startswith(known)] == []


@pytest.fixture(scope="module")
def my_run(tmp_path_factory):
    """Train the README's own run as printed, with a two-layer model instead of the Hub's."""
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
    for name, place in (
        ("my_run.yaml", folder / "my_run.yaml"), ("runs/my_run", folder / "runs/my_run"),
        ("my_held_out_rows.jsonl", folder / "my_held_out_rows.jsonl"),
        ("Qwen/Qwen2.5-0.5B-Instruct", folder / "runs/base/model"),
        ("accelerate_configs/ddp.yaml", ROOT / "accelerate_configs/ddp.yaml"),
        ("train.py", ROOT / "train.py"),
    ):  # fmt: skip
        command = command.replace(name, str(place))
    words = shlex.split(command)
    first = [] if words[0] == "python" else ["-m", "accelerate.commands.launch"]
    return [sys.executable, *first, *words[2 if first else 1 :]]


# What is added to a command, for less of the same: fewer tokens, one topology of all, two steps.
BRIEF = {
    "plan": ["--topology", str(ROOT / "accelerate_configs/ddp.yaml")],
    "evaluate": ["--max-new-tokens", "4"],
    "chat": ["--prompt", "hi", "--max-new-tokens", "4"],
    "several": ["--run.name", "several", "--train.max_steps", "2"],
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_readme_in_order(my_run, monkeypatch):
    """--check, show, plan, train, chat, evaluate, merge.

    Seven cold commands would take a minute, so this process runs them; test_launch.py starts as a
    user does.
    """
    runs = ("python train.py my_run", "python -m finetune ")
    chosen = [c for c in commands() if c.startswith(runs) and c != "python -m finetune launch"]
    assert len(chosen) == 7
    for command in chosen:
        script, *arguments = typed(command, my_run)[1:]
        if script == "-m":
            assert main([*arguments[1:], *BRIEF.get(arguments[1], [])]) == 0, command
            forget_process_state()
            continue
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *arguments])
            patch.setattr(sys, "stdout", sys.stdout)  # main replaces both
            patch.setattr(sys, "stderr", sys.stderr)
            assert train.main() == 0, command
        forget_process_state()


@pytest.mark.slow
@pytest.mark.parametrize("is_cold", short([False, True], False), ids=["forked", "as typed"])
def test_the_command_for_several_processes(my_run, is_cold):
    """test_launcher.py compares the environment of a forked process with accelerate's."""
    [several] = [c for c in commands() if c.startswith("accelerate launch")]
    words = [*typed(several, my_run), *BRIEF["several"]]
    if is_cold:
        result = launch(words)
        assert result.returncode == 0, result.stderr
        return
    script = words.index(str(ROOT / "train.py"))
    file, processes = str(ROOT / "accelerate_configs/ddp.yaml"), 2
    assert words[3:script] == ["--config_file", file, "--num_processes", str(processes)]
    logs = [my_run / f"{rank}.log" for rank in range(processes)]
    begun = fork("train", words[script + 1 :], "ddp", logs, {})
    assert begun.codes() == [0] * processes, begun.output()


def test_help_names_every_setting_without_torch():
    result = launch([*typed("python train.py --help", ROOT), "all"])
    assert result.returncode == 0
    for section, classes in sections_of_config().items():
        assert all(
            f"--{section}.{name}" in result.stdout for cls in classes for name in cls.model_fields
        )


@pytest.mark.parametrize(
    "path",
    [ROOT / name for name in tracked() if re.fullmatch(r"configs/.+\.yaml", name)],
    ids=lambda p: p.name,
)
def test_every_recipe_passes_the_config_check(path):
    config, check_only = configs.parse(["--config", str(path)])
    assert config.run.name
    assert not check_only


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("CONTRIBUTING.md", lambda logprobs: -(logprobs.exp().detach() * logprobs).mean()),
        ("docs/objectives.md", lambda logprobs: -(logprobs.softmax(0).detach() * logprobs).sum()),
    ],
    ids=["contributing", "denominator"],
)
def test_an_objective_of_the_documentation_learns_what_it_says(workshop, page, expected):
    """One step over all rows: loss and gradient norm against the formula, on logits."""
    text = (ROOT / page).read_text()
    own = example(workshop, text, "Objective")
    base = workshop.train("base") / "model"
    held_out = write_jsonl(workshop.folder / "held_out.jsonl", pairs(60)[40:])
    run = workshop.train(
        **own, model__path=str(base), model__init="pretrained", model__config=None,
        model__tokenizer=None, train__global_batch_size=40, train__epochs=2,
        data__eval=str(held_out), evaluation__every_steps=1,
    )  # fmt: skip
    tokens = workshop.folder / "cache/tokens" / workshop.receipt()["train_data"]["fingerprint"]
    model, logprobs = token_logprobs(base, tokens)
    loss = expected(logprobs)
    loss.backward()
    grad_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    first = read_jsonl(run / "metrics.jsonl")[0]
    assert (first["loss"], first["grad_norm"]) == pytest.approx((loss.item(), grad_norm), rel=1e-5)
    line = read_jsonl(run / "eval.jsonl")[-1]
    assert line["eval_loss"] < line["cross_entropy"] == pytest.approx(math.log(line["perplexity"]))


@pytest.mark.parametrize("name", ["Pairwise", "Reward"])
def test_the_pairs_of_the_documentation_learn_which_answer_is_better(workshop, name):
    own = example(workshop, (ROOT / "docs/objectives.md").read_text(), name)
    row = {"best": "yes, it is", "worst": "no, it is not", "score_gap": 0.1}
    write_jsonl(workshop.rows, [{"q": f"is {n} a number?", **row} for n in range(16)])
    found = losses(workshop.train(**own, train__max_steps=4, train__micro_batch_size=8))
    assert found[-1] < found[0]


@pytest.mark.slow
def test_the_documentations_example_of_a_divergence_stays_near_the_base(workshop):
    own = example(workshop, (ROOT / "docs/objectives.md").read_text(), "Near")
    base = workshop.train("base", train__max_steps=1) / "model"
    run = workshop.train(**own, **pretrained(base), train__max_steps=2)
    assert [line["divergence"] > 0 for line in read_jsonl(run / "metrics.jsonl")] == [False, True]


def test_the_documentations_example_of_an_objective_that_samples_learns(workshop):
    own = example(workshop, (ROOT / "docs/objectives.md").read_text(), "Reinforce")
    write_jsonl(workshop.rows, [{"prompt": f"count from {n}"} for n in range(8)])
    own |= {"data__train": str(workshop.rows), "optimizer__lr": 1e-2, "train__max_steps": 3}
    own["objective__rollouts"] |= {"max_new_tokens": 8, "cut_answers": "learn"}
    lines = read_jsonl(workshop.train(**own, train__epochs=9) / "metrics.jsonl")
    assert all(line["reward"] < 0 < line["reward_spread"] for line in lines)
    assert all(line["loss"] and line["grad_norm"] for line in lines)


def example(workshop, text: str, name: str) -> dict[str, Any]:
    """Write the first objective of a page with `name` in it; return the settings beside it."""
    sources = [block for block in blocks("python", text) if "import Objective" in block]
    source = next(block for block in sources if name in block)
    [kind] = re.findall(r"class (\w+)\(Objective\)", source)
    [settings] = [block for block in blocks("yaml", text) if f".py:{kind}" in block]
    found = yaml.safe_load(settings)
    (workshop.folder / found["objective"]["kind"].partition(":")[0]).write_text(source)
    return {f"{part}__{key}": value for part in found for key, value in found[part].items()}


def token_logprobs(base, tokens):
    """Return (model, its log-probabilities of the supervised tokens in the cache)."""
    model = AutoModelForCausalLM.from_pretrained(base)
    ids, supervised, ends = (
        np.load(tokens / f"{name}.npy") for name in ("input_ids", "supervised", "ends")
    )
    found = []
    for start, end in zip([0, *ends], ends):
        row = torch.tensor(ids[start:end], dtype=torch.int64)
        logprobs = model(row[None]).logits[0, :-1].log_softmax(-1)[range(len(row) - 1), row[1:]]
        found.append(logprobs[torch.tensor(supervised[start + 1 : end])])
    return model, torch.cat(found)


def test_the_schema_is_that_of_the_config():
    assert json.loads((ROOT / "configs/schema.json").read_text()) == configs.json_schema(), (
        "run make schema"
    )


def test_links_and_files_are_in_the_repository():
    files = {ROOT / line for line in tracked()}
    there = files | {folder for file in files for folder in file.parents}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).resolve() in there, f"{page.name}: {target}"
    for file in re.findall(
        r"`((?:finetune|accelerate_configs|configs|tests)/[\w./]+\.\w+)`",
        README + (ROOT / "docs/architecture.md").read_text(),
    ):
        assert ROOT / file in there, file


def test_the_architecture_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text()
    for path in ROOT.glob("finetune/**/*.py"):
        if path.name != "__init__.py":
            package = path.relative_to(ROOT).parts[1]  # or the file itself
            assert path.name in text or f"`finetune/{package}/`" in text, path
