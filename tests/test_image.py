"""The container image: what can be known without building it, and, with FINETUNE_IMAGE=1 (`make image-test`), one that is
built, started and stopped as Docker would: by runc, as user 10001, with a root that is read-only."""

import argparse
import ast
import configparser
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, losses, pairs, read_jsonl, write_jsonl

from finetune import config as configs
from finetune import launcher
from finetune.__main__ import COMMANDS
from finetune.errors import ConfigError

DOCKERFILE, COMPOSE, SERVICE, SKYPILOT = (
    (ROOT / "docker" / name).read_text() for name in ("Dockerfile", "compose.yaml", "finetune.service", "skypilot.yaml")
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
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word
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


def complaints(text: str) -> list[str]:
    """What a Dockerfile promises less than docs/containers.md."""
    found, stages, defaults = [], set(), arguments(text)
    all_of_them = instructions(text)
    for word, rest in all_of_them:
        if word == "FROM":
            image, *name = rest.split(" AS ")
            image = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], image)
            if image not in stages and not re.fullmatch(r"docker\.io/[\w/-]+:[\w.-]+@sha256:[0-9a-f]{64}", image):
                found.append(f"{image} is not pinned")
            if ":latest" in image:
                found.append(f"{image} is whatever is newest")
            stages.update(name)
        if word in ("ARG", "ENV") and re.search("TOKEN|SECRET|PASSW|_KEY", rest):
            found.append(f"{word} {rest} can be read by whoever has the image")
        if word == "ADD" or re.search(r"\b(curl|wget|git clone)\b", rest):
            found.append(f"{word} {rest[:40]} brings in what no list pins")
        if word in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
            found.append(f"{word} in shell form: the shell would be PID 1, and SIGTERM end there")
    final = [(word, rest) for word, rest in all_of_them if word in ("USER", "STOPSIGNAL", "ENTRYPOINT", "CMD")]
    said = dict(final)
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", said.get("USER", "")):
        found.append(
            f"the last USER is {said.get('USER')}: Kubernetes takes a number only as proof that it is not root"
        )
    if (said.get("STOPSIGNAL"), said.get("CMD")) != ("SIGTERM", '["--help"]'):
        found.append("what stops it, or what it says without arguments, has changed")
    written = " ".join(rest for word, rest in all_of_them if word == "ENV").split()
    if not {"HOME=/scratch", "TMPDIR=/scratch"} <= set(written):
        found.append("something is written elsewhere than in /scratch and /runs")
    code = all_of_them.index(("COPY", ". ."))
    before = [rest for word, rest in all_of_them[:code] if word == "COPY" and not rest.startswith("--from=")]
    packages = [place for place, (word, rest) in enumerate(all_of_them) if word == "RUN" and "--requirement" in rest]
    if not packages or code < packages[0] or any(not rest.startswith("requirements") for rest in before):
        found.append("a change of the code installs every package again")
    return found


def test_the_dockerfile_keeps_what_is_promised():
    assert complaints(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (r"(BASE_IMAGE=[^@]*)@\S+", r"\1", "ubuntu24.04 is not pinned"),
        (r"(DEVEL_IMAGE=[^@]*)@\S+", r"\1", "ubuntu24.04 is not pinned"),
        (r"13\.0\.3-base-ubuntu24\.04", "latest", "is whatever is newest"),
        (r"FROM packages AS run", "FROM debian:12 AS run", "debian:12 is not pinned"),
        (r"ARG SOURCE", "ARG HF_TOKEN", "can be read by whoever has the image"),
        (r"COPY \. \.", "ADD https://example.org/rows.tar .\nCOPY . .", "brings in what no list pins"),
        (r"ENTRYPOINT .*", "ENTRYPOINT python -m finetune", "the shell would be PID 1"),
        (r"USER 10001:10001\n\n\n# What", "USER finetune\n\n\n# What", "the last USER is finetune"),
        (r"USER 10001:10001\n\n\n# What", "\n\n# What", "the last USER is 0"),
        (r"STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "what stops it"),
        (r" TMPDIR=/scratch", "", "written elsewhere"),
        (r"COPY requirements.txt /opt/", "COPY . .", "installs every package again"),
    ],
)  # fmt: skip
def test_a_dockerfile_that_breaks_a_promise_is_noticed(old, new, complaint):
    changed, count = re.subn(old, new, DOCKERFILE, count=1)
    assert count == 1
    assert complaint in "\n".join(complaints(changed))


