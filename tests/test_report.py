"""`finetune data report`: the card of a set of rows says what is in them, whatever they hold."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
import yaml
from browser import browse, require_narrow
from conftest import Workshop, forget_process_state, pairs, write_jsonl

from finetune import config as configs
from finetune import preflight
from finetune.__main__ import main
from finetune.engine.topology import Topology
from finetune.preparation import lengths, survey


def story(number, length=40):
    source = random.Random(number)
    return " ".join(f"w{source.randrange(3_000)}" for _ in range(length))


def row(number, **more):
    return {"question": f"what about {story(number, 8)}", "answer": story(number), **more}


HOSTILE = "<script>alert(1)</script> | `x` **b** \x1b[2J"
UNIQUE = [row(number, generated=number % 4 == 0) for number in range(24)]
PLANTED = [
    *UNIQUE,
    *UNIQUE[:3], UNIQUE[2],  # exact duplicates: clusters of 2, 2, 3
    {**UNIQUE[5], "answer": UNIQUE[5]["answer"] + " end"},  # nearly the same, and another answer
    {**UNIQUE[6], "answer": story(906)},  # another answer
    row(900, generated=True), row(901, generated=True),  # these are evaluation rows
    {"question": "write to ann@example.org", "answer": f"{story(902)} ann@example.org"},
    {"question": HOSTILE, "answer": HOSTILE}, {"question": HOSTILE, "answer": HOSTILE},
]  # fmt: skip


class Card:
    """What one run of the program wrote."""

    def __init__(self, folder):
        self.page = folder / "report.html"
        self.text = (folder / "README.md").read_text()
        self.croissant = json.loads((folder / "croissant.json").read_text())
        self.numbers = json.loads((folder / "counts.json").read_text())
        _, front, self.body = self.text.split("---\n", 2)
        self.front = yaml.safe_load(front)

    def section(self, title):
        return self.body.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def make(tmp_path, capsys):
    """Run the program; return its card."""

    def run(rows, *words, code=0, workers=1):
        forget_process_state()
        source = rows if isinstance(rows, str) else str(write_jsonl(tmp_path / "in.jsonl", rows))
        folder = tmp_path / "card"
        arguments = [source, "--output", folder, "--counts", folder / "counts.json"]
        done = main(["data", "report", *map(str, [*arguments, "--workers", workers, *words])])
        run.stderr = capsys.readouterr().err
        assert done == code, run.stderr
        return Card(folder) if not code else None

    return run


def test_a_card_counts_what_was_planted(make, tmp_path):
    against = write_jsonl(tmp_path / "eval.jsonl", [row(900), row(901), row(950)])
    card = make(PLANTED, "--against", against)
    found = card.numbers
    assert found["rows"] == len(PLANTED)
    assert found["exact_duplicates"] == 5
    assert found["near_duplicates"] == 6
    assert found["largest_clusters"] == [3, 2, 2, 2, 2]
    assert found["questions_with_several_answers"] == 2
    assert found["overlaps"] == {"the same text": 2}
    assert found["personal"] == {"email": 1}
    assert found["origins"]["not said"] == 3
    assert found["origins"]["generated"] == 9
    assert found["patterns"] == {"answer, question": len(PLANTED)}
    assert sum(found["languages"].values()) == len(PLANTED)
    assert "in.jsonl:3" in card.section("Duplicates")
    assert "in.jsonl:31" in card.section("Overlap with evaluation rows")
    assert "eval.jsonl:1" in card.section("Overlap with evaluation rows")
    assert "in.jsonl:33" in card.section("Personal data")
    assert "ann@example.org" not in card.text + card.page.read_text()
    advice = card.section("What to do")
    for program in ("dedup", "decontaminate", "scrub"):
        assert f"finetune data {program}" in advice
    assert "--licence" in advice
    assert "--source" in advice


def test_rows_cannot_break_the_card(make):
    card = make(PLANTED)
    duplicates = card.section("Duplicates")
    assert "&lt;script>alert(1)&lt;/script> \\| 'x' \\*\\*b\\*\\* ␛[2J" in duplicates
    tables = [line for line in duplicates.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {4}
    written = card.page.read_text()
    assert "<script>" not in written
    assert "&lt;script&gt;alert(1)" in written
    assert "\x1b" not in written + card.text


def test_distinct_n_is_that_of_a_count_by_hand():
    from finetune.data.places import Place, Row

    texts = ["a b a b", "a b c", "c"]
    rows = [
        Row(Place("x", n), {"question": "q", "answer": text}) for n, text in enumerate(texts, 1)
    ]
    found = survey.of_rows(rows, [], 1)
    assert found.distinct(1) == 3 / 8
    assert found.distinct(2) == 3 / 5  # ab ba ab | ab bc
    assert found.distinct(3) == 1  # aba bab | abc
    assert found.distinct(2, [1]) == 1
    assert found.distinct(2, [2]) is None


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "user assistant"),
        (
            {"conversations": [{"from": "system"}, *([{"from": "human"}, {"from": "gpt"}] * 3)]},
            "system (human gpt) x 3",
        ),
        ({"messages": [{"role": "user"}, {"role": "user"}, {}]}, "user user ?"),
        ({"text": "a", "id": 7}, "text"),
    ],
)
def test_patterns_of_roles(values, pattern):
    assert survey.pattern(values) == pattern


def test_the_hub_and_croissant_get_the_same_facts(make, tmp_path):
    card = make(UNIQUE, "--licence", "mit", "--source", "https://example.org/a", "--name", "My set")
    assert card.front["license"] == "mit"
    assert card.front["pretty_name"] == "My set"
    assert card.front["size_categories"] == ["n<1K"]
    [files] = card.front["configs"]
    assert files["data_files"] == [{"split": "train", "path": ["in.jsonl"]}]
    described = card.croissant
    [file] = described["distribution"]
    content = (tmp_path / "in.jsonl").read_bytes()
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert file["contentSize"] == f"{len(content)} B"
    assert described["license"] == "mit"
    assert described["url"] == "https://example.org/a"
    [rows] = described["recordSet"]
    types = {each["name"]: each["dataType"] for each in rows["field"]}
    assert types == {"answer": "sc:Text", "question": "sc:Text", "generated": "sc:Boolean"}
    for each in rows["field"]:
        assert each["source"]["fileObject"]["@id"] == file["@id"]
        assert each["source"]["extract"] == {"column": each["name"]}


def test_earlier_steps_are_told_with_examples(make, tmp_path):
    counts = tmp_path / "dedup.json"
    source = write_jsonl(tmp_path / "all.jsonl", PLANTED)
    words = ["--output", tmp_path / "once.jsonl", "--counts", counts, "--workers", "1"]
    assert main(["data", "dedup", str(source), *map(str, words)]) == 0
    card = make(str(tmp_path / "once.jsonl"), "--steps", counts)
    steps = card.section("What earlier steps did")
    kept = len(PLANTED) - 6
    assert f"| dedup | {len(PLANTED)} | {kept} | 5 exact duplicate; 1 near-duplicate |" in steps
    assert "all.jsonl:25" in steps
    assert "a step is missing" not in card.body
    again = make(UNIQUE, "--steps", counts, "--force")
    assert f"wrote {kept} rows, but these are 24: a step is missing" in again.body


@pytest.mark.proof
def test_output_is_the_same_at_any_number_of_workers(make):
    many = [row(number) for number in range(2_500)]
    one = make(many)
    other = make(many, "--force", workers=2)
    assert one.text == other.text
    assert one.numbers == other.numbers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "{rows}"], "in.jsonl is damaged: it is not JSON; give files that programs"),
        (["--steps", "{folder}/none.json"], "none.json is missing"),
        (["--origin", "author"], "--origin: no row has a column 'author'"),
        (["--against", "{folder}/none.jsonl"], "none.jsonl: no such file"),
        (["--config", "{folder}/none.yaml"], "none.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(make, tmp_path, words, message):
    filled = [w.format(rows=tmp_path / "in.jsonl", folder=tmp_path) for w in words]
    make(UNIQUE, *filled, code=2)
    assert message in make.stderr
    assert not list((tmp_path / "card").glob("*"))


def test_files_that_exist_stay(make, tmp_path):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("mine")
    make(UNIQUE, code=2)
    assert "README.md exists; choose another name, or add --force" in make.stderr
    assert [path.name for path in (tmp_path / "card").iterdir()] == ["README.md"]


# -------------------------------------------------------------------------------------- tokens


def test_tokens_are_those_of_training(make, tmp_path):
    workshop = Workshop(tmp_path)
    path = workshop.write(workshop.config(data__eval_fraction=0.1))
    card = make(pairs(), "--config", path)
    config = configs.parse(["--config", str(path), "--data.eval_fraction", "0"])[0]
    forget_process_state()
    data = preflight.prepare(config, Topology(config.train.precision, check_only=True))
    examples = data.train.sequences.examples
    found = card.numbers["tokens"]
    assert found["sum"] == examples.lengths.sum() == 2_814
    assert found["supervised_share"] == examples.num_supervised_tokens / examples.lengths.sum()
    assert found["over_max_length"] == 0
    assert "Template question_answer; 29.3% of the tokens are supervised." in card.body


def test_rows_over_max_length_are_measured_whole(make, tmp_path):
    workshop = Workshop(tmp_path)
    card = make(pairs(), "--config", workshop.write(workshop.config(data__max_length=60)))
    assert card.numbers["tokens"]["sum"] == 2_814
    over = card.numbers["tokens"]["over_max_length"]
    assert over > 0
    assert f"{over} rows are longer than data.max_length 60 tokens; with 128" in card.body


def brute(tokens, limit):
    """Count what a limit cuts, token by token."""
    lost = answers = supervised = 0
    for number in range(len(tokens.rows)):
        part = tokens.rows.input.span(number)
        marks = tokens.rows.supervised[part]
        lost += len(marks[limit:])
        answers += int(marks[limit:].sum())
        supervised += int(marks.sum())
    return lost / tokens.lengths.sum(), answers / supervised


def test_what_each_limit_cuts_is_counted_right(tmp_path):
    workshop = Workshop(tmp_path)
    path = workshop.write(workshop.config(data__max_length=60, train__micro_batch_size=4))
    tokens = lengths.by_config(str(path), [str(workshop.rows)])
    limits = tokens.limits()
    assert {60, tokens.advised()} <= set(limits)
    assert limits == sorted(limits)
    for limit in [*limits, 1, 55, 1_000]:
        over, lost, answers = tokens.cut(limit)
        assert over == (tokens.lengths > limit).sum()
        assert (lost, answers) == pytest.approx(brute(tokens, limit))
    advised = tokens.advised()
    assert advised % 64 == 0
    assert (tokens.lengths > advised).mean() <= 0.005
    assert (tokens.lengths > advised - 64).mean() > 0.005
    num_packs, full = tokens.packed(128)
    assert full == pytest.approx(tokens.lengths.sum() / (num_packs * 128))
    assert 0 < tokens.padded(True) < tokens.padded(False) < 1
    chosen = np.minimum(tokens.lengths, 60)
    assert tokens.padded(False) <= 1 - chosen.min() / chosen.max()


@pytest.mark.proof
def test_a_browser_opens_the_page_without_errors(make, tmp_path):
    workshop = Workshop(tmp_path)
    card = make(PLANTED, "--config", workshop.write(workshop.config(data__max_length=200)))
    seen = browse(card.page, "document.title = document.querySelectorAll('svg').length")
    assert not seen.console
    assert int(seen.title) >= 2
    require_narrow(card.page)
