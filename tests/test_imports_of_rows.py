"""Documents, FAQ pages, Slack exports and tickets become rows."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import read_jsonl, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.preparation.from_text import passages
from finetune.preparation.import_support import without_quotes


@pytest.fixture
def make(tmp_path, capsys):
    """Return the rows that a program makes of inputs; `make.err`: what it prints."""

    def make(program: str, *arguments: Any, code: int = 0) -> list[Any]:
        out = tmp_path / "made.jsonl"
        out.unlink(missing_ok=True)
        try:
            found = main(["data", program, *map(str, arguments), "--output", str(out)])
        except SystemExit as exc:
            found = exc.code
        make.err = capsys.readouterr().err
        assert found == code, make.err
        return read_jsonl(out) if out.exists() else []

    return make


def pairs(rows: list[Any]) -> list[tuple[str, str]]:
    return [(row["question"], row["answer"]) for row in rows]


# ------------------------------------------------------------------------------------ documents

MARKDOWN = """# Shop FAQ

Welcome.

## How do I **pay**?

By card.

### By invoice

For [companies](https://example.org) only.

## Opening hours

Nine to five.

**Can I return it?**
Within 30 days:

```
# not a heading?
Q: nor a question
```

Q: Do you ship abroad?
A: Yes.
To Europe.
Question 2: And to Mars?
## Empty?
"""
HTML = """<html><head><title>Help &amp; more</title><style>p{}</style></head><body>
<nav><p>Home?</p></nav><h1>FAQ</h1><h2>What is&nbsp;it?</h2><p>A <b>thing</b>.</p>
<ul><li>one</li><li><p>two</p></li></ul><dl><dt>Price</dt><dd>Free &lt;now&gt;</dd></dl>
<details><summary>Who?</summary><p>Us.</p></details><pre>a
  b</pre></body></html>"""
ENTITY = {
    "@type": "Question",
    "name": "Why?",
    "acceptedAnswer": {"text": "<p>Because&nbsp;so.</p>"},
}
SCHEMA = {"@type": "FAQPage", "mainEntity": [ENTITY]}


def test_questions_of_a_markdown_page(make, tmp_path):
    (tmp_path / "faq.md").write_text(MARKDOWN)
    rows = make("import_faq", tmp_path / "faq.md")
    code = "```\n# not a heading?\nQ: nor a question\n```"
    assert pairs(rows) == [
        ("How do I pay?", "By card.\n\nBy invoice\n\nFor [companies](https://example.org) only."),
        ("Can I return it?", f"Within 30 days:\n\n{code}"),
        ("Do you ship abroad?", "Yes.\nTo Europe."),
    ]
    assert "1 documents read" in make.err
    assert "2 dropped (question without an answer)" in make.err
    headings = make("import_faq", tmp_path / "faq.md", "--headings")
    assert ("Opening hours", "Nine to five.") in pairs(headings)


def test_questions_of_an_html_page(make, tmp_path):
    page = tmp_path / "faq.html"
    page.write_text(HTML)
    assert pairs(make("import_faq", page)) == [
        ("What is it?", "A thing .\n\n- one\n\ntwo"),
        ("Price", "Free <now>"),
        ("Who?", "Us.\n\na\n  b"),
    ]
    script = f'<script type="application/ld+json">{json.dumps(SCHEMA)}</script>'
    page.write_text(HTML.replace("</head>", script + "</head>"))
    assert pairs(make("import_faq", page)) == [("Why?", "Because so.")]


def test_sections_of_documents_become_questions(make, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("# Pumps\n\nAll about pumps and how they work.\n\n## Care\n\n"
                                 "Oil them every single week.\n\n### In winter\n\nKeep them warm "
                                 "and dry.\n\n## Short\n\nNo.\n")  # fmt: skip
    (folder / "b.html").write_text(HTML)
    (folder / "c.png").write_bytes(b"\x89PNG")
    rows = make("from_text", folder)
    assert pairs(rows)[:3] == [
        ("What does Pumps say about Pumps?", "All about pumps and how they work."),
        ("What does Pumps say about Care?", "Oil them every single week."),
        ("What does Pumps say about Care: In winter?", "Keep them warm and dry."),
    ]
    assert "2 documents read" in make.err
    assert "dropped (too short)" in make.err
    rows = make("from_text", folder / "a.md", "--question", "{heading}?", "--words", "4")
    assert pairs(rows) == []
    rows = make("from_text", folder / "a.md", "--words", "4", "--least-words", "1")
    assert rows[0]["question"] == "What does Pumps say about Pumps (1 of 2)?"
    rows = make("from_text", folder / "a.md", "--to", "text")
    assert rows[1] == {"text": "Oil them every single week.", "source": str(folder / "a.md")}
    make("from_text", folder, "--question", "What is {it}?", code=2)
    assert "should hold {heading}, {title} or both" in make.err


def pdf(text: str) -> bytes:
    """A PDF of one line, with a text layer."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    page = writer.add_blank_page(300, 300)
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
    kind, base = NameObject("/Type1"), NameObject("/Helvetica")
    font = DictionaryObject({
        NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): kind,
        NameObject("/BaseFont"): base,
    })  # fmt: skip
    fonts = DictionaryObject({NameObject("/F1"): font})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    page[NameObject("/Contents")] = writer._add_object(stream)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def test_the_text_of_a_pdf(make, tmp_path):
    (tmp_path / "a_guide.pdf").write_bytes(pdf("Turn the wheel to the left, then pull."))
    [row] = make("from_text", tmp_path / "a_guide.pdf")
    assert row["question"] == "What does a guide say about a guide?"
    assert row["answer"] == "Turn the wheel to the left, then pull."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF-1.4 no", "not a whole PDF"),
        ("a.pdf", pdf(""), "this PDF holds images of text"),
        ("a.md", b"ok\n\xe9t\xe9", "a.md:2: byte 0xe9 is not UTF-8"),
        ("a.docx", b"x", "unknown type '.docx'"),
    ],
)
def test_a_document_that_cannot_be_read_is_named(make, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    make("from_text", tmp_path / name, code=2)
    assert message in make.err
    make("import_faq", tmp_path / "missing.md", code=2)
    assert "no such file" in make.err


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.sampled_from([".md", ".html", ".pdf", ".txt"]))
def test_any_bytes_are_a_document_or_an_error(make, tmp_path, data, ending):
    path = tmp_path / f"x{ending}"
    path.write_bytes((b"%PDF-1.4\n" if ending == ".pdf" else b"# a?\n<dt>") + data)
    for program in ("from_text", "import_faq"):
        try:
            make(program, path)
        except AssertionError:
            assert f"error: {path}" in make.err
            assert "Traceback" not in make.err


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "b.", "c!", "\n\n", "d? "]), max_size=60), st.integers(1, 9))
def test_passages_keep_every_word_in_order(pieces, most):
    text = " ".join(pieces)
    made = list(passages(text, most))
    assert " ".join(made).split() == text.split()
    assert all(len(part.split()) <= most for part in made)


