"""Micro-batches by step number.

Which process puts which sequence through the model follows from the position in the order alone:
any number of processes makes the same steps.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from finetune.data.columns import Columns
from finetune.data.examples import Examples
from finetune.data.order import Sequences
from finetune.data.stream import GrowingOrder, StreamedSequences
from finetune.data.views import Document
from finetune.data.windows import WindowedOrder

Counts = dict[str, int]
"""What losses are divided by: supervised `tokens`, `documents`, `examples`; and `input_tokens`."""


@dataclass(frozen=True)
class Batch:
    """What one process puts through the model at once.

    inputs: keyword arguments of the model's forward, in its names; input_ids int64 [B, T], where
    B = 1 for sequences laid end to end, or one padded row for each document. Of the S supervised
    tokens, labels int64 [S] are the ids, positions int64 [S] the places in the flattened hidden
    states [B * T] that predict them, document int64 [S] their documents. example int64 [D] is the
    example of each document, ends int64 [D] the place of its last token, -1 if a group has it
    elsewhere; lengths are those of the documents, on the host.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    positions: torch.Tensor
    document: torch.Tensor
    example: torch.Tensor
    ends: torch.Tensor
    lengths: tuple[int, ...]
    counts: Counts
    weights: torch.Tensor | None = None
    """float32 [S]: factors of the losses, where a row gave some."""
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """[D, ...] by name: what is known beforehand of documents."""
    token_columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """[S, ...] by name: what is known beforehand of supervised tokens."""
    group: Any = None
    """The processes that share this sequence, each with a `part` of its tokens."""
    owned: torch.Tensor | None = None
    """int64 [D]: in a group, the documents that count here; example and columns are theirs."""
    num_documents: int = 0
    """Of the whole sequences, without fillers: what `document` counts up to."""
    mismatched: "Batch | None" = None
    """The prompts of these documents, each with the answer of another (`data.mismatched`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", Columns(self.columns))

    def part(self, index: int, count: int, group: Any) -> "Batch":
        """Return one of `count` equal stretches of sequences laid end to end.

        A document that teaches nothing fills up the last. Documents are shared out by example: one
        that lies in several stretches counts on one process.
        """
        total = self.inputs["input_ids"].shape[1]
        length = -(-total // count)
        filler = length * count - total
        where = slice(index * length, (index + 1) * length)

        def stretch(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, filler))[:, where]

        mine = (self.positions >= where.start) & (self.positions < where.stop)
        owned = (self.example % count == index).nonzero().flatten()
        lengths = (*self.lengths, *([filler] if filler else []))
        in_stretch = max(0, min(total, where.stop) - where.start)
        example = self.example[owned]
        ends = torch.where(
            (self.ends >= where.start) & (self.ends < where.stop), self.ends - where.start, -1
        )
        counts = {
            "tokens": int(mine.sum()), "documents": len(owned), "examples": len(example.unique()),
            "input_tokens": in_stretch if self.counts["input_tokens"] else 0,
        }  # fmt: skip
        columns = {name: values[owned] for name, values in self.columns.items()}
        of_tokens = {name: values[mine] for name, values in self.token_columns.items()}
        ids, places = (stretch(self.inputs[name]) for name in ("input_ids", "position_ids"))
        inputs = {**_end_to_end(ids, places, lengths), "sequence_group": group}
        weights = None if self.weights is None else self.weights[mine]
        mismatched = self.mismatched and self.mismatched.part(index, count, group)
        return Batch(
            inputs, self.labels[mine], self.positions[mine] - where.start, self.document[mine],
            example, ends, lengths, counts, weights, columns, of_tokens, group, owned,
            self.num_documents, mismatched,
        )  # fmt: skip

    def to(self, device: torch.device) -> "Batch":
        """Copy all tensors to a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copy all tensors to page-locked memory, from where `to` does not make the host wait.

        An expanded tensor has to be written out first: page-locked memory is filled place by place.
        """
        return self._each(lambda tensor: tensor.contiguous().pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Change all tensors; one that stands under two names once."""
        changed: dict[int, torch.Tensor] = {}

        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: apply(each) for name, each in value.items()}
            if isinstance(value, Batch):
                return value._each(change)
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]

        return replace(self, **{name: apply(value) for name, value in self.__dict__.items()})


