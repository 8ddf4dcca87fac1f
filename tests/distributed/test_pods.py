"""Two pods of the multi-node manifests run in namespaces of this machine, and one is lost.

Each has processes of its own, whose first is the launcher, and finds the other by the name that the
manifest gives. tests/manifest_checks.py holds the rules by which controllers
act once a pod has ended.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, losses
from manifest_checks import Work, environment, expanded, fate, render, work

# A network and names of its own, as the port is the manifest's.
NETWORK = ["unshare", "--net", "--mount", "--propagation", "private"]
# SIOCSIFFLAGS: UP, LOOPBACK, RUNNING
LO_UP = (
    "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', "
    "b'lo', 0x49))"
)


def can_try() -> bool:
    return (
        bool(shutil.which("kubectl") and shutil.which("unshare"))
        and subprocess.run([*NETWORK, "true"], capture_output=True, check=False).returncode == 0
    )


pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not can_try(), reason="needs kubectl, and root for namespaces of networks and mounts"
    ),
]


class Cluster:
    """Stands in for the nodes, their network and the kubelet that starts pods."""

    def __init__(self, found: Work, folder: Path, config: Path) -> None:
        self.found, self.folder, self.config = found, folder, config
        self.pods: dict[int, subprocess.Popen[bytes]] = {}
        hosts = folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {found.first_node}\n")
        script = (
            f'mount --bind {hosts} /etc/hosts && {sys.executable} -c "{LO_UP}" && echo ready && '
            "exec sleep infinity"
        )
        self.network = subprocess.Popen([*NETWORK, "bash", "-c", script], stdout=subprocess.PIPE)
        assert self.network.stdout
        assert self.network.stdout.readline() == b"ready\n"

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            given = environment(self.found, self.found.node, rank) | {
                "GLOO_SOCKET_IFNAME": "lo",
                "FINETUNE_NEEDS_GPU": "0",
            }
            # Nodes of one process each, and the test's config in place of the ConfigMap's.
            here = {"/config/run.yaml": str(self.config), "16": "2"}
            words = [here.get(word, expanded(word, given)) for word in self.found.args]
            command = [
                "nsenter", f"--target={self.network.pid}", "--net", "--mount", f"--wd={ROOT}",
                "unshare", "--pid", "--fork", "--kill-child=KILL", sys.executable, "-m", "finetune",
                *words,
            ]  # fmt: skip
            with (self.folder / f"pod{rank}.log").open("ab") as log:
                self.pods[rank] = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **given},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def preempt(self, rank: int) -> None:
        """The machine goes away, and with it every process of the pod at once."""
        self.pods[rank].kill()

    def codes(self, within: float = 150) -> dict[int, int]:
        end = time.monotonic() + within
        return {rank: pod.wait(max(1, end - time.monotonic())) for rank, pod in self.pods.items()}

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("pod*.log")))

    def close(self) -> None:
        for process in (*self.pods.values(), self.network):
            process.kill()
            process.communicate()


@contextlib.contextmanager
def cluster(overlay: str, folder: Path, config: Path) -> Iterator[Cluster]:
    started = Cluster(work(render(ROOT / "k8s/overlays" / overlay)), folder, config)
    try:
        yield started
    finally:
        started.close()


@pytest.mark.parametrize("overlay", ["jobset", "multi-node", "trainjob"])
def test_two_pods_train_as_one_process_and_survive_losing_one(workshop, tmp_path, overlay):
    settings = {
        "train__micro_batch_size": 2, "train__epochs": 12, "train__max_steps": 60,
        "checkpoint__every_steps": 10, "train__hang_minutes": 1,
    }  # fmt: skip
    config = workshop.write(workshop.config("two", **settings))
    with cluster(overlay, tmp_path, config) as both:
        both.start(0, 1)
        wait_for(workshop.run_dir("two") / "checkpoints/step-00000010/manifest.json", both)
        both.preempt(1)
        lost = both.codes()
        # A machine that vanishes is noticed minutes later: what is seen first is the peer, which
        # has crashed.
        assert fate(both.found, lost[0], disrupted=False) == "counted", both.output()
        both.start(0, 1)
        assert both.codes() == {0: 0, 1: 0}, both.output()
        assert "resumed from" in both.output()
    one = workshop.train("one", **settings)
    assert losses(workshop.run_dir("two")) == pytest.approx(losses(one), rel=1e-5)


def wait_for(path: Path, pods: Cluster) -> None:
    for _ in range(600):
        if path.exists():
            return
        assert all(pod.poll() is None for pod in pods.pods.values()), pods.output()
        time.sleep(0.1)
    raise AssertionError(pods.output())