def test_both_cuda_images_are_of_the_same_cuda_and_system():
    """A wheel that is compiled on one must load on the other."""
    base, devel = (arguments(DOCKERFILE)[name].split("@")[0] for name in ("BASE_IMAGE", "DEVEL_IMAGE"))
    assert base.replace("-base-", "-devel-") == devel


def test_hadolint_finds_nothing():
    result = subprocess.run(
        [tool("hadolint"), "--no-color", "docker/Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


# What is sent to the builder

TEMPTATIONS = (
    ".env", "hf_token", "id_rsa", "credentials.json", "data/rows.jsonl", "runs/mine/model/model.safetensors", "wandb/key",
    "finetune/.env", "finetune/token.txt", "finetune/__pycache__/config.pyc", "configs/.env", "configs/token.json",
    "configs/mine/hidden.yaml", "data_scripts/rows.jsonl", "accelerate_configs/.netrc", ".venv/lib/x.py", "shared/data/rows.csv",
)  # fmt: skip
NEEDED = r"train\.py|LICENSE|requirements(-cuda)?\.txt|(finetune|data_scripts)/.*\.py|(configs|accelerate_configs)/\w+\.yaml|ds_configs/\w+\.json"


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def sent(folder: Path, patterns: str) -> set[str]:
    """Files that Docker's own client would send to the builder."""
    build = pytest.importorskip("docker.utils.build", reason="Docker's Python client is not installed")
    lines = [line for line in patterns.splitlines() if line and not line.startswith("#")]
    return {path for path in build.exclude_paths(str(folder), lines) if (folder / path).is_file()}


@pytest.fixture
def tempting(tmp_path: Path) -> Path:
    for name in (*tracked(), *TEMPTATIONS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_the_builder_is_sent_what_the_image_needs_and_nothing_else(tempting):
    assert sent(tempting, IGNORE) - {"docker/Dockerfile", ".dockerignore"} == {
        name for name in tracked() if re.fullmatch(NEEDED, name)
    }


@pytest.mark.parametrize("line", ["!finetune/**", "!**/*.json", "!**/.env", "!data/*", "!runs"])
def test_a_line_that_lets_in_more_is_noticed(tempting, line):
    assert sent(tempting, f"{IGNORE}{line}\n") & set(TEMPTATIONS)


# Command lines

VALUES = {
    "GPUS": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "2", "IMAGE": "registry.example.org/finetune:0.1.0", "STORAGE": "s3://bucket/folder",
    "CONFIG": "my_run", "HOME": "/home/me", "PWD": "/home/me/work",
}  # fmt: skip


def filled(text: str) -> str:
    """Variables replaced, `${NAME:-default}` and `${NAME:?why}` too; a name that nobody gives is a KeyError."""
    return re.sub(r"\$\{?(\w+)(?::[-?][^}]*)?\}?", lambda match: VALUES[match[1]], text)


def started(command: str) -> tuple[set[str], list[str]]:
    """`docker run OPTIONS IMAGE WORDS` -> (options, words). All options are --name or --name=value, so the image is the first word that is none."""
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
    return "".join(line for line in script.splitlines(keepends=True) if not line.startswith("#")).replace("\\\n", " ")


def understood(words: list[str], folder: Path) -> Any:
    """The run config that these words to the image give; by the launcher and the parser of train.py."""
    write_jsonl(folder / "rows.jsonl", pairs(4))
    run = {"run": {"name": "mine"}, "model": {"path": "m"}, "data": {"train": str(folder / "rows.jsonl")}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    words = [word.replace("/config/run.yaml", str(folder / "run.yaml")) for word in words]
    assert words[0] == "launch"
    with contextlib.ExitStack() as held, contextlib.chdir(ROOT):
        environments, command = launcher.plan(words[1:], held)
        config, _ = configs.parse(command[2:])
    assert command[:2] == [sys.executable, "train.py"]
    return len(environments), config


def test_compose_the_unit_and_skypilot_start_a_run_that_the_real_parsers_understand(tmp_path):
    processes, config = understood(of_compose(), tmp_path)
    assert (processes, config.checkpoint.notices, config.checkpoint.storage) == (2, None, None)
    for command in (in_the_unit()["ExecStart"], of_skypilot()):
        processes, config = understood(started(command)[1], tmp_path)
        assert (processes, config.checkpoint.notices, config.checkpoint.storage) == (2, "aws", "s3://bucket/folder")


@pytest.mark.parametrize(
    "wrong", ["--num_proceses=2", "--checkpoint.notice=aws", "--config_file=accelerate_configs/dpp.yaml"]
)
def test_a_command_line_with_a_slip_is_noticed(tmp_path, wrong):
    right = {"--num_proceses=2": "--num_processes", "--checkpoint.notice=aws": "--checkpoint.notices"}.get(
        wrong, "--config_file"
    )
    words = [wrong if word.split("=")[0] == right else word for word in started(of_skypilot())[1]]
    assert wrong in words
    with pytest.raises(ConfigError):
        understood(words, tmp_path)


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


@pytest.mark.parametrize("command", [in_the_unit()["ExecStart"], of_skypilot()], ids=["unit", "skypilot"])
def test_a_run_on_a_machine_of_its_own_is_shut_in_but_hears_of_interruptions(command):
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
    if not (service.get("read_only") and service.get("cap_drop") == ["ALL"] and service.get("security_opt")):
        found.append("the container may do more than it needs")
    volumes = {volume.rsplit(":", 2 if volume.endswith(":ro") else 1)[1]: volume for volume in service["volumes"]}
    if set(volumes) != {"/config", "/runs", "/scratch"} or not volumes["/config"].endswith(":ro"):
        found.append("there are other volumes than /config, which is only read, /runs and /scratch")
    if "tmpfs" in service:
        found.append("Docker mounts tmpfs without execution, and compiled kernels could not be loaded")
    [grace] = [float(word.split("=")[1]) for word in of_compose(text) if word.startswith("--checkpoint.grace_seconds")]
    if seconds(service["stop_grace_period"]) < grace + 10:
        found.append("killed before the save is done that the run believes to have time for")
    if not re.fullmatch(r"on-failure:[1-5]", service["restart"]):
        found.append("a wrong config would be started for ever")
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    if devices != [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]:
        found.append("no GPUs")
    if any(not re.fullmatch(r"[A-Z_]+", name) for name in service["environment"]):
        found.append("a value that belongs into the shell stands in the file")
    return found


def test_compose_keeps_what_is_promised():
    assert compose_complaints(COMPOSE) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("finetune:0.1.0", "finetune:latest", "not that of this version"),
        ("read_only: true", "read_only: false", "may do more"),
        ("cap_drop: [ALL]", "cap_drop: [NET_RAW]", "may do more"),
        (":/config:ro", ":/config", "only read"),
        ("runs:/runs", "runs:/finetune/runs", "other volumes"),
        ("read_only:", "tmpfs: [/scratch]\n    read_only:", "without execution"),
        ("130s", "60s", "killed before the save"),
        ("on-failure:3", "always", "started for ever"),
        ("capabilities: [gpu]", "capabilities: [compute]", "no GPUs"),
        ("- HF_TOKEN", "- HF_TOKEN=hf_abc", "belongs into the shell"),
    ],
)  # fmt: skip
def test_a_compose_file_that_breaks_a_promise_is_noticed(old, new, complaint):
    assert old in COMPOSE
    assert complaint in "\n".join(compose_complaints(COMPOSE.replace(old, new, 1)))


# The unit


def starts_again(service: configparser.SectionProxy, code: int) -> bool:
    """systemd.service(5), Restart=: what the unit does after an exit code."""
    if str(code) in service.get("RestartPreventExitStatus", "").split():
        return False
    fine = code == 0 or str(code) in service.get("SuccessExitStatus", "").split()
    return {"no": False, "on-failure": not fine, "always": True}[service.get("Restart", "no")]


def codes(text: str) -> list[int]:
    return [code for code in (0, 1, 2, 75) if starts_again(in_the_unit(text), code)]


def test_the_unit_starts_again_after_1_and_75_and_never_after_0_and_2():
    assert codes(SERVICE) == [1, 75]


@pytest.mark.parametrize(
    ("old", "new"),
    [("RestartPreventExitStatus=2\n", ""), ("Restart=on-failure", "Restart=always"), ("Restart=on-failure", "SuccessExitStatus=75\nRestart=on-failure")],
)  # fmt: skip
def test_a_unit_that_starts_after_other_codes_is_noticed(old, new):
    assert old in SERVICE
    assert codes(SERVICE.replace(old, new)) != [1, 75]


def test_the_unit_gives_the_run_the_time_that_it_counts_on(tmp_path):
    service = in_the_unit()
    _, config = understood(started(service["ExecStart"])[1], tmp_path)
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert seconds(service["TimeoutStopSec"]) >= config.checkpoint.grace_seconds + 10
    assert seconds(service["TimeoutStopSec"]) <= 120  # all that AWS gives


@pytest.mark.parametrize("slip", [False, True], ids=["as it is", "with a slip"])
def test_systemd_understands_the_unit(tmp_path, slip):
    """It ends with 0 also when it has ignored a line, so what it says counts. Docker need not be there."""
    text = SERVICE.replace("/usr/bin/docker", sys.executable)
    (tmp_path / "finetune.service").write_text(text.replace("RestartPrevent", "RestartPrevnt") if slip else text)
    (tmp_path / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    result = subprocess.run(
        [tool("systemd-analyze"), "verify", str(tmp_path / "finetune.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("Unknown key 'RestartPrevntExitStatus'" in result.stderr) == slip
    about_it = [line for line in result.stderr.splitlines() if "finetune.service" in line]
    assert slip or (result.returncode, about_it) == (0, [])


# SkyPilot


def test_skypilot_starts_again_without_limit_only_after_75():
    values = yaml.safe_load(SKYPILOT)["resources"]
    assert values["use_spot"] is True
    assert values["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 3}


def test_shellcheck_finds_nothing_in_what_skypilot_runs():
    result = subprocess.run(
        [tool("shellcheck"), "--shell=bash", "-"],
        input=yaml.safe_load(SKYPILOT)["run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "")


# The image, built and run


class Image:
    """Built by buildah, in a storage of its own, and started by runc, as Docker starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.context, self.count = folder, folder / "context", 0
        for name in tracked():
            (self.context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.context / name)
        for name in TEMPTATIONS:
            (self.context / name).parent.mkdir(parents=True, exist_ok=True)
            (self.context / name).write_text("must stay out")
        self.options = site(folder)

    def buildah(self, *arguments: str) -> str:
        places = [f"--root={self.folder}/storage", f"--runroot={self.folder}/run", "--storage-driver=overlay"]
        environment = {**os.environ, "TMPDIR": str(self.folder)}
        result = subprocess.run(
            ["buildah", *places, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        return result.stdout + result.stderr if arguments[0] == "build" else result.stdout

    def build(self) -> tuple[str, float]:
        """(what the builder said, seconds)"""
        begun = time.monotonic()
        said = self.buildah(
            "build", "--isolation=chroot", "--network=host", "--layers", "--build-arg=BASE_IMAGE=localhost/base", *self.options,
            "--build-arg=REVISION=0123abc", f"--file={self.context}/docker/Dockerfile", "--tag=finetune", str(self.context),
        )  # fmt: skip
        return said, time.monotonic() - begun

    def open(self) -> None:
        [details] = [json.loads(self.buildah("inspect", "--type=image", "localhost/finetune"))]
        self.config = details["OCIv1"]["config"]
        container = self.buildah("from", "localhost/finetune").strip()
        self.root = Path(self.buildah("mount", container).strip())

    def start(self, *words: str, entrypoint: list[str] | None = None, scratch: Path, **volumes: Path) -> "Container":
        self.count += 1
        return Container(self, f"finetune-{os.getpid()}-{self.count}", (entrypoint or self.config["Entrypoint"]) + list(words or self.config["Cmd"]),
                         {"scratch": scratch, **volumes})  # fmt: skip

    def run(self, *words: str, **keywords: Any) -> tuple[int, str]:
        return self.start(*words, **keywords).end()

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.buildah("umount", "--all")
        subprocess.run(
            ["umount", "--recursive", str(self.folder / "storage/overlay")], capture_output=True, check=False
        )


class Container:
    """Without network, capabilities and a root that could be written to."""

    def __init__(self, image: Image, name: str, words: list[str], volumes: dict[str, Path]) -> None:
        self.name, self.bundle = name, image.folder / name
        self.bundle.mkdir()
        user, group = map(int, image.config["User"].split(":"))
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=64m"]},
        ]  # fmt: skip
        for target, source in volumes.items():
            mounts.append({"destination": f"/{target}", "type": "bind", "source": str(source), "options": ["rbind", "ro" if target == "config" else "rw"]})  # fmt: skip
        config = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": user, "gid": group}, "args": words, "env": [*image.config["Env"], "OMP_NUM_THREADS=1"],
                "cwd": image.config["WorkingDir"], "noNewPrivileges": True, "capabilities": {},
            },
            "root": {"path": str(image.root), "readonly": True}, "mounts": mounts,
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]},
        }  # fmt: skip
        (self.bundle / "config.json").write_text(json.dumps(config))
        with (self.bundle / "said").open("w") as said:
            self.process = subprocess.Popen(
                self._runc("run", f"--bundle={self.bundle}", name), stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )  # fmt: skip

    def _runc(self, *arguments: str) -> list[str]:
        return ["runc", f"--root={self.bundle.parent}/runc", *arguments]

    def signal(self, name: str) -> None:
        """To its PID 1, as `docker stop` and the kubelet do."""
        subprocess.run(self._runc("kill", self.name, name), check=True)

    def said(self) -> str:
        return (self.bundle / "said").read_text()

    def end(self, timeout: float = 240) -> tuple[int, str]:
        """(exit code, what it said)"""
        try:
            return self.process.wait(timeout), self.said()
        finally:
            if self.process.poll() is None:
                subprocess.run(self._runc("delete", "--force", self.name), check=False)
                self.process.wait(10)


def site(folder: Path) -> list[str]:
    """Options by which a build uses the package index of this machine, whatever pip knows of it: mirrors, folders, certificate."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    known = {}
    for line in sorted(listed.stdout.splitlines(), reverse=True):  # the environment after the files, as it wins
        name, _, value = line.partition("=")
        known[name.rpartition(".")[2]] = ast.literal_eval(value)
    volumes = {Path(word.removeprefix("file://")) for value in known.values() for word in value.split()}
    volumes = {path for path in volumes if path.is_absolute() and path.is_dir()}
    if "cert" in known:
        (folder / "site").mkdir()
        shutil.copy(known["cert"], folder / "site/ca.pem")
        known["cert"] = "/site/ca.pem"
    pip = configparser.ConfigParser(interpolation=None)
    pip["global"] = known
    with (folder / "pip.conf").open("w") as file:
        pip.write(file)
    # An index in a folder links to files that lie beside it.
    shared = {str(path.parent if path.name == "simple" else path) for path in volumes}
    mounts = {**{path: path for path in shared}, **({str(folder / "site"): "/site"} if "cert" in known else {})}
    return [
        f"--secret=id=pip.conf,src={folder}/pip.conf",
        *(f"--volume={source}:{target}:ro" for source, target in mounts.items()),
    ]


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    if not os.environ.get("FINETUNE_IMAGE"):
        pytest.skip("FINETUNE_IMAGE is not set: make image-test builds and runs the image")
    missing = [name for name in ("buildah", "runc", "mmdebstrap") if shutil.which(name) is None]
    assert not missing, f"apt-get install {' '.join(missing)}"
    assert os.getuid() == 0, "only root can become user 10001"
    with tempfile.TemporaryDirectory(prefix="finetune-image-") as folder:
        os.chmod(folder, 0o755)
        made = Image(Path(folder))
        try:
            begun = time.monotonic()
            base = Path(folder, "base")
            base.mkdir()
            subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", "bookworm", f"{base}/base.tar"], check=True)
            (base / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
            made.buildah("build", "--isolation=chroot", "--tag=base", str(base))
            shutil.rmtree(base)
            print(f"\nbase: {time.monotonic() - begun:.0f} s")
            _, took = made.build()
            size = made.buildah("images", "--format={{.Size}}", "localhost/finetune").strip()
            print(f"image: {took:.0f} s, {size}")
            made.open()
            yield made
        finally:
            made.close()


@pytest.fixture(scope="session")
def place(image: Image) -> Callable[[], Path]:
    """Makes folders that belong to user 10001."""

    def make() -> Path:
        folder = Path(tempfile.mkdtemp(dir=image.folder))
        os.chown(folder, 10001, 10001)
        return folder

    return make


long = pytest.mark.timeout(1800)  # the first of them also builds

TRAIN = (
    "launch", "train.py", "--config=configs/quickstart_pretrain.yaml", "--data.train=/config/sentences.txt", "--train.max_steps=20",
)  # fmt: skip


@long
def test_the_image_says_what_it_can_do_and_where_it_comes_from(image, place):
    code, said = image.run(scratch=place())
    assert code == 0
    assert "launch" in said
    assert image.config["Labels"]["org.opencontainers.image.revision"] == "0123abc"


@long
def test_nothing_that_lies_beside_the_code_is_in_the_image(image):
    """Tokens, data, runs, what pip was told; and all of it is root's."""
    code = image.root / "finetune"
    inside = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert inside == {name for name in tracked() if re.fullmatch(NEEDED, name)}
    assert not (image.root / "run/secrets/pip.conf").exists()
    assert {path.lstat().st_uid for path in code.rglob("*")} == {0}


@long
def test_user_10001_can_write_to_scratch_and_runs_and_nowhere_else(image, place):
    look = """
import getpass, os
print(os.getuid(), os.getgid(), getpass.getuser(), os.getpid())
for folder, folders, _ in os.walk("/"):
    if folder in ("/proc", "/sys", "/dev"):
        folders.clear()
    elif os.access(folder, os.W_OK):
        print(folder)
        folders.clear()
"""
    code, said = image.run("-c", look, entrypoint=["python"], scratch=place(), runs=place())
    assert (code, said.splitlines()[0]) == (0, "10001 10001 finetune 1")
    assert sorted(said.splitlines()[1:]) == ["/runs", "/scratch"]


@pytest.fixture(scope="session")
def rows(image: Image, place: Callable[[], Path]) -> Path:
    """Made by the image's own script; for runs they are in /config, where they can be read only."""
    folder = place()
    code, said = image.run(
        "data_scripts/pig_latin.py", "--output=/runs", entrypoint=["python"], scratch=place(), runs=folder
    )
    assert code == 0, said
    return folder


@pytest.fixture(scope="session")
def undisturbed(image: Image, place: Callable[[], Path], rows: Path) -> Path:
    """A short run of the quickstart, from start to end."""
    runs, begun = place(), time.monotonic()
    code, said = image.run(*TRAIN, scratch=place(), runs=runs, config=rows)
    assert code == 0, said
    print(f"\nquickstart, 20 steps: {time.monotonic() - begun:.0f} s")
    return runs / "quickstart_base"


@long
def test_a_run_of_the_quickstart_needs_no_network_and_no_other_folder(undisturbed):
    assert json.loads((undisturbed / "outcome.json").read_text())["state"] == "complete"
    assert (undisturbed / "model/model.safetensors").exists()
    assert len(losses(undisturbed)) == 20


@long
def test_sigterm_to_pid_1_saves_and_ends_with_75_and_the_next_start_goes_on(image, place, rows, undisturbed):
    volumes = {"runs": place(), "config": rows}
    run = volumes["runs"] / "quickstart_base"
    container = image.start(*TRAIN, scratch=place(), **volumes)
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert container.process.poll() is None, container.said()
        time.sleep(0.1)
    begun = time.monotonic()
    container.signal("SIGTERM")
    code, said = container.end()
    took = time.monotonic() - begun
    assert code == 75, said
    assert json.loads((run / "outcome.json").read_text())["state"] == "preempted"
    [saved] = (run / "checkpoints").glob("step-*")
    done = losses(run)
    assert 3 <= len(done) < 20
    assert int(saved.name.removeprefix("step-")) == len(done)
    print(f"\nSIGTERM to exit: {took:.1f} s")
    code, said = image.run(*TRAIN, scratch=place(), **volumes)  # another machine: nothing in /scratch
    assert code == 0, said
    assert f"at step {len(done)}\n" in said
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == list(range(1, 21))
    assert losses(run) == losses(undisturbed)


@long
@pytest.mark.parametrize(
    "wrong", ["--optimizer.lr=fast", "--optimizer.learning_rate=1e-3", "--data.train=/config/nothing.txt"]
)
def test_what_is_wrong_ends_with_2(image, place, rows, wrong):
    code, said = image.run(*TRAIN, wrong, scratch=place(), runs=place(), config=rows)
    assert code == 2, said
    assert "error" in said


@long
def test_pid_1_buries_orphans(image, place):
    """A process whose parent has gone becomes the launcher's, and must not stay as a zombie."""
    scripts = place()
    (scripts / "orphan.py").write_text("""
import os, subprocess, sys, time
assert os.getppid() == 1
orphan = int(subprocess.run(["sh", "-c", "sleep 1 & echo $!"], stdout=subprocess.PIPE, text=True).stdout)
state = lambda: open(f"/proc/{orphan}/stat").read().rpartition(")")[2].split()[:2]
assert state()[1] == "1"
time.sleep(2)
sys.exit(os.path.exists(f"/proc/{orphan}"))
""")
    code, said = image.run("launch", "/config/orphan.py", scratch=place(), config=scripts)
    assert code == 0, said


@long
def test_layers_can_be_compiled(image, place, rows):
    """With the compiler and the headers of the image; what comes out is loaded from /scratch."""
    scratch = place()
    code, said = image.run(
        *TRAIN,
        "--train.compile=true",
        "--train.max_steps=2",
        "--schedule.warmup_steps=1",
        scratch=scratch,
        runs=place(),
        config=rows,
    )
    assert code == 0, said
    assert list(scratch.rglob("*.so"))


@long
def test_a_change_of_the_code_leaves_the_packages_as_they_are(image):
    with (image.context / "train.py").open("a") as file:
        file.write("# changed\n")
    said, took = image.build()
    print(f"\nafter a change of train.py: {took:.0f} s")
    steps = dict(re.findall(r"STEP \d+/\d+: (.*)\n(.*)", said))
    [packages] = [step for step in steps if "--requirement /opt/requirements.txt" in step]
    assert "Using cache" in steps[packages]
    assert "Using cache" not in steps["COPY . ."]
    assert took < 120
