"""`finetune show` shows what the batches of training hold: in the terminal, and as a page."""

import os
import pty
import re
import select
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import browse, require_narrow
from conftest import Workshop, forget_process_state, made_once, pairs, short, write_jsonl

from finetune import config as configs
from finetune import preflight, show
from finetune.__main__ import main
from finetune.data import xray
from finetune.engine.topology import Topology

CLM = {"objective__kind": "clm", "data__template": "auto"}
PADDED = {"model__attention": "sdpa"}
SETTINGS = {
    "plain": {},
    "packed": {"data__packing": True, "data__max_length": 200},
    "padded": PADDED,
    "padded by length": {**PADDED, "data__group_by_length": True},
    "held out": {"data__eval_fraction": 0.2},
    "fewer rows": {"data__max_rows": 10},
    "right": {"data__max_length": 60, "data__truncation": "right"},
    "left": {"data__max_length": 60, "data__truncation": "left"},
    "left, packed": {"data__max_length": 70, "data__truncation": "left", "data__packing": True},
    "dropped": {"data__max_length": 70, "data__truncation": "drop", "data__eval_fraction": 0.2},
    "split": {"data__max_length": 32, "data__truncation": "split", "objective__kind": "clm"},
    "weights": {},
    "last turn": {"data__loss_on": "last_turn"},
}


def made(workshop, **changes):
    """Return what a run would train on, and the view of it."""
    forget_process_state()
    config, _ = configs.parse(["--config", str(workshop.write(workshop.config(**changes)))])
    data = preflight.prepare(config, Topology(config.train.precision, check_only=True))
    return data, show.of_run(config, data)


def learned_in_an_epoch(batches, tokenizer):
    """Count (text, which tokens are labels, padding) of all documents of an epoch's batches."""
    found = Counter()
    for micro in (micro for step in batches.epoch() for micro in step):
        ids = micro.inputs["input_ids"].flatten()
        is_label = np.zeros(len(ids), bool)
        is_label[micro.positions + 1] = True
        assert (ids[is_label] == micro.labels).all()
        width = micro.inputs["input_ids"].shape[1] if batches.padded else 0
        for end, length in zip(micro.ends.tolist(), micro.lengths):
            part = slice(end + 1 - length, end + 1)
            text = tokenizer.decode(ids[part].tolist(), clean_up_tokenization_spaces=False)
            found[text, tuple(is_label[part].tolist()), max(0, width - length)] += 1
    return found


def mask(document):
    return tuple(
        span.kind == xray.SUPERVISED
        for span in document.spans
        if span.kind != xray.CUT
        for _ in range(span.num_tokens)
    )


def text(document, *kinds):
    return "".join(span.text for span in document.spans if not kinds or span.kind in kinds)


SEEN = (xray.SUPERVISED, xray.MASKED)


@pytest.mark.parametrize("name", short([*SETTINGS], "padded", "left, packed"))
def test_what_it_shows_is_what_the_batches_teach(workshop, name):
    changes = SETTINGS[name]
    if name == "weights":
        changes = {"data__weights": {str(workshop.rows): 1.5}}
    data, view = made(workshop, **changes)
    shown = Counter(
        (text(document, *SEEN), mask(document), document.padding)
        for item in view.items
        if item.fate == xray.TRAINED
        for document in view.show(item).documents
    )
    assert shown == learned_in_an_epoch(data.train, data.tokenizer)
    assert (
        sum(sum(mask) * count for (_, mask, _), count in shown.items())
        == (data.train.all_totals()["tokens"])
    )
    if "model__attention" in changes:
        assert any(padding for _, _, padding in shown)


