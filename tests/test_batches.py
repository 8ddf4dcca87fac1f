"""Any number of processes makes the same steps; labels never cross documents."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pairs, read_jsonl, write_jsonl

from finetune.data.batches import Batch, Batches
from finetune.data.examples import Examples, Ragged
from finetune.data.order import GROUP_STEPS, Sequences, order

IGNORE = -100  # no label
EOS = 1  # also the padding, as in many tokenizers
METRICS = "metrics.jsonl"
LENGTHS = np.random.default_rng(0).integers(2, 30, 53)


def examples_of(lengths: np.ndarray) -> Examples:
    """Example i is [10 + i, random..., EOS], of which the second half is supervised."""
    random = np.random.default_rng(3)
    parts, supervised = [], []
    for number, length in enumerate(lengths):
        parts.append(
            np.concatenate([[10 + number], random.integers(1000, 2000, length - 2), [EOS]]).astype(
                np.int32
            )
        )
        supervised.append(np.arange(length) >= max(1, length // 2))
    ends = np.cumsum(lengths)
    return Examples(
        {"input": Ragged(np.concatenate(parts), ends - lengths, ends)}, np.concatenate(supervised),
        np.arange(len(lengths)) % 2, np.arange(len(lengths)) + 1, np.zeros(len(lengths), int),
        ["a.jsonl", "b.jsonl"], "fingerprint", len(lengths), 0, 0,
    )  # fmt: skip


EXAMPLES = examples_of(LENGTHS)


def batches_of(lengths: np.ndarray = LENGTHS, packing: bool = False, **settings) -> Batches:
    settings = {"seed": 4, "global_batch_size": 8, "micro_batch_size": 2, "pad_id": EOS} | settings
    return Batches(Sequences(examples_of(lengths), packing, 64, seed=4), **settings)


def targets_of(batch: Batch) -> torch.Tensor:
    """The label at every place of the input, IGNORE where nothing is supervised."""
    flat = torch.full((batch.inputs["input_ids"].numel(),), IGNORE)
    flat[batch.positions] = batch.labels
    return flat.view_as(batch.inputs["input_ids"])


def documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Return (input_ids, labels) of every document in a micro-batch, without fillers."""
    found, inputs, whole = [], batch.inputs, targets_of(batch)
    if "attention_mask" in inputs:
        for ids, targets, mask in zip(inputs["input_ids"], whole, inputs["attention_mask"].bool()):
            found.append((ids[mask].tolist(), targets[mask].tolist()))
    else:
        bounds = inputs["cu_seq_lens_q"]
        for start, end in zip(bounds[:-1], bounds[1:]):
            found.append((inputs["input_ids"][0, start:end].tolist(), whole[0, start:end].tolist()))
    return [document for document in found if document[0] != [EOS, EOS]]


def of_example(examples: Examples, number: int) -> tuple[list[int], list[int]]:
    """What a document should hold: its tokens, and for each the next one where that is learned."""
    part = examples.input.span(number)
    ids, supervised = examples.input.ids[part].tolist(), examples.supervised[part].tolist()
    return ids, [
        token if learned else IGNORE for token, learned in zip(ids[1:], supervised[1:])
    ] + [IGNORE]


@pytest.fixture(params=[False, True], ids=["end to end", "padded"])
def padded(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["examples", "packs"])
def packing(request):
    return request.param


# The plan


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 53, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_every_epoch_holds_every_sequence_once(group_by_length, count, epoch):
    lengths = np.random.default_rng(count).integers(1, 100, count)
    assert sorted(order(0, epoch, lengths, 8, group_by_length)) == list(range(count))


@pytest.mark.parametrize("group_by_length", [False, True])
def test_the_plan_follows_from_seed_and_epoch_alone(group_by_length):
    def ordered(seed: int, epoch: int) -> list[int]:
        return order(seed, epoch, LENGTHS, 8, group_by_length).tolist()

    first = ordered(1, 2)
    np.random.default_rng().random(100)
    np.random.seed(5)
    assert ordered(1, 2) == first
    assert ordered(1, 3) != first
    assert ordered(2, 2) != first


def test_the_plan_leaves_the_lengths_as_they_were():
    lengths = LENGTHS.copy()
    order(0, 0, lengths, 8, True)
    assert np.array_equal(lengths, LENGTHS)


