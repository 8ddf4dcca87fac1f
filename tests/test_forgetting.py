"""The fixed suite before and after tuning, and the options that ask for it and for benchmarks."""

import argparse
import json
import random

import pytest
from conftest import made_once, tiny_llama, write_jsonl

from finetune.errors import DataError, UserError
from finetune.evaluation import (
    benchmark_options,
    command,
    forgetting,
    loaded,
    measures,
    results_file,
)
from finetune.evaluation.benchmark_options import Benches
from finetune.evaluation.candidates import Candidate
from finetune.evaluation.continuations import Continuations
from finetune.evaluation.measures import Measure

ROWS = [{"query": f"What is {n} and one?", "choices": ["1", str(n + 1)], "gold": 1}
        for n in range(40)]  # fmt: skip


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark_options.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return a folder with a model, `base`, and an adapter on it, `tuned`."""
    return made_once(tmp_path_factory, "multiple-choice", _make)


def _make(folder):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from finetune.models import base_identity
    from finetune.models.load import bytes_tokenizer

    torch.manual_seed(1)
    config = tiny_llama(vocab_size=261, initializer_range=0.3, max_position_embeddings=512)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(folder / "base")
    record = base_identity.record(base, torch.float32, None, False, [], [])
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    get_peft_model(base, LoraConfig(r=4, init_lora_weights=False)).save_pretrained(folder / "tuned")
    (folder / "tuned" / base_identity.FILE).write_text(json.dumps(record))
    for name in ("base", "tuned"):
        bytes_tokenizer().save_pretrained(folder / name)


@pytest.fixture
def candidates(models):
    tuned = Candidate("tuned", str(models / "tuned"), option="--tuned")
    return [Candidate("base", str(models / "base"), option="--base"), tuned]


def test_the_suite_is_the_same_everywhere_and_its_answers_are_right():
    suite = forgetting.suite()
    state = random.getstate()
    assert suite == forgetting.suite()
    assert state == random.getstate()
    sums = {benchmark.name: benchmark for benchmark in suite}["sums"].items
    assert (sums[0].context, sums[0].choices[sums[0].gold]) == ("47 + 33 =", "80")
    for benchmark in suite:
        assert len(benchmark.items) >= 100
        assert len({item.context for item in benchmark.items}) == len(benchmark.items)
        assert benchmark.chance == 0.25
        for item in benchmark.items:
            assert len(set(item.choices)) == 4
        assert len({item.gold for item in benchmark.items}) == 4
    for item in sums:
        assert eval(item.context.rstrip(" =")) == int(item.choices[item.gold])


def test_bits_per_byte_are_those_of_the_whole_text(models, bytes_tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    path = tmp_path / "notes.txt"
    path.write_text("One two three.\n\nÜber " + "und " * 400 + "\n")
    given = forgetting.passages(str(path))
    assert [passage.row for passage in given] == [0, 1, 1]
    assert " ".join(passage.text for passage in given[1:]) == path.read_text().split("\n")[2]
    model = AutoModelForCausalLM.from_pretrained(models / "base")
    total = 0.0
    for passage in given:
        ids = [bytes_tokenizer.bos_token_id, *bytes_tokenizer(passage.text)["input_ids"]]
        for start in range(0, len(ids) - 1, 512):  # what the model reads at once
            part = torch.tensor([ids[start : start + 513]])
            with torch.no_grad():
                logits = model(part[:, :-1]).logits.log_softmax(-1)
            total -= logits.gather(2, part[:, 1:, None]).sum().item()
    found = forgetting.bits_per_byte(given, Continuations(model, bytes_tokenizer), bytes_tokenizer)
    num_bytes = sum(len(passage.text.encode()) for passage in given)
    assert sum(found) / len(found) == pytest.approx(total / 0.6931471805599453 / num_bytes, 1e-5)


def test_a_loss_is_found_and_parts_that_were_guessed_show_nothing():
    right, wrong = [1.0] * 90 + [0.0] * 10, [1.0] * 60 + [0.0] * 40
    parts = [
        Measure("sums", "acc", {"base": right, "tuned": wrong}, chance=0.25),
        Measure("order", "acc", {"base": right, "tuned": right}, chance=0.25),
        Measure("copying", "acc", {"base": [1.0, 0, 0, 0] * 25, "tuned": [0.0] * 100}, chance=0.25),
        Measure("text", "bits per byte", {"base": [1.0, 2.0] * 20, "tuned": [1.5, 2.4] * 20},
                is_share=False, higher=False),
    ]  # fmt: skip
    assert [part.verdict("tuned") for part in parts[:2]] == ["worse", "no change seen"]
    assert forgetting.summary(parts) == (
        "forgetting of tuned: lost 2 of 4; worse: sums, text; no change seen: order; shows "
        "nothing, as the first model only guesses: copying"
    )
    shown = measures.table(parts).splitlines()
    assert shown[1].split()[:5] == ["sums", "acc", "100", "90.0%", "60.0%"]
    assert "-30.0 (-39." in shown[1]
    assert "+0.450" in shown[4]


def test_a_base_and_its_adapter_are_loaded_once(candidates, monkeypatch, models, tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    opened = []
    real = loaded.load
    monkeypatch.setattr(loaded, "load", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    found = Benches.of(parsed("--benchmarks", path)).compare(candidates)
    assert opened == [str(models / "tuned")]
    for number, name in enumerate(["base", "tuned"]):
        alone = Benches.of(parsed("--benchmarks", path)).compare([candidates[number]])
        for one, other in zip(found.benchmarks, alone.benchmarks):
            assert one.values[name] == other.values[name]
    assert found.benchmarks[0].values["base"] != found.benchmarks[0].values["tuned"]
    [acc, norm] = found.facts.benchmarks
    assert (acc.name, acc.line) == ("rows, acc", "40 items; guessing gives 50%")
    assert norm.name == "rows, acc_norm"
    assert acc.means["base"].mean == sum(found.benchmarks[0].values["base"]) / 40
    assert acc.changes["tuned"].low <= acc.changes["tuned"].mean


def test_options_name_files_a_suite_and_text(candidates, tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "ITEMS", 4)
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    text = tmp_path / "notes.txt"
    text.write_text("One two.\n\nThree four.\n")
    words = ["--forgetting-file", path, "--forgetting-file", str(text), "--benchmark-limit", "8"]
    shots = ["--benchmark-shots", "2", "--benchmark-dev", path]
    tests = Benches.of(parsed(*words, *shots))
    assert [len(each.items) for each in tests.suite] == [4, 4, 4, 4, 4, 8]
    assert tests.suite[5].items[0].before == "What is 0 and one? 1\n\nWhat is 1 and one? 2\n\n"
    shown = tests.compare(candidates).text()
    assert "notes.txt        bits per byte" in shown
    assert "forgetting of tuned: " in shown
    assert Benches.of(parsed()) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmarks", "absent.jsonl"], "--benchmarks takes files"),
        (["--benchmark-shots", "2", "--forgetting"], "come together"),
        (["--forgetting-file", "table.csv"], "no column 'text' or 'choices'"),
        (["--forgetting-file", "empty.txt"], "holds no rows"),
        (["--benchmarks", "rows.jsonl,./rows.jsonl"], "two files are called 'rows'"),
        (["--benchmarks", "rows.jsonl", "--benchmark-dev", "rows.jsonl", "--benchmark-shots", "41"],
         "has 40 rows, fewer than 41"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises((DataError, UserError), match=message):
        Benches.of(parsed(*words))


def test_the_command_compares_on_benchmarks_alone(models, tmp_path, capsys):
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    words = ["--base", str(models / "base"), "--tuned", str(models / "tuned")]
    words += ["--benchmarks", path]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.main(parser.parse_args(words))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "benchmarks"
    assert lines[1].split() == "task score items base tuned change, 95% interval".split()
    assert lines[2].split()[:3] == ["rows", "acc", "40"]
    command.main(parser.parse_args([*words, "--report", str(tmp_path / "report")]))
    found = results_file.read(tmp_path / "report/results.json")
    assert [each.name for each in found.benchmarks] == ["rows, acc", "rows, acc_norm"]
    assert (found.verdict.kind, found.rows, found.notes) == ("no scores", [], [])
    page = (tmp_path / "report/report.html").read_text()
    assert "<h2>Benchmarks</h2>" in page
    assert "<h2>Scores</h2>" not in page
    assert "id=rows" not in page
    with pytest.raises(UserError, match="--output: is about answers to rows; give --data"):
        command.main(parser.parse_args([*words, "--output", str(tmp_path / "answers.jsonl")]))
