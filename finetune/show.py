"""`finetune show`: rows as the model will see them, in the terminal or as a page."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune import config as configs
from finetune import files, page, preflight, replay
from finetune.config import Config, paths
from finetune.data import examples
from finetune.data.xray import (
    CUT,
    MASKED,
    SUPERVISED,
    TRAINED,
    Item,
    ShownDocument,
    ShownSequence,
    Span,
    Xray,
)
from finetune.engine.rundir import RunDirectory
from finetune.engine.topology import Topology
from finetune.errors import ConfigError, DataError, RunDirectoryError
from finetune.opening import as_base_is
from finetune.preflight import Data

NO_LIMIT = 1 << 30  # tokens; no row is cut
MOST = 1_000  # sequences of a page: about 10 MB for 2,000 tokens each
# What must be the same for a run directory: else other tokens would be shown than it learned.
SHOWN = ("training data", "tokenizer", "template", "date in the template")

# Of (kind, whether special): how terminals show it. 1 bold, 2 faint, 4 underlined, 9 struck.
COLOURS = {
    (SUPERVISED, False): "1;32", (SUPERVISED, True): "1;4;32", (MASKED, False): "",
    (MASKED, True): "4;35", (CUT, False): "9;31", (CUT, True): "9;31",
}  # fmt: skip
FAINT = "2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.usage = "%(prog)s CONFIG|RUN [options] [--section.field VALUE ...]"
    what = "run config, or run directory; the path alone will do as well"
    add("--config", metavar="FILE", type=paths.argument, help=what)
    what = "show this row of data.train: its number, or its place as messages write it, file:line"
    add("--row", metavar="N|FILE:LINE", help=what)
    what = "write a page that a browser can search and filter, in place of the terminal"
    add("--html", metavar="FILE", type=paths.argument, help=what)
    what = "sequences of the page; of more, as many are taken at even distances"
    add("--most", metavar="N", type=_at_least_one, default=MOST, help=what)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number from 1, got {text!r}")
    return int(text)


def main(arguments: argparse.Namespace) -> None:
    """Read and tokenise the rows as training does, and show them."""
    if arguments.html:
        page.require_writable(Path(arguments.html), "--html")
    config, run = _config(arguments)
    if config.data.streaming:
        raise ConfigError(
            "data.streaming: show reads all rows into memory; draw some into a file (finetune data "
            "sample), and add --data.train FILE --data.streaming false"
        )
    topology = Topology(config.train.precision, check_only=True)
    data = preflight.prepare(config, topology, RunDirectory(config, True).template_date())
    if run and not arguments.settings:
        _require_same(run, data)
    xray = of_run(config, data)
    row = None if arguments.row is None else _row(arguments.row, xray)
    chosen = xray.items if row is None else xray.items_of(row)
    if arguments.html:
        chosen = _spread(chosen, arguments.most)
        page.write(Path(arguments.html), _page(config, data, xray, chosen), "--html")
        of = f" of {len(xray.items):,}" if len(chosen) < len(xray.items) else ""
        print(f"{arguments.html}: {len(chosen):,}{of} sequences")
        return
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n".join(_head(xray, data, colours)))
    if row is None and sys.stdin.isatty() and sys.stdout.isatty():
        _leaf(xray, colours)
        return
    for item in chosen:
        print("\n".join(_lines(xray.show(item), colours, row)), flush=True)


def _config(arguments: argparse.Namespace) -> tuple[Config, Path | None]:
    """Return the config, and the run directory if that was named."""
    settings = arguments.settings
    named = [arguments.config] if arguments.config else settings[:1]
    run = None
    if named and not named[0].startswith("-") and os.path.isdir(named[0]):
        run, settings = Path(named[0]), settings if arguments.config else settings[1:]
        arguments.settings = settings
        saved = run / "config.yaml"
        values, (receipt, _) = configs.read_resolved(saved), files.read_note(run / "receipt.json")
        replay.require_own_code(run, configs.flatten(values), receipt)
        config = configs.parse(["--config", str(saved), *settings])[0]
    else:
        given = ["--config", arguments.config] if arguments.config else []
        config = configs.parse([*given, *settings])[0]
    if config.train.micro_batch_size == "auto":  # decides only how much padding there is
        config = config.changed("train", micro_batch_size=1)
    return as_base_is(config), run


def _require_same(run: Path, data: Data) -> None:
    """Raise RunDirectoryError if rows, tokenizer or template are not those of the run."""
    known = files.read_note(run / "receipt.json")[0].get("identity") or {}
    if other := [name for name in SHOWN if name in known and known[name] != data.identity[name]]:
        raise RunDirectoryError(
            f"{run}: the {' and the '.join(other)} changed since the run, so this would show other "
            "tokens than it learned; put them back, or show the config that you train next"
        )


def of_run(config: Config, data: Data) -> Xray:
    """Return the view of everything that a run makes of data.train."""
    train, wanted = data.train.in_memory.examples, config.data
    whole = None
    leaves_out = wanted.max_rows is not None or wanted.weights or wanted.token_budgets
    if train.num_truncated or train.num_dropped or leaves_out:
        options = replace(data.options, max_length=NO_LIMIT, truncation="error", positions=None)
        whole = examples.prepare(
            data.sources.train, data.template, data.tokenizer, options, config.cache_dir
        )
    held_out = data.eval if wanted.eval_fraction else None
    return Xray(data.train, held_out, whole, data.tokenizer, wanted.max_length, wanted.truncation)


def _row(text: str, xray: Xray) -> int:
    """Return the number of the row that --row names. Raise DataError if there is none."""
    if text.isdecimal() and 1 <= int(text) <= xray.num_rows:
        return int(text)
    if not text.isdecimal() and (row := xray.row_at(text)):
        return row
    raise DataError(
        f"--row {text}: data.train has rows 1 to {xray.num_rows:,}; give one of these numbers, or "
        "a place as messages write it, such as "
        f"{xray.show(xray.items[0]).documents[0].place}"
    )


def _spread(items: list[Item], most: int) -> list[Item]:
    """Return at most `most` of the items, at even distances."""
    if len(items) <= most:
        return items
    return [items[number] for number in np.linspace(0, len(items) - 1, most).astype(int)]


# ------------------------------------------------------------------------------------- terminal


def _coloured(text: str, colour: str, colours: bool) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colours and colour and text else text


def _head(xray: Xray, data: Data, colours: bool) -> Iterator[str]:
    """Say what is shown, and how."""
    yield _sums(xray, data)
    if not colours:
        yield "what is supervised stands in [[ ]], what is cut off in {cut: }"
        return
    kinds = {
        "supervised": (SUPERVISED, False), "not supervised": (MASKED, False),
        "special token": (MASKED, True), "cut off": (CUT, False),
    }  # fmt: skip
    yield "   ".join(_coloured(name, COLOURS[kind], colours) for name, kind in kinds.items())


def _sums(xray: Xray, data: Data) -> str:
    """Count rows, sequences and tokens in one line."""
    train = data.train.in_memory
    fates = ", ".join(f"{count:,} {fate}" for fate, count in xray.counts().items())
    num_tokens, supervised = int(train.lengths.sum()), train.examples.num_supervised_tokens
    return (
        f"{xray.num_rows:,} rows: {fates}; {len(train):,} sequences with {num_tokens:,} tokens, "
        f"{supervised:,} of them supervised ({supervised / num_tokens:.1%})"
    )


def _title(shown: ShownSequence) -> str:
    """Say when the model gets a sequence, and of what it consists."""
    parts = [] if shown.fate == TRAINED else [shown.fate]
    if shown.step is not None:
        parts.append(f"step {shown.step} of the first epoch")
    if len(shown.documents) > 1:
        num_tokens = sum(document.num_tokens for document in shown.documents)
        parts.append(f"{len(shown.documents)} documents, {num_tokens:,} tokens")
    return ", ".join(parts)


def _about(document: ShownDocument) -> str:
    """Say where a document comes from, and what becomes of its tokens."""
    parts = [f"row {document.row}", document.place, f"{document.num_tokens:,} tokens"]
    if any(span.kind != CUT for span in document.spans):
        parts.append(f"{document.num_supervised:,} supervised")
    parts += [document.cut] if document.cut else []
    parts += [f"{name} {value:g}" for name, value in document.columns.items()]
    if document.padding:
        parts.append(f"{document.padding:,} tokens of padding, never trained")
    return ", ".join(parts)


def _lines(shown: ShownSequence, colours: bool, row: int | None = None) -> Iterator[str]:
    """Render a sequence for a terminal. `row`: in a pack, show the text of this row alone."""
    yield ""
    yield _coloured(f"=== {_title(shown)}", "1", colours)
    for document in shown.documents:
        yield _coloured(f"--- {_about(document)}", FAINT, colours)
        if row is None or document.row == row:
            text = "".join(_marked(document.spans, colours))
            yield from (f"  | {line}" for line in text.split("\n"))


def _marked(spans: Iterable[Span], colours: bool) -> Iterator[str]:
    """Mark the fates: by colours, or by [[ ]] around what is supervised, special or not."""
    last = None
    closing = {SUPERVISED: "]]", CUT: "}"}
    for span in spans:
        text = page.plain(span.text)
        if colours:
            colour = COLOURS[span.kind, span.is_special]
            yield "\n".join(_coloured(line, colour, True) for line in text.split("\n"))
        else:
            if span.kind != last:
                yield closing.get(last or "", "")
                yield {SUPERVISED: "[[", CUT: "{cut: "}.get(span.kind, "")
            yield text
        last = span.kind
    yield "" if colours else closing.get(last or "", "")


def _leaf(xray: Xray, colours: bool) -> None:
    """Show one sequence at a time, and ask which comes next."""
    number = 0
    while True:
        item = xray.items[number]
        print("\n".join(_lines(xray.show(item), colours)))
        asked = f"{number + 1} of {len(xray.items)}: Enter next, b back, N that row, q end > "
        try:
            answer = input(_coloured(asked, FAINT, colours)).strip().lower()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if answer in ("q", "quit"):
            return
        if answer in ("", "n"):
            if number + 1 == len(xray.items):
                return
            number += 1
        elif answer == "b":
            number = max(0, number - 1)
        elif answer.isdecimal() and 1 <= int(answer) <= xray.num_rows:
            number = xray.items.index(xray.items_of(int(answer))[0])
        else:
            print(f"{page.plain(answer)!r} is neither b, q nor a row from 1 to {xray.num_rows}")


# ----------------------------------------------------------------------------------------- page

STYLE = """
.supervised { color: var(--good); background: var(--goodback); }
.cut { color: var(--bad); background: var(--badback); text-decoration: line-through; }
.special { color: var(--special); border-bottom: 1px dotted; }
article { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; padding: 0 1rem;
  content-visibility: auto; contain-intrinsic-size: auto 200px; }