def test_grouping_puts_like_lengths_into_one_step_and_its_steps_in_no_order():
    lengths = np.random.default_rng(0).integers(1, 1000, 8 * GROUP_STEPS)
    steps = lengths[order(0, 0, lengths, 8, True)].reshape(-1, 8)
    alone = lengths[order(0, 0, lengths, 8, False)].reshape(-1, 8)
    assert np.ptp(steps, axis=1).mean() < 0.1 * np.ptp(alone, axis=1).mean()
    means = steps.mean(axis=1)
    assert not np.array_equal(means, np.sort(means))
    assert not np.array_equal(means, np.sort(means)[::-1])


def test_grouping_keeps_an_incomplete_step_last_and_random():
    lengths = np.arange(8 * 3 + 5)
    last = {tuple(order(0, epoch, lengths, 8, True)[24:]) for epoch in range(5)}
    assert len(last) == 5


# Steps and processes


def test_the_steps_of_an_epoch_hold_every_sequence_once(packing):
    batches = batches_of(packing=packing)
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        chosen = np.concatenate([batches.of_step(step) for step in steps])
        assert sorted(chosen) == list(range(len(batches.sequences)))
        assert all(len(batches.of_step(step)) == 8 for step in steps[:-1])


def test_a_step_is_the_same_whenever_it_is_asked_for():
    """Resuming at a step, going back to it and arriving at it give the same sequences."""
    arrived, jumped = batches_of(), batches_of()
    orders = [arrived.of_step(step).tolist() for step in range(20)]
    assert [jumped.of_step(step).tolist() for step in (19, 0, 7, 13)] == [
        orders[step] for step in (19, 0, 7, 13)
    ]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 2, 4], ids=["first", "last of an epoch", "in the next"])
