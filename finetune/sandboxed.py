"""Run a program that must not touch this machine; `sandbox.py` starts this file as a process.

It imports the standard library alone, as it runs isolated (python -I -S). Three processes: this one
gives the next its user namespace; that one has namespaces of its own for everything else, forks the
program as their first process and watches it; the program sees a root of its own, a tmpfs with the
interpreter and the system's libraries read-only in it. Whatever it started ends with it.

stdin: a JSON object; stdout: a JSON object with what became of the program.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
MS_NOSUID, MS_NODEV = 2, 4
AT_FDCWD, AT_RECURSIVE, RDONLY, NOSUID, NODEV = -100, 0x8000, 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = (
    1, 22, 24, 28, 38,
)  # fmt: skip
MOUNT_SETATTR = 442  # on every architecture
UNPRIVILEGED = 65534
PROGRAM_UID = 1  # inside, where root started this; the kernel limits no processes of root
POLL_SECONDS = 0.01
DEVICES = ("null", "zero", "full", "random", "urandom")
# Its first process is the program. What it prints after the tests is unknown to the program until
# then, so one that ends early has not passed.
DRIVER = """
import os, sys
def read(count):
    found = b""
    while len(found) < count:
        found += os.read(3, count - len(found))
    return found
size, tests = int(read(20)), int(read(20))
space = {"__name__": "answer"}
try:
    for name, text in (("answer.py", read(size)), ("tests.py", read(tests))):
        exec(compile(text, name, "exec"), space)
finally:
    sys.stdout.flush()
