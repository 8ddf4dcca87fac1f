"""The launcher passes on signals and exit codes, and leaves no process behind."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock

from finetune.engine.topology import launch
from finetune.survival import launcher

# What a process of these tests does: its rank picks the argument. It notes its own number, its
# folder and each signal.
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path

rank, notes = int(os.environ.get("RANK", "0")), Path(__file__).parent
what, *rest = sys.argv[1:][rank].split(":")
signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

def note(name, text):
    with open(notes / f"{name}-{rank}", "a") as file:
        file.write(f"{text}\\n")

def until(condition):
    while not condition():
        time.sleep(0.01)

def state_of(other):
    try:
        pid = (notes / f"pid-{other}").read_text().strip()
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if pid else "?"
    except FileNotFoundError:
        return "gone" if (notes / f"pid-{other}").exists() else "?"

def listen():
    for number in signals:
        signal.signal(number, lambda number, _: note("heard", signal.Signals(number).name))
    note("ready", "")
    until((notes / "end").exists)

note("pid", os.getpid())
note("beats", os.environ["FINETUNE_BEATS"])
if what in ("deaf", "stop", "step"):
    Path(os.environ["FINETUNE_BEATS"], str(rank)).write_text("step 38\\n")
if what == "step":
    what, *rest = rest
if what == "after":  # the process of another rank has gone
    until(lambda: state_of(rest[0]) == "gone")
    what, *rest = rest[1:]
elif what == "beside":  # it is stopped, or ignores everything
    until(lambda: state_of(rest[0]) == "T" or (notes / f"ready-{rest[0]}").exists())
    what, *rest = rest[1:]
if what in ("family", "deaf"):
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
if what == "family":
    note("child", subprocess.Popen(["sleep", "600"]).pid)
    what, *rest = rest
if what == "exit":
    sys.exit(int(rest[0]))
elif what == "abort":  # as NCCL's own thread does
    if rest:
        Path(os.environ["FINETUNE_BEATS"], "run").write_text(str(notes / rest[0]))
    os.abort()
elif what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
elif what == "listen":
    listen()
    sys.exit(75)
elif what == "follow":  # as train.py does
    from finetune.survival.preemption import StopFlag
    flag = StopFlag()
    flag.follow_launcher()
    flag.raises()
    flag.only_note()
    note("ready", "")
    until(lambda: flag.is_set)
    note("heard", flag.reason)
else:
    note("ready", "")
    time.sleep(600)
"""
# Prints what it was given, in one piece.
TELL = """
import json, os, sys
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR OMP_NUM_THREADS".split()
prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
given = {k: v for k, v in os.environ.items() if k in names or k.startswith(prefixes)}
os.write(1, (json.dumps([given, os.environ.get("MASTER_PORT"), sys.argv[1:]]) + "\\n").encode())
"""
MAIN = """
import sys
from finetune.survival import launcher
code = launcher.main(sys.argv[1:])
sys.exit(code)
"""
RUN = """
import os, sys
from finetune.survival import launcher
worker, *behaviours = sys.argv[1:]
environments = [{**os.environ, "RANK": str(rank)} for rank in range(len(behaviours))]
sys.exit(launcher.run(environments, [sys.executable, worker, *behaviours]))
"""


@pytest.fixture
def worker(tmp_path):
    return script(tmp_path / "worker.py", WORKER)


@pytest.fixture
def log(tmp_path):
    return script(tmp_path / "tell.py", TELL)


