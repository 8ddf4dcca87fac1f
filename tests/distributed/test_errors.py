"""Errors of one process end all of them."""

import json

import pytest
from faults.forked import fork

from finetune import errors

pytestmark = pytest.mark.slow


def test_a_wrong_batch_size_is_an_error_before_anything_loads(workshop):
    result = workshop.launch(
        "uneven", processes=2, train__global_batch_size=5, train__micro_batch_size=1
    )
    assert result.returncode != 0
    assert "it must be a multiple of 2, for example 6" in result.stderr
    assert not workshop.run_dir("uneven").exists()


def test_a_bad_row_ends_all_processes(workshop):
    workshop.rows.write_text('{"question": "a"}\n')
    result = workshop.launch("bad", processes=2)
    assert result.returncode != 0
    assert "rows.jsonl:1" in result.stderr


def test_error_keeps_its_type_everywhere_and_its_traceback_where_it_happened(tmp_path):
    launch = fork("distributed.raising", [], "ddp", [tmp_path / "0.log", tmp_path / "1.log"], {})
    assert launch.codes(within=60) == [0, 0], launch.output()
    lines = [
        json.loads(line[5:]) for line in launch.output().splitlines() if line.startswith("TOLD ")
    ]
    results = {(each["verb"], each["kind"], each["rank"]): each for each in lines}
    for verb, origin in (("on_main", 0), ("on_every", 1)):
        for kind in (
            "DirectoryInUse",
            "OutOfMemory",
            "TrainingDiverged",
            "TopologyError",
            "UserError",
        ):
            for rank in (0, 1):
                got = results[verb, kind, rank]
                assert (got["type"], got["message"], got["code"]) == (
                    kind,
                    "why",
                    getattr(errors, kind).exit_code,
                )
        unknown = [
            (kind, "ProcessFailed") for kind in ("KeyError", "SystemExit", "KeyboardInterrupt")
        ]
        for kind, elsewhere in (*unknown, ("OutOfMemoryError", "OutOfMemory")):
            assert results[verb, kind, origin]["type"] == kind
            got = results[verb, kind, 1 - origin]
            assert (got["type"], got["code"]) == (elsewhere, 1)
            assert got["message"].startswith(f"process {origin}: ")
        for (said_by, _, rank), got in results.items():
            if said_by == verb:
                assert got["shown"] == (rank == origin)
                assert got["cause"] == ("ValueError('the cause')" if rank == origin else "None")
    assert [results["both", "UserError", rank]["type"] for rank in (0, 1)] == [
        "UserError",
        "UserError",
    ]
    assert results["both", "UserError", 0]["cause"] == "TopologyError('why')"
