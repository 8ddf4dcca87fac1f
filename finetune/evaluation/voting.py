"""A page on which a person compares two answers without knowing which model gave them.

One self-contained file: it asks no network for anything, keeps its votes in the browser, and
exports them as a file that `votes.py` reads. Rows come in a random order, so that the first votes
are a random sample of them, and each row has its sides by chance; the seed of both comes from the
answers, and is in the page and in each vote. Names of models are encoded; the export has them.
"""

import base64
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from finetune import page
from finetune.evaluation.judges.pairwise import messages_of
from finetune.generation.completions import Completion

TITLE = "Which answer is better?"


def pairs(answers: Mapping[str, Sequence[Completion]], seed: int) -> list[dict[str, Any]]:
    """Return what the page shows, in its order: prompts with two different answers."""
    chance, found = random.Random(seed), []
    for models in combinations(answers, 2):
        for both in zip(*(answers[name] for name in models)):
            is_failed = any(each.finish_reason == "failed" for each in both)
            if is_failed or both[0].text == both[1].text:
                continue
            sides = [0, 1] if chance.random() < 0.5 else [1, 0]
            names = {"models": [models[side] for side in sides], "salt": chance.getrandbits(48)}
            prompt = both[0].prompt
            found.append({
                "row": prompt.place, "prompt": [*messages_of(prompt)],
                "answers": [both[side].text for side in sides],
                "cut": [both[side].is_cut for side in sides],
                "key": base64.b64encode(json.dumps(names).encode()).decode(),
            })  # fmt: skip
    chance.shuffle(found)
    return found


def seed_of(answers: Mapping[str, Sequence[Completion]]) -> int:
    """Return a seed: the same answers make the same page, in which votes go on."""
    content = [(name, each.prompt.place, each.text) for name in answers for each in answers[name]]
    return int(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8], 16)


def write(path: Path, answers: Mapping[str, Sequence[Completion]], option: str) -> int:
    """Write the page, unless it has no pairs, and return how many it shows."""
    seed = seed_of(answers)
    if shown := pairs(answers, seed):
        page.write(path, html(shown, seed), option)
    return len(shown)


def html(shown: Sequence[Mapping[str, Any]], seed: int) -> str:
    content = json.dumps(shown)
    identity = hashlib.sha256(f"{seed} {content}".encode()).hexdigest()[:16]
    data = page.data({"pairs": shown, "seed": seed, "identity": identity})
    script = f"const DATA = {data};\n{SCRIPT}"
    return page.page(TITLE, BODY, STYLE, script)


STYLE = """
body { max-width: 90rem; padding-bottom: 0; }
.bar { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; }
.bar progress { flex: 1 1 8rem; accent-color: var(--plot); }
.text { white-space: pre-wrap; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .8rem; margin: .3rem 0 .8rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.sides h2, #prompt h2 { margin: .5rem 0 0; font-size: 1rem; color: var(--soft); }
.sides section { min-width: 0; }
.chosen .text { border-color: var(--good); background: var(--goodback); }
#vote { position: sticky; bottom: 0; background: var(--paper); padding: .6rem 0;
  border-top: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .5rem; }
#vote button { flex: 1 1 6rem; padding: .6rem .5rem; cursor: pointer; }
#vote button[aria-pressed=true] { border-color: var(--good); background: var(--goodback); }
button:focus-visible, input:focus-visible { outline: 2px solid var(--plot); }
kbd { color: var(--soft); font: .8rem ui-monospace, monospace; }
.warn { color: var(--bad); }
@media (max-width: 700px) { .sides { grid-template-columns: 1fr; gap: 0; }
  #vote { display: grid; grid-template-columns: repeat(6, 1fr); }
  #vote button { grid-column: span 2; } #vote [data-move] { grid-column: span 3; order: 1; }
  kbd { display: none; } }
"""

BODY = """
<div class="bar"><span id="place"></span><progress id="progress" value="0"></progress>
  <label>Your name <input id="rater" size="10" placeholder="optional"></label>
  <button id="export">Save votes <kbd>E</kbd></button></div>
<p id="note" class="soft" role="status"></p>
<main><div id="prompt"></div><div class="sides">
  <section id="first"><h2>Answer A</h2><div class="text"></div></section>
  <section id="second"><h2>Answer B</h2><div class="text"></div></section></div></main>
<div id="vote">
  <button data-move="-1">Back <kbd>&#9003;</kbd></button>
  <button data-better="first">A is better <kbd>&larr; A</kbd></button>
  <button data-better="tie">Equal <kbd>T</kbd></button>
  <button data-better="second">B is better <kbd>&rarr; B</kbd></button>
  <button data-move="1">Skip <kbd>S</kbd></button></div>
"""

