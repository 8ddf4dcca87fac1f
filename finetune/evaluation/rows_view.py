"""The rows of a report on a page: filtered, sorted, paged, each answer compared word by word."""

from typing import Any

from finetune import page
from finetune.evaluation.results_file import ResultsFile

KEYS = {
    "place", "messages", "reference", "fields", "answers", "scores", "failed", "errors", "nearest",
    "since",
}  # fmt: skip


def html(found: ResultsFile) -> str:
    """Return the form, the list that SCRIPT fills, and the rows as JSON.

    The rows are data and the script makes text of them, so that none of it can be taken for HTML.
    """
    return f'{FORM}<script type="application/json" id="data">{page.data(_data(found))}</script>'


def button(kind: str, value: object, name: str) -> str:
    """Return a button that shows the rows of an error or of a slice alone."""
    return (
        f'<button type="button" class="pick" data-kind="{kind}" data-value="{page.text(value)}">'
        f"{page.text(name)}</button>"
    )


def _data(found: ResultsFile) -> dict[str, Any]:
    return {
        "models": list(found.models), "tuned": found.tuned, "base": found.base,
        "decides": found.decides.score if found.decides else None,
        "higher": {each.name: each.higher for each in found.scores},
        "shares": [score.name for score in found.scores if score.is_share],
        "slices": [{"name": each.name, "rows": each.rows} for each in found.slices],
        "rows": [row.model_dump(include=KEYS) for row in found.rows],
    }  # fmt: skip


FORM = """
<form id="filters" class="filters">
<input type="search" name="text" placeholder="search the rows" aria-label="search the rows">
<select name="outcome" aria-label="outcome"><option value="">all rows</option></select>
<select name="error" aria-label="type of error"><option value="">any error or none</option></select>
<select name="slice" aria-label="slice"><option value="">all slices</option></select>
<select name="since" aria-label="since the earlier round"><option value="">both rounds</option>
</select>
<select name="order" aria-label="order"><option value="worst">worst first</option>
<option value="lost">lost against the base first</option>
<option value="won">won against the base first</option>
<option value="file">in order of the file</option>
<option value="long">longest answers first</option></select>
<button type="reset">reset</button>
</form>
<p class="soft">Against the right answer: <del>words that are missing</del>,
<ins>words that are not in it</ins>.</p>
<div class="pages"><button type="button" id="back">&lsaquo; back</button>
<span id="count"></span><button type="button" id="next">next &rsaquo;</button></div>
<div id="list"></div>
<div class="pages"><button type="button" id="back2">&lsaquo; back</button>
<button type="button" id="next2">next &rsaquo;</button></div>
"""

