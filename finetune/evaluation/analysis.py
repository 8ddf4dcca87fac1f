"""Put together what a report shows: from answers and scores to `ResultsFile`."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from finetune.data.clusters import words
from finetune.data.places import printable
from finetune.errors import UserError
from finetune.evaluation import (
    error_types,
    nearest,
    results_file,
    rounds,
    run_facts,
    slices,
)
from finetune.evaluation import statistics as tests
from finetune.evaluation.nearest import TrainingRow
from finetune.evaluation.results import BASE, TUNED, Results
from finetune.evaluation.results_file import (
    AnswerFacts,
    Change,
    Decides,
    ErrorFacts,
    LabelFacts,
    Mean,
    MessageFacts,
    ModelFacts,
    Neighbour,
    ResultsFile,
    RowFacts,
    ScoreFacts,
    SliceFacts,
)
from finetune.evaluation.run_facts import plain
from finetune.evaluation.scores import details_of
from finetune.evaluation.scores.labels import Label, by_label
from finetune.evaluation.verdict import Verdict
from finetune.generation.completions import Completion, Prompt, Score

HALF = 0.5
LONG_ANSWER = 10  # words; a right answer that is longer is seldom matched word for word
# An answer is wrong by these whatever the reference.
BY_THEMSELVES = {"no answer", "cut", "repetition", "refusal", "question"}


def of_results(
    results: Results, verdict: Verdict, decides: Decides | None,
    trained: Callable[[], Sequence[TrainingRow]] = list, earlier: Path | None = None,
) -> ResultsFile:  # fmt: skip
    """Return what the report shows.

    trained: reads the rows that were trained on; asked only if rows are wrong. earlier: the
    results.json of an earlier round, whose rule `decides` is (`rounds.rule`).
    """
    before = results_file.read(earlier) if earlier else None
    tuned = tuned_of(results)
    failed, types = failures_of(results, decides)
    messages = [_messages(each) for each in results.prompts]
    became = rounds.since(before, messages, failed) if before else {}
    parts = _slices(results, decides, failed)
    near, notes = _nearest(results, [row for row, wrong in failed.items() if wrong], trained)
    if decides is None and results.prompts:
        notes.append("no score says which answers are wrong; those count that need no reference")
    counts = Counter(name for names in types.values() for name in names)
    findings = {each.score: each.p for each in verdict.findings}
    rows = []
    for row, asked in enumerate(messages):
        known: dict[str, Any] = {"failed": failed.get(row), "errors": types.get(row, [])}
        known |= {"nearest": near.get(row, []), "since": became.get(row)}
        rows.append(_row(results, row, asked, known))
    compared = None
    if before is not None and earlier is not None:
        compared = rounds.compared(earlier, before, became, parts, len(rows))
    return ResultsFile(
        verdict=results_file.Verdict(kind=verdict.kind, sentence=printable(verdict.sentence)),
        tuned=tuned,
        base=BASE if BASE in results.answers else None,
        decides=decides,
        settings=plain(results.settings),
        models={name: _model(results, name) for name in results.models},
        scores=[_score(results, name, findings.get(name)) for name in results.scores],
        error_types=[
            ErrorFacts(name=name, definition=what, count=counts[name])
            for name, what in error_types.DEFINITIONS.items()
            if counts[name]
        ],
        slices=parts,
        round=compared,
        run=run_facts.of_run(Path(results.run_dir)) if results.run_dir else None,
        notes=notes,
        rows=rows,
        benchmarks=list(results.beside.benchmarks),
        forgetting=list(results.beside.forgetting),
        corpus_scores=list(results.beside.corpus_scores),
    )


def tuned_of(results: Results) -> str:
    """Return the model whose errors are typed: the tuned one, else the last."""
    return TUNED if TUNED in results.answers else results.models[-1]


def decides_of(results: Results, given: tuple[str | None, float] | None = None) -> Decides | None:
    """Return what makes an answer wrong: a score below one half.

    Of the scores that are shares, where more is better, the first that is 0 or 1; where right
    answers are long, the first with values between. given: (score or None, below) of the command
    line. Raises UserError for a score that cannot decide.
    """
    named, below = given or (None, HALF)
    tuned = tuned_of(results)
    able = [
        name
        for name, scorer in results.scorers.items()
        if scorer.higher and any(each.value is not None for each in results.scores[name][tuned])
    ]
    if named is not None:
        if named not in able:
            raise UserError(
                f"{printable(named)!r} cannot say which answers are wrong, as no answer of {tuned} "
                f"has it; choose one of {', '.join(able) or 'the scores where more is better'} "
                "with --wrong-below"
            )
        return Decides(score=named, below=below)
    shares = [name for name in able if results.scorers[name].is_share]
    graded = [name for name in shares if _is_graded(results, name)]
    lengths = [len(words(each.reference)) for each in results.prompts if each.reference]
    is_long = bool(lengths) and median(lengths) > LONG_ANSWER
    strict = [name for name in shares if name not in graded]
    chosen = [*(graded if is_long else strict), *shares]
    return Decides(score=chosen[0], below=below) if chosen else None


def _is_graded(results: Results, score: str) -> bool:
    values = (each.value for given in results.scores[score].values() for each in given)
    return any(value is not None and 0 < value < 1 for value in values)


def failures_of(
    results: Results, decides: Decides | None
) -> tuple[dict[int, bool], dict[int, list[str]]]:
    """Return (whether each row that can be decided is wrong; the types of those that are)."""
    tuned = tuned_of(results)
    failed: dict[int, bool] = {}
    if decides is not None:
        for row, score in enumerate(results.scores[decides.score][tuned]):
            if score.value is not None:
                failed[row] = score.value < decides.below
    unclear = [row for row in range(len(results.prompts)) if row not in failed]
    wrong = [row for row, is_wrong in failed.items() if is_wrong]
    types = error_types.of_results(results, tuned, sorted([*wrong, *unclear]))
    for row in unclear:
        if BY_THEMSELVES & set(types[row]):
            failed[row] = True
        else:
            del types[row]
    return failed, types


def _messages(prompt: Prompt) -> list[MessageFacts]:
    return [
        MessageFacts(
            role=each.role,
            content=printable(each.content + (f"\n\n{each.context}" if each.context else "")),
        )
        for each in prompt.messages
    ]


def _model(results: Results, name: str) -> ModelFacts:
    answers = results.answers[name]
    return ModelFacts(
        answers=len(answers),
        cut=sum(each.is_cut for each in answers),
        failed=sum(each.finish_reason == "failed" for each in answers),
        tokens=sum(each.billed[1] if each.billed else len(each.token_ids) for each in answers),
        seconds=math.fsum(each.seconds for each in answers),
    )


def _score(results: Results, name: str, p_holm: float | None) -> ScoreFacts:
    scorer, by_model = results.scorers[name], results.scores[name]
    means, missing = {}, {}
    for model, scores in by_model.items():
        if (found := _mean(scores, results.clusters, scorer.is_share)) is not None:
            means[model] = found
        reasons = Counter(printable(each.reason) for each in scores if value_of(each) is None)
        if reasons:
            missing[model] = dict(reasons)
    changes: dict[str, Change] = {}
    for model in by_model:
        if BASE in by_model and model != BASE:
            holm = p_holm if model == tuned_of(results) else None
            change = _change(by_model[BASE], by_model[model], results.clusters, holm)
            changes |= {model: change} if change else {}
    labels = {}
    if isinstance(scorer, Label):
        labels = {model: _labels(scorer, given) for model, given in results.answers.items()}
    details = details_of(scorer, results.answers)
    return ScoreFacts(
        name=name, line=scorer.line, higher=scorer.higher, is_share=scorer.is_share, means=means,
        changes=changes, missing=missing, labels=labels,
        details={model: [*map(printable, lines)] for model, lines in details.items()},
    )  # fmt: skip


def _labels(scorer: Label, answers: Sequence[Completion]) -> list[LabelFacts]:
    return [
        LabelFacts(
            label=printable(each.label), rows=each.rows, precision=each.precision,
            recall=each.recall, f1=each.f1,
        )
        for each in by_label(scorer.counts(answers))
    ]  # fmt: skip


def value_of(score: Score) -> float | None:
    """Return the value of a score; None for none, or one that is not finite."""
    return score.value if score.value is not None and math.isfinite(score.value) else None


def _mean(scores: Sequence[Score], clusters: Sequence[int], is_share: bool) -> Mean | None:
    kept = [
        (value, c) for each, c in zip(scores, clusters) if (value := value_of(each)) is not None
    ]
    if not kept:
        return None
    values, groups = zip(*kept)
    return Mean.of(values, groups, is_share)


def _change(
    before: Sequence[Score], after: Sequence[Score], clusters: Sequence[int], p_holm: float | None
) -> Change | None:
    kept = []
    for one, other, cluster in zip(before, after, clusters):
        old, new = value_of(one), value_of(other)
        if old is not None and new is not None:
            kept.append((old, new, cluster))
    if not kept:
        return None
    return Change.of(tests.difference(*zip(*kept)), p_holm)


def _slices(
    results: Results, decides: Decides | None, failed: Mapping[int, bool]
) -> list[SliceFacts]:
    """Return the slices: weak ones first, then by the share of wrong rows."""
    parts, tuned, found = slices.of_results(results), tuned_of(results), []
    for part, (p, is_weak) in zip(parts, slices.failing_more(parts, failed)):
        groups = [results.clusters[row] for row in part.rows]
        means: dict[str, Mean] = {}
        change = None
        if decides is not None:
            is_share = results.scorers[decides.score].is_share
            inside = {
                model: [scores[row] for row in part.rows]
                for model, scores in results.scores[decides.score].items()
            }
            given = {model: _mean(scores, groups, is_share) for model, scores in inside.items()}
            means = {model: mean for model, mean in given.items() if mean is not None}
            if BASE in inside and tuned != BASE:
                change = _change(inside[BASE], inside[tuned], groups, None)
        found.append(
            SliceFacts(
                column=printable(part.column), value=printable(part.value), rows=list(part.rows),
                clusters=len(set(groups)), is_small=len(set(groups)) < tests.FEWEST_ROWS,
                is_weak=is_weak, failures=sum(failed.get(row, False) for row in part.rows), p=p,
                means=means, change=change,
            )
        )  # fmt: skip
    return sorted(found, key=lambda each: (not each.is_weak, -each.failures / len(each.rows)))


def _nearest(
    results: Results, wrong: Sequence[int], trained: Callable[[], Sequence[TrainingRow]]
) -> tuple[dict[int, list[Neighbour]], list[str]]:
    """Return (the nearest rows that were trained on, of each wrong row; notes)."""
    if not wrong or not (known := trained()):
        return {}, []
    if not nearest.is_possible():
        return {}, [nearest.MISSING]
    near = nearest.of_questions([results.prompts[row].question for row in wrong], known)
    return {
        row: [
            Neighbour(
                place=printable(each.place), question=printable(each.question),
                answer=printable(each.answer), similarity=cosine,
            )
            for each, cosine in found
        ]
        for row, found in zip(wrong, near)
    }, []  # fmt: skip


def _other_columns(prompt: Prompt) -> dict[str, Any]:
    """Return the columns that hold neither the question nor the answer."""
    shown = {message.content for message in prompt.messages} | {prompt.reference}
    return {
        name: value
        for name, value in plain(prompt.fields).items()
        if not isinstance(value, list | dict) and value not in shown
    }


def _row(
    results: Results, row: int, messages: list[MessageFacts], known: Mapping[str, Any]
) -> RowFacts:
    prompt = results.prompts[row]
    answers = {
        name: AnswerFacts(
            text=printable(given[row].text), finish_reason=given[row].finish_reason,
            tokens=len(given[row].token_ids), seconds=given[row].seconds, seed=given[row].seed,
        )
        for name, given in results.answers.items()
    }  # fmt: skip
    return RowFacts(
        place=prompt.place,
        messages=messages,
        reference=None if prompt.reference is None else printable(prompt.reference),
        fields=_other_columns(prompt),
        cluster=int(results.clusters[row]),
        answers=answers,
        scores={
            name: {model: value_of(scores[row]) for model, scores in by_model.items()}
            for name, by_model in results.scores.items()
        },
        **known,
    )
