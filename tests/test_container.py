"""The image is built, started and stopped as Docker would: runc, user 10001, read-only root.

`make image-test` alone runs what uses the image.
"""

import ast
import configparser
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, losses, read_jsonl
from test_image import NEEDED, TEMPTATIONS, tracked


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
        places = [
            f"--root={self.folder}/storage",
            f"--runroot={self.folder}/run",
            "--storage-driver=overlay",
        ]
        environment = {**os.environ, "TMPDIR": str(self.folder)}
        result = subprocess.run(
            ["buildah", *places, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        return result.stdout + result.stderr if arguments[0] == "build" else result.stdout

    def build(self) -> tuple[str, float]:
        """(output of the builder, seconds)"""
        begun = time.monotonic()
        output = self.buildah(
            "build", "--isolation=chroot", "--network=host", "--layers",
            "--build-arg=BASE_IMAGE=localhost/base", *self.options, "--build-arg=REVISION=0123abc",
            f"--file={self.context}/docker/Dockerfile", "--tag=finetune", str(self.context),
        )  # fmt: skip
        return output, time.monotonic() - begun

    def open(self) -> None:
        [details] = [json.loads(self.buildah("inspect", "--type=image", "localhost/finetune"))]
        self.config = details["OCIv1"]["config"]
        container = self.buildah("from", "localhost/finetune").strip()
        self.root = Path(self.buildah("mount", container).strip())

    def start(
        self, *words: str, entrypoint: list[str] | None = None, scratch: Path, **volumes: Path
    ) -> "Container":
        self.count += 1
        return Container(self, f"finetune-{os.getpid()}-{self.count}", (
            entrypoint or self.config["Entrypoint"]
        ) + list(words or self.config["Cmd"]),
                         {"scratch": scratch, **volumes})  # fmt: skip

    def run(self, *words: str, **keywords: Any) -> tuple[int, str]:
        return self.start(*words, **keywords).end()

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.buildah("umount", "--all")
        subprocess.run(
            ["umount", "--recursive", str(self.folder / "storage/overlay")],
            capture_output=True,
            check=False,
        )


class Container:
    """Without network, capabilities and a root that could be written to."""

    def __init__(self, image: Image, name: str, words: list[str], volumes: dict[str, Path]) -> None:
        self.name, self.bundle = name, image.folder / name
        self.bundle.mkdir()
        user, group = map(int, image.config["User"].split(":"))
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=64m"],
            },
        ]  # fmt: skip
        for target, source in volumes.items():
            mounts.append(
                {
                    "destination": f"/{target}",
                    "type": "bind",
                    "source": str(source),
                    "options": ["rbind", "ro" if target == "config" else "rw"],
                }
            )
        config = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": user, "gid": group}, "args": words,
                "env": [*image.config["Env"], "OMP_NUM_THREADS=1"],
                "cwd": image.config["WorkingDir"], "noNewPrivileges": True, "capabilities": {},
            },
            "root": {"path": str(image.root), "readonly": True}, "mounts": mounts,
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]
            },
        }  # fmt: skip
        (self.bundle / "config.json").write_text(json.dumps(config))
        with (self.bundle / "output").open("w") as output:
            self.process = subprocess.Popen(
                self._runc("run", f"--bundle={self.bundle}", name), stdout=output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )  # fmt: skip

    def _runc(self, *arguments: str) -> list[str]:
        return ["runc", f"--root={self.bundle.parent}/runc", *arguments]

    def signal(self, name: str) -> None:
        """To its PID 1, as `docker stop` and the kubelet do."""
        subprocess.run(self._runc("kill", self.name, name), check=True)

    def output(self) -> str:
        return (self.bundle / "output").read_text()

    def end(self, timeout: float = 240) -> tuple[int, str]:
        """(exit code, output)"""
        try:
            return self.process.wait(timeout), self.output()
        finally:
            if self.process.poll() is None:
                subprocess.run(self._runc("delete", "--force", self.name), check=False)
                self.process.wait(10)


