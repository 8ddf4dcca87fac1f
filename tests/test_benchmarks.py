"""The comparisons of single kernels run on a CPU with tiny shapes, and their figures are right."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import attention
import chip
import head
import optim

from finetune.models.varlen_choice import Work


def cells(table):
    """Return {name: {column: cell}} of a table in markdown."""
    first, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    )
    return {row[0]: dict(zip(first[1:], row[1:])) for row in rows}


def test_every_kernel_of_attention_agrees_with_float32():
    """A document that sees its neighbour would be a tenth away, or more."""
    lengths = [7, 1, 24]
    work = Work(4, 2, 16, torch.bfloat16, False, tuple(lengths), tuple(sorted(lengths)))
    found = cells(attention.measure(work, rounds=1, rate=1e12))
    assert set(found) >= {"ours", "SDPA, flash, each document", "SDPA, mask of documents"}
    for row in found.values():
        assert float(row["error of output"]) < 1e-2
        assert float(row["of the worst gradient"]) < 1e-2


def test_packs_of_attention_are_named_by_their_documents():
    assert attention.documents("8x1024") == [1024] * 8
    mixed = attention.documents("mixed8192")
    assert (sum(mixed), max(mixed) <= 600) == (8192, True)
    with pytest.raises(Exception, match="neither 8x1024 nor mixed8192"):
        attention.documents("many")


def test_optimizers_are_measured_by_bytes_and_by_how_far_they_move(monkeypatch):
    """Steps of 1e-5 on weights of 0.02: rounding bfloat16 to the nearest loses most of them."""
    monkeypatch.setattr(optim, "SIZE", 64)
    found = {}
    for name in ("ours, stochastic rounding", "torch AdamW, fused, bf16 to the nearest"):
        row = optim.measure(name, *optim.ways()[name], count=2, rounds=1, rate=1e9)
        assert row[3] == "14", "reads weight, gradient and two averages, writes three of them"
        found[name] = float(row[-1].rstrip("%"))
    assert found["ours, stochastic rounding"] == pytest.approx(100, abs=5)
    assert found["torch AdamW, fused, bf16 to the nearest"] < 50


def test_what_fails_is_named_and_the_rest_is_measured():
    def breaks():
        raise ImportError("no such package")

    medians, failed = chip.alternate({"a": lambda: [1.0, 2.0], "b": breaks}, rounds=2)
    assert (medians, failed) == ({"a": [1.0, 2.0]}, {"b": "ImportError: no such package"})
    assert chip.notes(failed) == "\n- cannot run here: b: ImportError: no such package"


def test_the_head_gives_the_gradients_of_all_logits():
    sizes = head.made(20, 16, 50)
    right = head.gradients(head.plain, *sizes)
    for own, wanted in zip(head.gradients(head.without_kernel, *sizes), right):
        assert ((own - wanted).norm() / wanted.norm()).item() < 1e-2