STYLE = """
.filters { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.filters input { flex: 1 1 14rem; } .filters select { flex: 0 1 auto; }
.pages { display: flex; gap: 1rem; align-items: center; margin: 0.6rem 0; }
button { cursor: pointer; } button:disabled { opacity: 0.4; cursor: default; }
.pick { border: 0; background: none; padding: 0; color: var(--plot); text-align: left;
  text-decoration: underline; text-underline-offset: 2px; }
article { border: 1px solid var(--line); border-radius: 8px; margin: 0.8rem 0;
  padding: 0.6rem 1rem; }
article header { display: flex; flex-wrap: wrap; gap: 0.4rem; align-items: baseline; }
article dl { display: grid; grid-template-columns: 7rem 1fr; gap: 0.35rem 1rem; margin: 0.5rem 0; }
article dt { color: var(--soft); } article dd { margin: 0; white-space: pre-wrap; min-width: 0; }
@media (max-width: 600px) { article dl { grid-template-columns: 1fr; gap: 0 0; }
  article dd { margin-bottom: 0.5rem; } .filters select { flex: 1 1 10rem; } }
ins { background: var(--badback); color: var(--bad); text-decoration: none; border-radius: 3px; }
del { color: var(--good); background: var(--goodback); border-radius: 3px; }
.tag { border: 1px solid var(--line); border-radius: 999px; padding: 0 0.5rem; font-size: 0.8rem;
  white-space: nowrap; }
.tag.bad { border-color: var(--bad); color: var(--bad); }
.tag.good { border-color: var(--good); color: var(--good); }
details summary { cursor: pointer; color: var(--soft); }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 10, MOST_WORDS = 600;
const form = document.forms.filters, list = document.getElementById("list");
let chosen = [], start = 0;

function value(row, model) {
  const scores = row.scores[data.decides];
  return scores && scores[model] !== undefined ? scores[model] : null;
}
function gain(row) {
  const one = value(row, data.base), other = value(row, data.tuned);
  return one === null || other === null ? 0 : other - one;
}
const outcomes = {
  "wrong": row => row.failed === true, "right": row => row.failed === false,
  "won against the base": row => gain(row) > 0, "lost against the base": row => gain(row) < 0,
  "cut": row => row.answers[data.tuned].finish_reason === "length",
  "undecided": row => row.failed === null };
// Of rows that the deciding score calls equal, the other scores that are shares say the worst.
const worst = row => {
  const others = data.shares.filter(name => data.higher[name]).map(
    name => (row.scores[name] ?? {})[data.tuned]).filter(found => typeof found === "number");
  const mean = others.reduce((sum, found) => sum + found, 0) / (others.length || 1);
  return (row.failed ? -10 : 0) + (value(row, data.tuned) ?? 0) + 0.01 * mean;
};
const orders = { worst: (a, b) => worst(a) - worst(b), lost: (a, b) => gain(a) - gain(b),
  won: (a, b) => gain(b) - gain(a), file: () => 0,
  long: (a, b) => b.answers[data.tuned].text.length - a.answers[data.tuned].text.length };

function fill(select, names) {
  for (const [value, name, count] of names) {
    if (!count) continue;
    const option = document.createElement("option");
    option.value = value;
    option.textContent = `${name} (${count.toLocaleString("en")})`;
    select.append(option);
  }
  select.hidden = select.options.length === 1;
}
function counted(test) { return data.rows.reduce((sum, row) => sum + (test(row) ? 1 : 0), 0); }
data.rows.forEach((row, number) => { row.number = number; });
fill(form.outcome, Object.keys(outcomes).map(name => [name, name, counted(outcomes[name])]));
const errors = [...new Set(data.rows.flatMap(row => row.errors))];
fill(form.error, errors.map(e => [e, e, counted(row => row.errors.includes(e))]));
fill(form.slice, data.slices.map((slice, n) => [n, slice.name, slice.rows.length]));
fill(form.since, ["fixed", "not fixed", "new", "right"].map(
  name => [name, name === "new" ? "newly wrong" : name, counted(row => row.since === name)]));

function haystack(row) {
  row.text ??= [row.place, row.reference ?? "", ...row.messages.map(m => m.content),
    ...data.models.map(name => row.answers[name].text)].join("\\n").toLowerCase();
  return row.text;
}
function update() {
  const text = form.text.value.toLowerCase().trim(), outcome = outcomes[form.outcome.value];
  const error = form.error.value, since = form.since.value, slice = form.slice.value;
  const inside = slice === "" ? null : new Set(data.slices[+slice].rows);
  chosen = data.rows.filter(row => (!outcome || outcome(row)) && (!inside || inside.has(row.number))
    && (!error || row.errors.includes(error)) && (!since || row.since === since)
    && (!text || haystack(row).includes(text)));
  chosen.sort(orders[form.order.value]);
  start = 0;
  show();
}
function make(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}
function split(text) {
  return text.match(/[\\p{L}\\p{N}_']+\\s*|[^\\s\\p{L}\\p{N}_']\\s*/gu) ?? [];
}
// Words in common, by the longest common subsequence: [[tag or "", words], ...].
function compare(answer, right) {
  const a = split(answer), b = split(right), parts = [];
  const same = (one, other) => one.trim() === other.trim();
  let from = 0, end = 0;
  while (from < Math.min(a.length, b.length) && same(a[from], b[from])) from++;
  while (end < Math.min(a.length, b.length) - from
    && same(a[a.length - 1 - end], b[b.length - 1 - end])) end++;
  const one = a.slice(from, a.length - end), other = b.slice(from, b.length - end);
  if (one.length > MOST_WORDS || other.length > MOST_WORDS) return [["ins", answer]];
  const best = Array.from({ length: one.length + 1 }, () => new Uint16Array(other.length + 1));
  for (let i = one.length - 1; i >= 0; i--)
    for (let j = other.length - 1; j >= 0; j--)
      best[i][j] = same(one[i], other[j]) ? best[i + 1][j + 1] + 1
        : Math.max(best[i + 1][j], best[i][j + 1]);
  // Of texts that share little, marks between the words would hide both.
  const common = from + end + best[0][0];
  if (common < 0.3 * Math.max(a.length, b.length))
    return answer ? [["ins", answer]] : [["del", right]];
  let gone = [], added = [];
  const flush = () => {
    const old = gone.join(""), fresh = added.join("");
    if (old) parts.push(["del", old.trimEnd()], ["", fresh ? " " : /\\s*$/.exec(old)[0]]);
    if (fresh) parts.push(["ins", fresh.trimEnd()], ["", /\\s*$/.exec(fresh)[0]]);
    gone = []; added = [];
  };
  const keep = word => { flush(); parts.push(["", word]); };
  a.slice(0, from).forEach(keep);
  let i = 0, j = 0;
  while (i < one.length || j < other.length) {
    if (i < one.length && j < other.length && same(one[i], other[j])) { keep(one[i++]); j++; }
    else if (j < other.length && (i === one.length || best[i][j + 1] >= best[i + 1][j]))
      gone.push(other[j++]);
    else added.push(one[i++]);
  }
  a.slice(a.length - end).forEach(word => end && keep(word));
  flush();
  return parts;
}
function answered(row, model) {
  const node = make("dd"), text = row.answers[model].text;
  const parts = row.reference === null ? [["", text]] : compare(text.trim(), row.reference.trim());
  for (const [tag, words] of parts) node.append(tag ? make(tag, words) : words);
  if (!text && row.reference === null) node.append(make("small", "no answer"));
  if (row.answers[model].finish_reason === "length")
    node.append(" ", make("span", "cut", "tag bad"));
  return node;
}
function number(name, value) {
  if (value === null || value === undefined) return "-";
  if (data.shares.includes(name)) return (100 * value).toFixed(value % 1 ? 1 : 0) + "%";
  return Number(value.toPrecision(4)).toLocaleString("en");
}
function article(row) {
  const node = make("article"), header = make("header"), known = make("dl");
  header.append(make("b", row.place));
  if (row.failed === true) header.append(make("span", "wrong", "tag bad"));
  if (row.failed === false) header.append(make("span", "right", "tag good"));
  for (const error of row.errors) header.append(make("span", error, "tag"));
  if (row.since) header.append(make("span",
    row.since === "new" ? "newly wrong" : row.since === "right" ? "right before" : row.since,
    row.since === "fixed" ? "tag good" : "tag"));
  const last = row.messages[row.messages.length - 1];
  known.append(make("dt", "question"), make("dd", last ? last.content : ""));
  if (row.reference !== null)
    known.append(make("dt", "right answer"), make("dd", row.reference));
  for (const model of [data.tuned, ...data.models.filter(name => name !== data.tuned)])
    known.append(make("dt", model), answered(row, model));
  node.append(header, known, scoresOf(row));
  if (row.messages.length > 1) node.append(folded("earlier messages",
    row.messages.slice(0, -1).map(m => [m.role, m.content])));
  const fields = Object.entries(row.fields);
  if (fields.length) node.append(folded("columns", fields.map(([name, value]) =>
    [name, typeof value === "string" ? value : JSON.stringify(value)])));
  if (row.nearest.length) node.append(folded("nearest rows that were trained on", row.nearest.map(
    near => [near.similarity.toFixed(2), `${near.place}\\n${near.question}\\n${near.answer}`])));
  return node;
}
function scoresOf(row) {
  const shown = Object.entries(row.scores).map(([name, by]) => `${name} ` + data.models.filter(
    model => model in by).map(model => `${model} ${number(name, by[model])}`).join(", "));
  return make("small", shown.join(" \\u00b7 "));
}
function folded(title, pairs) {
  const node = make("details"), known = make("dl");
  for (const [name, text] of pairs) known.append(make("dt", name), make("dd", text));
  node.append(make("summary", title), known);
  return node;
}
function show() {
  list.replaceChildren(...chosen.slice(start, start + PAGE).map(article));
  const end = Math.min(start + PAGE, chosen.length), sum = chosen.length.toLocaleString("en");
  document.getElementById("count").textContent =
    chosen.length ? `${start + 1} to ${end} of ${sum}` : "no row";
  for (const id of ["back", "back2"]) document.getElementById(id).disabled = start === 0;
  for (const id of ["next", "next2"]) document.getElementById(id).disabled = end >= chosen.length;
  document.getElementById("next2").parentNode.hidden = chosen.length <= PAGE;
}
function turn(by, top) {
  start += by * PAGE;
  show();
  if (top) document.getElementById("rows").scrollIntoView();
}
for (const [id, by, top] of [["back", -1, false], ["next", 1, false], ["back2", -1, true],
  ["next2", 1, true]])
  document.getElementById(id).addEventListener("click", () => turn(by, top));
for (const pick of document.querySelectorAll(".pick"))
  pick.addEventListener("click", () => {
    form.reset();
    form[pick.dataset.kind].value = pick.dataset.value;
    if (pick.dataset.kind === "slice" && counted(outcomes.wrong)) form.outcome.value = "wrong";
    update();
    document.getElementById("rows").scrollIntoView();
  });
form.addEventListener("input", update);
form.addEventListener("reset", () => setTimeout(update));
form.addEventListener("submit", event => event.preventDefault());
update();
"""