article > div + div { border-top: 2px dashed var(--plot); }
form { position: sticky; top: 0; background: var(--paper); padding: 0.5rem 0; display: flex;
  flex-wrap: wrap; gap: 0.5rem; align-items: center; z-index: 1; }
"""
SCRIPT = """
const all = [...document.querySelectorAll("article")].map(node => ({
  node, text: node.textContent.toLowerCase(), fate: node.dataset.fate, cut: node.dataset.cut,
  tokens: +node.dataset.tokens, share: +node.dataset.share }));
const form = document.forms[0], list = document.getElementById("list");
const orders = { rows: () => 0, longest: (a, b) => b.tokens - a.tokens,
  shortest: (a, b) => a.tokens - b.tokens, most: (a, b) => b.share - a.share,
  least: (a, b) => a.share - b.share };
function update() {
  const words = form.words.value.toLowerCase(), fate = form.fate.value;
  let count = 0;
  for (const each of all) {
    const isShown = each.text.includes(words) && (!fate || each.fate === fate)
      && (!form.cut.checked || each.cut === "yes");
    each.node.hidden = !isShown;
    count += isShown ? 1 : 0;
  }
  document.getElementById("count").textContent = `${count} of ${all.length}`;
}
form.order.addEventListener("change", () =>
  list.append(...[...all].sort(orders[form.order.value]).map(each => each.node)));