SCRIPT = r"""
const $ = (id) => document.getElementById(id);
const pairs = DATA.pairs, storeName = "finetune votes " + DATA.identity;
const state = {votes: {}, at: 0, rater: "", id: ""};
let isKept = true, isSaved = true;

function load() {
  const random = crypto.getRandomValues(new Uint32Array(1))[0];
  state.id = random.toString(16).padStart(8, "0");
  try {
    const kept = JSON.parse(localStorage.getItem(storeName) || "{}");
    for (const [number, better] of Object.entries(kept.votes || {}))
      if (pairs[number] && ["first", "second", "tie"].includes(better))
        state.votes[number] = better;
    if (pairs[kept.at]) state.at = kept.at;
    for (const name of ["rater", "id"])
      if (typeof kept[name] === "string") state[name] = kept[name];
    localStorage.setItem(storeName, JSON.stringify(state));
  } catch (error) { isKept = false; }
}

function keep() {
  try { localStorage.setItem(storeName, JSON.stringify(state)); }
  catch (error) { isKept = false; }
}

function block(name, text) {
  const part = document.createElement("section"), head = document.createElement("h2");
  const inner = document.createElement("div");
  head.textContent = name; inner.textContent = text; inner.className = "text";
  part.append(head, inner);
  return part;
}

function show() {
  const pair = pairs[state.at], better = state.votes[state.at];
  const done = Object.keys(state.votes).length;
  $("place").textContent = `${state.at + 1} of ${pairs.length}, ${done} voted`;
  $("progress").max = pairs.length;
  $("progress").value = done;
  const names = {user: "Request", system: "System", assistant: "Earlier answer"};
  $("prompt").replaceChildren(...pair.prompt.map(
    (turn) => block(names[turn.role] || turn.role, turn.content)));
  ["first", "second"].forEach((side, number) => {
    const cut = pair.cut[number] ? " \u2026 [cut]" : "";
    // White space around an answer, which some templates leave, would tell the models apart.
    $(side).querySelector(".text").textContent = pair.answers[number].trim() + cut || "(empty)";
    $(side).className = better === side ? "chosen" : "";
  });
  for (const button of document.querySelectorAll("[data-better]"))
    button.setAttribute("aria-pressed", String(button.dataset.better === better));
  $("note").className = isKept ? "soft" : "warn";
  $("note").textContent = !isKept
    ? "This browser keeps nothing: save your votes before you close the page."
    : done === pairs.length ? "All are voted on. Save your votes."
    : "Your votes stay in this browser until you save them.";
}

function move(step) {
  state.at = Math.min(Math.max(state.at + step, 0), pairs.length - 1);
  keep(); show(); window.scrollTo(0, 0);
}

function vote(better) {
  state.votes[state.at] = better;
  isSaved = false;
  move(1);
}

function lines() {
  const rater = state.rater.trim() || `person ${state.id}`;
  return Object.keys(state.votes).map(Number).sort((a, b) => a - b).map((number) => {
    const pair = pairs[number];
    const bytes = Uint8Array.from(atob(pair.key), (letter) => letter.charCodeAt(0));
    const models = JSON.parse(new TextDecoder().decode(bytes)).models;
    return JSON.stringify({row: pair.row, prompt: pair.prompt, models, answers: pair.answers,
      better: state.votes[number], rater, seed: DATA.seed}) + "\n";
  }).join("");
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], {type: "application/jsonl"}));
  link.download = "votes.jsonl";
  link.click();
  isSaved = true;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.better) vote(button.dataset.better);
  else if (button.dataset.move) move(Number(button.dataset.move));
  else if (button.id === "export") save();
});
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const votes = {arrowleft: "first", a: "first", 1: "first", arrowright: "second", b: "second",
    2: "second", t: "tie", 0: "tie"};
  const moves = {backspace: -1, s: 1};
  const key = event.key.toLowerCase();
  if (votes[key]) vote(votes[key]);
  else if (moves[key]) move(moves[key]);
  else if (key === "e") save();
  else return;
  event.preventDefault();
});
$("rater").addEventListener("input", () => { state.rater = $("rater").value; keep(); });
window.addEventListener("beforeunload", (event) => {
  if (!isKept && !isSaved) event.preventDefault();
});
load();
$("rater").value = state.rater;
show();
"""