@pytest.mark.parametrize(
    "name", short(["right", "left", "left, packed", "dropped", "fewer rows"], "left")
)
def test_rows_are_shown_whole_whatever_became_of_them(workshop, name):
    _, whole = made(workshop, data__max_length=200)
    rows = {each.row: each for item in whole.items for each in whole.show(item).documents}
    _, view = made(workshop, **SETTINGS[name])
    shown = {each.row: each for item in view.items for each in view.show(item).documents}
    assert {row: text(each) for row, each in shown.items()} == {
        row: text(each) for row, each in rows.items()
    }
    for each in shown.values():
        num_cut = sum(span.num_tokens for span in each.spans if span.kind == xray.CUT)
        if "data__truncation" in SETTINGS[name] and name != "dropped":
            assert each.num_tokens <= SETTINGS[name]["data__max_length"]
            counted = "1 token is" if num_cut == 1 else f"{num_cut} tokens are"
            side = SETTINGS[name]["data__truncation"]
            assert each.cut == (f"{counted} cut on the {side}" if num_cut else "")
    fates = view.counts()
    assert fates.total() == 40
    if name == "dropped":
        assert set(fates) == {"trained", "held out", "dropped"}
        assert fates["dropped"] == sum(each.num_tokens > 70 for each in rows.values())
    if name == "fewer rows":
        assert fates == {"trained": 10, "left out": 30}


def test_parts_of_a_split_row_say_so(workshop):
    _, view = made(workshop, **SETTINGS["split"])
    parts = [view.show(item).documents[0] for item in view.items_of(1)]
    assert [part.cut for part in parts] == [f"part {n} of {len(parts)} of its row" for n in (1, 2)]


def test_each_turn_of_a_row_is_shown_with_what_is_cut(workshop):
    texts = ("hi", "so " * 5, "and", "so " * 40)
    turns = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]
    rows = str(write_jsonl(workshop.folder / "turns.jsonl", [{"messages": turns}] * 3))
    data, view = made(
        workshop, data__train=rows, data__loss_on="each_turn", data__max_length=120,
        data__truncation="right", data__template="chatml",
    )  # fmt: skip
    first, second = (view.show(item).documents[0] for item in view.items_of(2))
    assert (first.cut, second.num_tokens) == ("", 120)
    assert second.cut.endswith("tokens are cut on the right")
    assert text(second).endswith(f"{texts[3]}<|im_end|>\n")
    shown = Counter(
        (text(d, *SEEN), mask(d), d.padding) for i in view.items for d in view.show(i).documents
    )
    assert shown == learned_in_an_epoch(data.train, data.tokenizer)


def test_weights_of_answers_are_shown(workshop):
    turns = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "b", "weight": 2},
    ]  # fmt: skip
    rows = [{"messages": turns}, {"messages": turns[2:]}, {"messages": [turns[0], turns[3]]}] * 3
    given = {"data__train": str(write_jsonl(workshop.folder / "turns.jsonl", rows))}
    _, view = made(workshop, **given, data__template="chatml")
    found = [view.show(view.items_of(row)[0]).documents[0].columns for row in (1, 2)]
    assert found == [{"least weight": 0.5, "largest weight": 2.0}, {"weight": 2.0}]


@pytest.mark.parametrize("name", ["phi-2", "phi-3-mini", "bytes"])
def test_decoded_runs_join_to_the_text(name, bytes_tokenizer, request):
    tokenizer = bytes_tokenizer
    if name != "bytes":
        from transformers import AutoTokenizer

        folder = request.getfixturevalue("real_data") / "tokenizers" / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
    sentence = "Ünïcode 日本 🙂🙂, two  spaces,\n\n\ttabs and don't."
    ids = np.array(tokenizer(sentence, add_special_tokens=False)["input_ids"])
    whole = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    random = np.random.default_rng(0)
    for count in (0, 1, 3, 9):
        cuts = sorted({0, len(ids), *random.integers(1, len(ids), count).tolist()})
        texts = xray.decoded(ids, cuts, tokenizer)
        # A cut inside a character shows a replacement character before it.
        assert "".join(texts).replace("\ufffd", "") == whole


def run(workshop, *words, **changes):
    forget_process_state()
    return main(["show", str(workshop.write(workshop.config(**changes))), *map(str, words)])


