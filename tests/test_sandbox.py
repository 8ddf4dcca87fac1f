"""Programs and their tests, run away from this machine: real processes that try to get out."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, session

from finetune import sandbox
from finetune.errors import ConfigError
from finetune.evaluation import scores
from finetune.evaluation.scores.code_tests import code_in
from finetune.sandbox import Limits

QUICK = Limits(seconds=1.5)


@pytest.fixture(autouse=True)
def is_possible(request):
    """Skip tests that start a sandbox where none can be made."""
    if request.node.get_closest_marker("slow") and (why := sandbox._why_unavailable()):
        pytest.skip(f"no sandbox on this machine: {why}")


@pytest.mark.slow
def test_a_program_passes_its_tests_or_says_why_not():
    code = "print('hi')\ndef double(x): return 2 * x\nif __name__ == '__main__': input()"
    found = sandbox.run(code, "assert double(2) == 4")
    assert (found.passed, found.reason, found.output) == (True, "", "hi\n")
    found = sandbox.run(code, "print('last')\nassert double(2) == 5, 'not five'")
    assert (found.passed, found.reason) == (False, "AssertionError: not five")
    assert 'File "tests.py", line 2' in found.output


# What stands in a file of this machine, the name of that file, and a program that wants it.
OUTSIDE = """
import ctypes, errno, os, socket, sys
outside = {outside!r}
def refused(function, *arguments):
    try:
        function(*arguments)
    except OSError as exc:
        return True
    return False
assert refused(open, outside), "reads a file"
os.symlink(outside, "/program/link")
assert refused(open, "/program/link"), "reads through a link"
assert refused(open, "/program/link", "w"), "writes through a link"
os.symlink("..", "/program/up")
assert sorted(os.listdir("/program/up/..")) == sorted(os.listdir("/")), "goes up"
assert refused(os.link, "/usr/bin/env", "/program/hard"), "links a file"
for folder in ("/usr", sys.base_prefix):
    assert refused(open, folder + "/new", "w"), "writes to the system"
assert not os.path.exists("/proc") and not os.path.exists("/etc/passwd")
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_VSOCK):
    assert refused(socket.socket, family), "opens a socket"
socket.socketpair()
assert refused(os.setuid, 0) or os.getuid() == 0
assert refused(os.chroot, "/program") and refused(os.mknod, "/program/node", 0o60600, 0x800)
assert refused(os.memfd_create, "x"), "memory that no limit counts"
libc = ctypes.CDLL(None, use_errno=True)
for call in ((b"none", b"/program", b"tmpfs", 0, None),):
    assert libc.mount(*call) == -1, "mounts"
