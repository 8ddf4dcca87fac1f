"""Keep a model on track: rules and classifiers for what users ask and what models answer.

    finetune moderate RUN --dev dev.jsonl --test test.jsonl     # choose the threshold, measure
    finetune chat runs/my_run --moderation rules.yaml RUN

RUN is a run with objective.kind: sequence_classification. `finetune data split` parts labelled rows
by near-duplicate cluster, so that test rows are not variants of training rows. The threshold is
chosen on dev alone, and precision and recall are those on test.

A file of rules (YAML) is a list:

    - pattern: '(?i)credit card'      # a regular expression of Python, searched anywhere
      side: input                     # or output; left out: both
      refusal: I cannot talk about payments.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import yaml

from finetune import failures, files, places
from finetune.config import from_yaml, paths
from finetune.config.base import model_argument, model_in, require_model
from finetune.console import visible
from finetune.data import rows, source_files
from finetune.data.places import short
from finetune.data.problems import Problems
from finetune.errors import DataError, ModelError, UserError
from finetune.export.load import load, load_tokenizer, trust_remote_code_argument
from finetune.time_limit import TimeLimit

Side = Literal["input", "output"]
SIDES: tuple[Side, Side] = ("input", "output")
REFUSAL = "I cannot help with that."
FILE = "moderation.json"  # of a classifier, beside its weights' folder
BATCH = 32
SECONDS = 10.0  # for a pattern on a text
LABELS = ("unsafe", "refuse", "flagged", "toxic", "harmful", "off_topic", "1")
"""Labels that mean "refuse" where --label names none."""


@dataclass(frozen=True)
class Finding:
    """What a text was refused for. refusal: the answer in its place."""

    refusal: str
    reason: str


class Check(Protocol):
    def find(self, text: str, side: Side) -> Finding | None:
        """Return what a text is refused for; None if it passes."""
        ...


@dataclass(frozen=True)
class Moderation:
    """Checks in their order; the first that refuses a text decides."""

    checks: Sequence[Check] = ()

    def find(self, text: str, side: Side) -> Finding | None:
        return next((found for each in self.checks if (found := each.find(text, side))), None)

    def __bool__(self) -> bool:
        return bool(self.checks)


OFF = Moderation()


def add_argument(parser: argparse.ArgumentParser) -> None:
    what = (
        "refuse messages and answers by these files of rules (.yaml) and classifiers that "
        "`finetune moderate` has measured; off by default"
    )
    parser.add_argument(
        "--moderation", type=paths.argument, nargs="+", default=[], metavar="FILE|RUN", help=what
    )


def of(names: Sequence[str], trust_remote_code: bool = False) -> Moderation:
    """Return the checks of --moderation. Raises UserError for what cannot be read."""
    checks: list[Check] = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            checks.append(Rules.read(Path(name)))
        else:
            checks.append(Classifier.open(name, trust_remote_code))
    return Moderation(checks)


# --------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    pattern: re.Pattern[str]
    refusal: str
    sides: tuple[Side, ...]
    place: str

    def matches(self, text: str) -> bool:
        """Search a text. Raises DataError for a pattern that takes too long."""
        what = f"--moderation: {self.place}: pattern {short(self.pattern.pattern)}"
        with TimeLimit(SECONDS, f"{what} on {short(text)}", "write it without nested repeats"):
            return self.pattern.search(text) is not None


@dataclass(frozen=True)
class Rules:
    """The rules of a file."""

    path: Path
    rules: Sequence[Rule]

    @classmethod
    def read(cls, path: Path) -> "Rules":
        """Read a file of rules. Raises DataError that lists every wrong rule."""
        try:
            given = from_yaml(path.read_text(encoding="utf-8"))
        except OSError as exc:
            failures.reraise(exc, f"--moderation: {path}: cannot be read now")
            raise DataError(f"--moderation: {path}: cannot be read ({exc.strerror})") from exc
        except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as exc:
            raise DataError(f"--moderation: {path}: is not YAML in UTF-8: {exc}") from exc
        if not isinstance(given, list) or not given:
            what = "should be a list of rules, such as - pattern: '(?i)credit card'"
            raise DataError(f"--moderation: {path}: {what}, got {short(given)}")
        problems, found = Problems(), []
        for number, rule in enumerate(given, 1):
            problems.num_rows += 1
            with problems.noted():
                found.append(_rule(f"{path}: rule {number}", rule))
        problems.raise_if_any()
        return cls(path, found)

    def find(self, text: str, side: Side) -> Finding | None:
        for rule in self.rules:
            if side in rule.sides and rule.matches(text):
                reason = f"{rule.place}: {rule.pattern.pattern}"
                return Finding(rule.refusal, reason)
        return None


def _rule(place: str, given: Any) -> Rule:
    if not isinstance(given, dict) or not isinstance(given.get("pattern"), str):
        raise DataError(f"{place}: should have a pattern in quotes, got {short(given)}")
    if unknown := sorted(map(str, given.keys() - {"pattern", "side", "refusal"})):
        raise DataError(f"{place}: has {unknown[0]!r}; a rule has pattern, side and refusal")
    try:
        pattern = re.compile(given["pattern"])
    except (re.error, RecursionError, OverflowError) as exc:
        raise DataError(f"{place}: pattern {short(given['pattern'])}: {exc}") from exc
    if pattern.search(""):
        raise DataError(f"{place}: pattern {short(given['pattern'])} matches every text")
    side = given.get("side", "both")
    sides: dict[Any, tuple[Side, ...]] = {"input": SIDES[:1], "output": SIDES[1:], "both": SIDES}
    refusal = given.get("refusal", REFUSAL)
    if not isinstance(side, str) or side not in sides:
        raise DataError(f"{place}: side should be input, output or both, got {short(side)}")
    if not isinstance(refusal, str) or not refusal.strip():
        raise DataError(f"{place}: refusal should be text, got {short(refusal)}")
    return Rule(pattern, refusal, sides[side], place)


# --------------------------------------------------------------------------------- classifiers


@dataclass(frozen=True)
class Measured:
    """What `finetune moderate` found on rows of one file, at the threshold."""

    rows: int
    flagged_rightly: int
    flagged_wrongly: int
    missed: int

    @property
    def precision(self) -> float | None:
        flagged = self.flagged_rightly + self.flagged_wrongly
        return self.flagged_rightly / flagged if flagged else None

    @property
    def recall(self) -> float | None:
        right = self.flagged_rightly + self.missed
        return self.flagged_rightly / right if right else None


@dataclass
class Classifier:
    """A model that gives each text the probability of one of its labels."""

    folder: str
    model: Any
    tokenizer: Any
    label: str
    threshold: float
    refusal: str = REFUSAL

    @classmethod
    def open(cls, name: str, trust_remote_code: bool = False) -> "Classifier":
        """Open a classifier with its threshold. Raises UserError without one."""
        folder = model_in(name)
        require_model(folder, "--moderation")
        settings, problem = files.read_note(Path(folder, FILE))
        label, threshold = settings.get("label"), settings.get("threshold")
        if problem or not isinstance(label, str) or not isinstance(threshold, float):
            how = f"{places.command()} moderate {name} --dev FILE --test FILE"
            raise UserError(
                f"--moderation: {name}: {FILE} {problem or 'has no label and threshold'}; run {how}"
            )
        model, tokenizer = _opened(folder, trust_remote_code)
        _number(model, folder, label)
        refusal = settings.get("refusal")
        return cls(folder, model, tokenizer, label, threshold, refusal or REFUSAL)

    def find(self, text: str, side: Side) -> Finding | None:
        [value] = probabilities(self.model, self.tokenizer, [text], self.label)
        if value < self.threshold:
            return None
        return Finding(self.refusal, f"{self.folder}: {self.label} {value:.3f}")


def _opened(folder: str, trust_remote_code: bool) -> tuple[Any, Any]:
    model = load(folder, trust_remote_code=trust_remote_code)
    labels = getattr(model.config, "id2label", None)
    named = type(getattr(model, "base_model", model)).__name__ + type(model).__name__
    if not labels or "SequenceClassification" not in named:
        raise ModelError(
            f"{folder} is not a classifier of texts; train one with objective.kind: "
            "sequence_classification"
        )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, load_tokenizer(folder, trust_remote_code)


def _number(model: Any, folder: str, label: str) -> int:
    """Return the number of a label. Raises ModelError for one that the model does not have."""
    labels = {str(name): int(number) for number, name in model.config.id2label.items()}
    if label not in labels:
        raise ModelError(f"{folder}: has no label {label!r}; it has {', '.join(labels)}")
    return labels[label]


def probabilities(model: Any, tokenizer: Any, texts: Sequence[str], label: str) -> list[float]:
    """Return the probability of a label for each text; long texts are cut at the end."""
    number = _number(model, "the classifier", label)
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
    # RoBERTa counts positions from 2.
    longest = min(tokenizer.model_max_length, max(positions - 2, 1))
    device = next(model.parameters()).device
    found: list[float] = []
    for start in range(0, len(texts), BATCH):
        inputs = tokenizer(
            list(texts[start : start + BATCH]), truncation=True, max_length=longest, padding=True,
            return_tensors="pt",
        ).to(device)  # fmt: skip
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            logits = model(**inputs).logits.float()
        found += logits.softmax(-1)[:, number].tolist()
    return found


# ----------------------------------------------------------------------------- the threshold


def threshold_of(scores: Sequence[float], is_right: Sequence[bool]) -> float:
    """Return the threshold with the best F1: 2 TP / (2 TP + FP + FN); the highest of equal ones.

    A text is refused from the threshold on. Only values of the rows themselves are tried.
    """
    ordered = sorted(zip(scores, is_right), reverse=True)
    total, right, best, chosen = sum(is_right), 0, -1.0, 1.0
    for number, (score, is_one) in enumerate(ordered, 1):
        right += is_one
        is_last = number == len(ordered) or ordered[number][0] < score
        f1 = 2 * right / (number + total)
        if is_last and f1 > best:
            best, chosen = f1, score
    return chosen


def measured(scores: Sequence[float], is_right: Sequence[bool], threshold: float) -> Measured:
    pairs = [(score >= threshold, one) for score, one in zip(scores, is_right)]
    return Measured(
        len(pairs), pairs.count((True, True)), pairs.count((True, False)),
        pairs.count((False, True)),
    )  # fmt: skip


def _labelled(source: str, option: str) -> tuple[list[str], list[str]]:
    """Return the texts and labels of rows. Raises DataError that lists wrong ones."""
    found, _ = source_files.expand(source, option)
    problems = Problems()
    samples = list(rows.samples(found, "text_label", {}, "line", None, problems))
    problems.raise_if_any()
    if not samples:
        raise DataError(f"{option}: {source} holds no rows")
    texts = [sample.conversations[0].messages[0].content for sample in samples]
    return texts, [str(sample.labels[0]) for sample in samples]


def _label(given: str | None, model: Any, folder: str) -> str:
    """Return the label that means "refuse"."""
    if given is not None:
        _number(model, folder, given)
        return given
    labels = [str(name) for name in model.config.id2label.values()]
    known = [name for name in labels if name.lower() in LABELS]
    if len(known) != 1:
        raise UserError(f"--label: name the label to refuse, one of {', '.join(labels)}")
    return known[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "run with objective.kind: sequence_classification"
    add("model", type=model_argument, metavar="RUN", help=what)
    what = "labelled rows (text, label) to choose the threshold on"
    add("--dev", required=True, type=paths.argument, help=what)
    add("--test", required=True, type=paths.argument, help="labelled rows to measure it on")
    add("--label", default=None, help="the label to refuse (default: one called unsafe or alike)")
    add("--refusal", default=REFUSAL, help="the answer in place of what is refused")
    trust_remote_code_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    """Choose the threshold on dev, measure it on test, and write both beside the weights."""
    folder = arguments.model
    require_model(folder, "RUN")
    if not Path(folder).is_dir():
        raise ModelError(f"{folder}: give a folder, in which {FILE} is written")
    parts = {name: _labelled(getattr(arguments, name), f"--{name}") for name in ("dev", "test")}
    if both := set(parts["dev"][0]) & set(parts["test"][0]):
        raise DataError(
            f"--test: {len(both)} of its texts are also in --dev, such as {short(min(both))}; "
            f"split them by cluster: {places.command()} data split"
        )
    model, tokenizer = _opened(folder, arguments.trust_remote_code)
    label = _label(arguments.label, model, folder)
    scores = {}
    for name, (texts, labels) in parts.items():
        if label not in labels:
            raise DataError(f"--{name}: no row has the label {label!r}; add some")
        scores[name] = probabilities(model, tokenizer, texts, label)
    right = {name: [each == label for each in labels] for name, (_, labels) in parts.items()}
    threshold = threshold_of(scores["dev"], right["dev"])
    found = {name: measured(scores[name], right[name], threshold) for name in parts}
    note = {
        "label": label, "threshold": threshold, "refusal": arguments.refusal,
        **{name: asdict(each) for name, each in found.items()},
    }  # fmt: skip
    with failures.writing(Path(folder)):
        files.write_whole(Path(folder, FILE), json.dumps(note, indent=1) + "\n")
    print(visible(_report(label, threshold, found)))


def _report(label: str, threshold: float, found: dict[str, Measured]) -> str:
    lines = [f"refused from {label} {threshold:.4g} on, the best F1 on dev"]
    lines.append(f"{'':<6}{'rows':>6}{label:>12}{'precision':>11}{'recall':>8}")
    for name, each in found.items():
        shares = [
            "none" if share is None else f"{100 * share:.1f}%"
            for share in (each.precision, each.recall)
        ]
        count = each.flagged_rightly + each.missed
        lines.append(f"{name:<6}{each.rows:>6,}{count:>12,}{shares[0]:>11}{shares[1]:>8}")
    return "\n".join(lines)