form.addEventListener("input", update);
form.addEventListener("submit", event => event.preventDefault());
update();
"""


def _page(config: Config, data: Data, xray: Xray, items: list[Item]) -> str:
    """Return the page of these sequences."""
    fates = "".join(f"<option>{page.text(fate)}</option>" for fate in xray.counts())
    shown = f"{len(items):,} shown: sequences, and rows that are in none"
    if len(items) < len(xray.items):
        shown += f", at even distances, of {len(xray.items):,}"
    form = (
        '<form><input type="search" name="words" placeholder="search text, file:line">'
        f'<select name="fate"><option value="">all rows</option>{fates}</select>'
        '<select name="order"><option value="rows">in order of rows</option>'
        '<option value="longest">longest first</option><option value="shortest">shortest first'
        '</option><option value="most">most supervised first</option>'
        '<option value="least">least supervised first</option></select>'
        '<label><input type="checkbox" name="cut"> cut or split</label>'
        '<span id="count" class="soft"></span></form>'
    )
    lengths = data.train.in_memory.examples.lengths.tolist()
    body = [
        f"<p>{page.text(_sums(xray, data))}</p><p class=soft>{shown}; template "
        f"{page.text(data.template.name)}, data.max_length {config.data.max_length}</p>",
        page.histogram(lengths, "tokens of an example", {"max_length": config.data.max_length}),
        '<p><span class="supervised">supervised</span> &nbsp; not supervised &nbsp; '
        '<span class="special">special token</span> &nbsp; <span class="cut">cut off</span> '
        "&nbsp; <span class=soft>a dashed line: the border between two documents, which attention "
        "never crosses</span></p>",
        form,
        '<main id="list">',
        *(_article(xray.show(item)) for item in items),
        "</main>",
    ]
    return page.page(f"What {config.run.name} learns", "\n".join(body), STYLE, SCRIPT)


def _article(shown: ShownSequence) -> str:
    """Render a sequence for the page."""
    num_tokens = sum(document.num_tokens for document in shown.documents)
    share = sum(document.num_supervised for document in shown.documents) / num_tokens
    cut = "yes" if any(document.cut for document in shown.documents) else ""
    documents = (
        f"<div><small>{page.text(_about(document))}</small>"
        f"<pre>{''.join(map(_span, document.spans))}</pre></div>"
        for document in shown.documents
    )
    title = f"<small><b>{page.text(_title(shown))}</b></small>"
    return (
        f'<article data-fate="{shown.fate}" data-cut="{cut}" data-tokens="{num_tokens}" '
        f'data-share="{share:.4f}">{title}{"".join(documents)}</article>'
    )


def _span(span: Span) -> str:
    names = [] if span.kind == MASKED else [span.kind]
    names += ["special"] if span.is_special else []
    text = page.text(span.text)
    return f'<span class="{" ".join(names)}">{text}</span>' if names else text
