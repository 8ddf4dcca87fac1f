"""report.html, report.md and results.json: what they say, and what a browser makes of them."""

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from browser import browse, require_narrow
from conftest import ROOT, Workshop, write_jsonl
from made_results import Asked, Rule, results

from finetune import page
from finetune.__main__ import main
from finetune.errors import RunDirectoryError, ScoreTooLow, UserError
from finetune.evaluation import (
    analysis,
    benchmark_options,
    compare_runs,
    corpus,
    error_types,
    report,
    report_files,
    results_file,
    run_facts,
    scores,
    table,
    verdict,
)
from finetune.evaluation.measures import Measure
from finetune.evaluation.results_file import read, write
from finetune.evaluation.trained_run import TrainedRun

HOSTILE = "</script><script>alert(1)</script> | `x` **b** \x1b[2J \x7f \x85 \ud800"


def analysed(made, **more):
    return analysis.of_results(made, verdict.of(made), analysis.decides_of(made), **more)


def some(count=60, right=lambda number: number % 3 > 0, **more):
    """Rows of which the tuned model gets two thirds right, and the base a few."""
    rows = []
    for number in range(count):
        wanted = f"the answer number {number}"
        tuned = wanted if right(number) else f"an answer number {number}"
        base = wanted if number % 10 == 0 else HOSTILE
        fields = {"kind": "even" if number % 2 == 0 else "odd", "question": f"what is {number}"}
        rows.append(
            Asked(f"what is {number}", wanted, tuned, base, fields=fields, system="Be kind.")
        )
    lengths = {name: [float(n % 7) for n in range(count)] for name in ("base", "tuned")}
    lengths["tuned"][0] = None
    given = {"length": lengths}
    return results(rows, scores=given, scorers={"length": Rule("length", None, False)}, **more)


# ------------------------------------------------------------------------------------ results.json


def test_the_file_holds_what_was_found_and_reads_back(tmp_path):
    found = analysed(some(settings={"data": "test.jsonl", "odd \ud800": float("nan")}))
    write(tmp_path / "results.json", found)
    assert read(tmp_path / "results.json") == found
    values = json.loads((tmp_path / "results.json").read_text())
    match = values["scores"][0]
    assert match["means"]["tuned"]["mean"] == pytest.approx(40 / 60)
    assert match["means"]["base"]["rows"] == 60
    change = match["changes"]["tuned"]
    assert change["mean"] == pytest.approx(34 / 60)
    assert change["low"] < change["mean"] < change["high"]
    assert change["p_holm"] == change["p"] < 0.001
    assert values["scores"][1]["missing"] == {"tuned": {"not there": 1}}
    assert values["models"]["tuned"] == {
        "answers": 60, "cut": 0, "failed": 0, "tokens": 120, "seconds": 30.0,
    }  # fmt: skip
    row = values["rows"][0]
    assert row["fields"] == {"kind": "even"}  # not the question again
    assert [message["role"] for message in row["messages"]] == ["system", "user"]
    assert row["failed"] is True