def script(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs/a"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def start(worker):
    """Start a launcher in its own process, which heeds SIGHUP even if the tests run under nohup."""
    started, heard = [], signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def start(*behaviours, before=(), **keywords):
        command = [*before, sys.executable, "-c", RUN, str(worker), *behaviours]
        # One that is killed leaves its folder of steps behind.
        environment = {**os.environ, "TMPDIR": str(worker.parent), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **keywords
        )
        started.append(process)
        return process

    yield start
    signal.signal(signal.SIGHUP, heard)
    for pid in [
        *(process.pid for process in started if process.poll() is None),
        *noted(worker, "pid"),
    ]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


def run(worker, *behaviours):
    """A launcher in this process."""
    environments = [{**os.environ, "RANK": str(rank)} for rank in range(len(behaviours))]
    return launcher.run(environments, [sys.executable, str(worker), *behaviours])


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def notes(worker, name, rank=0):
    path = worker.parent / f"{name}-{rank}"
    return path.read_text().split() if path.exists() else []


def noted(worker, name):
    return [int(line) for rank in range(4) for line in notes(worker, name, rank)]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until_ready(worker, number):
    """Each has its handlers, or ignores everything."""
    until(lambda: all((worker.parent / f"ready-{rank}").exists() for rank in range(number)))


def let_end(worker, process):
    (worker.parent / "end").touch()
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


@pytest.mark.parametrize(
    ("behaviours", "code"),
    [
        (["exit:0"], 0), (["exit:2"], 2), (["exit:75"], 75), (["exit:1"], 1), (["exit:3"], 1),
        (["exit:130"], 1), (["die"], 1), (["exit:0", "exit:0"], 0),
        (["after:1:exit:0", "exit:2"], 2), (["exit:0", "after:0:exit:75"], 75),
        (["exit:75", "after:0:exit:1"], 75), (["exit:1", "after:0:exit:75"], 1),
        (["after:1:exit:2", "die"], 1),
        (["after:1:exit:1", "after:2:exit:75", "exit:0"], 75),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)  # fmt: skip
def test_the_exit_code_is_that_of_the_first_failure(worker, behaviours, code):
    assert run(worker, *behaviours) == code


def test_a_clean_end_leaves_no_message_and_no_step_folder(worker, capfd):
    run(worker, "exit:75", "exit:0")
    assert capfd.readouterr() == ("", "")
    assert not Path(notes(worker, "beats")[0]).exists()


def test_a_killed_worker_is_reported_with_its_step_and_the_others_end(worker, capfd):
    assert run(worker, "after:1:exit:1", "step:die") == 1
    output = capfd.readouterr().err.splitlines()
    assert output == [
        "process 1 was killed by SIGKILL in step 38",
        "process 0 ended with exit code 1",
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"state": "running", "step": 30}, ("failed", 37)),
        (None, ("failed", 37)),
        ({"state": "complete", "step": 40}, ("complete", 40)),
    ],
)
def test_an_outcome_is_written_for_workers_that_died_without_one(worker, run_dir, before, after):
    if before:
        (run_dir / "outcome.json").write_text(json.dumps(before))
    (run_dir / "metrics.jsonl").write_text('{"step": 36}\n{"step": 37}\n{"st')
    assert run(worker, "after:1:exit:1", "step:abort:runs/a") == 1
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert (outcome["state"], outcome["step"]) == after
    assert before == outcome or outcome["reason"] == "process 1 was killed by SIGABRT in step 38"


def test_the_outcome_of_another_run_is_left_alone(worker, run_dir):
    (run_dir / "outcome.json").write_text('{"state": "running", "step": 30}')
    assert run(worker, "step:abort") == 1
    with FileLock(run_dir / ".lock"):
        assert run(worker, "step:abort:runs/a") == 1
    assert json.loads((run_dir / "outcome.json").read_text()) == {"state": "running", "step": 30}


@pytest.mark.parametrize("other", ["stop", "deaf"])
def test_a_stopped_or_deaf_worker_is_killed_after_a_failure(worker, capfd, monkeypatch, other):
    monkeypatch.setattr(launcher.processes, "OTHERS_SECONDS", 0.3)
    assert run(worker, other, "beside:0:exit:1") == 1
    assert capfd.readouterr().err.splitlines() == [
        "process 1 ended with exit code 1",
        "process 0 had not ended 0.3 seconds after process 1, and was killed in step 38",
    ]
    assert not any(map(is_alive, noted(worker, "pid")))