assert libc.unshare(0x10000000) == -1, "makes a namespace"
assert libc.ptrace(16, 1, 0, 0) == -1
assert os.getpid() == 1 and refused(os.kill, {parent}, 0), "sees other processes"
"""


@pytest.mark.slow
def test_a_program_reaches_nothing_outside(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("secret")
    found = sandbox.run(OUTSIDE.format(outside=str(outside), parent=os.getpid()))
    assert found.passed, found.reason
    assert outside.read_text() == "secret"
    assert list(tmp_path.iterdir()) == [outside]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param("import time; time.sleep(60)", "over 1.5 s", marks=pytest.mark.slow),
        pytest.param("x = bytearray(1 << 30)", "over 512 MB", marks=pytest.mark.slow),
        pytest.param("import os; os._exit(0)", "ended before its tests did",
                     marks=pytest.mark.slow),
        *(pytest.param(*each, marks=pytest.mark.proof) for each in (
            ("raise SystemExit", "ended before its tests did"),
            ("import signal\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)"
             "\nwhile True: pass", "over 1.5 s"),
            ("while True: print('x' * 10_000)", "over 1.5 s"),
            ("import os, time\nfor _ in range(8):\n  if not os.fork():\n    x = b'x' * (200 << 20)"
             "\n    time.sleep(9)\ntime.sleep(9)", "over 512 MB"),
            ("f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
             "OSError: [Errno 27] File too large"),
            ("for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(4 << 20))",
             "OSError: [Errno 28] No space left on device"),
            ("for i in range(9999): open(f'/tmp/{i}', 'w')",
             "OSError: [Errno 28] No space left on device: '/tmp/40"),
            ("import ctypes; ctypes.string_at(0)", "ended with -11"),
            ("def", "SyntaxError: invalid syntax"),
            ("input()", "EOFError: EOF when reading a line"),
            ("print('\\ud83d')", "UnicodeEncodeError"),
            ("import os; os.closerange(0, 99)", "ended with 120"),
        )),
    ],
)  # fmt: skip
def test_a_program_ends_at_its_limits(code, reason):
    start, limits = time.monotonic(), Limits(seconds=20) if "MB" in reason else QUICK
    found = sandbox.run(code, "x = 1", limits)
    assert (found.passed, found.reason[: len(reason)]) == (False, reason)
    assert len(found.output) <= QUICK.output_bytes
    assert time.monotonic() - start < 30


@pytest.mark.proof
def test_a_fork_bomb_ends_with_all_its_processes():
    bomb = (
        "import os\nwhile True:\n  try:\n    if not os.fork(): os.setsid()\n  except OSError: pass"
    )
    before = set(os.listdir("/proc"))
    found = sandbox.run(bomb, "", QUICK)
    assert found.reason in ("over 1.5 s", "over 512 MB")
    new = [number for number in set(os.listdir("/proc")) - before if number.isdigit()]
    commands = []
    for number in new:
        try:
            commands.append(Path(f"/proc/{number}/cmdline").read_text())
        except OSError:
            continue
    assert not [each for each in commands if "python\0-I" in each]


@pytest.mark.proof
def test_a_program_ends_with_the_process_that_started_it():
    code = "from finetune import sandbox; sandbox.run('import time; time.sleep(60)')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True
    )  # its sandbox has another session: children are found by their parents
    deadline, inner = time.monotonic() + 30, []
    while time.monotonic() < deadline and len(inner) < 3:
        inner = below(process.pid)
        time.sleep(0.05)
    assert len(inner) >= 3
    process.kill()
    process.wait()
    while time.monotonic() < deadline and any(map(alive, inner)):
        time.sleep(0.05)
    assert not any(map(alive, inner))
    assert session(process.pid) == []


def below(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [number for child in map(int, children) for number in (child, *below(child))]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_a_sandbox_code_is_refused(monkeypatch, tmp_path):
    why = "a user namespace: Operation not permitted"
    fake = tmp_path / "sandboxed.py"
    fake.write_text(f'print(\'{{"unavailable": "{why}"}}\')')
    monkeypatch.setattr(sandbox.sandboxed, "__file__", str(fake))
    sandbox._why_unavailable.cache_clear()
    try:
        with pytest.raises(ConfigError, match="--scores code-tests runs code in a sandbox, which "
                           f"cannot be made here: {why}; it needs Linux"):  # fmt: skip
            scores.choose(["code-tests"])
    finally:
        sandbox._why_unavailable.cache_clear()


def test_code_is_what_stands_in_fences():
    assert code_in("x = 1") == "x = 1"
    assert code_in("Sure:\n```python\nx = 1\n```\nDone.") == "x = 1\n"
    assert code_in("```py\nx\n```\nand\n```\ny") == "x\n\ny"


@pytest.mark.slow
def test_answers_are_scored_by_the_tests_of_their_rows():
    from test_scores import completion

    [scorer] = scores.choose(["code-tests"])
    given = [
        completion("```python\ndef f(): return 1\n```", fields={"tests": ["assert f()", "f()"]}),
        completion("def f(): return 0", fields={"tests": "assert f()"}),
        completion("def f(): return 0"),
    ]
    found = scorer(given)
    assert [each.value for each in found] == [1, 0, None]
    assert found[1].reason == "AssertionError"
    assert found[2].reason == "the row has no text of tests in tests"