def test_without_a_terminal_brackets_mark_what_is_supervised(workshop, capsys):
    assert run(workshop, "--row", "3") == 0
    head, how, _, title, about, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("40 rows: 40 trained; 40 sequences with 2,814 tokens, 824 of them")
    assert "[[ ]]" in how
    assert re.fullmatch(r"=== step \d of the first epoch", title)
    assert about == f"--- row 3, {workshop.rows}:3, 54 tokens, 5 supervised"
    assert lines == [
        "  | ### Question:", "  | what is 2 times three", "  | ", "  | ### Answer:",
        "  | [[so 6<|eos|>]]",
    ]  # fmt: skip


def test_what_was_cut_stands_where_it_was(workshop, capsys):
    assert run(workshop, "--row", "rows.jsonl:3", "--data.max_length", "51",
               "--data.truncation", "right") == 0  # fmt: skip
    output = capsys.readouterr().out
    assert "51 tokens, 2 supervised, 3 tokens are cut on the right\n" in output
    assert output.endswith("  | [[so]]{cut:  6<|eos|>}\n")


def test_a_row_of_a_pack_is_shown_with_its_neighbours_named(workshop, capsys):
    assert run(workshop, "--row", "3", "--data.packing", "--data.max_length", "200") == 0
    output = capsys.readouterr().out
    [count] = re.findall(r"=== .* epoch, (\d) documents", output)
    abouts = re.findall(r"--- row (\d+), .* supervised", output)
    assert len(abouts) == int(count) > 1
    assert "3" in abouts
    assert output.count("### Question:") == 1
    assert "so 6" in output


def test_control_characters_of_rows_never_reach_the_terminal(workshop, capsys):
    write_jsonl(workshop.rows, [{"question": "a\x1b[2J\x9b", "answer": "b\x07"}] * 8)
    assert run(workshop, "--row", "1") == 0
    assert "  | a␛[2J\\x9b\n" in capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch):
    """Type into a terminal; return what `finetune show` writes there."""
    ours, theirs = pty.openpty()
    streams = os.fdopen(theirs, "r"), os.fdopen(os.dup(theirs), "w")

    def typed(keys, call):
        monkeypatch.setattr(sys, "stdin", streams[0])
        monkeypatch.setattr(sys, "stdout", streams[1])
        os.write(ours, keys.encode())
        assert call() == 0
        streams[1].flush()
        written = b""
        while select.select([ours], [], [], 0.2)[0]:
            written += os.read(ours, 1 << 16)
        return written.decode()

    yield typed
    for stream in streams:
        stream.close()
    os.close(ours)


@pytest.mark.parametrize("colour", short([True, False], True))
def test_a_terminal_shows_one_sequence_at_a_time(workshop, monkeypatch, terminal, colour):
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    written = terminal("\n7\nb\nx\nq\n", lambda: run(workshop))
    assert re.findall(r"--- row (\d+),", written) == ["1", "2", "7", "6", "6"]
    assert ("\x1b[" in written) == colour
    assert ("[[" in written) == (not colour)
    if colour:
        assert "\x1b[1;32m" + "so " * 7 + "3\x1b[0m\x1b[1;4;32m<|eos|>\x1b[0m" in written
    assert "neither b, q nor a row from 1 to 40" in written


WRONG = [
    (["--row", "41"], "--row 41: data.train has rows 1 to 40; give one of these numbers"),
    (["--row", "other.jsonl:1"], "--row other.jsonl:1: data.train has rows 1 to 40"),
    (["--html", "no/folder.html"], "--html: no/folder.html: its folder does not exist"),
    (["--html", "{rows}"], "exists, and this program did not write it, so it is not replaced"),
    (["--data.max_lenth", "7"], "max_length"),
]