# ---------------------------------------------------------------------------------------- slack


def slack(user: str, text: str, ts: float, thread: float | None = None, **more: Any) -> Any:
    message = {"type": "message", "user": user, "text": text, "ts": f"{ts:.6f}", **more}
    return message | ({"thread_ts": f"{thread:.6f}"} if thread else {})


def export(folder: Path) -> Path:
    people = [{"id": "U1", "name": "ann"}, {"id": "U2", "name": "bob"}, {"id": "U3", "name": "cy"}]
    days = {
        "help/2026-01-30.json": [
            slack("U1", "How do I reset &lt;it&gt;, <@U2>?", 100, 100),
            slack("U2", "Press <https://x.org|the button>.", 101, 100),
            slack("U3", "Twice.", 102, 100),
            slack("U1", "Thanks <!here>", 103, 100),
            slack("U1", "no thread", 104),
            slack("U9", "joined", 105, subtype="channel_join"),
        ],
        "help/2026-01-31.json": [slack("U2", "It works now in <#C1|help>.", 106, 100)],
        "random/2026-01-30.json": [slack("U1", "hm", 100, 100), slack("U1", "hm?", 101, 100)],
    }
    with zipfile.ZipFile(folder / "export.zip", "w") as archive:
        archive.writestr("users.json", json.dumps(people))
        for name, messages in days.items():
            archive.writestr(name, json.dumps(messages))
    return folder / "export.zip"


