"""train.py on two processes, of which the thread that saves dies on process 1, as DIES says; with MUTE without a trace.

DIES: how `Saver._write` ends there at its first save, or "FILE:LINE", before which SystemExit is raised in that thread, once.
"""

import os
import sys
import threading
from pathlib import Path

import train
from finetune.engine.checkpoint import saver
from finetune.engine.topology.processes import Processes

WAYS = {
    "exits": lambda: sys.exit(3),
    "returns": lambda: None,
    "is interrupted": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
}


def main() -> int:
    dies = os.environ["DIES"]
    if os.environ["RANK"] == os.environ.get("ON", "1"):
        if dies == "does not start":
            replace_once(threading.Thread, "start", no_thread)
        elif ":" in dies:
            threading.settrace(before(*dies.split(":")))
        else:
            replace_once(saver.Saver, "_write", lambda *_: WAYS[dies]())
    if os.environ.get("MUTE"):
        Processes.leave = lambda self: None
    return train.main()


def no_thread(thread):
    raise RuntimeError("can't start new thread")


def replace_once(owner, name, instead):
    whole = getattr(owner, name)

    def first(self, *arguments):
        if owner is threading.Thread and self.name != "checkpoint":
            return whole(self, *arguments)
        setattr(owner, name, whole)
        return instead(self, *arguments)

    setattr(owner, name, first)


def before(file, number):
    left = [1]

    def line(frame, event, argument):
        if (
            event == "line"
            and frame.f_lineno == int(number)
            and left
            and threading.current_thread().name == "checkpoint"
        ):
            left.clear()
            raise SystemExit(f"at {file}:{number}")
        return line

    def call(frame, event, argument):
        return line if left and Path(frame.f_code.co_filename).name == file else None

    return call