@pytest.mark.parametrize(("words", "message"), short(WRONG, *WRONG[1:4]))
def test_wrong_arguments_are_named(workshop, capsys, words, message):
    words = [word.replace("{rows}", str(workshop.rows)) for word in words]
    before = workshop.rows.read_bytes()
    assert run(workshop, *words) == 2
    assert message in capsys.readouterr().err
    assert workshop.rows.read_bytes() == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a workshop with a run of one step."""
    folder = made_once(
        tmp_path_factory, "shown_run",
        lambda folder: Workshop(folder).train(train__max_steps=1, data__eval_fraction=0.1),
    )  # fmt: skip
    return Workshop(folder)


@pytest.mark.slow
def test_a_run_directory_shows_what_the_run_learned(finished, capsys):
    directory = str(finished.run_dir())
    assert main(["show", directory, "--row", "3"]) == 0
    assert "36 trained" in capsys.readouterr().out
    write_jsonl(finished.rows, pairs(41))
    try:
        forget_process_state()
        assert main(["show", directory]) == 2
        assert "the training data changed since the run" in capsys.readouterr().err
        forget_process_state()
        assert main(["show", directory, "--data.max_length", "100", "--row", "3"]) == 0
    finally:
        write_jsonl(finished.rows, pairs())


# ----------------------------------------------------------------------------------------- page


class Reader(HTMLParser):
    """Collect the marked text of each article."""

    def __init__(self):
        super().__init__()
        self.articles, self.names = [], []

    def handle_starttag(self, tag, attributes):
        if tag == "article":
            self.articles.append([])
        if tag in ("pre", "span"):
            self.names.append(dict(attributes).get("class") or "masked")

    def handle_endtag(self, tag):
        if tag in ("pre", "span"):
            self.names.pop()

    def handle_data(self, data):
        if self.names and self.articles:
            self.articles[-1].append((self.names[-1], data))


HARD = {"question": "<script>alert(1)&\x1b", "answer": "</pre><b>so</b>"}


@pytest.fixture
def written(workshop, capsys):
    """Return the page of rows that try to break out of it."""
    write_jsonl(workshop.rows, [*pairs(), HARD])
    path = workshop.folder / "rows.html"
    cut = ("--data.max_length", "60", "--data.truncation", "right")
    assert run(workshop, "--html", path, *cut) == 0
    assert capsys.readouterr().out == f"{path}: 41 sequences\n"
    assert run(workshop, "--html", path, *cut) == 0  # it may replace its own page
    return path


def test_a_page_holds_every_row_with_its_marks(written):
    reader = Reader()
    reader.feed(written.read_text())
    assert len(reader.articles) == 41
    question = "### Question:\nwhat is 2 times three\n\n### Answer:\n"
    marks = [("masked", question), ("supervised", "so 6"), ("supervised special", "<|eos|>")]
    assert reader.articles[2] == marks
    texts = ["".join(text for _, text in article) for article in reader.articles]
    assert HARD["question"].replace("\x1b", "␛") in texts[40]
    assert "</pre><b>so</b>" in texts[40]
    assert "<script>alert" not in written.read_text()
    assert not re.search(
        r"""<[^>]*(?:src|href)=["']?(?!data:|["'])|url\(|@import""", written.read_text()
    )


def test_a_page_has_at_most_as_many_sequences_as_asked_for(workshop, capsys):
    path = workshop.folder / "rows.html"
    assert run(workshop, "--html", path, "--most", "5") == 0
    assert capsys.readouterr().out == f"{path}: 5 of 40 sequences\n"
    assert path.read_text().count("<article") == 5


@pytest.mark.proof
def test_a_browser_searches_and_filters_the_page(written):
    script = """
      const typed = (name, value) => { form[name].value = value;
        form[name].dispatchEvent(new Event(name === "order" ? "change" : "input",
                                           {bubbles: true})); };
      const count = () => document.getElementById("count").textContent;
      const found = [count()];
      typed("words", "ROWS.JSONL:3,"); found.push(count());
      typed("words", "nowhere"); found.push(count());
      typed("words", ""); form.cut.click(); found.push(count());
      form.cut.click(); typed("order", "shortest");
      found.push(document.querySelector("article").dataset.tokens);
      document.title = found.join("; ");
    """
    seen = browse(written, script)
    num_cut = len(re.findall('data-cut="yes"', seen.dom))
    assert seen.title == f"41 of 41; 1 of 41; 0 of 41; {num_cut} of 41; 51"
    assert not seen.console
    broken = browse(written, "nothing.there()")
    assert broken.console  # an error would be seen


@pytest.mark.proof
def test_a_narrow_screen_shows_the_page_without_scrolling_sideways(written):
    require_narrow(written)
