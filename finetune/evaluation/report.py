"""report.html, one self-contained page, and report.md: what an evaluation found, for people."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune import page
from finetune.data.clusters import words
from finetune.evaluation import rows_view
from finetune.evaluation.results_file import (
    Change,
    LabelFacts,
    Mean,
    ResultsFile,
    RowFacts,
    RunFacts,
    ScoreFacts,
    SliceFacts,
)
from finetune.preparation import card
from finetune.preparation.card import Block, Section, Table

SHOWN = 5  # rows of the Markdown that got worse, and that are wrong
MOST_SLICES = 12  # of the page before a click shows the others
STYLE = """
.verdict { border-left: 6px solid var(--soft); background: var(--panel); border-radius: 6px;
  padding: 0.8rem 1rem; } .verdict strong { font-size: 1.3rem; } .verdict p { margin: 0.3rem 0 0; }
.verdict.better { border-color: var(--good); } .verdict.better strong { color: var(--good); }
.verdict.worse { border-color: var(--bad); } .verdict.worse strong { color: var(--bad); }
.facts { padding-left: 1.2rem; } h2 { scroll-margin-top: 0.5rem; }
.wide td:first-child { min-width: 9rem; } .wide td svg { max-width: none; }
.scores td, .scores th { min-width: 4rem; } .scores small { min-width: 6.5rem; }
.wide th { vertical-align: bottom; } .share {
  display: inline-block; height: 0.8rem; background: var(--plot); border-radius: 2px; }