def test_threads_of_slack_become_conversations(make, tmp_path):
    archive = export(tmp_path)
    [row] = make("import_slack", archive)
    assert row == {
        "messages": [
            {"role": "user", "content": "How do I reset <it>, [USER_1]?"},
            {"role": "assistant", "content": "Press the button (https://x.org).\n\nTwice."},
            {"role": "user", "content": "Thanks @here"},
            {"role": "assistant", "content": "It works now in #help."},
        ],
        "channel": "help", "date": "1970-01-01",
    }  # fmt: skip
    for reason in ("outside a thread", "thread without an answer", "of a bot or of Slack"):
        assert f"1 dropped ({reason}" in make.err.replace("message ", "")
    [row] = make("import_slack", archive, "--answerers", "cy", "--names", "--channels", "help")
    assert [turn["content"] for turn in row["messages"]] == [
        "How do I reset <it>, @bob?\n\nPress the button (https://x.org).", "Twice.",
    ]  # fmt: skip
    with zipfile.ZipFile(archive) as whole:
        whole.extractall(tmp_path / "unpacked")
    assert len(make("import_slack", tmp_path / "unpacked")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["export.zip", "--answerers", "dan"], "'dan' is not in the export, which has ann, bob"),
        (["export.zip", "--channels", "x"], "'x' is not in the export, which has help, random"),
        (["bad.zip"], "not a whole .zip of a Slack export"),
        (["missing.zip"], "no such file"),
        (["empty"], "holds no channels"),
        (["broken"], "broken/help/2026-01-30.json: broken JSON"),
    ],
)
def test_an_export_that_cannot_be_read_is_named(make, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    export(tmp_path)
    Path("bad.zip").write_bytes(b"PK\x03\x04no")
    Path("empty").mkdir()
    Path("broken/help").mkdir(parents=True)
    Path("broken/help/2026-01-30.json").write_text("[{")
    make("import_slack", *options, code=2)
    assert message in make.err


# -------------------------------------------------------------------------------------- support


def test_tickets_of_a_table_become_conversations(make, tmp_path):
    table = tmp_path / "tickets.csv"
    table.write_text(
        "ticket_id,author_role,body,created_at\n"
        '7,customer,"It broke.\n\nOn Monday, you <a@b.org> wrote:\n> old",2026-01-02\n'
        '7,Agent,"Hello,\nrestart it.\n-- \nAnn\nSupport",2026-01-03\n'
        "8,customer,Anyone?,2026-01-02\n"
        "7,customer,Thanks,2026-01-04\n"
        "7,customer,Still no.,2026-01-01\n"
    )
    [row] = make("import_support", table)
    assert row == {
        "messages": [
            {"role": "user", "content": "Still no.\n\nIt broke."},
            {"role": "assistant", "content": "Hello,\nrestart it."},
        ],
        "ticket": "7",
    }
    assert "1 dropped (ticket without question and answer)" in make.err
    make("import_support", table, "--agents", "boss", code=2)
    assert "no message is of an agent; authors are customer, agent" in make.err
    make("import_support", table, "--text", "words", code=2)
    assert "no column for the text" in make.err


def test_tickets_with_comments_become_conversations(make, tmp_path):
    comments = [
        {"author": {"role": "end-user"}, "body": "<p>Where is <b>it</b>?</p>"},
        {"author": {"role": "agent"}, "body": "There."},
    ]
    source = write_jsonl(tmp_path / "tickets.jsonl", [{"id": 3, "comments": comments}])
    [row] = make("import_support", source)
    assert row["ticket"] == 3
    assert [turn["content"] for turn in row["messages"]] == ["Where is it?", "There."]


@pytest.mark.parametrize(
    ("mail", "kept"),
    [
        ("Yes.\n\n-----Original Message-----\nFrom: x", "Yes."),
        ("Yes.\nSent from my phone", "Yes."),
        ("> old\nYes.\n> more\n", "Yes."),
        ("On time, he wrote: a letter.", "On time, he wrote: a letter."),
        ("a -- b", "a -- b"),
    ],
)
def test_quotes_and_signatures_are_cut_off(mail, kept):
    assert without_quotes(mail) == kept