os.write(1, read(32))
"""
# Names -> numbers on x86_64 and on aarch64. What holds memory that no limit counts, what opens
# parts of the kernel that a program does not need, and what would make further namespaces.
CALLS = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "bpf": (321, 280), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "perf_event_open": (298, 241), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
}  # fmt: skip
# Architecture as the kernel calls it, and pivot_root, clone, clone3, socket.
MACHINES = {
    "x86_64": (0, 0xC000003E, 155, 56, 435, 41), "aarch64": (1, 0xC00000B7, 41, 220, 435, 198),
}  # fmt: skip


class Unavailable(Exception):
    """A step that this machine does not allow."""


libc = ctypes.CDLL(None, use_errno=True)


def call(step: str, function: str, *arguments: object) -> int:
    """Call a function of libc. Raises Unavailable, named after the step."""
    found: int = getattr(libc, function)(*arguments)
    if found < 0:
        raise Unavailable(f"{step}: {os.strerror(ctypes.get_errno())}")
    return found


def syscall(step: str, number: int, *arguments: object) -> None:
    call(step, "syscall", ctypes.c_long(number), *arguments)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    call(
        f"mount {target}", "mount", source.encode(), target.encode(), kind.encode(),
        ctypes.c_ulong(flags), data.encode(),
    )  # fmt: skip


def main() -> None:
    """Give the watcher its user namespace, and wait for it."""
    asked = json.load(sys.stdin)
    call("prctl", "prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    ready, go = os.pipe(), os.pipe()
    user, group = os.geteuid(), os.getegid()
    watcher = os.fork()
    if not watcher:
        try:
            call("a user namespace", "unshare", CLONE_NEWUSER)
            call("prctl", "prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
            os.write(ready[1], b"x")
            if not os.read(go[0], 1):
                os._exit(1)
            print(json.dumps(watch(asked, is_root=user == 0)), flush=True)
        except (Unavailable, OSError) as exc:
            print(json.dumps({"unavailable": str(exc)}), flush=True)
        os._exit(0)
    os.close(ready[1])
    os.close(go[0])
    if os.read(ready[0], 1):
        try:
            write_maps(watcher, user, group)
            os.write(go[1], b"x")
        except OSError as exc:
            print(json.dumps({"unavailable": f"the map of users: {exc.strerror}"}), flush=True)
    os.close(go[1])
    os.waitpid(watcher, 0)


def write_maps(process: int, user: int, group: int) -> None:
    """Map users of a namespace: root is this user; if this is root, 1 is a user without rights."""
    more = f"\n{PROGRAM_UID} {UNPRIVILEGED} 1" if user == 0 else ""
    if user:  # as the kernel asks of other users
        write(f"/proc/{process}/setgroups", "deny")
    write(f"/proc/{process}/uid_map", f"0 {user} 1{more}")
    write(f"/proc/{process}/gid_map", f"0 {group} 1{more}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def watch(asked: dict[str, Any], is_root: bool) -> dict[str, Any]:
    """Fork the program, and end it at the limits. Return what became of it."""
    others = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    call("namespaces", "unshare", others)
    output, given, failed = os.pipe(), os.pipe(), os.pipe()
    nonce = os.urandom(16).hex().encode()
    start = time.monotonic()
    program = os.fork()
    if not program:
        failed_end = os.dup(failed[1])  # not inherited: it closes where the program starts
        try:
            enter(asked, is_root)
            given_end = os.dup(given[0])  # above 3
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(output[1], 1)
            os.dup2(output[1], 2)
            os.dup2(given_end, 3)
            os.closerange(4, failed_end)
            os.closerange(failed_end + 1, 64)
            confine(asked, is_root)
            os.execve(
                asked["python"], ["python", "-I", "-c", DRIVER], {"HOME": "/program", "PATH": ""}
            )
        except BaseException as exc:
            os.write(failed_end, str(exc).encode()[:500])
        os._exit(1)
    for end in (output[1], given[0], failed[1]):
        os.close(end)
    if problem := os.read(failed[0], 500):
        os.waitpid(program, 0)
        raise Unavailable(problem.decode(errors="replace"))
    code, tests = asked["code"].encode(), asked["tests"].encode()
    sent = b"%20d%20d" % (len(code), len(tests)) + code + tests + nonce
    found = attend(program, output[0], given[1], sent, asked, start)
    return {**found, "seconds": time.monotonic() - start, "nonce": nonce.decode()}


def attend(
    program: int, output: int, given: int, unsent: bytes, asked: dict[str, Any], start: float
) -> dict[str, Any]:
    """Feed the program, read what it prints, and kill it at a limit."""
    printed, reason, most = b"", "", asked["output_bytes"]
    os.set_blocking(output, False)
    os.set_blocking(given, False)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    while True:
        ended, status = os.waitpid(program, os.WNOHANG)
        readable, writable, _ = select.select([output], [given] if unsent else [], [], POLL_SECONDS)
        if writable:
            try:
                unsent = unsent[os.write(given, unsent) :]
            except BlockingIOError:
                continue
            except OSError:  # it ended, or closed its input
                unsent = b""
        if readable:
            with contextlib.suppress(BlockingIOError):
                printed = (printed + os.read(output, 1 << 16))[-2 * most :]
        if ended:
            break
        if time.monotonic() - start > asked["seconds"]:
            reason = "time"
        elif resident(program) > asked["memory_bytes"]:
            reason = "memory"
        if reason:
            os.kill(program, signal.SIGKILL)  # and with it everything in its namespace
            _, status = os.waitpid(program, 0)
            break
    with contextlib.suppress(BlockingIOError):
        while more := os.read(output, 1 << 16):  # what was in the pipe
            printed = (printed + more)[-2 * most :]
    code = os.waitstatus_to_exitcode(status)
    return {"exit_code": code, "reason": reason, "output": printed[-most:].decode(errors="replace")}


def resident(process: int) -> int:
    """Return the bytes in memory of a process and of all below it."""
    total, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            with open(f"/proc/{number}/statm") as file:
                total += int(file.read().split()[1]) * resource.getpagesize()
            with open(f"/proc/{number}/task/{number}/children") as file:
                waiting += map(int, file.read().split())
        except (OSError, IndexError):  # it ended
            continue
    return total


def enter(asked: dict[str, Any], is_root: bool) -> None:
    """Make a root of a tmpfs with read-only folders of the system, and enter it."""
    call("a mount namespace", "unshare", CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    root = asked["mount_point"]
    owner = f",uid={PROGRAM_UID}" if is_root else ""
    mount(
        "tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV,
        f"size={asked['disk_bytes']},nr_inodes={asked['files']},mode=755{owner}",
    )  # fmt: skip
    for link, target in asked["links"].items():
        os.makedirs(os.path.dirname(root + link), exist_ok=True)
        os.symlink(target, root + link)
    for folder in asked["folders"]:
        os.makedirs(root + folder, exist_ok=True)
        bind(folder, root + folder, RDONLY | NOSUID | NODEV)
    os.makedirs(root + "/dev", exist_ok=True)
    for name in DEVICES:
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY))
        bind(f"/dev/{name}", f"{root}/dev/{name}", RDONLY | NOSUID)
    for folder in ("/program", "/tmp", "/dev/shm"):
        os.makedirs(root + folder, exist_ok=True)
        os.chmod(root + folder, 0o777)
    os.chdir(root)
    pivot_root = MACHINES[platform.machine()][2]
    syscall("pivot_root", pivot_root, b".", b".")
    call("the old root", "umount2", b".", MNT_DETACH)
    os.chdir("/program")


def bind(source: str, target: str, attributes: int) -> None:
    mount(source, target, "", MS_BIND | MS_REC)
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    syscall(
        f"a read-only {source}", MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, wanted,
        ctypes.c_size_t(len(wanted)),
    )  # fmt: skip


def confine(asked: dict[str, Any], is_root: bool) -> None:
    """Limit this process, give up every privilege, and refuse calls of CALLS."""
    for name, most in (
        ("AS", asked["memory_bytes"]), ("FSIZE", asked["disk_bytes"]), ("NOFILE", 64),
        ("NPROC", asked["processes"]), ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0),
        ("CPU", int(asked["seconds"]) + 1),
    ):  # fmt: skip
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    if is_root:
        os.setgroups([])
        os.setresgid(PROGRAM_UID, PROGRAM_UID, PROGRAM_UID)
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # the kernel knows no more
    # Bits and their locks: root's programs get no capabilities.
    call("prctl", "prctl", PR_SET_SECUREBITS, 0b1111, 0, 0, 0)
    if is_root:
        os.setresuid(PROGRAM_UID, PROGRAM_UID, PROGRAM_UID)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call("capset", "capset", header, none)
    call("prctl", "prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    call("no_new_privs", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    refuse_calls()


def refuse_calls() -> None:
    """Install a filter in classic BPF: CALLS, other sockets than AF_UNIX, new user namespaces."""
    column, machine, _, clone, clone3, socket = MACHINES[platform.machine()]
    load, jump, jump_ge, jump_set, end = 0x20, 0x15, 0x35, 0x45, 0x06
    number, architecture, first_argument = 0, 4, 16  # in struct seccomp_data
    answers = {
        "allow": 0x7FFF0000, "refuse": 0x50000 | errno.EPERM, "missing": 0x50000 | errno.ENOSYS,
        "kill": 0x80000000,
    }  # fmt: skip
    # (code, operand, where to go if it holds, and if not); "over": past the next two.
    steps = [
        (load, architecture, "next", "next"), (jump, machine, "next", "kill"),
        (load, number, "next", "next"),
        (jump_ge, 0x40000000, "kill", "next"),  # the x32 calls of x86_64
        (jump, clone3, "missing", "next"),  # a filter cannot read its flags; libc takes clone
        *((jump, numbers[column], "refuse", "next") for numbers in CALLS.values()),
        (jump, socket, "next", "over"), (load, first_argument, "next", "next"),
        (jump, 1, "allow", "refuse"),
        (jump, clone, "next", "allow"), (load, first_argument, "next", "next"),
        (jump_set, CLONE_NEWUSER, "refuse", "allow"),
    ]  # fmt: skip
    program = b""
    for place, (code, operand, *ways) in enumerate(steps):
        left, skips = len(steps) - place - 1, {"next": 0, "over": 2}
        skips |= {answer: left + order for order, answer in enumerate(answers)}
        program += struct.pack("HBBI", code, *(skips[way] for way in ways), operand)
    program += b"".join(struct.pack("HBBI", end, 0, 0, answer) for answer in answers.values())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    call("seccomp", "prctl", PR_SET_SECCOMP, 2, header, 0, 0)


if __name__ == "__main__":
    main()
