"""Save checkpoints in a background thread, one at a time, while training continues."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune import failures, torch_versions
from finetune.config import fields
from finetune.engine.checkpoint import contents, folder
from finetune.engine.state import TrainState
from finetune.engine.topology import Topology
from finetune.engine.topology.processes import first_error
from finetune.errors import CheckpointError, FinetuneError, TakenOver

if TYPE_CHECKING:
    from finetune.engine.checkpoint.storage import Storage

MOST_FAILURES = 3  # in a row
ABANDON_SECONDS = 60.0


class Saver:
    """Every process has one, and all call the same methods after the same steps."""

    def __init__(
        self, root: Path, topology: Topology, storage: "Storage | None",
        settings: fields.Checkpoint, *, about: dict[str, Any], resumed_from: int | None,
        log: Callable[[str], None], record: Callable[[dict[str, Any]], None],
        before: Callable[[], None],
    ) -> None:  # fmt: skip
        """`about` goes into the manifest; a resuming run must agree with it.

        `record` gets the facts of each save. The main process calls `before` just before a
        checkpoint becomes valid; it may raise.
        """
        self.root, self.storage, self.settings, self.about = root, storage, settings, about
        self.resumed_from, self.log, self.record, self.before = resumed_from, log, record, before
        self.topology, self.background = topology, topology.processes.apart()
        copier = torch_versions.host_copier(topology.device) if settings.asynchronous else None
        self._copied = copier or (lambda tensors: tensors)
        self.saved_at = time.monotonic()
        self.last_seconds = 0.0
        """How long the last save took."""
        self.last_step: int | None = resumed_from
        """The newest saved step."""
        self._thread: threading.Thread | None = None
        self._problem: FinetuneError | None = None
        self._facts: dict[str, Any] = {}
        self._failures, self._is_warned = 0, False

    def is_time(self) -> bool:
        """Return whether checkpoint.every_minutes have passed on this process's clock."""
        every = self.settings.every_minutes
        return every is not None and time.monotonic() - self.saved_at > 60 * every

    def has_ended(self) -> bool:
        """Return whether this process's part of a save has ended; `settle` then gets the result."""
        return self._thread is not None and not self._thread.is_alive()

    def save(
        self, state: TrainState, best: int | None = None, seconds_left: float | None = None
    ) -> None:
        """Write checkpoint `step-<progress.step>`; prune older ones except step `best`. Collective.

        Returns when the state is copied. A failed save is reported and leaves the older checkpoints
        alone; the third in a row raises CheckpointError. `seconds_left`: until the machine goes
        away; None: it stays.
        """
        if seconds_left is not None and self.last_seconds > max(0.0, seconds_left):
            self.log(
                f"note: the last save took {self.last_seconds:.3g} s, "
                f"and about {max(0.0, seconds_left):.3g} s are left: a save under "
                f"way finishes first, then step {state.progress.step} is saved if there is time"
            )
        began, progress = time.monotonic(), state.progress.to_dict()
        self.settle()
        self.saved_at = began
        try:
            staged = self.topology.on_every(
                lambda: contents.stage(self.topology, state, self._copied)
            )
        except Exception as exc:
            self._failed(progress["step"], exc)
            return
        manifest = {
            "format": folder.FORMAT,
            "progress": progress,
            "num_processes": self.topology.num_processes,
            "topology": self.topology.name,
            **self.about,
        }
        self._facts = {"step": progress["step"]}
        self._thread = threading.Thread(
            target=self._run, args=(staged, manifest, best, began), name="checkpoint", daemon=True
        )
        try:
            self._thread.start()
        except Exception as exc:  # this process may have reached a limit on threads
            self._problem = self._words(exc)
        if not self.settings.asynchronous:
            self._wait()
        self._facts["stall_seconds"] = round(time.monotonic() - began, 4)
        if not self.settings.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way and report its result, the same on all. Collective."""
        if self._thread is None:
            return
        self._wait()
        self._thread = None
        step, (problem, is_whole) = self._facts["step"], self._ended()
        if is_whole:
            self.last_step = step  # it is on this disk, even if the upload or pruning failed
        if problem is not None:
            self._failed(step, problem)
            return
        self._failures, self.last_seconds = 0, self._facts["seconds"]
        if self.last_seconds > self.settings.grace_seconds and not self._is_warned:
            self._is_warned = True
            self.log(
                f"note: the save of step {step} took {self.last_seconds:.3g} s, "
                f"longer than checkpoint.grace_seconds ({self.settings.grace_seconds:g}): a "
                "preempted machine may be gone before a save ends; save more often, or get more "
                "grace"
            )
        self.record(self._facts)

    def abandon(self) -> None:
        """Let a save under way finish, unless it hangs, when the run fails for another reason."""
        if self._thread and self._thread.is_alive():
            self._thread.join(ABANDON_SECONDS)

    @property
    def under_way(self) -> set[int]:
        """The step that is being saved, if any."""
        return {self._facts["step"]} if self._thread else set()

    def _wait(self) -> None:
        assert self._thread is not None
        self.topology.watchdog.pause(
            f"the save of step {self._facts['step']}", self.background.waiting
        )
        if self._thread.is_alive():
            self._thread.join()

    def _ended(self) -> tuple[FinetuneError | None, bool]:
        """Return (the first error of any process, whether the checkpoint is complete), same on all.

        A thread may die at any line without our code noticing, while the threads of other processes
        wait for it. So a process whose thread did not finish leaves their group, which makes the
        others' waits fail.
        """
        own, self._problem = self._problem, None
        processes, watchdog = self.topology.processes, self.topology.watchdog
        if own is None and "seconds" not in self._facts:
            own = CheckpointError(
                f"process {processes.rank}: the thread that saves ended without a result"
            )
        if own is not None:
            self.background.leave()
        watchdog.pause(f"the end of the save of step {self._facts['step']}", processes.waiting)
        everyone = processes.gather((own, "bytes" in self._facts))
        watchdog.pause(f"the save of step {self._facts['step']}")
        errors, is_whole = [error for error, _ in everyone], any(whole for _, whole in everyone)
        first = first_error(errors)
        if first is None:
            return None, is_whole
        self.background.leave()
        self.background = processes.apart()
        return errors[first], is_whole

    def _words(self, exc: BaseException) -> FinetuneError:
        """Return an error without the traceback, whose frames would keep `background` alive."""
        if not isinstance(exc, Exception):
            return CheckpointError(f"process {self.topology.rank}: {type(exc).__name__}: {exc}")
        known = failures.translate(exc)
        return type(known)(str(known)) if known else CheckpointError(str(exc) or type(exc).__name__)

    def require(self, step: int) -> None:
        """Raise CheckpointError if this step is not saved; before the first there is nothing."""
        if step and self.last_step != step:
            raise CheckpointError(
                f"step {step} could not be saved before the end; "
                f"the newest checkpoint is of step {self.last_step}"
            )

    def _failed(self, step: int, problem: Exception) -> None:
        if isinstance(problem, TakenOver):
            raise problem
        self._failures += 1
        newest = "none is on this disk yet"
        if self.last_step is not None:
            newest = f"the newest on this disk is of step {self.last_step}"
        what = "could not be saved"
        if self.last_step == step and self.storage:
            what = "is not in the store"
        elif self.last_step == step:
            what = "is saved, but older ones could not be removed"
        text = f"checkpoint of step {step} {what}: {problem}"
        if self._failures == MOST_FAILURES:
            raise CheckpointError(
                f"{text}; {MOST_FAILURES} saves in a row have failed, and {newest}"
            ) from problem
        self.log(
            f"note: {text}; {newest}, and training "
            f"continues ({self._failures} of {MOST_FAILURES} failures in a row)"
        )

    def _run(
        self, staged: contents.Staged, manifest: dict[str, Any], best: int | None, began: float
    ) -> None:
        """Do all of the thread's work; keep an error for `settle`."""
        try:
            self._write(staged, manifest, best)
            if "bytes" in self._facts:
                self._facts["seconds"] = round(time.monotonic() - began, 3)
        # A full disk can surface as OSError, RuntimeError or dcp's CheckpointException.
        except BaseException as exc:
            self._problem = self._words(exc)

    def _use_own_gpu(self) -> None:
        """Switch to the process's GPU: a new thread starts on the first one."""
        if self.topology.device.type == "cuda":
            torch.cuda.set_device(self.topology.device)

    def _write(self, staged: contents.Staged, manifest: dict[str, Any], best: int | None) -> None:
        # If one process fails outside `on_every` or `on_main`, the others wait until `_ended`
        # makes it leave the group.
        processes, root, step = self.background, self.root, manifest["progress"]["step"]
        processes.on_every(self._use_own_gpu)
        total = sum(processes.gather(staged.num_bytes))

        def begin() -> Path:
            folder.require_space(root, total)
            return folder.begin(root, step)

        writing: Path = processes.on_main(begin)
        try:
            contents.write(writing, staged, processes)
            wrote = processes.gather(
                processes.on_every(lambda: contents.written(writing, staged, processes.rank))
            )
            names: list[str] = processes.on_main(lambda: self._all_there(writing, wrote))
            mine = names[processes.rank :: processes.number]
            described = processes.gather(
                processes.on_every(lambda: folder.described(writing, mine))
            )
            files = {name: each[name] for name in names for each in described if name in each}
            processes.on_main(self.before)
            final: Path = processes.on_main(
                lambda: folder.commit(writing, {**manifest, "files": files})
            )
        except BaseException as exc:
            if processes.is_main:
                is_full = shutil.disk_usage(root).free < total
                folder.sweep(root)  # its space may be what is missing
                if is_full:  # libraries word this differently
                    raise CheckpointError(f"the disk is full ({exc})") from exc
            raise
        self._facts["bytes"] = sum(each["bytes"] for each in files.values())
        processes.on_main(lambda: self._tidy(final, step, best))

    def _all_there(self, writing: Path, wrote: list[set[str]]) -> list[str]:
        """Return all files. Raises CheckpointError if one that another process wrote is missing."""
        names = folder.files(writing)
        if missing := sorted(set().union(*wrote) - set(names)):
            raise CheckpointError(
                f"process 0 does not see {missing[0]}, which another process wrote, in {writing}; "
                "run.dir must be on storage that all nodes share"
            )
        return names

    def _tidy(self, final: Path, step: int, best: int | None) -> None:
        """Prune older checkpoints, and upload this one and the logs to the store."""
        protected = {
            folder.step_name(each) for each in (step, best, self.resumed_from) if each is not None
        }
        folder.prune(self.root, self.settings.keep_last, protected)
        if self.storage:
            began = time.monotonic()
            # Notes first: a complete checkpoint must find its logs there.
            self.storage.upload_notes(self.root.parent)
            self.storage.upload_checkpoint(final)
            self.storage.prune(self.settings.keep_last, protected)
            self._facts["upload_seconds"] = round(time.monotonic() - began, 3)