@pytest.mark.parametrize(("first", "code"), [("exit:0", 1), ("exit:75", 75), ("exit:2", 2)])
def test_a_worker_that_outlives_a_finished_one_is_killed_later(
    worker, capfd, monkeypatch, first, code
):
    monkeypatch.setattr(launcher.processes, "OTHERS_SECONDS", 0.0)
    monkeypatch.setattr(launcher.processes, "FINISH_SECONDS", 0.4)
    assert run(worker, f"beside:1:{first}", "deaf") == code
    assert (
        capfd.readouterr().err
        == "process 1 had not ended 0.4 seconds after process 0, and was killed in step 38\n"
    )
    assert not any(map(is_alive, noted(worker, "pid")))


def test_a_worker_finishing_after_a_failure_extends_no_deadline(worker, capfd, monkeypatch):
    monkeypatch.setattr(launcher.processes, "OTHERS_SECONDS", 2.0)
    assert run(worker, "deaf", "beside:0:exit:1", "after:1:exit:0") == 1
    assert (
        "process 0 had not ended 2 seconds after process 1, and was killed"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    "behaviours", [["family:exit:0"], ["family:die"], ["family:sleep", "beside:0:exit:1"]]
)
def test_children_of_ended_or_killed_workers_are_killed(worker, monkeypatch, behaviours):
    monkeypatch.setattr(launcher.processes, "OTHERS_SECONDS", 0.1)
    run(worker, *behaviours)
    [child] = noted(worker, "child")
    until(lambda: not is_alive(child))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_each_signal_reaches_every_process_once(start, worker, name):
    process = start("listen", "listen")
    until_ready(worker, 2)
    expected = []
    for _ in range(2):
        process.send_signal(signal.Signals[name])
        expected.append("SIGTERM" if name == "SIGHUP" else name)
        until(lambda: all(len(notes(worker, "heard", rank)) == len(expected) for rank in (0, 1)))
    assert let_end(worker, process) == (75, "")
    assert [notes(worker, "heard", rank) for rank in (0, 1)] == [expected, expected]


