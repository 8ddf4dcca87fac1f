"""What a reward model is worth on held-out rows: right, calibrated, or only fond of length."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class Judged:
    """An answer up to a step, which is right or wrong. length: in tokens, with its prompt."""

    row: str
    score: float
    is_right: bool
    length: int


def main(run: TrainedRun, arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Score the held-out rows of a run, print what they show, and write it."""
    _require_options(arguments, defaults)
    report_files.require(arguments, run)
    samples = _samples(run, arguments)
    model = RewardModel(run.model, trust_remote_code=arguments.trust_remote_code)
    prompts = [held_out.prompt_of(each) for each in samples]
    groups = dict(zip([p.place for p in prompts], held_out.grouped(prompts, arguments.group)))
    found, shown = (
        _compared(samples, model, groups) if run.compares else _judged(samples, model, groups)
    )
    print("\n".join(shown))
    folder = report_files.folder_of(arguments.report, run)
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(folder / FILE, json.dumps(found, indent=1) + "\n")
    print(f"scores: {folder / FILE}")


Clusters = Mapping[str, int]
"""The cluster of each row, by its place."""


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


# -------------------------------------------------------------------------------------- pairs


def _compared(
    samples: Sequence[Sample], model: RewardModel, groups: Clusters
) -> tuple[dict[str, Any], Iterator[str]]:
    pairs = pairs_of(samples, model)
    found = measured(pairs, [groups[each.row] for each in pairs])
    rows = {"pairs": [asdict(pair) for pair in pairs]}
    return found | rows, lines(found, len(pairs), len(samples))


def pairs_of(samples: Sequence[Sample], model: RewardModel) -> list[Pair]:
    """Return each rejected answer beside the chosen one of its row, scored."""
    pairs = []
    for sample, answers in _scored(samples, model):
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
    right = leads > 0
    trusted = calibration.of([_sigmoid(abs(lead)) for lead in leads], right, low=0.5)
    by_length = (("chosen is longer", longer > 0), ("chosen is shorter", longer < 0))
    return {
        **_accuracy(right, clusters), "calibration": asdict(trusted),
        "length_correlation": _correlation(leads, longer),
        "accuracy_by_length": {
            name: float(right[which].mean()) if which.any() else None for name, which in by_length
        },
        "share_longer": float((longer > 0).mean()) if longer.any() else None,
    }  # fmt: skip


def lines(found: Mapping[str, Any], num_pairs: int, num_rows: int) -> Iterator[str]:
    """Yield what the terminal shows of pairs."""
    rows = f" of {num_rows:,} rows" * (num_rows < num_pairs)
    yield f"{num_pairs:,} held-out pairs{rows}"
    yield f"accuracy {_interval(found)}: the chosen answer scores higher"
    yield from _calibration(found, "sigmoid of the lead")
    by_length = ", ".join(
        f"{name} {_percent(value)}" for name, value in found["accuracy_by_length"].items()
    )
    correlation = _signed(found["length_correlation"])
    yield f"length: correlation of a lead with how much longer the chosen answer is {correlation}"
    longer = _percent(found["share_longer"])
    yield f"accuracy where {by_length}; the longer one is chosen in {longer}"


# -------------------------------------------------------------------------------------- steps


def _judged(
    samples: Sequence[Sample], model: RewardModel, groups: Clusters
) -> tuple[dict[str, Any], Iterator[str]]:
    judged = [
        Judged(str(sample.conversations[0].place), score, label > 0.5, length)
        for sample, answers in _scored(samples, model) for label, score, length in answers
    ]  # fmt: skip
    clusters = [groups[each.row] for each in judged]
    found = measured_steps(judged, clusters)
    rows = {"steps": [asdict(each) for each in judged]}
    return found | rows, lines_of_steps(found, len(judged), len(samples))


def measured_steps(judged: Sequence[Judged], clusters: Sequence[int]) -> dict[str, Any]:
    """Return the same of steps, whose scores are log-odds that all is right up to there."""
    scores = np.array([each.score for each in judged])
    labels = np.array([each.is_right for each in judged])
    trusted = calibration.of([_sigmoid(score) for score in scores], labels)
    return {
        **_accuracy((scores > 0) == labels, clusters), "share_right": float(labels.mean()),
        "calibration": asdict(trusted),
        "length_correlation": _correlation(scores, np.array([each.length for each in judged])),
    }  # fmt: skip


def lines_of_steps(found: Mapping[str, Any], num_steps: int, num_rows: int) -> Iterator[str]:
    """Yield what the terminal shows of steps."""
    yield f"{num_steps:,} held-out steps of {num_rows:,} rows"
    share = _percent(found["share_right"])
    yield f"accuracy {_interval(found)}: scores above 0 for right steps; {share} are right"
    yield from _calibration(found, "sigmoid of the score")
    yield f"length: correlation with the score {_signed(found['length_correlation'])}"


# ---------------------------------------------------------------------------------- of both


def _scored(
    samples: Sequence[Sample], model: RewardModel
) -> Iterator[tuple[Sample, list[tuple[float, float, int]]]]:
    """Yield rows with (label, score, tokens) of each of their conversations."""
    conversations = [each for sample in samples for each in sample.conversations]
    scores = iter(model(conversations))
    lengths = map(len, model.documents(conversations))
    for sample in samples:
        labels = sample.fields["label"]
        yield sample, [(label, next(scores), next(lengths)) for label in labels]


def _accuracy(right: np.ndarray, clusters: Sequence[int]) -> dict[str, float | None]:
    values = [float(each) for each in right]
    low, high = statistics.interval(values, clusters)
    return {"accuracy": float(np.mean(values)), "low": low, "high": high}


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    varies = len(one) > 1 and one.std() > 0 and other.std() > 0
    return float(np.corrcoef(one, other)[0, 1]) if varies else None


def _sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))  # without overflow


def _calibration(found: Mapping[str, Any], what: str) -> list[str]:
    given = found["calibration"]
    bins = tuple(calibration.Bin(**each) for each in given["bins"])
    return calibration.table(calibration.Calibration(bins, given["ece"], given["brier"]), what)


def _interval(found: Mapping[str, Any]) -> str:
    within = "too few for an interval"
    if found["low"] is not None:
        within = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
    return f"{_percent(found['accuracy'])} ({within})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
