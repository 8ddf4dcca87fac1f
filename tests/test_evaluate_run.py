"""A run directory knows what to compare, and which rows it was trained on."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import Workshop, launch, launcher, pretrained, read_jsonl, write_jsonl

from finetune.__main__ import main
from finetune.evaluation import held_out, trained_rows
from finetune.evaluation.results_file import read
from finetune.evaluation.trained_run import TrainedRun
from finetune.export.lineup import Lineup

SIZES = {"train__global_batch_size": 4, "train__micro_batch_size": 4, "train__max_steps": 1}
WORDS = "amber birch cedar dune ember fern grove heath iris jade kelp lark moss north".split()


def row(number):
    """Ten words that no other row has in this order, with a number."""
    asked = [WORDS[(number * 3 + place * place) % len(WORDS)] for place in range(9)]
    return {
        "question": f"{' '.join(asked)} {number}",
        "answer": f"answer {number}",
        "user": number % 4,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    shared = Workshop(tmp_path_factory.mktemp("runs"))
    write_jsonl(shared.rows, [row(number) for number in range(30)])
    base = shared.train("base", **SIZES) / "model"
    columns = {"question": "question", "answer": "answer"}
    changes = {"data__eval_fraction": 0.2, "data__columns": columns}
    return shared.train("tuned", **pretrained(base), **SIZES, **changes)


def trained(run, path):
    opened = TrainedRun.open(str(run))
    prompts = held_out.read(str(path), opened.reading)
    return prompts, trained_rows.find(prompts, opened)


def test_the_rows_that_a_run_held_out_were_not_trained_on(run):
    assert len(read_jsonl(run / "held_out.jsonl")) == 6
    assert trained(run, run / "held_out.jsonl")[1] == {}


def test_planted_rows_are_found_exact_and_near_with_both_places(run, tmp_path):
    kept = {each["question"] for each in read_jsonl(run / "held_out.jsonl")}
    [one, other, *_] = [n for n in range(30) if row(n)["question"] not in kept]
    long = row(other)["question"]
    planted = [
        {"question": "something else entirely", "answer": "no"},
        {"question": row(one)["question"].upper() + "!", "answer": "another answer"},
        {"question": row(one)["question"], "answer": "a second time"},
        {"question": f"{long} please", "answer": row(other)["answer"]},
    ]
    path = write_jsonl(tmp_path / "planted.jsonl", planted)
    prompts, found = trained(run, path)
    assert sorted(found) == [1, 2, 3]
    assert found[1] == trained_rows.Trained(
        f"{run.parents[1]}/rows.jsonl:{one + 1}", "the same text"
    )
    assert found[3].place.endswith(f"rows.jsonl:{other + 1}")
    assert f"{path}:2 repeats " in trained_rows.listing(prompts, found)
    assert [p.place for p in trained_rows.refuse(prompts, found)] == [f"{path}:1"]


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments), "--max-new-tokens", "1", "--examples", "0"])


def test_the_command_leaves_them_out_or_scores_with_and_without(run, tmp_path, capsys):
    kept = read_jsonl(run / "held_out.jsonl")
    [leak, *_] = [row(n) for n in range(30) if row(n) not in kept]
    path = write_jsonl(tmp_path / "rows.jsonl", [*kept, leak])
    assert evaluate(run, "--data", path) == 0
    printed = capsys.readouterr()
    assert "6 held-out rows" in printed.out
    assert "note: 1 of 7 rows were trained on, and are left out" in printed.err
    assert f"{path}:7 repeats " in printed.err
    assert evaluate(run, "--data", path, "--trained-rows", "score") == 0
    printed = capsys.readouterr().out
    assert "7 held-out rows" in printed
    assert "without 1 rows that were trained on" in printed
    assert "6 held-out rows" in printed
    write_jsonl(path, [leak])
    assert evaluate(run, "--data", path) == 2
    assert "1 of 1 rows were trained on, so they cannot show" in capsys.readouterr().err


def test_another_rule_than_that_of_the_round_before_ends_before_any_answer(run, tmp_path, capsys):
    assert evaluate(run, "--scores", "exact-match", "--report", tmp_path / "one") == 0
    before, now = tmp_path / "one/results.json", tmp_path / "now"
    capsys.readouterr()
    for options, message in (
        (["--scores", "token-f1"], "was wrong there by exact match, which is not among the scores"),
        (["--wrong-below", "0.9"], "exact match below 0.5, and is here by exact match below 0.9"),
    ):
        assert evaluate(run, "--before", before, "--report", now, *options) == 2
        assert message in capsys.readouterr().err
        assert not now.exists()
    # Two scores could decide; the round before says which.
    both = ["--scores", "contains", "exact-match"]
    assert evaluate(run, "--before", before, "--report", now, *both) == 0
    assert read(now / "results.json").decides.score == "exact match"
    for option in (["--fail-under", "BLEU=1"], ["--wrong-below", "BLEU=1"]):
        assert evaluate(run, "--report", tmp_path / "none", *option) == 2
        assert not (tmp_path / "none").exists()


def test_training_rows_that_are_gone_are_noted(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("rows.jsonl", "gone.jsonl"))
    prompts = held_out.read(str(run / "held_out.jsonl"))
    with pytest.raises(trained_rows.Unread, match=r"gone\.jsonl: no such file"):
        trained_rows.find(prompts, TrainedRun.open(str(copy)))
    assert evaluate(copy) == 0
    assert "was trained on cannot be compared with these" in capsys.readouterr().err
    assert json.loads((copy / "outcome.json").read_text())["state"] == "complete"


def test_a_run_directory_knows_what_to_compare(run, capsys):
    assert evaluate(run) == 0
    printed = capsys.readouterr().out
    assert "6 held-out rows" in printed
    assert "6 rows; about 73 would show" in printed
    assert f"{run}/held_out.jsonl" not in printed
    assert evaluate(run / "model", "--limit", 3, "--group", "user", "--also", f"me={run}") == 0
    printed = capsys.readouterr().out
    assert "3 held-out rows" in printed
    assert "tuned against me: token F1 +0.0" in printed


def test_a_run_without_what_it_takes_says_what_to_give(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "held_out.jsonl").unlink()
    for arguments, says in (
        ([copy], "held out no rows, and has no data.eval; give rows"),
        ([run.parent / "base"], "began with random weights, so it has no base to compare with"),
        ([run, "--tuned", run], "--tuned: the tuned model is that of"),
        ([tmp_path / "no"], "no does not exist; give a run directory"),
        ([run.parent / "base" / "checkpoints"], "give a run directory"),
        ([], "name a run, as "),
        (["--base", run], "or give also --tuned and --data"),
    ):
        assert evaluate(*arguments) == 2
        assert says in capsys.readouterr().err
    shutil.rmtree(copy / "model")
    (copy / "outcome.json").write_text(json.dumps({"state": "preempted"}))
    assert evaluate(copy) == 2
    assert "has no model yet: its run is preempted" in capsys.readouterr().err
    config = (run / "config.yaml").read_text()
    (copy / "model").mkdir()
    (copy / "model" / "config.json").touch()
    named = str(Path(run.parent / "base" / "model"))
    (copy / "config.yaml").write_text(config.replace(named, "/gone/model"))
    assert evaluate(copy) == 2
    assert "give --base with the folder where it is now" in capsys.readouterr().err


def test_the_base_is_that_of_the_revision_that_the_run_began_with(run, tmp_path, monkeypatch):
    """On the Hub, whose newest revision has no weights: it cannot be opened."""
    repository = tmp_path / "hub" / "models--some--base"
    for name, commit in (("old", "ab" * 20), ("main", "cd" * 20)):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(run.parent / "base" / "model", snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(snapshot.name)
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    copy = shutil.copytree(run, tmp_path / "copy")
    named = str(Path(run.parent / "base" / "model"))
    config = (run / "config.yaml").read_text().replace(named, "some/base")
    assert "revision: null" in config
    found = {}
    for revision in ("old", "main"):
        given = config.replace("revision: null", f"revision: {revision}")
        (copy / "config.yaml").write_text(given)
        found[revision] = evaluate(copy, "--report", tmp_path / revision)
    assert found == {"old": 0, "main": 2}
    assert evaluate(run, "--report", tmp_path / "folder") == 0
    answers = [read_jsonl(tmp_path / name / "answers.jsonl") for name in ("old", "folder")]
    assert answers[0][0]["identity"] == f"some/base, commit {'ab' * 20}"
    texts = [[line["answer"] for line in each if line["model"] == "base"] for each in answers]
    assert texts[0] == texts[1]
    (copy / "config.yaml").write_text(config.replace("revision: null", "revision: old"))
    assert Lineup(str(copy / "model")).open("base").model.name_or_path == "some/base"


def answers_of(run):
    return read_jsonl(run / "evaluation" / "answers.jsonl")


def test_saved_answers_need_no_model_and_are_scored_again(run, capsys, monkeypatch, tmp_path):
    import finetune.evaluation.answering as answering

    into = tmp_path / "kept"
    assert evaluate(run, "--report", into) == 0
    first = capsys.readouterr().out
    kept = read_jsonl(into / "answers.jsonl")
    assert [line["model"] for line in kept] == ["base"] * 6 + ["tuned"] * 6

    def refused(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(answering, "load", refused)
    assert evaluate(run, "--report", into) == 0
    assert capsys.readouterr().out == first
    assert evaluate("--answers", into / "answers.jsonl") == 0
    again = capsys.readouterr().out
    assert again == first.replace(f"report: {into}/report.html\n", "")
    assert evaluate(run, "--answers", into / "answers.jsonl") == 2
    assert "--answers: RUN would be ignored" in capsys.readouterr().err


def test_the_base_is_also_asked_with_examples_and_with_context(run, tmp_path, capsys):
    kept = read_jsonl(run / "held_out.jsonl")
    rows = [{**each, "page": f"page {n}"} for n, each in enumerate(kept)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    asked = ("--few-shot", 1, "--context", "page", "--report", tmp_path / "into")
    assert evaluate(run, "--data", path, *asked) == 0
    table = capsys.readouterr().out
    assert "base 1-shot" in table
    assert "tuned with context" in table
    by_model = {}
    for line in read_jsonl(tmp_path / "into" / "answers.jsonl"):
        by_model.setdefault(line["model"], []).append(line)
    examples = {json.dumps(line["prompt"][:2]) for line in by_model["base 1-shot"]}
    assert len(examples) == 1
    turns = json.loads(examples.pop())
    trained_on = [row(n) for n in range(30) if row(n) not in kept]
    assert [each["role"] for each in turns] == ["user", "assistant"]
    assert {each["content"] for each in turns[::2]} <= {each["question"] for each in trained_on}
    [one, *_] = by_model["tuned with context"]
    assert one["prompt"][-1]["content"] == f"page 0\n\n{kept[0]['question']}"
    assert evaluate(run, "--data", path, "--context", "pages") == 2
    assert "has no text in column pages" in capsys.readouterr().err
    assert evaluate(run, "--few-shot", 9, "--report", tmp_path / "none") == 2  # 256 positions
    assert "with 9 examples every prompt has" in capsys.readouterr().err
    assert not (tmp_path / "none/answers.jsonl").read_bytes()
    assert evaluate(run, "--few-shot", 25) == 2
    assert (
        "25 examples are asked for, and the run was trained on 24 rows" in capsys.readouterr().err
    )


def test_a_zero_adapter_shares_its_base_and_changes_nothing(run, workshop, capsys, monkeypatch):
    """An adapter that has learned nothing answers as its base, which is not loaded twice."""
    import finetune.evaluation.answering as answering

    base = run.parent / "base" / "model"
    zero = workshop.train(
        "zero", **pretrained(base), **SIZES, adapter__kind="lora", optimizer__lr=1e-30,
        data__eval_fraction=0.2,
    )  # fmt: skip
    monkeypatch.setattr(answering, "load", lambda *_, **__: pytest.fail("loaded alone"))
    asked = ("--also", f"again={zero}", "--max-new-tokens", "9")
    assert main(["evaluate", str(zero), *asked]) == 0
    by_model = {}
    for line in answers_of(zero):
        by_model.setdefault(line["model"], []).append((line["answer"], line["token_ids"]))
    assert by_model["base"] == by_model["tuned"] == by_model["again"]
    assert len(by_model["base"]) == 8
    assert "+0.0" in capsys.readouterr().out


def test_a_run_that_goes_on_from_an_adapter_is_compared_with_that_adapter(run, workshop):
    """Not with the model under it, whose distance counts what the adapter had learned before."""
    base, lora = run.parent / "base" / "model", {"adapter__kind": "lora"}
    first = workshop.train("first", **pretrained(base), **SIZES, **lora, optimizer__lr=0.3)
    second = workshop.train(
        "second", **pretrained(base), **SIZES, **lora, adapter__path=str(first / "model"),
        optimizer__lr=1e-7, data__eval_fraction=0.2,
    )  # fmt: skip
    assert main(["evaluate", str(second), "--max-new-tokens", "9"]) == 0
    by_model = {}
    for line in answers_of(second):
        by_model.setdefault(line["model"], []).append(line["answer"])
    assert by_model["base"] == by_model["tuned"]
    assert json.loads((second / "evaluation" / "results.json").read_text())["models"]
    assert TrainedRun.open(str(second)).base == str(first / "model")


def test_processes_without_a_common_folder_are_refused(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = run / "model"
    assert evaluate("--base", model, "--tuned", model, "--data", run / "held_out.jsonl") == 2
    assert "2 processes share their answers in a folder; name one with --report" in (
        capsys.readouterr().err
    )


@pytest.mark.proof
def test_two_processes_of_a_launcher_answer_a_share_each(run, tmp_path):
    rows = [{"question": f"{n} of many", "answer": f"{n}"} for n in range(70)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    asked = ["evaluate", str(run), "--data", str(path), "--report", str(tmp_path / "report")]
    options = [*asked, "--max-new-tokens", "2", "--examples", "0"]
    result = launch([*launcher("ddp", 2, ["-m"]), "finetune", *options])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("verdict: ") == 1
    lines = read_jsonl(tmp_path / "report" / "answers.jsonl")
    assert Counter(line["model"] for line in lines) == {"base": 70, "tuned": 70}
