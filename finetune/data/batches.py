"""Micro-batches by step number.

Which process puts which sequence through the model follows from the position in the order alone:
any number of processes makes the same steps.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from finetune.data.order import Document, Sequences, order

Counts = dict[str, int]
"""How much there is of what losses are divided by: supervised `tokens`, `documents`, `examples`;
and `input_tokens`, all.
"""


@dataclass(frozen=True)
class Batch:
    """What one process puts through the model at once.

    inputs: keyword arguments of the model's forward, in its names; input_ids int64 [B, T], where B
    = 1 for sequences laid end to end, or a row for each document, padded. S supervised tokens:
    labels int64 [S] are their ids, positions int64 [S] where in the flattened hidden states [B * T]
    each is predicted, found on the CPU so that no device has to be waited for, document int64 [S]
    the document of each. example int64 [D]: the example of each document. lengths: of the
    documents, on the host.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    positions: torch.Tensor
    document: torch.Tensor
    example: torch.Tensor
    lengths: tuple[int, ...]
    counts: Counts
    weights: torch.Tensor | None = None
    """float32 [S]: factors of the losses, where a row gave some."""
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """[D, ...] or [S, ...]: what is known beforehand of documents or supervised tokens, by name."""
    group: Any = None
    """Processes that share this sequence, each with a `part` of its tokens."""
    owned: torch.Tensor | None = None
    """int64 [D]: with a group, the documents that count on this process; example and columns are
    theirs.
    """
    num_documents: int = 0
    """Of the whole sequences, without fillers: what `document` counts up to."""

    def part(self, index: int, count: int, group: Any) -> "Batch":
        """One of `count` equal stretches of sequences laid end to end, filled up by a document that
        teaches nothing.

        Documents are shared out by example: one that lies in several stretches counts on one
        process.
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
        in_stretch = (
            max(0, min(total, where.stop) - where.start) if self.counts["input_tokens"] else 0
        )
        ids, places = (stretch(self.inputs[name]) for name in ("input_ids", "position_ids"))
        return replace(
            self, inputs={**_end_to_end(ids, places, lengths), "sequence_group": group},
            labels=self.labels[mine], positions=self.positions[mine] - where.start, document=self.document[mine],
            example=self.example[owned], lengths=lengths,
            counts={
                "tokens": int(mine.sum()), "documents": len(owned), "examples": len(self.example[owned].unique()), "input_tokens": in_stretch,
            },
            weights=None if self.weights is None else self.weights[mine],
            columns={name: values[owned if len(values) == self.num_documents else mine] for name, values in self.columns.items()},
            group=group, owned=owned,
        )  # fmt: skip

    def to(self, device: torch.device) -> "Batch":
        """With all tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """With all tensors in page-locked memory, from where `to` does not make the host wait."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """With all tensors changed; one that stands under two names is changed once."""
        changed: dict[int, torch.Tensor] = {}

        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: apply(each) for name, each in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]

        return replace(self, **{name: apply(value) for name, value in self.__dict__.items()})


class Batches:
    """Micro-batches by step number, for one process of several."""

    def __init__(
        self, sequences: Sequences, *, seed: int, global_batch_size: int, micro_batch_size: int,
        rank: int = 0, num_processes: int = 1, padded: bool = False, group_by_length: bool = False, pad_id: int = 0,
    ) -> None:  # fmt: skip
        self.sequences = sequences
        self.seed, self.group_by_length = seed, group_by_length
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.num_processes = rank, num_processes
        self.padded, self.pad_id = padded, pad_id
        self.steps_per_epoch = -(-len(sequences) // global_batch_size)
        self._order: tuple[int, np.ndarray] | None = None

    def of_all(self) -> "Batches":
        """The same steps as one process alone sees them."""
        whole = copy.copy(self)
        whole.rank, whole.num_processes = 0, 1
        return whole

    @property
    def fingerprint(self) -> str:
        """Of the rows as tokens: their content, template, tokenizer and order."""
        return self.sequences.examples.fingerprint

    def of_step(self, step: int) -> np.ndarray:
        """Sequences of one step over all processes; fewer than global_batch_size at the end of an
        epoch.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        known = self._order  # one read: a thread that makes batches ahead may be in the next epoch
        if known is None or known[0] != epoch:
            made = order(
                self.seed,
                epoch,
                self.sequences.lengths,
                self.global_batch_size,
                self.group_by_length,
            )
            self._order = known = (epoch, made)
        return known[1][number * self.global_batch_size : (number + 1) * self.global_batch_size]

    def places(self, step: int) -> list[str]:
        """file:line of every row of a step."""
        return [
            self.sequences.examples.place(e)
            for s in self.of_step(step)
            for e in self.sequences.members(s)
        ]

    def at(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step; every process gets the same number of them."""
        chosen = self.of_step(step)
        at_once = self.micro_batch_size * self.num_processes
        filled = np.full(-(-len(chosen) // at_once) * at_once, -1, np.int64)
        filled[: len(chosen)] = chosen
        mine = filled.reshape(-1, self.num_processes, self.micro_batch_size)[:, self.rank]
        collate = _pad if self.padded else _lay_end_to_end
        return [collate(self._documents(micro[micro >= 0]), self.pad_id) for micro in mine]

    def totals(self, step: int) -> Counts:
        """What a step is divided by, over all processes: known on the host, from the order alone."""
        members = np.concatenate(
            [self.sequences.members(sequence) for sequence in self.of_step(step)]
        )
        return self.sequences.examples.counts(members)

    def all_totals(self) -> Counts:
        """The same of an epoch."""
        return self.sequences.examples.counts(np.arange(len(self.sequences.examples)))

    def _documents(self, sequences: np.ndarray) -> list[Document]:
        return [
            document for sequence in sequences for document in self.sequences.documents(sequence)
        ]

    def largest(self) -> Batch:
        """As many of the longest sequences as a micro-batch may hold."""
        longest = np.argsort(-self.sequences.lengths, kind="stable")[: self.micro_batch_size]
        collate = _pad if self.padded else _lay_end_to_end
        return collate(self._documents(longest), self.pad_id)

    def epoch(self, epoch: int = 0) -> Iterator[list[Batch]]:
        for step in range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch):
            yield self.at(step)


def _lay_end_to_end(documents: list[Document], pad_id: int) -> Batch:
    ids = [document.ids for document in documents] or [_filler(pad_id)]
    lengths = tuple(map(len, ids))
    input_ids = torch.from_numpy(np.concatenate(ids))[None]
    position_ids = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None]
    return _batch(
        documents,
        _end_to_end(input_ids, position_ids, lengths),
        np.cumsum([0, *lengths[:-1]]),
        lengths,
    )


def _pad(documents: list[Document], pad_id: int) -> Batch:
    """One document a row, padded on the right. Padding is masked by position, never by token id."""
    rows = [document.ids for document in documents] or [_filler(pad_id)]
    lengths = tuple(map(len, rows))
    shape = (len(rows), max(lengths))
    input_ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    inputs = {
        "input_ids": torch.from_numpy(input_ids), "position_ids": torch.arange(shape[1]).expand(shape), "use_cache": False,
        "attention_mask": torch.from_numpy(mask),
    }  # fmt: skip
    return _batch(documents, inputs, np.arange(len(rows)) * shape[1], lengths)


def _filler(pad_id: int) -> np.ndarray:
    """Stands in where a process has no sequence left: it goes through the model and teaches
    nothing.
    """
    return np.full(2, pad_id, np.int64)


def _end_to_end(
    input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: tuple[int, ...]
) -> dict[str, Any]:
    """Keyword arguments of a transformers causal LM for documents laid end to end, in its names."""
    bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return {
        "input_ids": input_ids, "position_ids": position_ids, "use_cache": False,
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths), "max_length_k": max(lengths),
        # So that no layer need ask the device for its bounds
        "document_lengths": SimpleNamespace(values=lengths),
    }  # fmt: skip


def _batch(
    documents: list[Document], inputs: dict[str, Any], starts: np.ndarray, lengths: tuple[int, ...]
) -> Batch:
    """`starts`: where each document begins in the flattened hidden states."""
    none = [np.zeros(0, np.int64)]
    labels = [document.ids[document.predicted + 1] for document in documents]
    positions = [start + document.predicted for start, document in zip(starts, documents)]
    owner = [np.full(len(document.predicted), number) for number, document in enumerate(documents)]
    numbers = {
        number: place
        for place, number in enumerate(dict.fromkeys(document.example for document in documents))
    }
    example_D = torch.tensor(
        [numbers[document.example] for document in documents], dtype=torch.int64
    )
    labels_S, positions_S, document_S = (
        torch.from_numpy(np.concatenate(each or none)) for each in (labels, positions, owner)
    )
    return Batch(
        inputs, labels_S, positions_S, document_S, example_D, lengths,
        counts={
            "tokens": len(labels_S), "documents": len(documents), "examples": len(numbers),
            "input_tokens": sum(len(document.ids) for document in documents),
        },
        num_documents=len(documents),
    )  # fmt: skip
