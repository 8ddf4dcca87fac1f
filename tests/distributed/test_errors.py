"""Errors of one process end all of them."""

import pytest

pytestmark = pytest.mark.slow


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
