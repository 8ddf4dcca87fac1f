"""Check the container image without building it; tests/test_container.py builds one."""

import argparse
import configparser
import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, pairs, tracked, write_jsonl

from finetune import config as configs
from finetune.__main__ import COMMANDS
from finetune.survival import launcher

DOCKERFILE, COMPOSE, SERVICE, SKYPILOT = (
    (ROOT / "docker" / name).read_text()
    for name in ("Dockerfile", "compose.yaml", "finetune.service", "skypilot.yaml")
)
IGNORE, DOCS = (ROOT / ".dockerignore").read_text(), (ROOT / "docs/containers.md").read_text()


def tool(name: str) -> str:
    """A program beside this Python, or on the path; skips without."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# The Dockerfile


def instructions(text: str) -> list[tuple[str, str]]:
    """("FROM", "... AS packages"): one for each instruction, its lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines())
        if word
    ]


def arguments(text: str) -> dict[str, str]:
    """Those before the first FROM, which choose images."""
    found = {}
    for word, rest in instructions(text):
        if word == "FROM":
            break
        name, _, value = rest.partition("=")
        found[name] = value
    return found


def inherited(all_of_them: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the instructions of the last stage, after those of the stages it builds on."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for word, rest in all_of_them:
        if word == "FROM":
            image, *name = rest.split(" AS ")
            stage = stages[name[0] if name else ""] = list(stages.get(image, ()))
        elif stages:
            stage.append((word, rest))
    return stage


def complaints(text: str) -> list[str]:
    """What a Dockerfile promises less than docs/containers.md."""
    found, stages, defaults = [], set(), arguments(text)
    all_of_them = instructions(text)
    for word, rest in all_of_them:
        if word == "FROM":
            image, *name = rest.split(" AS ")
            image = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], image)
            if image not in stages and not re.fullmatch(
                r"docker\.io/[\w/-]+:[\w.-]+@sha256:[0-9a-f]{64}", image
            ):
                found.append(f"{image} is not pinned")
            if ":latest" in image:
                found.append(f"{image} is whatever is newest")
            stages.update(name)
        if word in ("ARG", "ENV") and re.search("TOKEN|SECRET|PASSW|_KEY", rest):
            found.append(f"{word} {rest} can be read in the image")
        if word == "ADD" or re.search(r"\b(curl|wget|git clone)\b", rest):
            found.append(f"{word} {rest[:40]} brings in what no list pins")
    settings = dict(inherited(all_of_them))
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", settings.get("USER", "")):
        found.append(
            f"the last USER is {settings.get('USER')}: Kubernetes takes a number only as proof "
            "that it is not root"
        )
    if settings.get("ENTRYPOINT") != '["tini", "--", "python", "-m", "finetune"]':
        found.append("PID 1 does not pass signals on, or reaps no orphans")
    if (settings.get("STOPSIGNAL"), settings.get("CMD")) != ("SIGTERM", '["--help"]'):
        found.append("what stops it, or what it says without arguments, has changed")
    written = " ".join(rest for word, rest in all_of_them if word == "ENV").split()
    if not {"HOME=/scratch", "TMPDIR=/scratch"} <= set(written):
        found.append("something is written elsewhere than in /scratch and /runs")
    code = all_of_them.index(("COPY", ". ."))
    before = [
        rest
        for word, rest in all_of_them[:code]
        if word == "COPY" and not rest.startswith("--from=")
    ]
    packages = [
        place
        for place, (word, rest) in enumerate(all_of_them)
        if word == "RUN" and "--requirement" in rest
    ]
    if (
        not packages
        or code < packages[0]
        or any(not rest.startswith("requirements") for rest in before)
    ):
        found.append("a change of the code installs every package again")
    if not any("--requirement /opt/kernels.txt" in all_of_them[place][1] for place in packages):
        found.append("an image for GPUs lacks liger-kernel")
    return found


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["hadolint", "--no-color", "-"], DOCKERFILE),
        (["shellcheck", "--shell=bash", "-"], yaml.safe_load(SKYPILOT)["run"]),
    ],
    ids=["hadolint of the Dockerfile", "shellcheck of what SkyPilot runs"],
)
def test_linters_find_nothing(command, text):
    command = [tool(command[0]), *command[1:]]
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


