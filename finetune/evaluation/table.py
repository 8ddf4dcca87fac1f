"""The table of an evaluation, and its first rows in full, as text."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice

from finetune import page
from finetune.evaluation.report import with_interval
from finetune.evaluation.results import BASE, TUNED, Results
from finetune.evaluation.results_file import ScoreFacts
from finetune.generation.completions import Scorer

LEFT, COLUMN = 16, 8  # letters of the names of scores, and of a column


def text(results: Results, shown: int, max_new_tokens: int) -> str:
    """Return the table and the first `shown` rows."""
    return "\n".join([*_table(results, max_new_tokens), *_examples(results, shown)])


def _table(results: Results, max_new_tokens: int) -> Iterator[str]:
    count, groups = len(results.prompts), len(set(results.clusters))
    alike = f", in {groups} {'cluster' if groups == 1 else 'clusters'} of near-duplicates"
    if "group" in results.settings:
        noun = "group" if groups == 1 else "groups"
        alike = f", in {groups} {noun} of {results.settings['group']}"
    yield f"{count} held-out {'row' if count == 1 else 'rows'}" + alike * (groups < count)
    models = results.models
    compares = BASE in models and TUNED in models
    of = " of tuned" if len(models) > 2 else ""
    gain = f"   gain{of}, 95% interval over the rows" if compares else ""
    left = max([LEFT, *(len(score) + 2 for score in results.scores)])
    yield f"{'':<{left}}" + "".join(f"{name:>{_width(name)}}" for name in models) + gain
    for score, scorer in results.scorers.items():
        means = [_mean(results.mean(score, name), scorer, _width(name)) for name in models]
        line = f"{score:<{left}}{''.join(means)}"
        yield line + (f"   {_gain(results, score)}" if compares else "")
    yield from _gaps(results, left)
    yield from _against_others(results)
    given = results.answers.items()
    failed = {name: [a.why for a in of if a.finish_reason == "failed"] for name, of in given}
    if line := _counts({name: len(of) for name, of in failed.items()}):
        whys = Counter(why for of in failed.values() for why in of if why)
        reason = f", mostly: {whys.most_common(1)[0][0]}" if whys else ""
        yield f"{'failed':<{left}}{line}   answers that did not come{reason}"
    if line := _counts({name: sum(a.is_cut for a in of) for name, of in given}):
        yield (
            f"{'cut':<{left}}{line}   answers not ended after {max_new_tokens} tokens, and "
            "scored as they are; raise --max-new-tokens"
        )


def of_corpus(score: ScoreFacts) -> str:
    """Return a score of all answers at once, as `BLEU of the corpus: base 4.2% (...); ...`."""
    parts = [f"{name} {with_interval(mean, True)}" for name, mean in score.means.items()]
    gains = score.changes.items()
    parts += [f"{name} less {BASE} {with_interval(gain, True, True)}" for name, gain in gains]
    return f"{score.name}: {'; '.join(parts) or 'no answer has a reference'}"


def _counts(by_model: Mapping[str, int]) -> str:
    """Return the numbers in the columns of their models; empty if all are 0."""
    if not any(by_model.values()):
        return ""
    return "".join(f"{number:>{_width(name)}}" for name, number in by_model.items())


def _width(name: str) -> int:
    return max(COLUMN, len(name) + 3)


def _mean(value: float | None, scorer: Scorer, width: int) -> str:
    if value is None:
        return f"{'-':>{width}}"
    shown = f"{100 * value:.1f}%" if scorer.is_share else f"{value:.4g}"
    return f"{shown:>{width}}"


def _gain(results: Results, score: str, before: str = BASE, after: str = TUNED) -> str:
    """Return the difference of two models as `+22.0 (+15.0 to +31.1)`."""
    found = results.difference(score, before, after)
    if found is None:
        return "no row has the score of both"
    form, factor = ("+.1f", 100) if results.scorers[score].is_share else ("+.4g", 1)
    within = "too few rows for an interval"
    if found.low is not None and found.high is not None:
        within = f"{factor * found.low:{form}} to {factor * found.high:{form}}"
    return f"{factor * found.mean:{form}} ({within})"


def _gaps(results: Results, left: int) -> Iterator[str]:
    """Count the rows whose score could not be computed, with a reason."""
    for score, by_model in results.scores.items():
        for name, given in by_model.items():
            if missing := [each for each in given if each.value is None]:
                reason = f", such as: {missing[0].reason}" if missing[0].reason else ""
                yield (
                    f"{score:<{left}}without {len(missing):,} of {len(given):,} rows of {name}"
                    f"{reason}"
                )


def _against_others(results: Results) -> Iterator[str]:
    """Say for each further model by how much the tuned one differs from it."""
    others = [name for name in results.models if name not in (BASE, TUNED)]
    if TUNED not in results.models:
        return
    for name in others:
        gains = [f"{score} {_gain(results, score, name)}" for score in results.scores]
        yield f"tuned against {name}: {'; '.join(gains)}"


def _examples(results: Results, shown: int) -> Iterator[str]:
    names = results.models
    left = max(6, *map(len, names)) + 2
    for i, prompt in enumerate(islice(results.prompts, shown)):
        yield ""
        yield f"{'prompt':<{left}}{_line(prompt.question)}"
        yield f"{'wanted':<{left}}{_line(prompt.reference or '')}"
        for name in names:
            answer = results.answers[name][i]
            yield f"{name:<{left}}{_line(answer.text)}" + (" [cut]" if answer.is_cut else "")


def _line(text: str, width: int = 100) -> str:
    text = page.plain(text.strip().replace("\n", "\\n"))
    return text if len(text) <= width else text[:width] + "..."