class Batches:
    """Micro-batches by step number, for one process of several."""

    def __init__(
        self, sequences: Sequences | StreamedSequences, *, seed: int, global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0, num_processes: int = 1, padded: bool = False, group_by_length: bool = False,
        pad_id: int = 0, shares_beginnings: bool = False,
    ) -> None:  # fmt: skip
        """shares_beginnings: put what documents of an example begin with alike in only once."""
        self.sequences = sequences
        self.seed, self.group_by_length = seed, group_by_length
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.num_processes = rank, num_processes
        self.padded, self.pad_id = padded, pad_id
        self.shares_beginnings = shares_beginnings
        self.mismatched: Batches | None = None
        self._order: tuple[int, np.ndarray | WindowedOrder | GrowingOrder] | None = None

    @property
    def in_memory(self) -> Sequences:
        """Return the sequences where all their lengths are in memory: without data.streaming."""
        assert isinstance(self.sequences, Sequences)
        return self.sequences

    def with_examples(self, examples: Examples) -> "Batches":
        """Return batches of other examples, as many and in the same order."""
        other = copy.copy(self)
        other.sequences = copy.copy(self.in_memory)
        other.sequences.examples, other.mismatched = examples, None
        return other

    @property
    def starts_early(self) -> bool:
        """Whether training may start before all shards of a stream are made."""
        return self.sequences.starts_early

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Wait for it, if shards of a stream are still made."""
        return -(-len(self.sequences) // self.global_batch_size)

    def turn(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and its number in this epoch."""
        if self.sequences.holds(step * self.global_batch_size):  # needs no other shard
            return 0, step
        return divmod(step, self.steps_per_epoch)

    def num_epochs(self, step: int) -> float:
        """Return the epochs of the first steps; 0 while the length of an epoch is not known."""
        return step / self.steps_per_epoch if self.sequences.is_whole else 0.0

    def progress(self) -> float:
        """Return a number that changes as long as shards are made that a step may wait for."""
        return self.sequences.progress()

    def of_all(self) -> "Batches":
        """Return the same steps as one process alone sees them."""
        whole = copy.copy(self)
        whole.rank, whole.num_processes = 0, 1
        return whole

    @property
    def fingerprint(self) -> str:
        """Hash of the rows as tokens: their content, template, tokenizer and order."""
        return self.sequences.examples.fingerprint

    def of_step(self, step: int) -> np.ndarray:
        """Return a step's sequences over all processes; the last of an epoch may have fewer."""
        epoch, number = self.turn(step)
        size = self.global_batch_size
        known = self._order  # one read: a thread that makes batches ahead may be in the next epoch
        if known is None or known[0] != epoch:
            made = self.sequences.order(self.seed, epoch, size, self.group_by_length)
            known = (epoch, made)
            self._order = known
        return known[1][number * size : (number + 1) * size]

    def size_of(self, step: int) -> int:
        """Return how many sequences a step has, without a look at the order.

        Reading that of a window that was left would fetch its shards again, and the length of an
        epoch is not known while shards of a stream are made.
        """
        if self.sequences.holds((step + 1) * self.global_batch_size - 1):
            return self.global_batch_size
        done = step % self.steps_per_epoch * self.global_batch_size
        return min(self.global_batch_size, len(self.sequences) - done)

    def places(self, step: int) -> list[str]:
        """Return file:line of every row of a step."""
        members = [self.sequences.members(each) for each in self.of_step(step)]
        return [self.sequences.examples.place(example) for example in np.concatenate(members)]

    def at(self, step: int) -> list[Batch]:
        """Return this process's micro-batches of a step; every process gets as many."""
        chosen = self.of_step(step)
        at_once = self.micro_batch_size * self.num_processes
        filled = np.full(-(-len(chosen) // at_once) * at_once, -1, np.int64)
        filled[: len(chosen)] = chosen
        mine = filled.reshape(-1, self.num_processes, self.micro_batch_size)[:, self.rank]
        epoch, _ = self.turn(step)
        return [self._collated(micro[micro >= 0], epoch) for micro in mine]

    def totals(self, step: int) -> Counts:
        """Count what a step is divided by, over all processes: from the order alone."""
        return self.sequences.counts(self.of_step(step))

    def all_totals(self) -> Counts:
        """Count the same over an epoch."""
        return self.sequences.all_counts()

    def _collated(self, sequences: np.ndarray, epoch: int = 0) -> Batch:
        documents = [
            each for number in sequences for each in self.sequences.documents(number, epoch)
        ]
        view = self.sequences.examples.view
        lay = _pad_pairs if view.has_target else _pad if self.padded else _lay_end_to_end
        batch = lay(documents, self.pad_id)
        if self.shares_beginnings and not self.padded:
            batch = _with_shared_beginnings(batch, documents)
        if view.predicts_documents:  # the model answers once for each row
            batch = replace(batch, positions=batch.document)
        columns = {}
        for name, values in self.sequences.examples.columns.items():
            # Of no document: none of its shape.
            own = [each.columns[name] for each in documents] or np.empty((0, *values.shape[1:]))
            columns[name] = torch.from_numpy(np.asarray(own, np.float32))
        weights = None
        if self.sequences.examples.weight_range is not None:
            given = [each.weights for each in documents if each.weights is not None]
            weights = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *given]))
        of_tokens = {}
        known = self.sequences.examples.token_columns
        for name, kind in view.token_columns(known).items():
            shape = known[name].shape[1:] if name in known else ()
            parts = [np.zeros((0, *shape), kind), *(e.token_columns[name] for e in documents)]
            of_tokens[name] = torch.from_numpy(np.concatenate(parts))
        beside = self.mismatched._collated(sequences, epoch) if self.mismatched else None
        return replace(
            batch, columns=columns, weights=weights, token_columns=of_tokens, mismatched=beside
        )

    def of_sequence(self, sequence: int) -> Batch:
        """Return one sequence alone, as it stands in its micro-batch."""
        return self.of_sequences(np.array([sequence]))

    def of_sequences(self, sequences: np.ndarray) -> Batch:
        """Return some sequences together, as a micro-batch of them is."""
        return self._collated(sequences)

    def filler(self) -> Batch:
        """Return what a process gets that has no sequence left: nothing in it is supervised."""
        return self._collated(np.zeros(0, np.int64))

    def largest(self) -> Batch:
        """Return as many of the largest sequences as a micro-batch may hold."""
        return self._collated(self.sequences.largest(self.micro_batch_size, self.padded))

    def epoch(self, epoch: int = 0) -> Iterator[list[Batch]]:
        for step in range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch):
            yield self.at(step)


