"""Keys and values of sequences that are continued token by token, by our own attention.

A row for each sequence, its first token at place 0, what is behind its end masked. So nothing is
padded but in memory, and sums run over the same places as in training.
"""

import torch
import torch.nn.functional as F

STRIDE = 64  # places by which memory grows; kernels of a GPU want masks of multiples of 8
FEWEST = 4
"""Rows of a product: BLAS multiplies fewer by other kernels, which round otherwise."""


class KeyValues:
    """The cache of a batch, of all layers: of each call of attention in a pass, in their order.

    A layer may attend twice, and a pass may come to a layer again.

    A pass either reads the beginnings of sequences, which lie end to end as in training, or
    continues each row by one token. `lengths`: tokens of each row, with those of the pass.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths, self.device = lengths, device
        self._calls, self._layers = 0, list[tuple[torch.Tensor, torch.Tensor]]()
        self._documents: list[tuple[list[int], slice]] | None = None
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def continues(self) -> bool:
        """Whether the pass continues each row by one token."""
        return self._documents is None

    def read(self, rows: list[list[int]]) -> None:
        """Begin a pass over documents end to end. `rows`: those that begin with each document."""
        self._calls, self._documents, start = 0, [], 0
        for own in rows:
            stop = start + self.lengths[own[0]]
            self._documents.append((own, slice(start, stop)))
            start = stop

    def grow(self) -> torch.Tensor:
        """Begin a pass that continues each row; return the tokens' positions, int64 [rows]."""
        self._calls, self._documents, self._masks = 0, None, {}
        self._rows = torch.arange(len(self.lengths), device=self.device)
        self._ends = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        return self._ends

    def keep(self, rows: list[int]) -> None:
        """Leave these rows, in this order: each at its place, or also in that of one that goes."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        for kept in self._layers:
            for states in kept:
                for new, old in moved:
                    states[new] = states[old]
        self.lengths = [self.lengths[row] for row in rows]

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what a pass over documents says: key and value [1, KV, T, D]."""
        kept = self._of(key, value)
        for rows, part in self._documents or ():
            for states, own in zip(kept, (key, value)):
                states[rows, :, : part.stop - part.start] = own[0, :, part]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """Let one token of each row see its row.

        query [1, H, rows, D], key and value [1, KV, rows, D] -> [1, rows, H, D]. `window`: each
        sees itself and window - 1 tokens before it; None, 0: all of them.
        """
        count = len(self.lengths)
        keys, values = self._of(key, value)
        keys[self._rows, :, self._ends] = key[0].transpose(0, 1)
        values[self._rows, :, self._ends] = value[0].transpose(0, 1)
        mask = self._mask(window)
        longest = mask.shape[-1]
        # Heads that share keys are rows of one product.
        heads = query[0].transpose(0, 1).reshape(count, keys.shape[1], -1, query.shape[-1])
        shared = heads.shape[2]
        out = F.scaled_dot_product_attention(
            heads.repeat(1, 1, -(-FEWEST // shared), 1) if shared < FEWEST else heads,
            keys[:count, :, :longest], values[:count, :, :longest], attn_mask=mask, scale=scale,
        )  # fmt: skip
        return out[:, :, :shared].reshape(1, count, -1, out.shape[-1]).contiguous()

    def _mask(self, window: int | None) -> torch.Tensor:
        """Return which places each row's new token sees: bool [rows, 1, 1, places]."""
        if window not in self._masks:
            places, ends = torch.arange(self._room, device=self.device), self._ends[:, None]
            seen = places <= ends
            if window:
                seen &= places > ends - window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]

    @property
    def _room(self) -> int:
        """Return the places that the longest row needs."""
        return -(-max(self.lengths) // STRIDE) * STRIDE

    def _of(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a call keeps, with room for the pass: [rows or more, KV, places, D]."""
        count, room = len(self.lengths), self._room
        if self._calls == len(self._layers):
            empty = (
                each.new_zeros(count, each.shape[1], 0, each.shape[3]) for each in (key, value)
            )
            self._layers.append(tuple(empty))
        keys, values = self._layers[self._calls]
        if (missing := room - keys.shape[2]) > 0:
            keys, values = (F.pad(each[:count], (0, 0, 0, missing)) for each in (keys, values))
            self._layers[self._calls] = keys, values
        self._calls += 1
        return keys, values