def test_labels_corpus_scores_and_benchmarks_are_in_the_file_and_the_report():
    rows = [
        Asked(f"what is {n}", ("red", "blue")[n % 2], "red" if n < 30 else "blue", "no")
        for n in range(60)
    ]
    made, asked = results(rows), ["label", "bleu", "chrf"]
    scorers = {each.name: each for each in scores.choose(asked)}
    acc = Measure("arc", "acc", {"base": [0.0, 1.0] * 20, "tuned": [1.0] * 40}, chance=0.25)
    sums = Measure("sums", "acc", {"base": [0.0] * 40, "tuned": [0.0] * 40}, chance=0.25)
    made = replace(
        made, scores=scores.of(scorers.values(), made.answers), scorers=scorers,
        beside=benchmark_options.Compared([acc], [sums]).facts,
    )  # fmt: skip
    of_corpus = corpus.of_results(made)
    found = analysed(replace(made, beside=replace(made.beside, corpus_scores=of_corpus)))
    label, *_ = found.scores
    named = [(e.label, e.rows, e.precision, e.recall, e.f1) for e in label.labels["tuned"]]
    assert named == [("blue", 30, 0.5, 0.5, 0.5), ("red", 30, 0.5, 0.5, 0.5)]
    assert label.labels["base"][0].precision is None
    assert label.details["tuned"][0] == "accuracy 50.0%, macro F1 50.0%, 60 rows, 2 labels"
    chrf = found.corpus_scores[1]
    assert chrf.name == "chrF of the corpus"
    assert chrf.changes["tuned"].low < chrf.changes["tuned"].mean < chrf.changes["tuned"].high
    assert (chrf.means["base"].rows, chrf.changes["tuned"].clusters) == (60, 60)
    [task] = found.benchmarks
    assert (task.means["base"].mean, task.changes["tuned"].mean) == (0.5, 0.5)
    assert (task.chance, task.judged) == (0.25, {"tuned": "better"})
    assert found.forgetting[0].judged == {"tuned": "shows nothing, as the first model only guesses"}
    page, text = report.html(found), report.markdown(found)
    for name in ("chrF of the corpus", "arc, acc", "40 items; guessing gives 25%", "sums, acc"):
        assert name in page
    assert "| blue | 30 | 50.0% | 50.0% | 50.0% |" in text
    assert "## Forgetting" in text
    assert "confusion (a row: the reference" in page


