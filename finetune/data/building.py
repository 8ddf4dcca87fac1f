"""Shards that are made beside a run which already trains on the first of them."""

import atexit
import json
import multiprocessing
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from finetune import errors, files, own_code, workers
from finetune.data import examples as entries
from finetune.data import shards, windows
from finetune.data.layout import Layout
from finetune.data.shards import Builder, Recipe, StartAgain
from finetune.errors import FinetuneError, Outage

FAILED = "failed.json"  # why the shards are not made, for all processes of the node
POLL_SECONDS = 0.2
_STARTED = time.time()


class Building:
    """Who makes the shards of a stream that are not there yet: a process of this node."""

    def __init__(self, laid_out: Path, process: BaseProcess | None = None) -> None:
        """`process`: the builder, in the process that started it."""
        self.laid_out, self.process = laid_out, process

    def progress(self) -> float:
        """Return when a builder of these shards last made some of its way, in seconds.

        It may be one of another run that makes the same shards, on which ours waits.
        """
        with suppress(FileNotFoundError):
            return (self.laid_out.parent / shards.BEAT).stat().st_mtime
        return 0.0

    def check(self, known: Layout) -> None:
        """Raise the error that ended the builder."""
        path = self.laid_out / FAILED
        with suppress(FileNotFoundError):
            if path.stat().st_mtime >= _STARTED:  # else of an attempt before
                values = json.loads(path.read_text())
                if values["kind"] == StartAgain.__name__:
                    raise _Otherwise(values["message"])
                raise getattr(errors, values["kind"], Outage)(values["message"])
        if self.process and not self.process.is_alive() and not known.is_whole:
            known.refresh()
            if not known.is_whole:
                raise Outage(
                    "data.streaming: the process that tokenises was killed "
                    f"({self.process.exitcode}), perhaps for its memory; run the same command again"
                )


class _Otherwise(errors.DataError):
    """Rows begin otherwise than the template; all shards are made anew."""


def begin(recipe: Recipe, is_first: bool) -> tuple[Recipe, Path, Building]:
    """Return once the first window of a stream is whole on disk, and make the others meanwhile.

    `is_first`: whether this process starts the builder of its node; the others wait for files.
    Raises what `shards.prepare` raises; later errors come from `Building.check`.
    """
    while True:
        builder = Builder(recipe)
        if builder.begins_otherwise:
            recipe = replace(recipe, template=replace(recipe.template, learn_opening=True))
            continue
        if builder.is_done():
            return recipe, builder.laid_out, Building(builder.laid_out)
        building = Building(builder.laid_out, _started(builder) if is_first else None)
        try:
            _wait_for_window(recipe, building)
            return recipe, builder.laid_out, building
        except _Otherwise:
            if not builder.begins_otherwise:
                raise


def _started(builder: Builder) -> BaseProcess:
    with entries.writable(builder.recipe.cache_dir):
        builder.laid_out.mkdir(parents=True, exist_ok=True)
        (builder.laid_out / FAILED).unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    arguments = builder.recipe, builder.recipe.code, builder.laid_out
    process = context.Process(target=_build, args=arguments, name="shards")
    process.start()
    # A run that ends before the last shard leaves it to the next; else Python would wait here.
    atexit.register(process.terminate)
    return process


def _wait_for_window(recipe: Recipe, building: Building) -> None:
    known = Layout(building.laid_out)
    while not known.is_whole:
        if len(windows.spans([line["bytes"] for line in known.lines], recipe.window)) > 1:
            return
        time.sleep(POLL_SECONDS)
        known.refresh()
        building.check(known)


def _build(recipe: Recipe, code: str, laid_out: Path) -> None:
    """Make all shards, in a process of its own; write down why it failed.

    `code`: see `Recipe`, which cannot know it before it is read here.
    """
    workers.depend_on_parent()
    try:
        if code:
            own_code.read_as(recipe.options.format, code)
        shards.prepare(recipe, beside=True)
    except StartAgain as exc:
        why = "rows begin otherwise than those before; run it under another run.name"
        _fail(laid_out, exc, why)
    except FinetuneError as exc:
        _fail(laid_out, exc, str(exc))


def _fail(laid_out: Path, exc: Exception, message: str) -> None:
    values = {"kind": type(exc).__name__, "message": message}
    files.write_synced(laid_out / FAILED, json.dumps(values))
    sys.exit(1)
