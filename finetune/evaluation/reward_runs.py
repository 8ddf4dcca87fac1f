"""What a reward model is worth on held-out rows: right, calibrated, or only fond of length."""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from finetune import files
from finetune.data.conversations import Sample
from finetune.errors import UserError
from finetune.evaluation import calibration, held_out, report_files, statistics, trained_rows
from finetune.evaluation.trained_run import TrainedRun
from finetune.generation.reward_model import RewardModel

FILE = "scores.json"  # in the folder of the report
TAKEN = {"run", "data", "format", "columns", "trained_rows", "limit", "group", "report",
         "trust_remote_code"}  # fmt: skip
"""Options of evaluate that apply to reward models, by their names in argparse."""


@dataclass(frozen=True)
class Pair:
    """row: file and line. lead: of the chosen answer's score. longer: by tokens."""

    row: str
    chosen: float
    rejected: float
    longer: int

    @property
    def lead(self) -> float:
        return self.chosen - self.rejected


def main(run: TrainedRun, arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Score the held-out pairs of a run, print what they show, and write it."""
    _require_options(arguments, defaults)
    report_files.require(arguments, run)
    samples = _samples(run, arguments)
    model = RewardModel(run.model, trust_remote_code=arguments.trust_remote_code)
    pairs = pairs_of(samples, model)
    prompts = [held_out.prompt_of(each) for each in samples]
    groups = dict(zip([p.place for p in prompts], held_out.grouped(prompts, arguments.group)))
    clusters = [groups[each.row] for each in pairs]
    found = measured(pairs, clusters)
    print("\n".join(lines(found, pairs, len(samples))))
    folder = report_files.folder_of(arguments.report, run)
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(pair) for pair in pairs]
    files.write_whole(folder / FILE, json.dumps({**found, "pairs": rows}, indent=1) + "\n")
    print(f"scores: {folder / FILE}")


def _require_options(arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raise UserError for an option that is about answers, which a reward model does not write."""
    for name, usual in vars(defaults).items():
        if name not in TAKEN and getattr(arguments, name) != usual:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option}: would be ignored, as {arguments.run} is a reward model, which writes "
                "no answers; remove it"
            )


def _samples(run: TrainedRun, arguments: argparse.Namespace) -> list[Sample]:
    """Return the rows to score, without those that the run was trained on."""
    given = {"format": arguments.format, "columns": arguments.columns}
    reading = replace(run.reading, **{k: v for k, v in given.items() if v is not None})
    samples = held_out.samples(arguments.data or run.held_out, reading, arguments.limit)
    if arguments.trained_rows == "score":
        return samples
    prompts = [held_out.prompt_of(each) for each in samples]
    kept = trained_rows.refuse(prompts, trained_rows.known(prompts, run))
    places = {each.place for each in kept}
    return [each for each, prompt in zip(samples, prompts) if prompt.place in places]


def pairs_of(samples: Sequence[Sample], model: RewardModel) -> list[Pair]:
    """Return each rejected answer beside the chosen one of its row, scored."""
    conversations = [each for sample in samples for each in sample.conversations]
    scores = iter(model(conversations))
    lengths = map(len, model.documents(conversations))
    pairs = []
    for sample in samples:
        answers = [(label, next(scores), next(lengths)) for label in sample.fields["label"]]
        [(_, chosen, length)] = [each for each in answers if each[0] > 0.5]
        pairs += [
            Pair(str(sample.conversations[0].place), chosen, score, length - other)
            for label, score, other in answers if label <= 0.5
        ]  # fmt: skip
    return pairs


def measured(pairs: Sequence[Pair], clusters: Sequence[int]) -> dict[str, Any]:
    """Return accuracy with its interval, calibration, and what length has to do with the scores.

    Equal scores count as wrong. A correlation is None where one side does not vary.
    """
    leads = np.array([pair.lead for pair in pairs])
    longer = np.array([pair.longer for pair in pairs])
    right = [float(lead > 0) for lead in leads]
    low, high = statistics.interval(right, clusters)
    trusted = calibration.of(
        [1 / (1 + math.exp(-abs(lead))) for lead in leads], list(leads > 0), low=0.5
    )
    varies = len(pairs) > 1 and leads.std() > 0 and longer.std() > 0
    return {
        "accuracy": float(np.mean(right)), "low": low, "high": high,
        "calibration": asdict(trusted),
        "length_correlation": float(np.corrcoef(leads, longer)[0, 1]) if varies else None,
        "accuracy_by_length": {
            name: float((leads > 0)[which].mean()) if which.any() else None
            for name, which in (("chosen is longer", longer > 0), ("chosen is shorter", longer < 0))
        },
        "accuracy_of_longer": float((longer > 0).mean()),
    }  # fmt: skip


def lines(found: dict[str, Any], pairs: Sequence[Pair], num_rows: int) -> Iterator[str]:
    """Yield what the terminal shows."""
    rows = f" of {num_rows:,} rows" * (num_rows < len(pairs))
    yield f"{len(pairs):,} held-out pairs{rows}"
    between = "too few for an interval"
    if found["low"] is not None:
        between = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
    yield f"accuracy {_percent(found['accuracy'])} ({between}): the chosen answer scores higher"
    trusted = found["calibration"]
    bins = tuple(calibration.Bin(**each) for each in trusted["bins"])
    yield from calibration.table(
        calibration.Calibration(bins, trusted["ece"], trusted["brier"]), "sigmoid of the lead"
    )
    by_length = ", ".join(
        f"{name} {_percent(value)}" for name, value in found["accuracy_by_length"].items()
    )
    correlation = found["length_correlation"]
    yield (
        "length: correlation of a lead with how much longer the chosen answer is "
        + ("-" if correlation is None else f"{correlation:+.2f}")
    )
    longer = _percent(found["accuracy_of_longer"])
    yield f"accuracy where {by_length}; the longer one is chosen in {longer}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