def site(folder: Path) -> list[str]:
    """Return build options for this machine's package index: mirrors, folders, certificate."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    known = {}
    for line in sorted(
        listed.stdout.splitlines(), reverse=True
    ):  # the environment after the files, as it wins
        name, _, value = line.partition("=")
        known[name.rpartition(".")[2]] = ast.literal_eval(value)
    volumes = {
        Path(word.removeprefix("file://")) for value in known.values() for word in value.split()
    }
    volumes = {path for path in volumes if path.is_absolute() and path.is_dir()}
    if "cert" in known:
        (folder / "site").mkdir()
        shutil.copy(known["cert"], folder / "site/ca.pem")
        known["cert"] = "/site/ca.pem"
    known.pop("constraint", None)  # a file of this machine; the image's versions are pinned anyway
    pip = configparser.ConfigParser(interpolation=None)
    pip["global"] = known
    with (folder / "pip.conf").open("w") as file:
        pip.write(file)
    # An index in a folder links to files that lie beside it.
    shared = {str(path.parent if path.name == "simple" else path) for path in volumes}
    mounts = {
        **{path: path for path in shared},
        **({str(folder / "site"): "/site"} if "cert" in known else {}),
    }
    return [
        f"--secret=id=pip.conf,src={folder}/pip.conf",
        *(f"--volume={source}:{target}:ro" for source, target in mounts.items()),
    ]


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
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
            subprocess.run(
                ["mmdebstrap", "--quiet", "--variant=minbase", "bookworm", f"{base}/base.tar"],
                check=True,
            )
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
    "launch", "train.py", "--config=configs/quickstart_pretrain.yaml",
    "--data.train=/config/sentences.txt", "--train.max_steps=20",
)  # fmt: skip


@long
def test_the_image_has_help_and_origin_labels(image, place):
    code, output = image.run(scratch=place())
    assert code == 0
    assert "launch" in output
    assert image.config["Labels"]["org.opencontainers.image.revision"] == "0123abc"


@long
def test_the_image_holds_only_the_code(image):
    """Tokens, data, runs, pip's settings; and all of it is root's."""
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
    code, output = image.run("-c", look, entrypoint=["python"], scratch=place(), runs=place())
    assert (code, output.splitlines()[0]) == (0, "10001 10001 finetune 1")
    assert sorted(output.splitlines()[1:]) == ["/runs", "/scratch"]


@pytest.fixture(scope="session")
def rows(image: Image, place: Callable[[], Path]) -> Path:
    """Made by the image's own script; for runs they are in /config, where they can be read only."""
    folder = place()
    code, output = image.run(
        "data_scripts/pig_latin.py",
        "--output=/runs",
        entrypoint=["python"],
        scratch=place(),
        runs=folder,
    )
    assert code == 0, output
    return folder


@pytest.fixture(scope="session")
def undisturbed(image: Image, place: Callable[[], Path], rows: Path) -> Path:
    """A short run of the quickstart, from start to end."""
    runs, begun = place(), time.monotonic()
    code, output = image.run(*TRAIN, scratch=place(), runs=runs, config=rows)
    assert code == 0, output
    print(f"\nquickstart, 20 steps: {time.monotonic() - begun:.0f} s")
    return runs / "quickstart_base"


@long
def test_a_run_of_the_quickstart_needs_no_network_and_no_other_folder(undisturbed):
    assert json.loads((undisturbed / "outcome.json").read_text())["state"] == "complete"
    assert (undisturbed / "model/model.safetensors").exists()
    assert len(losses(undisturbed)) == 20


@long
def test_sigterm_to_pid_1_saves_and_ends_with_75_and_the_next_start_goes_on(
    image, place, rows, undisturbed
):
    volumes = {"runs": place(), "config": rows}
    run = volumes["runs"] / "quickstart_base"
    container = image.start(*TRAIN, scratch=place(), **volumes)
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert container.process.poll() is None, container.output()
        time.sleep(0.1)
    begun = time.monotonic()
    container.signal("SIGTERM")
    code, output = container.end()
    took = time.monotonic() - begun
    assert code == 75, output
    assert json.loads((run / "outcome.json").read_text())["state"] == "preempted"
    [saved] = (run / "checkpoints").glob("step-*")
    done = losses(run)
    assert 3 <= len(done) < 20
    assert int(saved.name.removeprefix("step-")) == len(done)
    print(f"\nSIGTERM to exit: {took:.1f} s")
    code, output = image.run(
        *TRAIN, scratch=place(), **volumes
    )  # another machine: nothing in /scratch
    assert code == 0, output
    assert f"at step {len(done)}\n" in output
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == list(range(1, 21))
    assert losses(run) == losses(undisturbed)


@long
@pytest.mark.parametrize(
    "wrong",
    ["--optimizer.lr=fast", "--optimizer.learning_rate=1e-3", "--data.train=/config/nothing.txt"],
)
def test_user_errors_exit_with_2(image, place, rows, wrong):
    code, output = image.run(*TRAIN, wrong, scratch=place(), runs=place(), config=rows)
    assert code == 2, output
    assert "error" in output


@long
def test_layers_can_be_compiled(image, place, rows):
    """With the compiler and the headers of the image; what comes out is loaded from /scratch."""
    scratch = place()
    code, output = image.run(
        *TRAIN,
        "--train.compile=true",
        "--train.max_steps=2",
        "--schedule.warmup_steps=1",
        scratch=scratch,
        runs=place(),
        config=rows,
    )
    assert code == 0, output
    assert list(scratch.rglob("*.so"))


@long
def test_a_code_change_does_not_reinstall_packages(image):
    with (image.context / "train.py").open("a") as file:
        file.write("# changed\n")
    output, took = image.build()
    print(f"\nafter a change of train.py: {took:.0f} s")
    steps = dict(re.findall(r"STEP \d+/\d+: (.*)\n(.*)", output))
    [packages] = [step for step in steps if "--requirement /opt/requirements.txt" in step]
    assert "Using cache" in steps[packages]
    assert "Using cache" not in steps["COPY . ."]
    assert took < 120
