"""The page of `finetune chat --web`: two answers side by side, and a vote."""

from collections.abc import Sequence

from finetune import page

POLICY = f"{page.POLICY}; connect-src 'self'; base-uri 'none'; form-action 'none'"

STYLE = """
#sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 45rem) { #sides { grid-template-columns: 1fr; } }
.side, .turn { background: var(--panel); border-radius: 6px; padding: 0.6rem 0.8rem;
  white-space: pre-wrap; min-height: 3rem; }
.turn { margin: 0.5rem 0; min-height: 0; } .turn.user { margin-left: 3rem; }
.side.better { outline: 2px solid var(--good); }
.side h2 { margin: 0 0 0.4rem; font-size: 1rem; white-space: normal; }
textarea { width: 100%; font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: 4px; padding: 0.4rem; }
#controls, #votes { display: flex; flex-wrap: wrap; gap: 0.6rem; align-items: center;
  margin: 0.6rem 0; }
button:disabled { opacity: 0.4; } #note { min-height: 1.5rem; }
.token { border-radius: 3px; }
"""

BODY = """
<div id="controls">
  <label>left <select id="left"></select></label>
  <label>right <select id="right"></select></label>
  <label><input type="checkbox" id="blind">
    blind: sides are drawn, names come after the vote</label>
  <label><input type="checkbox" id="probs"> probabilities</label>
  <button id="new">new conversation</button>
</div>
<label>system message <textarea id="system" rows="1"></textarea></label>
<div id="turns"></div>
<div id="sides">
  <div class="side"><h2>left</h2><span class="answer"></span></div>
  <div class="side"><h2>right</h2><span class="answer"></span></div>
</div>
<div id="votes">
  <button data-better="first" disabled>left is better</button>
  <button data-better="tie" disabled>equal</button>
  <button data-better="second" disabled>right is better</button>
  <small>The conversation goes on from the better answer; without a vote, from the left one.
  </small>
</div>
<p id="note" class="soft" role="status"></p>
<form id="form">
<textarea id="text" rows="3" placeholder="a message; Ctrl+Enter sends it"></textarea>
<button id="send">send</button></form>
"""

SCRIPT = """
'use strict';
const $ = id => document.getElementById(id);
const sides = [...document.querySelectorAll('.side')];
const votes = [...document.querySelectorAll('[data-better]')];
let turns = [], round = null, answers = ['', ''], better = 0, busy = false;

for (const [id, at] of [['left', 0], ['right', 1]]) {
  for (const name of SETUP.models) $(id).add(new Option(name, name));
  $(id).selectedIndex = Math.min(at, SETUP.models.length - 1);
}
$('blind').checked = SETUP.blind;
$('system').value = SETUP.system;

async function post(path, values) {
  const response = await fetch(path, { method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...values, token: SETUP.token }) });
  if (response.ok) return response;
  throw new Error((await response.json()).error.message);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split('\\n\\n');
    text = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice(6));
  }
}

function name(names) {
  sides.forEach((side, at) => { side.querySelector('h2').textContent =
    ['left', 'right'][at] + (names[at] ? ': ' + names[at] : ''); });
}

function piece(side, event) {
  const answer = side.querySelector('.answer');
  if (!event.tokens) { answer.append(event.text); return; }
  const percent = logprob => (100 * Math.exp(logprob)).toFixed(1) + '%';
  const about = token => [JSON.stringify(token.text) + ' ' + percent(token.logprob) + ', of',
    ...token.top.map(([text, logprob]) => JSON.stringify(text) + ' ' + percent(logprob))
  ].join('\\n');
  // Tokens that are parts of characters have no text of their own: they show as one.
  const isWhole = event.tokens.map(token => token.text).join('') === event.text;
  const groups = isWhole ? event.tokens.map(token => [token]) : [event.tokens];
  for (const group of groups) {
    const span = document.createElement('span');
    span.className = 'token';
    span.textContent = isWhole ? group[0].text : event.text;
    span.title = group.map(about).join('\\n');
    const doubt = Math.round(60 * Math.max(...group.map(token => 1 - Math.exp(token.logprob))));
    span.style.background = `color-mix(in srgb, var(--bad) ${doubt}%, transparent)`;
    answer.append(span);
  }
}

function clear() {
  for (const side of sides) {
    side.classList.remove('better');
    side.querySelector('.answer').textContent = '';
  }
  name([]);
  round = null; answers = ['', '']; better = 0;
  votes.forEach(button => { button.disabled = true; });
}

function add(role, content) {
  turns.push({ role, content });
  const turn = document.createElement('div');
  turn.className = 'turn ' + role;
  turn.textContent = content;
  $('turns').append(turn);
}

async function send() {
  const text = $('text').value.trim();
  if (!text || busy) return;
  busy = true; $('send').disabled = true; $('note').textContent = '';
  if (round) add('assistant', answers[better]);
  clear();
  add('user', text);
  $('text').value = '';
  try {
    const system = $('system').value.trim();
    const messages = [...(system ? [{ role: 'system', content: system }] : []), ...turns];
    const response = await post('/ask', { messages, models: [$('left').value, $('right').value],
      blind: $('blind').checked, probabilities: $('probs').checked });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.names) name(event.names);
      if (event.side !== undefined) {
        answers[event.side] += event.text;
        piece(sides[event.side], event);
        if (event.cut) $('note').textContent = 'An answer was cut at ' + SETUP.longest + ' tokens.';
      }
      if (event.round) {
        round = event.round;
        votes.forEach(button => { button.disabled = !event.can_vote; });
      }
    }
  } catch (error) {
    $('note').textContent = error.message;
    if (!round) { turns.pop(); $('turns').lastChild.remove(); $('text').value = text; }
  }
  busy = false; $('send').disabled = false;
}

async function vote(choice) {
  votes.forEach(button => { button.disabled = true; });
  try {
    const found = await (await post('/vote', { round, better: choice })).json();
    name(found.names);
    better = choice === 'second' ? 1 : 0;
    if (choice !== 'tie') sides[better].classList.add('better');
    $('note').textContent = found.votes + ' votes in ' + SETUP.file;
  } catch (error) { $('note').textContent = error.message; }
}

votes.forEach(button => button.addEventListener('click', () => vote(button.dataset.better)));
$('form').addEventListener('submit', event => { event.preventDefault(); send(); });
$('text').addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) send(); });
$('new').addEventListener('click', () => { turns = []; $('turns').textContent = ''; clear(); });
"""


def html(
    title: str, models: Sequence[str], *, token: str, file: str, system: str, longest: int,
    is_blind: bool,
) -> str:  # fmt: skip
    """Return the page. token: what its requests show; file: where votes go."""
    setup = {
        "models": list(models), "token": token, "file": file, "system": system, "longest": longest,
        "blind": is_blind,
    }  # fmt: skip
    script = f"const SETUP = {page.data(setup)};\n{SCRIPT}"
    return page.page(title, BODY, STYLE, script, policy=POLICY)