def test_a_corpus_score_of_clusters_has_a_wider_interval():
    rows = [Asked(f"q {n}", f"the words of row {n // 5}", "the words" if n // 5 % 2 else "of row")
            for n in range(200)]  # fmt: skip
    [scorer] = scores.choose(["chrf"])
    widths = []
    for clusters in (None, [n // 5 for n in range(200)]):
        made = results(rows, clusters)
        made = replace(made, scores=scores.of([scorer], made.answers), scorers={"chrF": scorer})
        mean = corpus.of_results(made)[0].means["tuned"]
        widths.append(mean.high - mean.low)
    assert widths[1] > 1.5 * widths[0]
    few = replace(made.subset(range(25)), beside=made.beside)
    assert corpus.of_results(few)[0].means["tuned"].low is None


def test_the_schema_is_the_one_in_the_repository():
    assert (ROOT / "configs/results.json").read_text() == results_file.schema() + "\n"


# ------------------------------------------------------------------------------------ the report


def test_the_page_begins_with_the_verdict_and_asks_no_network(tmp_path):
    found = analysed(some())
    written = report.html(found)
    body = written.partition("<body>")[2]
    assert body.index("Tuned is better than base") < body.index("<h2>")
    assert "default-src 'none'" in written
    assert not re.findall(r"(?:src|href)=[\"'](?!data:,)", written)
    assert "66.7%" in body
    assert "(54.1% to 77.3%)" in body
    assert "20 answers of tuned are wrong: exact match below 50.0%." in body
    assert "length has no value for rows of tuned (1: not there)." in body


def test_the_terminal_shows_no_control_characters():
    shown = table.text(some(3), 3, 9)
    assert "\u241b[2J \u2421 \\x85" in shown
    assert not re.findall("[\x1b\x7f-\x9f]", shown)


def test_groups_are_called_by_their_column():
    made = some(clusters=[number // 2 for number in range(60)])
    assert "60 rows in 30 clusters of near-duplicates." in report.summary(analysed(made))
    grouped = some(clusters=[0] * 60, settings={"group": "user"})
    assert "60 rows in 1 group of user." in report.summary(analysed(grouped))
    assert "60 held-out rows, in 1 group of user" in table.text(grouped, 0, 9)


def test_rows_cannot_break_the_page_or_the_markdown():
    found = analysed(some())
    written = report.html(found)
    assert written.count("<script") == 2  # the data and the program
    assert "alert(1)" in written
    assert "</script><script>alert" not in written
    assert not re.findall("[\x1b\x7f-\x9f]", written)
    data = re.search(r'id="data">(.*?)</script>', written, re.DOTALL)[1]
    answers = json.loads(data)["rows"][1]["answers"]
    assert answers["base"]["text"] == HOSTILE.replace("\ud800", "\\ud800")
    text = report.markdown(found)
    assert "\x1b" not in text
    assert "&lt;script>" in text
    wrong = text.partition("## Wrong\n")[2]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in wrong.splitlines() if line} == {7}


def test_markdown_has_scores_errors_and_slices():
    text = report.markdown(analysed(some()))
    assert "| exact match | 10.0% (4.7% to 20.1%) | 66.7% (54.1% to 77.3%) | +56.7 (" in text
    assert "| other | 20 | wrong in a way that none of these rules knows |" in text
    assert "| kind: odd | 30 | 10 |" in text
    assert "## Got worse" in text  # rows 0, 30: right before


def test_an_evaluation_of_one_model_has_a_report():
    made = some()
    alone = type(made)(
        made.prompts, made.clusters, {"tuned": made.answers["tuned"]},
        {"exact match": {"tuned": made.scores["exact match"]["tuned"]}},
        {"exact match": made.scorers["exact match"]},
    )  # fmt: skip
    found = analysis.of_results(
        alone, verdict.Verdict("no scores", "nothing to compare with"), analysis.decides_of(alone)
    )
    assert "No verdict" in report.html(found)
    assert "66.7%" in report.markdown(found)


FILTER = """
const shown = () => document.querySelectorAll("article").length;
const count = () => document.getElementById("count").textContent;
const seen = [count()];
document.getElementById("next").click(); seen.push(count());
const set = (name, value) => { form.elements[name].value = value;
  form.dispatchEvent(new Event("input")); seen.push(count()); };
set("outcome", "wrong"); set("slice", "0"); set("text", "number 54"); set("text", "nowhere");
form.reset(); update(); seen.push(count());
document.querySelector('.pick[data-kind="error"]').click(); seen.push(count());
set("text", "what is 57");
const marked = tag => [...document.querySelectorAll(`article ${tag}`)].map(n => n.textContent);
document.title = JSON.stringify([seen, marked("ins")[0], marked("del")[0]]);
"""


@pytest.mark.proof
def test_a_browser_filters_pages_and_compares(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report.html(analysed(some(), trained=list)))
    seen = browse(path, FILTER)
    assert not seen.console
    counts, added, missing = json.loads(page_text(seen.title))
    assert counts == [
        "1 to 10 of 60", "11 to 20 of 60", "1 to 10 of 20", "1 to 10 of 10", "1 to 1 of 1",
        "no row", "1 to 10 of 60", "1 to 10 of 20", "1 to 1 of 1",
    ]  # fmt: skip
    assert (added, missing) == ("an", "the")
    require_narrow(path)


def page_text(title):
    return title.replace("&amp;", "&").replace("&quot;", '"')


@pytest.mark.proof
def test_a_browser_opens_five_thousand_rows(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report.html(analysed(some(5_000))))
    script = """const began = performance.now();
      document.forms.filters.text.value = "number 4"; update();
      const took = performance.now() - began;
      document.title = JSON.stringify([took, document.getElementById("count").textContent]);"""
    seen = browse(path, script)
    assert not seen.console
    took, count = json.loads(page_text(seen.title))
    assert count == "1 to 10 of 1,111"
    assert took < 2_000  # ms


# ------------------------------------------------------------------------------------ plots


def test_lines_and_distributions_draw_what_they_get():
    drawn = page.lines({"a": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)]}, "loss")
    assert 'points="6.0,188.0 414.0,26.0"' in drawn
    assert '<circle cx="210.0" cy="107.0"' in drawn
    bars = page.distributions({"a": [0, 0, 1, 1], "b": [1, 1, 1, 1]}, "words")
    assert "a, 0 to 1: 50.0%" in bars
    assert "b, 1 to 2: 100.0%" in bars
    assert "no values" in page.lines({"a": []}, "loss")
    assert "no values" in page.distributions({"a": []}, "words")
    assert "nan" not in page.distributions({"a": [1.5] * 9, "b": []}, "words")


# ------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A run, and another that differs in its learning rate, both evaluated."""
    workshop = Workshop(tmp_path_factory.mktemp("runs"))
    one = workshop.train("one", data__eval_fraction=0.2, evaluation__every_steps=2)
    other = Path(shutil.copytree(one, one.with_name("other")))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["optimizer"]["lr"] = 0.001
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    for run, right in ((one, lambda n: n % 3 > 0), (other, lambda n: n % 10 > 0)):
        (run / "evaluation").mkdir()
        write(run / "evaluation/results.json", analysed(some(right=right, run_dir=str(run))))
    return one, other


@pytest.mark.slow
def test_runs_are_compared_in_a_table(two_runs, capsys):
    assert main(["compare", *map(str, two_runs), "--price", "3600"]) == 0
    cells = {}
    for line in capsys.readouterr().out.splitlines():
        name, *row = [cell.strip() for cell in line.strip().split("  ") if cell.strip()]
        cells.setdefault(name, row)
    assert cells["optimizer.lr"] == ["0.01", "0.001"]
    assert "evaluation.every_steps" not in cells
    assert "run.name" not in cells
    assert cells["state"] == ["complete", "complete"]
    assert cells["steps"] == ["4", "4"]
    assert cells["exact match"][0].startswith("66.7% (")
    assert cells["exact match"][1].startswith("90.0% (")
    assert cells["less one"][0].startswith("+23.3 (+")
    assert len(cells["loss"][0]) == 4
    assert float(cells["cost"][0]) > 0


@pytest.mark.slow
def test_the_page_of_runs_has_their_curves(two_runs, tmp_path, capsys):
    path = tmp_path / "runs.html"
    assert main(["compare", *map(str, two_runs), "--html", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    written = path.read_text()
    assert written.count("<polyline") >= 4 * 2
    assert "tuned is better than base" in written
    path.write_text("mine")
    assert main(["compare", str(two_runs[0]), "--html", str(path)]) == 2
    assert path.read_text() == "mine"
    assert "this program did not write it" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_of_a_run_has_its_curves_and_receipt(two_runs):
    found = read(two_runs[0] / "evaluation/results.json")
    assert [step for step, _ in found.run.curves["loss"]] == [1, 2, 3, 4]
    assert found.run.facts["num_steps"] == 4
    assert found.run.settings["optimizer.lr"] == 0.01
    written = report.html(found)
    assert "<summary>Receipt</summary>" in written
    assert written.count("<polyline") == 5


def test_the_card_beside_the_rows_is_in_the_report(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [])
    (tmp_path / "README.md").write_text("# My rows\n")
    assert run_facts.card_beside(str(rows)) is None  # any README
    (tmp_path / "croissant.json").write_text("{}")
    assert run_facts.card_beside([str(rows)]) == "# My rows\n"


def test_another_folder_is_no_run(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        compare_runs.opened(tmp_path, "x")


def test_the_sparkline_shows_means_of_stretches():
    assert compare_runs.sparkline([8, 4, 1]) == "█▄▁"
    assert compare_runs.sparkline([1]) == "▁"
    assert len(compare_runs.sparkline(list(range(1_000)))) == compare_runs.POINTS


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (59.6, "1:00"), (3_725, "1:02:05"), (5, "0:05")]
)
def test_durations(seconds, text):
    assert compare_runs.duration(seconds) == text


# ------------------------------------------------------------------------------------ the command


def options(*words):
    """Parse the options of evaluate that this part adds."""
    parser = argparse.ArgumentParser()
    report_files.add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


def reported(made, *words):
    """Do what evaluate does once it has results."""
    arguments = options(*words)
    report_files.require(arguments, None)
    report_files.require_scores(arguments, list(made.scorers.values()))
    report_files.write(made, verdict.of(made), arguments, None)


def test_an_evaluation_leaves_three_files_and_says_where(tmp_path, capsys):
    reported(some(), "--report", tmp_path / "a" / "b")
    out = capsys.readouterr().out.splitlines()
    assert out == ["errors of tuned: other 20", f"report: {tmp_path / 'a/b/report.html'}"]
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == sorted(report_files.NAMES)
    run = TrainedRun(tmp_path / "run", {})
    assert report_files.folder_of(None, run) == tmp_path / "run/evaluation"
    assert report_files.folder_of(None, None) is None


def test_reports_of_evaluations_before_stay(tmp_path):
    for number, right in enumerate((lambda n: False, lambda n: n > 9, lambda n: True)):
        reported(some(right=right), "--report", tmp_path)
        kept = sorted(path.name for path in (tmp_path / "earlier").glob("*"))
        assert kept == [str(n + 1) for n in range(number)]
    wrong = [len(read(path).failures) for path in sorted(tmp_path.glob("earlier/*/results.json"))]
    assert wrong == [60, 10]
    assert read(tmp_path / "results.json").failures == []


def test_the_terminal_shows_weak_slices_and_the_round(tmp_path, capsys):
    reported(some(right=lambda n: n % 2 == 0), "--report", tmp_path / "one")
    capsys.readouterr()
    before, asked = tmp_path / "one/results.json", tmp_path / "request.json"
    now = some(right=lambda n: n % 2 == 0 or n > 40)
    reported(now, "--before", before, "--next-data", asked)
    assert capsys.readouterr().out.splitlines() == [
        "errors of tuned: other 20",
        "weak: kind: odd (20 of 30 wrong)",
        f"since {before}: Of 30 rows that were wrong, 10 are right now. Of 30 rows that were "
        "right, every one still is (at most 11.6% of such rows broke).",
        f"next data: {asked} asks for 400 rows",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--report", "{file}"], "--report: {file} is a file"),
        (["--report", "/proc/none"], "cannot be written"),
        (["--before", "{folder}/none.json"], "none.json: cannot be read"),
        (
            ["--before", "{file}"],
            "is not what an evaluation wrote (configs/results.json)\n  the whole: Invalid JSON: "
            "expected value at line 1 column 1",
        ),
        (["--next-data", "{file}"], "--next-data: {file} exists"),
        (["--next-data", "{folder}/no/x.json"], "its folder does not exist"),
        (
            ["--wrong-below", "length=3"],
            "--wrong-below: 'length' is not a score of this evaluation where more is better",
        ),
        (
            ["--fail-under", "BLEU=3"],
            "'BLEU' is not a score of this evaluation where more is better; choose one of exact",
        ),
        (["--fail-under", "90"], "exact match is from 0 to 1; write 90% or a fraction"),
    ],
)
def test_wrong_options_are_named(tmp_path, given, message):
    (tmp_path / "file").write_text("mine")
    names = {"file": tmp_path / "file", "folder": tmp_path}
    with pytest.raises(UserError, match=re.escape(message.format(**names))) as raised:
        reported(some(), *(word.format(**names) for word in given))
    assert "b'" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["much", "nan", "=0.5", "exact match=", "90%%"])
def test_a_limit_is_a_number(text, capsys):
    with pytest.raises(SystemExit):
        options("--fail-under", text)
    assert "should be a number, as 0.9 or 90%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "passes"),
    [
        ("0.66", True), ("66%", True), ("67%", False), ("exact match=0.5", True),
        ("exact match=0.7", False), ("base", True),
    ],
)  # fmt: skip
def test_fail_under_ends_with_exit_code_1_after_the_report(tmp_path, limit, passes):
    words = ["--report", tmp_path, "--fail-under", limit]
    if passes:
        reported(some(), *words)
    else:
        with pytest.raises(ScoreTooLow, match=r"exact match of tuned is 66.7% \(54.1% to 77.3%\)"):
            reported(some(), *words)
    assert (tmp_path / "report.html").is_file()
    assert ScoreTooLow.exit_code == 1


def test_worse_than_the_base_fails(tmp_path):
    made = some()
    swapped = {"base": made.answers["tuned"], "tuned": made.answers["base"]}
    scores = {name: {"base": by["tuned"], "tuned": by["base"]} for name, by in made.scores.items()}
    with pytest.raises(ScoreTooLow, match="--fail-under base: tuned is worse than base"):
        reported(replace(made, answers=swapped, scores=scores), "--fail-under", "base")


def test_the_documentation_lists_every_type_of_error():
    section = (ROOT / "docs/evaluation.md").read_text().partition("\n### Types of errors\n")[2]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section.partition("\n### ")[0], re.MULTILINE)
    assert dict(rows) == error_types.DEFINITIONS
