"""Several nodes: launchers with ranks of their own, here on one host."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, losses, short
from faults.forked import fork

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# File -> processes on each of two nodes, and what its numbers are for so few.
FILES = {
    "ddp_multinode": (1, []), "fsdp2_multinode": (1, []), "zero3_multinode": (1, []),
    "fsdp2_hybrid_multinode": (
        2,
        ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"],
    ),
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def node(
    rank, topology, port, *arguments, each=1, extra=(), address="127.0.0.1", wait="60", join="1"
):
    """One node's launcher, as a cluster would start it."""
    line = (
        f"{sys.executable} -m accelerate.commands.launch --config_file "
        f"accelerate_configs/{topology}.yaml --num_machines $PET_NNODES "
        f"--num_processes $(({each} * PET_NNODES)) --machine_rank $PET_NODE_RANK --main_process_ip "
        "$PET_MASTER_ADDR "
        f"--main_process_port {port} --rdzv_conf timeout={wait} {' '.join(extra)} train.py "
        f"{' '.join(map(str, arguments))}"
    )
    cluster = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": address}
    environment = {**os.environ, **cluster, "FINETUNE_JOIN_MINUTES": join}
    return subprocess.Popen(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def output_of(*nodes, within):
    """What every node says; all must have ended within `within` seconds."""
    end = time.monotonic() + within
    try:
        return [each.communicate(timeout=max(1, end - time.monotonic()))[1] for each in nodes]
    finally:
        for each in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)


@pytest.mark.parametrize("topology", short([*FILES], "ddp_multinode"))
def test_two_nodes_train_as_one_process(workshop, topology):
    """Each process with the environment that its node's launcher gives it."""
    each, extra = FILES[topology]
    config = workshop.write(workshop.config("two", train__micro_batch_size=1))
    logs = [workshop.folder / f"{rank}.log" for rank in range(2 * each)]
    meet = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    launch = fork("train", ["--config", str(config)], topology, logs, {}, [*meet, *extra], nodes=2)
    assert launch.codes() == [0] * 2 * each, launch.output()
    one = workshop.train("one", train__micro_batch_size=1)
    assert losses(workshop.run_dir("two")) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.fault  # test_pods.py has two launchers, too
def test_two_launchers_train_as_one_process(workshop):
    config, port = workshop.write(workshop.config("two", train__micro_batch_size=1)), free_port()
    nodes = [node(rank, "ddp_multinode", port, "--config", config) for rank in (0, 1)]
    errors = output_of(*nodes, within=150)
    assert [each.returncode for each in nodes] == [0, 0], errors
    one = workshop.train("one", train__micro_batch_size=1)
    assert losses(workshop.run_dir("two")) == pytest.approx(losses(one), rel=1e-5)


def two_nodes(workshop, *arguments, join="1"):
    """Two nodes whose processes get arguments of their own."""
    logs = [workshop.folder / f"{rank}.log" for rank in (0, 1)]
    meet = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    settings = {"FINETUNE_JOIN_MINUTES": join}
    return fork("train", [], "ddp_multinode", logs, settings, meet, nodes=2, each=arguments)


def test_another_config_on_one_node_ends_all_and_is_reported(workshop):
    config = str(workshop.write(workshop.config()))
    launch = two_nodes(
        workshop, *(["--config", config, "--optimizer.lr", str(0.1 + rank)] for rank in (0, 1))
    )
    assert all(launch.codes(90))
    says = "process 1 was started with another optimizer.lr: 1.1, process 0 has 0.1"
    assert all(says in log.read_text() for log in launch.logs)
    assert not workshop.run_dir().exists()


def test_waiting_for_a_node_that_failed_early_is_limited(workshop):
    config = str(workshop.write(workshop.config()))
    launch = two_nodes(
        workshop, ["--config", config], ["--config", "no_such_file.yaml"], join="0.05"
    )
    assert all(launch.codes(90))
    assert "no_such_file.yaml" in launch.logs[1].read_text()
    assert "did not find each other at 127.0.0.1" in launch.logs[0].read_text()


@pytest.mark.fault
def test_waiting_for_a_missing_node_is_limited(workshop):
    config = workshop.write(workshop.config())
    [error] = output_of(
        node(0, "ddp_multinode", free_port(), "--config", config, wait="5"), within=90
    )
    assert "1/2 clients joined" in error


@pytest.mark.fault
def test_waiting_at_a_wrong_address_is_limited(workshop):
    config = workshop.write(workshop.config())
    wrong = node(1, "ddp_multinode", free_port(), "--config", config, wait="5", address="127.0.0.9")
    [error] = output_of(wrong, within=90)
    assert "127.0.0.9" in error
    assert wrong.returncode != 0
