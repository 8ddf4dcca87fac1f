"""Two processes, by the real accelerate launch, are one process."""

import json

import pytest
import torch
from conftest import losses, read_jsonl
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def check(result):
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("changes", [{"data__packing": True}, {"model__attention": "sdpa", "data__group_by_length": True}], ids=["packed", "padded"])  # fmt: skip
def test_two_processes_give_the_losses_and_weights_of_one(workshop, changes):
    """Uneven answers, a last step of an epoch with too few sequences for both, and evaluation."""
    settings = {
        "train__epochs": 2,
        "train__max_steps": 10,
        "data__eval_fraction": 0.2,
        "train__micro_batch_size": 1,
        **changes,
    }
    check(workshop.launch("two", processes=2, **settings))
    one, two = workshop.train("one", **settings), workshop.run_dir("two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    evals = [read_jsonl(run / "eval.jsonl")[-1] for run in (one, two)]
    assert evals[0]["eval_tokens"] == evals[1]["eval_tokens"]
    assert evals[1]["eval_loss"] == pytest.approx(evals[0]["eval_loss"], rel=1e-5)
    weights = [load_file(run / "model/model.safetensors") for run in (one, two)]
    for name in weights[0]:
        torch.testing.assert_close(*(w[name] for w in weights), atol=2e-4, rtol=2e-4)
    assert json.loads((two / "receipt.json").read_text())["num_processes"] == 2


def test_lora_on_two_processes_resumes_to_the_bit_and_on_one_process_too(workshop):
    base = workshop.train("base")
    settings = {
        "model__init": "pretrained", "model__path": str(base / "model"), "model__config": None, "model__tokenizer": None,
        "adapter__kind": "lora", "train__max_steps": 8, "train__epochs": 2, "checkpoint__every_steps": 3, "checkpoint__keep_last": 9,
    }  # fmt: skip
    check(workshop.launch("whole", processes=2, **settings))
    whole = workshop.run_dir("whole")
    for name, processes in (("again_two", 2), ("again_one", 1)):
        parts = workshop.run_dir(name)
        workshop.launch(name, processes=2, **settings)
        # Back to the state after step 3, as if the machine had gone in step 4 to 6.
        for later in (parts / "checkpoints/step-00000006", parts / "checkpoints/step-00000008"):
            for file in sorted(later.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            later.rmdir()
        (parts / "outcome.json").unlink()
        result = workshop.launch(name, processes=processes, **settings)
        check(result)
        assert "resumed from" in result.stderr
        assert "at step 3" in result.stderr
        if processes == 2:
            assert losses(parts) == losses(whole)
        else:
            assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_a_wrong_batch_size_is_an_error_before_anything_loads(workshop):
    result = workshop.launch("uneven", processes=2, train__global_batch_size=5, train__micro_batch_size=1)
    assert result.returncode != 0
    assert "it must be a multiple of 2, for example 6" in result.stderr
    assert not workshop.run_dir("uneven").exists()


def test_a_bad_row_ends_all_processes(workshop):
    workshop.rows.write_text('{"question": "a"}\n')
    result = workshop.launch("bad", processes=2)
    assert result.returncode != 0
    assert "rows.jsonl:1" in result.stderr