def _lay_end_to_end(documents: list[Document], pad_id: int) -> Batch:
    ids = [document.ids for document in documents] or [_filler(pad_id)]
    lengths = tuple(map(len, ids))
    input_ids = torch.from_numpy(np.concatenate(ids))[None]
    position_ids = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None]
    inputs = _end_to_end(input_ids, position_ids, lengths)
    return _batch(documents, inputs, np.cumsum([0, *lengths[:-1]]), lengths)


def _with_shared_beginnings(batch: Batch, documents: list[Document]) -> Batch:
    """Put tokens that a document and the one before it, of the same example, begin with in once.

    A causal model has the same states there. Only attention sees the documents apart:
    `shared_tokens` int64 [T] is the place of each of their tokens among those that are put in,
    `own_places` int64 [T put in] where each of these stands among all.
    """
    places, own, total, before = list[np.ndarray](), list[np.ndarray](), 0, None
    for number, document in enumerate(documents):
        common = 0
        if before is not None and before.example == document.example:
            both = min(len(before.ids), len(document.ids))
            differ = np.flatnonzero(before.ids[:both] != document.ids[:both])
            common = int(differ[0]) if len(differ) else both
        new = total + np.arange(len(document.ids) - common)
        places.append(np.concatenate([places[-1][:common], new]) if common else new)
        own.append(sum(batch.lengths[:number]) + np.arange(common, len(document.ids)))
        total, before = total + len(new), document
    if total in (0, sum(batch.lengths)):
        return batch
    shared_tokens, own_places = (torch.from_numpy(np.concatenate(e)) for e in (places, own))
    inputs = {**batch.inputs, "shared_tokens": shared_tokens, "own_places": own_places}
    for name in ("input_ids", "position_ids"):
        inputs[name] = inputs[name][:, own_places]
    return replace(
        batch, inputs=inputs, positions=shared_tokens[batch.positions],
        ends=shared_tokens[batch.ends],
    )  # fmt: skip


