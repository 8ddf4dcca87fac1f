"""Run train.py on two processes and kill the saver thread of process 1 as DIES says.

DIES: how `Saver._write` ends there at its first save.
"""

import os
import sys
import threading

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