# What is sent to the builder

TEMPTATIONS = (
    ".env", "hf_token", "id_rsa", "credentials.json", "data/rows.jsonl",
    "runs/mine/model/model.safetensors", "wandb/key", "finetune/.env", "finetune/hf_token",
    "finetune/data/id_rsa", "finetune/token.txt", "finetune/__pycache__/config.pyc", "configs/.env",
    "configs/token.json", "configs/mine/hidden.yaml", "data_scripts/rows.jsonl",
    "accelerate_configs/.netrc", ".venv/lib/x.py", "shared/data/rows.csv",
)  # fmt: skip
NEEDED = (
    r"train\.py|LICENSE|requirements(-cuda)?\.txt|(finetune|data_scripts)/.*\.py|"
    r"finetune/preparation/\w+\.jinja|finetune/evaluation/judges/\w+\.yaml|"
    r"(configs|accelerate_configs)/\w+\.yaml|ds_configs/\w+\.json"
)


def sent(folder: Path, patterns: str) -> set[str]:
    """Files that Docker's own client would send to the builder."""
    build = pytest.importorskip(
        "docker.utils.build", reason="Docker's Python client is not installed"
    )
    lines = [line for line in patterns.splitlines() if line and not line.startswith("#")]
    return {path for path in build.exclude_paths(str(folder), lines) if (folder / path).is_file()}