def _pad(documents: list[Document], pad_id: int) -> Batch:
    """Put a document into each row, padded on the right; masked by position, never by token id."""
    rows = [document.ids for document in documents] or [_filler(pad_id)]
    lengths = tuple(map(len, rows))
    input_ids, mask = _rectangle(rows, pad_id)
    inputs = {
        "input_ids": input_ids, "attention_mask": mask,
        "position_ids": torch.arange(input_ids.shape[1]).expand(input_ids.shape),
        "use_cache": False,
    }  # fmt: skip
    return _batch(documents, inputs, np.arange(len(rows)) * input_ids.shape[1], lengths)


def _pad_pairs(documents: list[Document], pad_id: int) -> Batch:
    """Put a document into each row of the encoder, and its target into that of the decoder.

    Both are padded on the right, where a causal decoder needs no mask.
    """
    rows = [document.ids for document in documents] or [_filler(pad_id)]
    decoded = [document.target for document in documents if document.target is not None]
    input_ids, mask = _rectangle(rows, pad_id)
    decoder_input_ids, _ = _rectangle(decoded or [_filler(pad_id)], pad_id)
    inputs = {
        "input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": decoder_input_ids,
        "use_cache": False,
    }  # fmt: skip
    starts, lengths = np.arange(len(rows)) * decoder_input_ids.shape[1], tuple(map(len, rows))
    ends = np.arange(len(rows)) * input_ids.shape[1] + np.array(lengths) - 1
    batch = _batch(documents, inputs, starts, lengths)
    return replace(batch, ends=torch.from_numpy(ends[: len(documents)]))


def _rectangle(rows: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows padded on the right, and 1 where they are not, both int64 [rows, longest]."""
    shape = (len(rows), max(map(len, rows)))
    padded, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for number, ids in enumerate(rows):
        padded[number, : len(ids)], mask[number, : len(ids)] = ids, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def _filler(pad_id: int) -> np.ndarray:
    """Stand in where a process has no sequence left: a document that teaches nothing."""
    return np.full(2, pad_id, np.int64)


def _end_to_end(
    input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: tuple[int, ...]
) -> dict[str, Any]:
    """Name the inputs of a transformers causal LM for documents laid end to end."""
    bounds, longest = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), max(lengths)
    return {
        "input_ids": input_ids, "position_ids": position_ids, "use_cache": False,
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": longest, "max_length_k": longest,
        # On the host, so that no layer asks the device for its bounds.
        "document_lengths": SimpleNamespace(values=lengths),
    }  # fmt: skip


def _batch(
    documents: list[Document], inputs: dict[str, Any], starts: np.ndarray, lengths: tuple[int, ...]
) -> Batch:
    """`starts`: where each document begins in the flattened hidden states."""
    labels = [each.labels for each in documents]
    positions = [start + each.positions for start, each in zip(starts, documents)]
    owners = [np.full(len(each.labels), number) for number, each in enumerate(documents)]
    none = [np.zeros(0, np.int64)]
    labels_S, positions_S, document_S = (
        torch.from_numpy(np.concatenate(each or none)) for each in (labels, positions, owners)
    )
    places: dict[int, int] = {}  # number of an example -> its place in the batch
    of_documents = [places.setdefault(each.example, len(places)) for each in documents]
    counts = {
        "tokens": len(labels_S), "documents": len(documents), "examples": len(places),
        "input_tokens": sum(len(each.ids) for each in documents),
    }  # fmt: skip
    example_D = torch.tensor(of_documents, dtype=torch.int64)
    ends_D = torch.from_numpy((starts + np.array(lengths) - 1)[: len(documents)])
    return Batch(
        inputs, labels_S, positions_S, document_S, example_D, ends_D, lengths, counts,
        num_documents=len(documents),
    )  # fmt: skip
