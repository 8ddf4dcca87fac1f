"""lm-evaluation-harness: our sums are its sums, and its tasks compare models item by item."""

import importlib.util
import json

import pytest
import torch
from conftest import tiny_llama, write_jsonl

from finetune.errors import ConfigError, Outage, UserError
from finetune.evaluation import benchmarks, harness
from finetune.evaluation.continuations import Continuations
from finetune.evaluation.harness import Harness

ROWS = [
    {"query": f"Question: What is {n} + {n}?", "choices": [str(n), str(2 * n), f"{n} ü"], "gold": 1}
    for n in range(12)
] + [{"query": "Question: Which? ", "choices": ["A", "B", "C"], "gold": n % 3} for n in range(6)]
has_harness = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not has_harness, reason="the package lm-eval is not installed")


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = tiny_llama(vocab_size=261, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("harness") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)  # that of all tasks reads 16,000 files


def task_of(path):
    return {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": str(path)},
        "test_split": "train", "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                        for name in ("acc", "acc_norm", "acc_bytes", "exact_match")],
    }  # fmt: skip


def by_harness(model, tokenizer, path, manager):
    """Return what the harness itself finds, with its own scorer and batch_size=auto."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size="auto", max_batch_size=8),
        tasks=[task_of(path)], task_manager=manager, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    return sorted(found["samples"]["sums"], key=lambda sample: sample["doc_id"])


@needs_harness
def test_sums_and_accuracies_are_those_of_the_harness(model, rows, manager, bytes_tokenizer):
    samples = by_harness(model, bytes_tokenizer, rows, manager)
    benchmark = benchmarks.read(str(rows), prompt="{{query}}\nAnswer:")
    scorer = Continuations(model, bytes_tokenizer)
    found = benchmarks.logprobs(benchmark, scorer, bytes_tokenizer)
    for sums, sample in zip(found, samples, strict=True):
        assert sums == pytest.approx([float(each[0]) for each in sample["filtered_resps"]], 1e-5)
    for name, values in benchmarks.accuracies(benchmark.items, found).items():
        assert values == [sample[name] for sample in samples]

    ours = Harness([task_of(rows)], manager=manager)(model, bytes_tokenizer, scorer)
    for name in ("acc", "acc_norm", "acc_bytes", "exact_match"):
        assert ours["sums", name] == [float(sample[name]) for sample in samples]


@needs_harness
def test_real_questions_score_as_in_the_harness(real_data, manager, tmp_path):
    """Also contexts that do not fit, whose beginnings go: one of these has 517 tokens of 512."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = real_data / "stories260k"
    real = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with (real_data / "benchmarks/arc_easy.jsonl").open() as file:
        lines = [json.loads(line) for line in file]
    longest = sorted(lines, key=lambda row: -len(row["query"]))[:8]
    chosen = write_jsonl(tmp_path / "rows.jsonl", [*lines[:40], *longest])
    samples = by_harness(real, tokenizer, chosen, manager)
    benchmark = benchmarks.read(str(chosen))
    scorer = Continuations(real, tokenizer)
    found = benchmarks.logprobs(benchmark, scorer, tokenizer)
    assert scorer.num_cut
    for sums, sample in zip(found, samples, strict=True):
        assert sums == pytest.approx([float(each[0]) for each in sample["filtered_resps"]], 1e-5)
    for name, values in benchmarks.accuracies(benchmark.items, found).items():
        if name in samples[0]:
            assert values == [sample[name] for sample in samples]


@needs_harness
def test_models_are_compared_item_by_item(model, rows, manager, bytes_tokenizer):
    tasks = Harness([task_of(rows)], limit=10, manager=manager)
    found = tasks(model, bytes_tokenizer, Continuations(model, bytes_tokenizer))
    other = {key: [1.0 - value for value in each] for key, each in found.items()}
    by_name = {each.name: each for each in harness.measures(tasks, {"base": found, "tuned": other})}
    acc = by_name["acc"]
    assert (acc.task, len(acc.values["base"])) == ("sums", 10)
    assert acc.change("tuned").mean == pytest.approx(1 - 2 * acc.mean("base"))


def test_tasks_of_a_group_are_one_measure():
    class Grouped(Harness):
        def __init__(self):
            self.names = ["all", "alone"]
            self.tasks = {"group_map": {"all": ["some", "third"], "some": ["first", "second"]}}

    names = ("first", "second", "third", "alone")
    values = {(name, "acc"): [1.0, 0.0][:n] for n, name in zip((2, 1, 2, 1), names)}
    [group, alone] = harness.measures(Grouped(), {"base": values})
    assert (group.task, group.values["base"]) == ("all", [1.0, 0.0, 1.0, 1.0, 0.0])
    assert (alone.task, alone.values["base"]) == ("alone", [1.0])


@needs_harness
def test_without_a_network_local_rows_are_named(manager):
    task = {**task_of("x"), "dataset_path": "allenai/ai2_arc", "dataset_kwargs": {}}
    instead = "HF_HUB_OFFLINE is set; .*--benchmarks FILE.jsonl"
    with pytest.raises(Outage, match=f"cannot be fetched: {instead}"):
        Harness([task], manager=manager)


@needs_harness
def test_an_unknown_task_is_named(manager):
    with pytest.raises(UserError, match="has no task 'arc_esay'; .*--benchmarks FILE.jsonl"):
        Harness(["arc_esay"], manager=manager)


@pytest.mark.skipif(has_harness, reason="the package lm-eval is installed")
def test_a_missing_harness_is_named():
    with pytest.raises(ConfigError, match=r"needs the package lm-eval; pip install .*\[harness\]"):
        Harness(["arc_easy"])