def test_any_number_of_processes_makes_the_same_step(
    num_processes, micro_batch_size, step, padded, packing
):
    """53 examples in steps of 24: the third is incomplete. Packed, the steps are of 12."""
    size = 12 if packing else 24
    shared = {"global_batch_size": size, "padded": padded, "packing": packing}
    whole = batches_of(**shared, micro_batch_size=size)
    ranks = [
        batches_of(
            **shared, micro_batch_size=micro_batch_size, rank=rank, num_processes=num_processes
        ).at(step)
        for rank in range(num_processes)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    members = [
        example for sequence in whole.of_step(step) for example in whole.sequences.members(sequence)
    ]
    expected = sorted(of_example(whole.sequences.examples, example) for example in members)
    together = [batch for batches in ranks for batch in batches]
    assert sorted(document for batch in together for document in documents(batch)) == expected
    assert sum(batch.counts["input_tokens"] for batch in together) == sum(
        len(ids) for ids, _ in expected
    )
    assert sum(batch.counts["tokens"] for batch in together) == sum(
        target != IGNORE for _, targets in expected for target in targets
    )


def test_an_incomplete_last_step_gives_each_process_as_many_micro_batches(padded):
    """5 sequences for 4 processes of 2: the last process runs fillers only."""
    lengths = LENGTHS[:13]
    ranks = [batches_of(lengths, rank=rank, num_processes=4, padded=padded) for rank in range(4)]
    assert [len(rank.of_step(1)) for rank in ranks] == [5] * 4
    held = [[len(documents(batch)) for batch in rank.at(1)] for rank in ranks]
    assert held == [[2], [2], [1], [0]]


def test_a_filler_has_no_labels(padded):
    (filler,) = batches_of(LENGTHS[:13], rank=3, num_processes=4, padded=padded).at(1)
    assert set(filler.counts.values()) == {0}
    assert len(filler.labels) == len(filler.example) == 0
    assert filler.inputs["input_ids"].numel() > 0


def test_an_epoch_is_its_steps_one_after_the_other(padded):
    batches = batches_of(padded=padded)
    steps = list(batches.epoch(1))
    assert len(steps) == batches.steps_per_epoch == 7
    for number, step in enumerate(steps):
        for one, other in zip(step, batches.at(7 + number), strict=True):
            assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    assert sum(len(documents(batch)) for step in steps for batch in step) == len(LENGTHS)


def test_the_rows_of_a_step_are_named_by_file_and_line(packing):
    batches = batches_of(packing=packing)
    members = [
        example
        for sequence in batches.of_step(1)
        for example in batches.sequences.members(sequence)
    ]
    assert batches.places(1) == [f"{'ab'[example % 2]}.jsonl:{example + 1}" for example in members]
    assert len(batches.places(1)) >= 8


# Layout


def test_labels_are_the_next_supervised_tokens_and_never_cross_documents(padded, packing):
    batches = batches_of(padded=padded, packing=packing)
    seen = 0
    for step in batches.epoch():
        for batch in step:
            assert (
                len(batch.positions)
                == len(batch.labels)
                == len(batch.document)
                == batch.counts["tokens"]
            )
            assert len(batch.positions.unique()) == len(batch.positions)
            starts = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
            if not padded:
                assert torch.equal(
                    torch.searchsorted(starts, batch.positions, right=True) - 1, batch.document
                )
            assert (
                batch.counts["documents"]
                == batch.counts["examples"]
                == len(batch.example)
                == batch.num_documents
            )
            for ids, targets in documents(batch):
                assert (ids, targets) == of_example(batches.sequences.examples, ids[0] - 10)
                assert targets[-1] == IGNORE
                seen += 1
    assert seen == len(LENGTHS)


def test_padded_and_packed_batches_hold_the_same_pairs_of_token_and_label(packing):
    for one, other in zip(
        batches_of(packing=packing).epoch(),
        batches_of(packing=packing, padded=True).epoch(),
        strict=True,
    ):
        for laid, rectangle in zip(one, other, strict=True):
            assert documents(laid) == documents(rectangle)
            assert laid.counts == rectangle.counts


def test_padding_is_masked_by_position_so_that_an_eos_is_still_seen():
    """The padding has the id of the EOS that ends every document."""
    for step in batches_of(padded=True).epoch():
        for batch in step:
            lengths = batch.inputs["attention_mask"].sum(dim=1)
            assert lengths.sum() == batch.counts["input_tokens"]
            for ids, targets, mask, length in zip(
                batch.inputs["input_ids"],
                targets_of(batch),
                batch.inputs["attention_mask"],
                lengths,
            ):
                assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
                assert ids[length - 1] == EOS
                assert targets[length - 2] == EOS, "stopping is learned"
                assert (ids[length:] == EOS).all()
                assert (targets[length:] == IGNORE).all()


def test_positions_begin_anew_in_every_document(packing):
    for step in batches_of(packing=packing).epoch():
        for batch in step:
            lengths = batch.inputs["cu_seq_lens_q"].diff().tolist()
            assert batch.inputs["position_ids"][0].tolist() == [
                position for n in lengths for position in range(n)
            ]
            assert batch.lengths == tuple(lengths)


def test_positions_of_a_padded_batch_count_from_0():
    for batch in batches_of(padded=True).at(0):
        places = torch.arange(max(batch.lengths)).expand_as(batch.inputs["input_ids"])
        assert torch.equal(batch.inputs["position_ids"], places)


def test_a_batch_is_called_as_transformers_calls_it(padded):
    batch = batches_of(padded=padded).at(0)[0]
    inputs = batch.inputs
    assert (
        inputs["input_ids"].dtype
        == inputs["position_ids"].dtype
        == batch.labels.dtype
        == torch.int64
    )
    assert inputs["use_cache"] is False
    assert inputs["input_ids"].shape == inputs["position_ids"].shape
    if padded:
        assert inputs["attention_mask"].shape == inputs["input_ids"].shape
        assert "cu_seq_lens_q" not in inputs
    else:
        assert "attention_mask" not in inputs, "a mask of ones would let documents see each other"
        assert inputs["cu_seq_lens_q"].dtype == torch.int32
        assert (
            inputs["cu_seq_lens_q"].tolist()
            == inputs["cu_seq_lens_k"].tolist()
            == [0, *np.cumsum(batch.lengths)]
        )
        assert inputs["max_length_q"] == inputs["max_length_k"] == max(batch.lengths)
        assert inputs["cu_seq_lens_q"][-1] == inputs["input_ids"].shape[1]


def test_a_micro_batch_has_the_requested_number_of_sequences(padded):
    for batch in batches_of(micro_batch_size=4, padded=padded).at(0):
        assert len(documents(batch)) == 4


def test_a_pack_is_a_sequence_of_at_most_max_length_tokens():
    batches = batches_of(packing=True)
    assert len(batches.sequences) < len(LENGTHS)
    assert batches.sequences.lengths.max() <= 64
    for sequence in range(len(batches.sequences)):
        assert (
            sum(len(document.ids) for document in batches.sequences.documents(sequence))
            == batches.sequences.lengths[sequence]
        )


def test_grouping_by_length_pads_less():
    def padding(group_by_length: bool) -> int:
        batches = batches_of(padded=True, micro_batch_size=8, group_by_length=group_by_length)
        return sum(
            batch.inputs["input_ids"].numel() - batch.counts["input_tokens"]
            for step in batches.epoch()
            for batch in step
        )

    assert padding(True) < 0.5 * padding(False)


def test_one_sequence_makes_one_step(padded):
    batches = batches_of(np.array([5]), padded=padded)
    assert batches.steps_per_epoch == 1
    assert [len(documents(batch)) for batch in batches.at(3)] == [1]


# Examples of several documents, and what a step is divided by


def pairs_of(lengths: np.ndarray = LENGTHS[:52]) -> Examples:
    """Two documents an example."""
    whole = examples_of(lengths)
    count = len(lengths) // 2
    return replace(
        whole, source=whole.source[:count], line=whole.line[:count], row=whole.row[:count],
        example_ends=2 * np.arange(1, count + 1),
    )  # fmt: skip


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_totals_of_a_step_are_what_all_processes_hold(num_processes, packing, padded):
    for examples in (examples_of(LENGTHS), pairs_of()):
        sequences = Sequences(examples, packing, 64, seed=4)
        ranks = [
            Batches(
                sequences,
                seed=4,
                global_batch_size=8,
                micro_batch_size=2,
                pad_id=EOS,
                padded=padded,
                rank=rank,
                num_processes=num_processes,
            )
            for rank in range(num_processes)
        ]
        for step in range(ranks[0].steps_per_epoch):
            held = [batch.counts for rank in ranks for batch in rank.at(step)]
            assert ranks[0].totals(step) == {
                name: sum(counts[name] for counts in held) for name in held[0]
            }
        whole = ranks[0].all_totals()
        assert whole["examples"] == len(examples)
        assert whole["tokens"] == examples.num_supervised_tokens


def test_documents_of_an_example_stay_together_and_know_it(packing, padded):
    examples = pairs_of()
    sequences = Sequences(examples, packing, 128, seed=4)
    batches = Batches(
        sequences, seed=4, global_batch_size=8, micro_batch_size=3, pad_id=EOS, padded=padded
    )
    seen = 0
    for batch in (batch for step in batches.epoch() for batch in step):
        assert batch.example.tolist() == [
            number for number in range(len(batch.example) // 2) for _ in range(2)
        ]
        firsts = [ids[0] - 10 for ids, _ in documents(batch)]
        assert [
            second - first for first, second in zip(firsts[::2], firsts[1::2], strict=True)
        ] == [1] * (len(firsts) // 2)
        seen += batch.counts["examples"]
    assert seen == len(examples)


def test_a_subset_of_pairs_keeps_pairs_together(packing):
    examples = pairs_of()
    assert examples.subset(np.array([3, 1])).digests() == [
        examples.digests()[3],
        examples.digests()[1],
    ]
    assert examples.subset(np.array([3, 1])).lengths.tolist() == examples.lengths[[3, 1]].tolist()


@pytest.mark.parametrize("count", [2, 3])
def test_stretches_of_shared_sequences_hold_every_token_and_document_once(count):
    sequences = Sequences(pairs_of(), True, 128, seed=4)
    batches = Batches(sequences, seed=4, global_batch_size=8, micro_batch_size=3, pad_id=EOS)
    for whole in (batch for step in batches.epoch() for batch in step):
        parts = [whole.part(index, count, "group") for index in range(count)]
        length = parts[0].inputs["input_ids"].shape[1]
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert torch.equal(
            torch.cat([part.positions + n * length for n, part in enumerate(parts)]),
            whole.positions,
        )
        assert sorted(torch.cat([part.owned for part in parts]).tolist()) == list(
            range(whole.num_documents)
        )
        assert {
            name: sum(part.counts[name] for part in parts) for name in whole.counts
        } == whole.counts


def test_the_largest_padded_micro_batch_has_the_largest_rectangle():
    """Of examples of several documents: each document is a row, as long as the longest."""
    examples = examples_of(np.array([50, 50, 99, 3, 75, 75]))
    pairs = replace(
        examples, example_ends=np.array([2, 4, 6]), source=examples.source[:3],
        line=examples.line[:3], row=examples.row[:3],
    )  # fmt: skip
    for padded, lengths in ((True, (99, 3)), (False, (75, 75))):
        found = Batches(
            Sequences(pairs, False, 200, seed=4), seed=4, global_batch_size=3, micro_batch_size=1,
            padded=padded,
        ).largest()  # fmt: skip
        assert found.lengths == lengths


def weighted(examples: Examples) -> Examples:
    """Give each token a weight, which follows from its id."""
    return replace(examples, weights=(examples.input.ids % 7 / 4).astype(np.float32))


@pytest.mark.parametrize("num_processes", [1, 3])
def test_weights_travel_with_their_tokens(packing, padded, num_processes):
    expected = Counter[tuple[int, float]]()
    for number in range(len(LENGTHS)):
        expected.update((t, t % 7 / 4) for t in of_example(EXAMPLES, number)[1] if t != IGNORE)
    found = Counter[tuple[int, float]]()
    for rank in range(num_processes):
        batches = Batches(
            Sequences(weighted(EXAMPLES), packing, 64, seed=4), seed=4, global_batch_size=8,
            micro_batch_size=2, padded=padded, rank=rank, num_processes=num_processes,
        )  # fmt: skip
        for batch in (each for step in batches.epoch() for each in step):
            for index in range(2):
                part = batch if padded else batch.part(index, 2, None)
                if not (padded and index):
                    found.update(zip(part.labels.tolist(), part.weights.tolist(), strict=True))
    assert found == expected
    assert batches.filler().weights.tolist() == []


def weighted_rows(path: Path, weights: Sequence[float]) -> str:
    """Write question and answer rows whose answers have these weights."""
    rows = []
    for pair, weight in zip(pairs(len(weights)), weights):
        answer = {"role": "assistant", "content": pair["answer"], "weight": weight}
        rows.append({"messages": [{"role": "user", "content": pair["question"]}, answer]})
    return str(write_jsonl(path, rows))


def test_weighted_runs_learn_the_same_in_any_shape(workshop):
    """Packed or not, 24 sequences at once or one by one: the same losses and norms."""
    rows = weighted_rows(workshop.folder / "weighted.jsonl", [0.25 + n % 3 for n in range(24)])
    given = {"data__train": rows, "train__epochs": 3, "train__global_batch_size": 24}
    lines = {}
    for name, changes in {
        "at-once": {"train__micro_batch_size": 24}, "one-by-one": {"train__micro_batch_size": 1},
        "packed": {"data__packing": True, "train__micro_batch_size": 2, "data__max_length": 150},
    }.items():  # fmt: skip
        run = workshop.train(name, **given, **changes)
        lines[name] = [(line["loss"], line["grad_norm"]) for line in read_jsonl(run / METRICS)]
        assert len(lines[name]) == 3
        np.testing.assert_allclose(lines[name], lines["at-once"], rtol=2e-5)


def test_a_weighted_loss_is_divided_by_the_number_of_supervised_tokens(workshop, capsys):
    found = []
    for weight in (1, 0.5):
        rows = weighted_rows(workshop.folder / f"{weight}.jsonl", [weight] * 8)
        run = workshop.train(f"w{weight}", data__train=rows, train__max_steps=1)
        found.append(read_jsonl(run / METRICS)[0]["loss"])
    assert found[1] == pytest.approx(found[0] / 2, rel=1e-6)
    shown = re.findall("learned(.*?);", capsys.readouterr().out)
    assert shown == ["", " with weights from 0.5 to 0.5"]


def test_weights_count_in_the_loss_and_not_in_the_cross_entropy(workshop, monkeypatch):
    whole = Batches._collated

    def halved(batches, *chosen):
        batch = whole(batches, *chosen)
        return replace(batch, weights=torch.full((len(batch.labels),), 0.5))

    monkeypatch.setattr(Batches, "_collated", halved)
    run = workshop.train(train__max_steps=1, data__eval_fraction=0.2)
    [line] = read_jsonl(run / "eval.jsonl")
    assert line["cross_entropy"] == pytest.approx(2 * line["eval_loss"], rel=1e-6)