def test_ctrl_c_in_a_terminal_reaches_workers_once(start, worker):
    """pty.spawn gives the launcher a terminal, and what is written to it."""
    terminal = [sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"]
    process = start("listen", before=terminal, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    until_ready(worker, 1)
    process.stdin.write("\x03")
    process.stdin.flush()
    until(lambda: notes(worker, "heard"))
    (worker.parent / "end").touch()
    assert process.wait(timeout=60) == 75
    assert notes(worker, "heard") == ["SIGINT"]


def test_sigterm_before_a_process_has_handlers_is_preemption(start, worker):
    process = start("sleep")
    until_ready(worker, 1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 75


def test_a_signal_before_the_first_process_starts_none(worker, capfd):
    with launcher.forwarding() as heard:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (
            launcher.supervise(heard, [dict(os.environ)], [sys.executable, str(worker), "listen"])
            == 75
        )
    assert notes(worker, "pid") == []
    assert capfd.readouterr().err.startswith(
        "preempted: a signal came before the first process was started"
    )


def test_nohup_is_heeded(start, worker):
    process = start("listen", before=["nohup"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until_ready(worker, 1)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    until(lambda: notes(worker, "heard"))
    let_end(worker, process)
    assert notes(worker, "heard") == ["SIGUSR1"]


def test_processes_end_when_the_launcher_was_killed(start, worker):
    process = start("follow", "follow")
    until_ready(worker, 2)
    process.kill()
    until(lambda: not any(map(is_alive, noted(worker, "pid"))))
    for rank in (0, 1):
        assert notes(worker, "heard", rank) == "the launcher has died".split()


def test_a_worker_orphaned_while_python_starts_ends_as_preempted():
    code = (
        "from finetune.survival.preemption import StopFlag; StopFlag().follow_launcher(); "
        "print('goes on')"
    )
    done = main(command=("-c", code), env={**os.environ, "FINETUNE_LAUNCHER": "999999999"})
    assert (done.returncode, done.stdout) == (75, "")
    assert "the launcher has died" in done.stderr


def test_a_failed_start_leaves_no_process(worker):
    with pytest.raises(ValueError, match="illegal environment variable name"):
        launcher.run([dict(os.environ), {"a=b": ""}], [sys.executable, str(worker), "deaf"])
    assert not any(map(is_alive, noted(worker, "pid")))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Popen's, of a process that still runs
def test_unkillable_worker_is_reported(worker, capfd, monkeypatch):
    """A disk or a GPU that hangs in the kernel; here what kills does nothing."""
    for name in ("KILL_SECONDS", "OTHERS_SECONDS"):
        monkeypatch.setattr(launcher.processes, name, 0.2)
    monkeypatch.setattr(launcher.processes._Worker, "kill", lambda self: None)
    assert run(worker, "deaf", "beside:0:exit:1") == 1
    os.kill(noted(worker, "pid")[0], signal.SIGKILL)
    assert capfd.readouterr().err.splitlines()[-1].startswith("process 0 cannot be killed")


def test_processes_start_without_a_step_folder(worker, monkeypatch, capfd):
    def full(**keywords):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(launcher.processes.tempfile, "mkdtemp", full)
    script = worker.with_name("bare.py")
    script.write_text("import os, sys; sys.exit(3 if 'FINETUNE_BEATS' not in os.environ else 0)")
    assert launcher.main([str(script)]) == 1
    assert capfd.readouterr().err == "process 0 ended with exit code 3\n"


def main(*arguments, command=("-c", MAIN), **keywords):
    """The command in a process of its own."""
    command = [sys.executable, *command, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **keywords
    )


def printed(result):
    """What each process has printed, by rank: environment, port, arguments."""
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[{")]
    return sorted(lines, key=lambda line: int(line[0].get("RANK", "0")))


def test_one_process_without_a_topology_file_is_what_python_would_start(log):
    """And no launcher needs Accelerate, which imports torch, to start it."""
    light = MAIN.replace("(code)", "(code or 'torch' in sys.modules)")
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    assert printed(
        main(log, "--config", "x.yaml", "--num_processes", "2", command=("-c", light), env=clean)
    ) == [[{}, None, ["--config", "x.yaml", "--num_processes", "2"]]]


def test_processes_inherit_the_terminal(worker):
    script = worker.with_name("echo.py")
    script.write_text("import sys; print(sys.stdin.read()); print('aside', file=sys.stderr)")
    result = main(script, input="what was typed")
    assert (result.stdout, result.stderr) == ("what was typed\n", "aside\n")


SCRIPT = str(ROOT / "train.py")
MULTINODE = ["--config_file", str(ROOT / "accelerate_configs/ddp_multinode.yaml")]


def plan(*arguments):
    """Environments of the processes that would be started."""
    return launcher.read([*map(str, arguments), SCRIPT])[0]


# File -> kind, processes of this node, replicas, processes that share a sequence.
TOPOLOGIES = {
    "single": ("single", 1, 1, 1), "cpu_debug": ("ddp", 2, 1, 1), "ddp": ("ddp", 8, 1, 1),
    "ddp_multinode": ("ddp", 8, 1, 1), "fsdp2": ("fsdp2", 8, 1, 1),
    "fsdp2_context": ("fsdp2_context", 8, 1, 4), "fsdp2_hybrid": ("fsdp2_hybrid", 8, 2, 1),
    "fsdp2_hybrid_multinode": ("fsdp2_hybrid", 8, 2, 1), "fsdp2_multinode": ("fsdp2", 8, 1, 1),
    "fsdp2_offload": ("fsdp2_offload", 8, 1, 1), "zero1": ("zero1", 8, 1, 1),
    "zero2": ("zero2", 8, 1, 1), "zero3": ("zero3", 8, 1, 1), "zero3_multinode": ("zero3", 8, 1, 1),
    "zero3_offload": ("zero3_offload", 8, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("accelerate_configs/*.yaml")), ids=lambda path: path.stem
)
def test_every_topology_file_gives_its_topology(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, number, replicas, context = TOPOLOGIES[file.stem]
    nodes = 2 if "multinode" in file.stem else 1
    environments = plan("--config_file", file, *(["--machine_rank", 1] if nodes == 2 else []))
    topologies = [launch.read(environment) for environment in environments]
    assert {(w.name, w.num_processes, w.num_replicas, w.num_context) for w in topologies} == {
        (name, number * nodes, replicas, context)
    }
    first = number * (nodes - 1)
    ranks = [(e.get("RANK"), e.get("LOCAL_RANK"), e.get("GROUP_RANK")) for e in environments]
    expected = [(str(first + local), str(local), str(nodes - 1)) for local in range(number)]
    assert ranks == (expected if file.stem != "single" else [(None, None, None)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "extra"),
    [
        pytest.param("single", ["--num_processes", "1"], marks=pytest.mark.proof),
        pytest.param(
            "zero3_offload", ["--num_processes", "2", "--mixed_precision", "no"],
            marks=pytest.mark.proof,
        ),
        (
            "fsdp2_context",
            "--num_processes 2 --parallelism_config_cp_size 2 "
            "--parallelism_config_dp_shard_size 1".split(),
        ),
    ],
)  # fmt: skip
def test_processes_get_what_accelerate_launch_gives_them(log, monkeypatch, topology, extra):
    monkeypatch.chdir(ROOT)
    file = f"accelerate_configs/{topology}.yaml"
    arguments = ["--config_file", file, *extra, "--main_process_port", "0", log]
    theirs = printed(main(*arguments, command=("-m", "accelerate.commands.launch")))
    ours = printed(main(*arguments))
    assert [launch.read(given) for given, _, _ in ours] == [
        launch.read(given) for given, _, _ in theirs
    ]
    assert [given for given, _, _ in ours] == [given for given, _, _ in theirs]


def test_use_cpu_is_refused_by_the_script(tmp_path):
    file = tmp_path / "cpu.yaml"
    file.write_text('distributed_type: "NO"\nuse_cpu: true\nnum_processes: 2\n')
    [environment] = plan("--config_file", file)
    with pytest.raises(
        launch.ConfigError, match="use_cpu: true makes accelerate launch start one process"
    ):
        launch.read(environment)


def test_several_processes_without_a_topology_file_are_ddp():
    environments = plan("--num_processes", 2)
    assert [launch.read(each).kind for each in environments] == ["ddp", "ddp"]


def test_the_accelerate_config_of_the_user_is_ignored(tmp_path, monkeypatch):
    from accelerate.commands import launch as theirs

    file = tmp_path / "default_config.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    monkeypatch.setattr(theirs, "default_config_file", str(file))
    assert ["WORLD_SIZE" in each for each in plan("--mixed_precision", "no")] == [False]


def test_processes_meet_at_the_given_or_a_free_port():
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        assert plan("--num_processes", 2, "--main_process_port", port)[0]["MASTER_PORT"] != str(
            port
        )
    assert plan("--num_processes", 2, "--main_process_port", port)[0]["MASTER_PORT"] == str(port)
    assert len({plan("--num_processes", 2)[0]["MASTER_PORT"] for _ in range(4)}) > 1


def test_a_taken_port_on_the_first_node_is_reported(capfd):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert launcher.main([*MULTINODE, "--main_process_port", str(port), SCRIPT]) == 1
    error = capfd.readouterr().err
    assert error.startswith("failed: ")
    assert f"port `{port}`" in error
    assert "Please specify a different port" in error


def test_modules_and_programs_start_too(tmp_path, capfd):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho $RANK: $1\n")
    program.chmod(0o755)
    assert launcher.main(["--no_python", str(program), "--two"]) == 0
    assert launcher.main(["--module", "timeit", "-n1", "-r1", "print('timed')"]) == 0
    assert capfd.readouterr().out.splitlines()[:2] == [": --two", "timed"]


def test_ignored_torchrun_options_are_reported(capfd):
    plan("--num_processes", 2, "--rdzv_conf", "timeout=5", "--max-restarts", 3)
    output = capfd.readouterr().err
    assert output.startswith(
        "ignored, as launch starts the processes itself: --rdzv_conf, --max_restarts; "
    )
    assert "FINETUNE_JOIN_MINUTES" in output


def test_help_exits_with_0(capfd):
    assert launcher.main(["--help"]) == 0
    assert "--num_processes" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "launch needs a script"),
        (["no_such.py", "--config", "x"], "no script no_such.py in"),
        (["--num_processes", "2", "no_such.py"], "no script no_such.py in"),
        (["--module", "--no_python", "x"], "--module and --no_python exclude each other"),
        (["--num_proceses", "2", SCRIPT], "unrecognized arguments: --num_proceses"),
        (["--num_processes", "0", SCRIPT], "num_processes is 0; it must be a whole number from 1"),
        (["--multi_gpu", "--use_fsdp", SCRIPT], "You can only use one of"),
        (
            ["--num_processes", "2", "--num_machines", "2", SCRIPT],
            "2 nodes need the address of the first one: give --main_process_ip",
        ),
        ([*MULTINODE, "--num_processes", "5", SCRIPT], "5 cannot be divided by num_machines: 2"),
        (
            [*MULTINODE, "--machine_rank", "2", SCRIPT],
            "machine_rank is 2, but there are 2 nodes; ranks start at 0",
        ),
        (["--tpu", SCRIPT], "asks for TPUs or mpirun"),
        (
            ["--config_file", "no_such.yaml", SCRIPT],
            "--config_file no_such.yaml cannot be read from",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_reported_in_one_line(capfd, arguments, message):
    assert_told(arguments, message, capfd)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds a NoneType instead of settings"),
        ("a: [1\n", "cannot be read from .*: while parsing a flow sequence"),
        ("num_processes: 2\n", "A `distributed_type` must be specified in the config file"),
        ("distributed_type: MULTI_GPU\nnum_procesess: "
         "2\n", r"had unknown keys \(\['num_procesess'\]\)"),
        ("distributed_type: MULTI_GPU\n", "You need to manually pass in `--num_processes`"),
        ("distributed_type: MULTI_GPU\nnum_processes: "
         "eight\n", "num_processes is 'eight'; it must be a whole number from 1"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nmain_process_port: "
         "x\n", "main_process_port is 'x'"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: "
         "no\n", "mixed_precision is False; remove it"),
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: "
         "2\n", "fsdp_config is 2; it must hold settings"),
        ("distributed_type: MULTI_CPU\nnum_processes: "
         "2\n", "2 processes, but this distributed_type starts one"),
        ("compute_environment: AMAZON_SAGEMAKER\ndistributed_type: "
         "'NO'\n", "compute_environment is AMAZON_SAGEMAKER"),
    ],
)  # fmt: skip
def test_an_unusable_topology_file_is_reported_in_one_line(tmp_path, capfd, text, message):
    file = tmp_path / "topology.yaml"
    file.write_text(text)
    assert_told(["--config_file", str(file), SCRIPT, "--check"], message, capfd)


def assert_told(arguments, message, capfd):
    assert launcher.main(arguments) == 2
    output = capfd.readouterr().err
    assert output.startswith("error: ")
    assert output.count("\n") == 1, output
    assert re.search(message, output), output
