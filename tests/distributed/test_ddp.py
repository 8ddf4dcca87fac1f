"""Two processes, by the real accelerate launch, are one process."""


import pytest
from conftest import losses

pytestmark = pytest.mark.slow


def check(result):
    assert result.returncode == 0, result.stderr[-3000:]


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
