"""What a run directory says of its training: the base, the model, the rows and how to read them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import config as configs
from finetune import files, own_code, places, replay
from finetune.config import paths
from finetune.config.base import is_model_or_adapter, kind_of_folder
from finetune.config.choices import ObjectiveKind, objective_kind
from finetune.config.own import own_format
from finetune.engine.rundir import HELD_OUT, OUTCOME
from finetune.errors import RunDirectoryError
from finetune.evaluation.held_out import Reading


@dataclass(frozen=True)
class TrainedRun:
    """A run directory with a model. settings: the sections of its config.yaml."""

    path: Path
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str) -> "TrainedRun":
        """Read a run directory. Raise RunDirectoryError for another folder, or without a model."""
        path = Path(folder)
        if path.name == "model" and kind_of_folder(str(path.parent)) == "run":
            path = path.parent
        kind = kind_of_folder(str(path))
        if kind != "run":
            hint = (
                f"give a run directory, or {places.command()} evaluate --base A --tuned B --data F"
            )
            near = Path(paths.RUNS, folder)
            if not path.exists() and kind_of_folder(str(near)) == "run":
                hint = f"did you mean {near}?"
            what = f"is {'an' if kind == 'adapter' else 'a'} {kind}" * (
                kind in ("model", "adapter")
            )
            raise RunDirectoryError(f"{folder} {what or kind}; {hint}")
        settings = configs.read_resolved(path / "config.yaml")
        if not is_model_or_adapter(path / "model"):
            state = files.read_note(path / OUTCOME)[0].get("state", "not known to have ended")
            raise RunDirectoryError(
                f"{path} has no model yet: its run is {state}; train to the end"
            )
        format = settings["data"].get("format", "auto")
        if own_code.is_own(format):
            receipt = files.read_note(path / "receipt.json")[0]
            replay.require_own_code(path, {"data.format": format}, receipt)
            settings["data"]["format"] = own_format(own_code.find(format)).name
        return cls(path, settings)

    @property
    def model(self) -> str:
        return str(self.path / "model")

    @property
    def base(self) -> str:
        """Return the folder or Hub id of what the run began with: a model, or an adapter on one.

        Raises RunDirectoryError where there is none.
        """
        began = self.settings["adapter"].get("path")
        name = began or self.settings["model"].get("path")
        if not name:
            raise RunDirectoryError(
                f"{self.path} began with random weights, so it has no base to compare with; give "
                "one with --base"
            )
        if paths.is_local(name) and not os.path.exists(name):
            raise RunDirectoryError(
                f"{self.path / 'config.yaml'}: {'adapter' if began else 'model'}.path: {name}: no "
                "such folder in "
                f"{os.getcwd()}; give --base with the folder where it is now"
            )
        return str(name)

    @property
    def revision(self) -> str | None:
        """Return the revision of a base on the Hub that the run began with; None: the newest."""
        if self.settings["adapter"].get("path"):
            return None  # an adapter records that of its base
        found = self.settings["model"].get("revision")
        return None if found is None else str(found)

    @property
    def system_prompt(self) -> str | None:
        prompt = self.settings["data"].get("system_prompt")
        return None if prompt is None else str(prompt)

    @property
    def source_prefix(self) -> str:
        """Return the text before the input of an encoder-decoder."""
        return str(self.settings["objective"].get("source_prefix") or "")

    @property
    def reading(self) -> Reading:
        """Return how its rows are read."""
        data, format = self.settings["data"], self.settings["data"].get("format", "auto")
        if format == "auto" and self._learns.rates:
            format = self._learns.formats[0]
        return Reading(
            format, dict(data.get("columns") or {}),
            data.get("text_unit", "line"), bool(data.get("repair_turns")),
            data.get("thinking", "keep"),
        )  # fmt: skip

    @property
    def _learns(self) -> ObjectiveKind:
        return objective_kind(self.settings.get("objective", {}).get("kind", "sft"))

    @property
    def gives_scores(self) -> bool:
        """Whether its model scores answers, and writes none."""
        return self._learns.family == "scores"

    @property
    def compares(self) -> bool:
        """Whether it learned from chosen answers beside rejected ones."""
        return self._learns.compares

    @property
    def held_out_file(self) -> list[str]:
        """Return the file of rows that training held out of data.train; empty without one."""
        return [str(self.path / HELD_OUT)] if (self.path / HELD_OUT).exists() else []

    @property
    def has_held_out(self) -> bool:
        return (self.path / HELD_OUT).exists() or bool(self.settings["data"].get("eval"))

    @property
    def held_out(self) -> str | list[str]:
        """Return the rows that training held out, or data.eval. Raise RunDirectoryError."""
        if file := self.held_out_file:
            return file
        if named := self.settings["data"].get("eval"):
            return named if isinstance(named, str) else list(named)
        raise RunDirectoryError(
            f"{self.path} held out no rows, and has no data.eval; give rows that it was not "
            "trained on with --data"
        )

    @property
    def trained_on(self) -> list[str]:
        """Return data.train."""
        named = self.settings["data"].get("train") or []
        return [named] if isinstance(named, str) else list(named)
