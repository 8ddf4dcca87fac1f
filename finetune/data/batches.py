"""The plan of a run and its micro-batches.

The plan is a pure function (seed, epoch, lengths) -> order of sequences; a position in it is an
integer, so resuming is arithmetic. Which process puts which sequence through the model follows
from the position alone: any number of processes makes the same steps.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from finetune.data.packing import pack
from finetune.data.tokens import Examples

IGNORE = -100  # a target that is not learned; PyTorch's own ignore_index
GROUP_STEPS = 50  # steps whose sequences are sorted by length together; more would wear the order's randomness down


@dataclass(frozen=True)
class Batch:
    """What one process puts through the model at once.

    input_ids, position_ids, targets: int64 [B, T]; targets[b, t] is the token after t in the same
    document, or IGNORE; learned int64 [S] is where in the flattened targets it is not, found on the
    CPU so that no device has to be waited for. Sequences laid end to end: B = 1, and bounds int32
    [documents + 1] says where each document starts and the last one ends. Padded: bounds is None,
    attention_mask [B, T].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    learned: torch.Tensor
    bounds: torch.Tensor | None
    attention_mask: torch.Tensor | None
    lengths: tuple[int, ...]
    """Of the documents, on the host: no layer need ask the device for its bounds."""
    num_tokens: int
    group: Any = None
    """Processes that share this sequence, each with a `part` of its tokens; bounds are those of the whole."""

    @property
    def num_supervised(self) -> int:
        return len(self.learned)

    def part(self, index: int, count: int, group: Any) -> "Batch":
        """One of `count` equal stretches of sequences laid end to end, filled up by a document that teaches nothing."""
        assert self.bounds is not None
        total = self.input_ids.shape[1]
        length = -(-total // count)
        filler = length * count - total
        where = slice(index * length, (index + 1) * length)

        def stretch(values: torch.Tensor, fill: int) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, filler), value=fill)[:, where]

        targets = stretch(self.targets, IGNORE)
        ends = [self.bounds, *([torch.tensor([length * count], dtype=torch.int32)] if filler else [])]
        return Batch(
            input_ids=stretch(self.input_ids, 0), position_ids=stretch(self.position_ids, 0), targets=targets,
            learned=_learned(targets),
            bounds=torch.cat(ends), attention_mask=None, lengths=(*self.lengths, *([filler] if filler else [])),
            num_tokens=max(0, min(total, where.stop) - where.start) if self.num_tokens else 0,
            group=group,
        )  # fmt: skip

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in self.__dict__.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers causal LM, in its names."""
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        if self.bounds is None:
            return inputs | {"attention_mask": self.attention_mask}
        return inputs | {
            "cu_seq_lens_q": self.bounds, "cu_seq_lens_k": self.bounds,
            "max_length_q": max(self.lengths), "max_length_k": max(self.lengths), "document_lengths": SimpleNamespace(values=self.lengths),
            **({"sequence_group": self.group} if self.group else {}),
        }  # fmt: skip


class Sequences:
    """Examples, alone or packed: the unit that the plan orders and batch sizes count."""

    def __init__(self, examples: Examples, packing: bool, max_length: int, seed: int) -> None:
        self.examples = examples
        self._packs = pack(examples.lengths, max_length, seed) if packing else None
        lengths = examples.lengths
        self.lengths = np.array([lengths[members].sum() for members in self._packs]) if self._packs else lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def members(self, sequence: int) -> np.ndarray:
        """Examples of one sequence."""
        return self._packs[sequence] if self._packs else np.array([sequence])

    def documents(self, sequence: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input_ids, targets), int64 [T] each, of every document in a sequence."""
        return [self._document(example) for example in self.members(sequence)]

    def _document(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.examples.starts[example], self.examples.ends[example])
        ids = np.asarray(self.examples.input_ids[part], np.int64)
        targets = np.full(len(ids), IGNORE, np.int64)
        targets[:-1] = np.where(self.examples.supervised[part][1:], ids[1:], IGNORE)
        return ids, targets