@pytest.fixture
def tempting(tmp_path: Path) -> Path:
    for name in (*tracked(), *TEMPTATIONS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_the_build_context_holds_only_what_the_image_needs(tempting):
    assert sent(tempting, IGNORE) - {"docker/Dockerfile", ".dockerignore"} == {
        name for name in tracked() if re.fullmatch(NEEDED, name)
    }


@pytest.mark.parametrize("line", ["!finetune/**", "!**/*.json", "!**/.env", "!data/*", "!runs"])
def test_a_wider_build_context_is_noticed(tempting, line):
    assert sent(tempting, f"{IGNORE}{line}\n") & set(TEMPTATIONS)


# Command lines

VALUES = {
    "GPUS": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "2", "IMAGE": "registry.example.org/finetune:0.1.0",
    "STORAGE": "s3://bucket/folder", "CONFIG": "my_run", "HOME": "/home/me", "PWD": "/home/me/work",
}  # fmt: skip


def filled(text: str) -> str:
    """Replace variables, also `${NAME:-default}` and `${NAME:?why}`; raise KeyError if unset."""
    return re.sub(r"\$\{?(\w+)(?::[-?][^}]*)?\}?", lambda match: VALUES[match[1]], text)


def started(command: str) -> tuple[set[str], list[str]]:
    """Split `docker run OPTIONS IMAGE WORDS` into (options, words); options are --name[=value]."""
    words = shlex.split(filled(command))
    words = words[words.index("run") + 1 :]
    image = next(place for place, word in enumerate(words) if not word.startswith("--"))
    return set(words[:image]), words[image + 1 :]


def in_the_unit(text: str = SERVICE) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read_string(text.replace("\\\n", " "))
    return unit["Service"]


def by_hand() -> list[str]:
    """Commands of the documentation."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)).replace("\\\n", " ")
    return [line.split("  #")[0] for line in blocks.splitlines() if line.startswith("docker run")]


def of_compose(text: str = COMPOSE) -> list[str]:
    return [filled(word) for word in yaml.safe_load(text)["services"]["finetune"]["command"]]


def of_skypilot(text: str = SKYPILOT) -> str:
    """The one command, without its comments."""
    script = yaml.safe_load(text)["run"]
    return "".join(
        line for line in script.splitlines(keepends=True) if not line.startswith("#")
    ).replace("\\\n", " ")


def understood(words: list[str], folder: Path) -> Any:
    """Return the run config that launcher and parser of train.py make of these words."""
    write_jsonl(folder / "rows.jsonl", pairs(4))
    run = {
        "run": {"name": "mine"},
        "model": {"path": "m"},
        "data": {"train": str(folder / "rows.jsonl")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    words = [word.replace("/config/run.yaml", str(folder / "run.yaml")) for word in words]
    assert words[0] == "launch"
    with contextlib.chdir(ROOT):
        environments, command = launcher.read(words[1:])
        config, _ = configs.parse(command[2:])
    assert command[:2] == [sys.executable, "train.py"]
    return len(environments), config


@pytest.mark.slow
def test_compose_the_unit_and_skypilot_start_a_run_that_the_real_parsers_understand(tmp_path):
    processes, config = understood(of_compose(), tmp_path)
    assert (processes, config.checkpoint.notices, config.checkpoint.storage) == (2, None, None)
    for command in (in_the_unit()["ExecStart"], of_skypilot()):
        processes, config = understood(started(command)[1], tmp_path)
        assert (processes, config.checkpoint.notices, config.checkpoint.storage) == (
            2,
            "aws",
            "s3://bucket/folder",
        )


@pytest.mark.slow
def test_the_commands_of_the_documentation_are_understood(tmp_path):
    known = set()
    for command in by_hand():
        _, words = started(command)
        known.update(words[:1])
        if words[:1] == ["launch"]:
            understood(words, tmp_path)
        elif words:
            parser = argparse.ArgumentParser(exit_on_error=False)
            importlib.import_module(COMMANDS[words[0]][0]).add_arguments(parser)
            parser.parse_args(words[1:])
    assert known == {"launch", "plan", "chat"}


HARDENED = {"--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"}


@pytest.mark.parametrize(
    "command", [in_the_unit()["ExecStart"], of_skypilot()], ids=["unit", "skypilot"]
)
def test_a_run_on_its_own_machine_is_sandboxed_but_sees_notices(command):
    """--network=host: the metadata service of AWS answers one hop away only."""
    options, _ = started(command)
    assert {*HARDENED, "--network=host", "--gpus=all", "--rm"} <= options
    targets = {option.split(":", 1)[1] for option in options if option.startswith("--volume=")}
    assert targets == {"/config:ro", "/runs", "/scratch"}


# Compose


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def compose_complaints(text: str) -> list[str]:
    values = yaml.safe_load(text)
    service, found = values["services"]["finetune"], []
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if service["image"] != f"finetune:{version}":
        found.append("the image is not that of this version")
    if not (
        service.get("read_only")
        and service.get("cap_drop") == ["ALL"]
        and service.get("security_opt")
    ):
        found.append("the container may do more than it needs")
    volumes = {
        volume.rsplit(":", 2 if volume.endswith(":ro") else 1)[1]: volume
        for volume in service["volumes"]
    }
    if set(volumes) != {"/config", "/runs", "/scratch"} or not volumes["/config"].endswith(":ro"):
        found.append("there are other volumes than /config, which is only read, /runs and /scratch")
    if "tmpfs" in service:
        found.append(
            "Docker mounts tmpfs without execution, and compiled kernels could not be loaded"
        )
    [grace] = [
        float(word.split("=")[1])
        for word in of_compose(text)
        if word.startswith("--checkpoint.grace_seconds")
    ]
    if seconds(service["stop_grace_period"]) < grace + 10:
        found.append("killed before the save is done that the run believes to have time for")
    if not re.fullmatch(r"on-failure:[1-5]", service["restart"]):
        found.append("a wrong config would be started without end")
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    if devices != [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]:
        found.append("no GPUs")
    if any(not re.fullmatch(r"[A-Z_]+", name) for name in service["environment"]):
        found.append("a value that belongs into the shell stands in the file")
    return found


# The unit


def starts_again(service: configparser.SectionProxy, code: int) -> bool:
    """systemd.service(5), Restart=: what the unit does after an exit code."""
    if str(code) in service.get("RestartPreventExitStatus", "").split():
        return False
    fine = code == 0 or str(code) in service.get("SuccessExitStatus", "").split()
    return {"no": False, "on-failure": not fine, "always": True}[service.get("Restart", "no")]


def unit_complaints(text: str) -> list[str]:
    again = [code for code in (0, 1, 2, 75) if starts_again(in_the_unit(text), code)]
    return [] if again == [1, 75] else [f"starts again after {again}"]


def test_the_unit_grants_the_configured_grace_period(tmp_path):
    service = in_the_unit()
    _, config = understood(started(service["ExecStart"])[1], tmp_path)
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert seconds(service["TimeoutStopSec"]) >= config.checkpoint.grace_seconds + 10
    assert seconds(service["TimeoutStopSec"]) <= 120  # all that AWS gives


def test_systemd_understands_the_unit(tmp_path):
    """systemd exits with 0 even when it ignores a line, so check its output; needs no Docker."""
    unit = tmp_path / "finetune.service"
    unit.write_text(SERVICE.replace("/usr/bin/docker", sys.executable))
    (tmp_path / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    command = [tool("systemd-analyze"), "verify", str(unit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    about_it = [line for line in result.stderr.splitlines() if "finetune.service" in line]
    assert (result.returncode, about_it) == (0, [])


@pytest.mark.parametrize(
    ("text", "check"),
    [(DOCKERFILE, complaints), (COMPOSE, compose_complaints), (SERVICE, unit_complaints)],
    ids=["Dockerfile", "Compose", "unit"],
)
def test_each_file_keeps_its_promises(text, check):
    assert check(text) == []


@pytest.mark.parametrize(
    ("text", "check", "old", "new", "complaint"),
    [
        (DOCKERFILE, complaints, r"(BASE_IMAGE=[^@]*)@\S+", r"\1", "ubuntu24.04 is not pinned"),
        (DOCKERFILE, complaints, "ARG SOURCE", "ARG HF_TOKEN", "can be read in the image"),
        (
            DOCKERFILE, complaints, r"ENTRYPOINT .*", 'ENTRYPOINT ["python", "-m", "finetune"]',
            "PID 1 does not pass signals on",
        ),
        (DOCKERFILE, complaints, "USER 10001:10001", "USER finetune", "the last USER is finetune"),
        (DOCKERFILE, complaints, " TMPDIR=/scratch", "", "written elsewhere"),
        (
            DOCKERFILE, complaints, "COPY requirements.txt requirements-cuda.txt /opt/", "COPY . .",
            "installs every package again",
        ),
        (DOCKERFILE, complaints, r" \\\n    && if python(.|\n)*?; fi", "", "lacks liger-kernel"),
        (
            COMPOSE, compose_complaints, r"finetune:0\.1\.0", "finetune:latest",
            "not that of this version",
        ),
        (COMPOSE, compose_complaints, "read_only: true", "read_only: false", "may do more"),
        (COMPOSE, compose_complaints, "runs:/runs", "runs:/finetune/runs", "other volumes"),
        (COMPOSE, compose_complaints, "130s", "60s", "killed before the save"),
        (COMPOSE, compose_complaints, "on-failure:3", "always", "started without end"),
        (SERVICE, unit_complaints, "RestartPreventExitStatus=2\n", "", "after [1, 2, 75]"),
        (SERVICE, unit_complaints, "Restart=on-failure", "Restart=always", "after [0, 1, 75]"),
    ],
)  # fmt: skip
def test_a_file_that_breaks_a_promise_is_noticed(text, check, old, new, complaint):
    changed, count = re.subn(old, new, text, count=1)
    assert count == 1
    assert complaint in "\n".join(check(changed))


# SkyPilot


def test_skypilot_restarts_without_limit_only_after_75():
    values = yaml.safe_load(SKYPILOT)["resources"]
    assert values["use_spot"] is True
    assert values["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 3}