.plots { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
small { line-height: 1.3; display: inline-block; } .aligned { white-space: pre; }
"""


# ------------------------------------------------------------------------------------ numbers


def shown(value: float | None, is_share: bool, signed: bool = False) -> str:
    """Write a score: a share in percent, others in four digits."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}{'' if signed else '%'}" if is_share else f"{value:{sign}.4g}"


def with_interval(found: Mean | Change | None, is_share: bool, signed: bool = False) -> str:
    """Write a mean and its interval, as `74.5% (68.0% to 80.0%)`."""
    if found is None:
        return "-"
    mean = shown(found.mean, is_share, signed)
    if found.low is None or found.high is None:
        return f"{mean} (too few rows for an interval)"
    ends = (shown(end, is_share, signed) for end in (found.low, found.high))
    return f"{mean} ({' to '.join(ends)})"


def chance(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def title(found: ResultsFile) -> str:
    where = found.run.directory if found.run else str(found.settings.get("tuned") or found.tuned)
    return f"Evaluation of {where}"


def summary(found: ResultsFile) -> list[str]:
    """Return what stands below the verdict: rows, wrong rows, cut answers, gaps, the round."""
    if not found.rows:
        return [_sentence(note) for note in found.notes]
    count, groups = len(found.rows), len({row.cluster for row in found.rows})
    rows = f"{count:,} {'row' if count == 1 else 'rows'}"
    group = found.settings.get("group")
    alike = f"{'group' if group else 'cluster'}{'s' * (groups != 1)}"
    alike = f" in {groups:,} {alike} of {group or 'near-duplicates'}"
    lines = [rows + alike * (groups < count) + "."]
    if found.decides:
        wrong = f"{len(found.failures):,} answers of {found.tuned} are wrong: "
        is_share = getattr(found.score(found.decides.score), "is_share", True)
        below = shown(found.decides.below, is_share)
        lines.append(f"{wrong}{found.decides.score} below {below}.")
    for name, model in found.models.items():
        for number, what in ((model.cut, "cut by the limit of tokens"), (model.failed, "missing")):
            if number:
                verb = "answer is" if number == 1 else "answers are"
                lines.append(f"{number:,} {verb} {what}, of {model.answers:,} of {name}.")
    for score in found.scores:
        for name, reasons in score.missing.items():
            why = "; ".join(
                f"{count:,}: {reason or 'unknown'}" for reason, count in reasons.items()
            )
            lines.append(f"{score.name} has no value for rows of {name} ({why}).")
    if found.round:
        lines.append(f"Since {found.round.file}: {found.round.sentence}")
    return lines + [_sentence(note) for note in found.notes]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


# ------------------------------------------------------------------------------------ Markdown


def markdown(found: ResultsFile) -> str:
    """Return the report as Markdown: all but curves, distributions and most rows."""
    sections = [Section("Verdict", [_sentence(found.verdict.sentence), *summary(found)])]
    for name, scores in _score_tables(found):
        sections.append(Section(name, [_scores_table(scores, found)]))
    for score in found.scores:
        for model, labels in score.labels.items():
            sections.append(Section(f"Labels of {model}", [_labels_table(labels)]))
    if found.error_types:
        types = [(each.name, each.count, each.definition) for each in found.error_types]
        sections.append(Section("Errors", [Table(["type", "rows", "what it means"], types)]))
    if found.slices:
        sections.append(Section("Slices", [_slices_table(found)]))
    if found.round:
        sections.append(Section("Since the earlier round", [*_round_blocks(found)]))
    for name, rows in (("Got worse", _lost(found)), ("Wrong", found.failures)):
        if rows:
            sections.append(Section(name, [_rows_table(found, rows[:SHOWN])]))
    return card.markdown(title(found), sections)


def _score_tables(found: ResultsFile) -> Iterator[tuple[str, Sequence[ScoreFacts]]]:
    """Yield the titles of tables of scores, and their scores."""
    if found.scores or not (found.benchmarks or found.forgetting):
        yield "Scores", [*found.scores, *found.corpus_scores]
    if found.benchmarks:
        yield "Benchmarks", found.benchmarks
    if found.forgetting:
        yield "Forgetting", found.forgetting


def _labels_table(labels: Sequence[LabelFacts]) -> Table:
    rows = [
        (each.label, each.rows, *(shown(v, True) for v in (each.precision, each.recall, each.f1)))
        for each in labels
    ]
    return Table(["label", "rows", "precision", "recall", "F1"], rows)


def _scores_table(scores: Sequence[ScoreFacts], found: ResultsFile) -> Table:
    models = list(found.models)
    others = [name for name in models if found.base and name != found.base]
    head = ["score", *models, *(f"{name} less {found.base}" for name in others), "p"]
    rows = []
    for score in scores:
        means = [with_interval(score.means.get(name), score.is_share) for name in models]
        gains = [with_interval(score.changes.get(n), score.is_share, True) for n in others]
        change = score.changes.get(found.tuned)
        p = (change.p if change.p_holm is None else change.p_holm) if change else None
        rows.append((score.name, *means, *gains, chance(p)))
    return Table(head, rows)


def _slices_table(found: ResultsFile) -> Table:
    head = ["slice", "rows", "wrong", *found.models, ""]
    is_share = _is_share(found)
    rows = [
        (
            each.name, len(each.rows), each.failures,
            *(with_interval(each.means.get(name), is_share) for name in found.models),
            ", ".join(["weak"] * each.is_weak + ["few rows"] * each.is_small),
        )
        for each in found.slices
    ]  # fmt: skip
    return Table(head, rows)


def _is_share(found: ResultsFile) -> bool:
    score = found.score(found.decides.score) if found.decides else None
    return score is None or score.is_share


def _round_blocks(found: ResultsFile) -> Iterator[Block]:
    if (since := found.round) is None:
        return
    yield since.sentence
    if since.only_before or since.only_now:
        what = f"{since.only_before:,} rows only the earlier round asked or could decide, "
        yield f"{what}{since.only_now:,} only this one."
    rows = [("all rows", since.fixed, since.not_fixed, since.new, since.right)]
    rows += [
        (f"{each.column}: {each.value}", each.fixed, each.not_fixed, each.new, each.right)
        for each in since.slices
    ]
    yield Table(["slice", "fixed", "not fixed", "newly wrong", "stayed right"], rows)


def _lost(found: ResultsFile) -> list[RowFacts]:
    """Return the rows where the tuned model is worse than the base, the worst first."""
    if not (found.decides and found.base) or found.base == found.tuned:
        return []
    losses = []
    for number, row in enumerate(found.rows):
        by_model = row.scores[found.decides.score]
        before, after = by_model[found.base], by_model[found.tuned]
        if before is not None and after is not None and after < before:
            losses.append((after - before, number))
    return [found.rows[number] for _, number in sorted(losses)]


def _rows_table(found: ResultsFile, rows: Sequence[RowFacts]) -> Table:
    head = ["row", "question", "right answer", *found.models, "errors"]
    return Table(
        head,
        [
            (
                row.place, row.messages[-1].content if row.messages else "", row.reference or "",
                *(row.answers[name].text for name in found.models), ", ".join(row.errors),
            )
            for row in rows
        ],
    )  # fmt: skip


# ------------------------------------------------------------------------------------ HTML


def html(found: ResultsFile) -> str:
    """Return the report as a page: the verdict first, rows to filter and compare word by word."""
    parts = [
        f'<div class="verdict {found.verdict.kind.replace(" ", "-")}">'
        f"<strong>{page.text(_headline(found))}</strong>"
        f"<p>{page.text(_sentence(found.verdict.sentence))}</p></div>",
        "<ul class=facts>" + "".join(f"<li>{page.text(line)}" for line in summary(found)) + "</ul>",
    ]  # fmt: skip
    for name, scores in _score_tables(found):
        parts += [f"<h2>{name}</h2>", _scores_html(scores, found)]
    parts += _details_html(found.scores)
    if found.error_types:
        parts += ["<h2>Errors</h2>", _errors_html(found)]
    if found.slices:
        parts += ["<h2>Slices</h2>", *_slices_html(found)]
    if found.round:
        parts.append("<h2>Since the earlier round</h2>")
        parts += map(card.block_html, _round_blocks(found))
    if found.rows:
        parts += ["<h2 id=rows>Rows</h2>", rows_view.html(found)]
        parts += ["<h2>Distributions</h2>", *_distributions(found)]
    if found.run:
        parts += _run_html(found.run)
    if found.settings:
        parts += ["<h2>Settings of this evaluation</h2>", _values(found.settings)]
    script = rows_view.SCRIPT if found.rows else ""
    return page.page(title(found), "\n".join(parts), STYLE + rows_view.STYLE, script)


def _headline(found: ResultsFile) -> str:
    name = found.tuned.capitalize()
    return {
        "better": f"{name} is better than {found.base}",
        "worse": f"{name} is worse than {found.base}",
        "mixed": "Better and worse",
        "no difference": "No difference found",
        "too few rows": "Too few rows to tell",
    }.get(found.verdict.kind, "No verdict")


def _scores_html(scores: Sequence[ScoreFacts], found: ResultsFile) -> str:
    others = [name for name in found.models if found.base and name != found.base]
    head = ["score", *found.models]
    head += [part for name in others for part in (f"{name} less {found.base}, 95% interval", "")]
    lines = ["".join(f"<th>{page.text(name)}</th>" for name in head)]
    shares = [score for score in scores if score.is_share]
    most = _widest(change for score in shares for change in score.changes.values())
    for score in scores:
        cells = [f"<td>{page.text(score.name)}<br><small>{page.text(score.line)}</small></td>"]
        for name in found.models:
            mean = score.means.get(name)
            cells.append(f"<td>{_with_small_interval(mean, score.is_share)}</td>")
        for name in others:
            change = score.changes.get(name)
            p = (change.p if change.p_holm is None else change.p_holm) if change else None
            note = f"<br><small>p {page.text(chance(p))}</small>" if p is not None else ""
            text = _with_small_interval(change, score.is_share, True) + note
            cells += [f"<td>{text}</td>", f"<td>{_forest(change, score, most)}</td>"]
        lines.append("".join(cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class=scores>{body}</table></div>'


def _with_small_interval(found: Mean | Change | None, is_share: bool, signed: bool = False) -> str:
    text = with_interval(found, is_share, signed)
    mean, _, rest = text.partition(" (")
    return f"<b>{page.text(mean)}</b>" + (f"<br><small>({page.text(rest)}</small>" if rest else "")


def _widest(changes: Iterable[Change | None]) -> float:
    """Return the end of an interval that is farthest from 0, which all of a table are drawn by."""
    ends = [end for each in changes if each for end in (each.low, each.high) if end is not None]
    return max(map(abs, ends), default=0.0) or 1.0


def _forest(change: Change | None, score: ScoreFacts, most: float) -> str:
    """Return a picture of an interval around zero: green if better, red if worse.

    most: what the width of half a picture stands for, of scores that are shares.
    """
    if change is None or change.low is None or change.high is None:
        return ""
    most = most if score.is_share else _widest([change])
    low, mid, high = (70 + 66 * v / most for v in (change.low, change.mean, change.high))
    sign = 0 if change.low <= 0 <= change.high else (1 if change.mean > 0 else -1)
    if score.higher is None:
        sign = 0
    colour = {0: "var(--soft)", 1: "var(--good)", -1: "var(--bad)"}[
        sign if score.higher in (True, None) else -sign
    ]
    text = with_interval(change, score.is_share, True)
    return (
        '<svg viewBox="0 0 140 22" width="140" height="22" role="img" '
        f'aria-label="{page.text(text)}">'
        f'<line class="axis" x1="70" x2="70" y1="0" y2="22"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="11" y2="11" stroke="{colour}" stroke-width="3"/>'
        f'<circle cx="{mid:.1f}" cy="11" r="5" fill="{colour}"/></svg>'
    )


def _details_html(scores: Sequence[ScoreFacts]) -> Iterator[str]:
    """Yield what scores have to show besides numbers, such as the report of a classifier."""
    for score in scores:
        for model, lines in score.details.items():
            name = page.text(score.name + (f" of {model}" if model else ""))
            text = page.text("\n".join(lines))
            yield (
                f"<details><summary>{name}: details</summary>"
                f'<div class="wide"><pre class=aligned>{text}</pre></div></details>'
            )


def _errors_html(found: ResultsFile) -> str:
    most = max(each.count for each in found.error_types)
    lines = ["<tr><th>type<th class=number>rows<th><th>what it means</tr>"]
    for each in sorted(found.error_types, key=lambda each: -each.count):
        wide = (
            f'<i class="share" style="width:calc(min(8rem, 18vw) * {each.count / most:.3f})"></i>'
        )
        lines.append(
            f"<tr><td>{rows_view.button('error', each.name, each.name)}"
            f"<td class=number>{each.count:,}<td>{wide}"
            f"<td><small>{page.text(each.definition)}</small></tr>"
        )
    return (
        "<p class=soft>An answer may have several types. Choose one to see its rows.</p>"
        f'<div class="wide"><table>{"".join(lines)}</table></div>'
    )


def _slices_html(found: ResultsFile) -> Iterator[str]:
    yield (
        "<p class=soft>Weak: fails more often than the other rows, which chance would do in 5% of "
        "sets (Fisher's exact test, Holm). Few rows: fewer than 30, or 30 clusters.</p>"
    )
    first, rest = found.slices[:MOST_SLICES], found.slices[MOST_SLICES:]
    yield _slices_part(found, first, 0)
    if rest:
        yield f"<details><summary>{len(rest):,} more slices</summary>"
        yield f"{_slices_part(found, rest, len(first))}</details>"


def _slices_part(found: ResultsFile, part: Sequence[SliceFacts], start: int) -> str:
    score = found.score(found.decides.score) if found.decides else None
    models = list(found.models) if score else []
    head = ["slice", "rows", "wrong", *models, "less base", ""]
    lines = ["".join(f"<th>{page.text(name)}</th>" for name in head)]
    most = _widest(each.change for each in found.slices)
    for number, each in enumerate(part, start):
        tags = '<span class="tag bad">weak</span> ' * each.is_weak
        tags += '<span class="tag">few rows</span>' * each.is_small
        cells = [f"<td>{rows_view.button('slice', number, each.name)} {tags}</td>"]
        cells.append(f"<td class=number>{len(each.rows):,}</td>")
        cells.append(f"<td class=number>{each.failures:,}</td>")
        for name in models:
            mean = each.means.get(name)
            cells.append(f"<td>{_with_small_interval(mean, _is_share(found))}</td>")
        cells.append(f"<td>{_with_small_interval(each.change, _is_share(found), True)}</td>")
        cells.append(f"<td>{_forest(each.change, score, most) if score else ''}</td>")
        lines.append("".join(cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class=scores>{body}</table></div>'


def _distributions(found: ResultsFile) -> Iterator[str]:
    models = list(found.models)
    yield page.legend(models)
    yield "<div class=plots>"
    lengths = {name: [len(words(row.answers[name].text)) for row in found.rows] for name in models}
    yield page.distributions(lengths, "words of the answers")
    for score in found.scores:
        values = {
            name: [v for row in found.rows if (v := row.scores[score.name].get(name)) is not None]
            for name in models
        }
        seen = {value for each in values.values() for value in each}
        if not seen <= {0.0, 1.0}:
            yield page.distributions(values, score.name)
    yield "</div>"


def _run_html(run: RunFacts) -> Iterator[str]:
    yield f"<h2>The run</h2><p><code>{page.text(run.directory)}</code>, {page.text(run.state)}</p>"
    if run.curves:
        names = ["loss", "evaluation loss"]
        losses = {name: run.curves[name] for name in names if name in run.curves}
        yield f"{page.legend(losses)}<div class=plots>"
        yield page.lines(losses, "loss, nats per supervised token")
        for name, points in run.curves.items():
            if name not in names:
                yield page.lines({name: points}, name)
        yield "</div>"
    for name, values in (("Settings of the run", run.settings), ("Receipt", run.facts)):
        if values:
            yield f"<details><summary>{name}</summary>{_values(values)}</details>"
    if run.data_card:
        yield "<details><summary>Card of the rows that were trained on</summary>"
        yield f"<pre>{page.text(run.data_card)}</pre></details>"


def _values(values: Mapping[str, Any]) -> str:
    rows = [(name, json.dumps(value, ensure_ascii=False)) for name, value in values.items()]
    return page.table(["name", "value"], rows)