def plan(seed: int, epoch: int, lengths: np.ndarray, batch_size: int, group_by_length: bool) -> np.ndarray:
    """Order of the sequences of one epoch, int64 [sequences]: every one exactly once.

    With `group_by_length`, each window of GROUP_STEPS steps is sorted by length and cut into
    steps, whose order is random again; a last incomplete step stays last.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if not group_by_length:
        return order
    whole = len(order) - len(order) % batch_size
    steps: list[np.ndarray] = []
    for start in range(0, whole, batch_size * GROUP_STEPS):
        window = order[start : min(start + batch_size * GROUP_STEPS, whole)]
        window = window[np.argsort(-lengths[window], kind="stable")]
        steps += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return np.concatenate([*(steps[i] for i in random.permutation(len(steps))), order[whole:]])


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
        """Sequences of one step over all processes; fewer than global_batch_size at the end of an epoch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = plan(self.seed, epoch, self.sequences.lengths, self.global_batch_size, self.group_by_length)
            self._order = (epoch, order)
        return self._order[1][number * self.global_batch_size : (number + 1) * self.global_batch_size]

    def places(self, step: int) -> list[str]:
        """file:line of every row of a step."""
        return [self.sequences.examples.place(e) for s in self.of_step(step) for e in self.sequences.members(s)]

    def at(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step; every process gets the same number of them."""
        chosen = self.of_step(step)
        at_once = self.micro_batch_size * self.num_processes
        filled = np.full(-(-len(chosen) // at_once) * at_once, -1, np.int64)
        filled[: len(chosen)] = chosen
        mine = filled.reshape(-1, self.num_processes, self.micro_batch_size)[:, self.rank]
        collate = _pad if self.padded else _lay_end_to_end
        return [
            collate([self.sequences.documents(sequence) for sequence in micro if sequence >= 0], self.pad_id)
            for micro in mine
        ]

    def largest(self) -> Batch:
        """As many of the longest sequences as a micro-batch may hold."""
        longest = np.argsort(-self.sequences.lengths, kind="stable")[: self.micro_batch_size]
        collate = _pad if self.padded else _lay_end_to_end
        return collate([self.sequences.documents(sequence) for sequence in longest], self.pad_id)

    def epoch(self, epoch: int = 0) -> Iterator[list[Batch]]:
        for step in range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch):
            yield self.at(step)


def _filler(pad_id: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stands in where a process has no sequence left: it goes through the model and teaches nothing."""
    return [(np.full(2, pad_id, np.int64), np.full(2, IGNORE, np.int64))]


def _lay_end_to_end(sequences: list[list[tuple[np.ndarray, np.ndarray]]], pad_id: int) -> Batch:
    documents = [document for sequence in sequences for document in sequence]
    num_tokens = sum(len(ids) for ids, _ in documents)
    documents = documents or _filler(pad_id)
    lengths = [len(ids) for ids, _ in documents]
    targets = np.concatenate([targets for _, targets in documents])
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([ids for ids, _ in documents]))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        targets=torch.from_numpy(targets)[None],
        learned=_learned(torch.from_numpy(targets)),
        bounds=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        attention_mask=None,
        lengths=tuple(lengths),
        num_tokens=num_tokens,
    )


def _pad(sequences: list[list[tuple[np.ndarray, np.ndarray]]], pad_id: int) -> Batch:
    """One document a row, padded on the right. Padding is masked by position, never by token id."""
    documents = [document for sequence in sequences for document in sequence]
    num_tokens = sum(len(ids) for ids, _ in documents)
    documents = documents or _filler(pad_id)
    longest = max(len(ids) for ids, _ in documents)
    shape = (len(documents), longest)
    input_ids, targets, mask = (
        np.full(shape, pad_id, np.int64),
        np.full(shape, IGNORE, np.int64),
        np.zeros(shape, np.int64),
    )
    for row, (ids, wanted) in enumerate(documents):
        input_ids[row, : len(ids)], targets[row, : len(ids)], mask[row, : len(ids)] = ids, wanted, 1
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(longest).expand(shape),
        targets=torch.from_numpy(targets),
        learned=_learned(torch.from_numpy(targets)),
        bounds=None,
        attention_mask=torch.from_numpy(mask),
        lengths=tuple(len(ids) for ids, _ in documents),
        num_tokens=num_tokens,
    )


def _learned(targets: torch.Tensor) -> torch.Tensor:
    return (targets.flatten() != IGNORE).nonzero().flatten()
