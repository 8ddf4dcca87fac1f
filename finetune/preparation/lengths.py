"""How long rows are in tokens, by the very code that training tokenises them with."""

from dataclasses import dataclass, replace

import numpy as np

from finetune import config as configs
from finetune import preflight
from finetune.data import examples, order, packing
from finetune.data.examples import Examples
from finetune.engine.topology import Topology

ENOUGH = 0.995  # share of the rows that the advised max_length keeps whole
STEP = 64  # tokens; lengths of kernels and caches are multiples of it
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class TokenLengths:
    """The rows in tokens, whole, and settings of the config that decide what becomes of them."""

    rows: Examples
    template: str
    max_length: int
    positions: int | None
    """How many tokens a sequence may have in the model."""
    micro_batch_size: int
    seed: int

    @property
    def lengths(self) -> np.ndarray:
        return self.rows.lengths

    def advised(self) -> int:
        """Return the smallest multiple of STEP that keeps ENOUGH of the rows whole.

        At most what the model's positions allow.
        """
        enough = int(np.quantile(self.lengths, ENOUGH, method="higher"))
        rounded = -(-enough // STEP) * STEP
        return rounded if self.positions is None else min(rounded, self.positions)

    def limits(self) -> list[int]:
        """Return the values of max_length to compare: powers of two, the config's, the advised."""
        longest = int(self.lengths.max())
        powers = {1 << k for k in range(6, 24) if longest // 32 <= 1 << k < 2 * longest}
        return sorted(powers | {self.max_length, self.advised()})

    def cut(self, limit: int) -> tuple[int, float, float]:
        """Return (rows over a limit, share of tokens lost, share of supervised tokens lost).

        Lost is what data.truncation: right would cut; left loses as many tokens, from the prompt.
        """
        stream, supervised = self.rows.input, np.asarray(self.rows.supervised)
        before = np.concatenate([[0], np.cumsum(supervised)])
        kept = np.minimum(stream.starts + limit, stream.ends)
        lost = (stream.ends - kept).sum() / max(1, stream.lengths.sum())
        answers = before[stream.ends] - before[kept]
        of = before[stream.ends] - before[stream.starts]
        over = int((self.lengths > limit).sum())
        return over, float(lost), float(answers.sum() / max(1, of.sum()))

    def packed(self, limit: int) -> tuple[int, float]:
        """Return (packs of the rows, cut to a limit; how full they are)."""
        lengths = np.minimum(self.lengths, limit)
        packs = packing.pack(lengths, limit, self.seed)
        return len(packs), float(lengths.sum() / (len(packs) * limit))

    def padded(self, group_by_length: bool) -> float:
        """Return the share of padding in micro-batches of the first epoch, where attention pads."""
        lengths, size = np.minimum(self.lengths, self.max_length), self.micro_batch_size
        chosen = lengths[order.order(self.seed, 0, lengths, size, group_by_length)]
        filled = np.zeros(-(-len(chosen) // size) * size, np.int64)
        filled[: len(chosen)] = chosen
        batches = filled.reshape(-1, size)
        slots = (batches.max(axis=1) * (batches > 0).sum(axis=1)).sum()
        return float(1 - lengths.sum() / slots)


def by_config(path: str, sources: list[str]) -> TokenLengths:
    """Tokenise rows as the run of a config would, whole. Raise UserError for wrong ones."""
    config = configs.parse(["--config", path])[0]
    config = config.changed(
        "data",
        train=sources,
        eval=None,
        eval_fraction=0.0,
        max_rows=None,
        truncation="drop",
        weights={},
        token_budgets={},
        streaming=False,
    )
    micro = config.train.micro_batch_size
    if micro == "auto":
        config = config.changed("train", micro_batch_size=1)
    data = preflight.prepare(config, Topology(config.train.precision, check_only=True))
    rows = data.train.in_memory.examples
    if rows.num_dropped:
        options = replace(data.options, max_length=NO_LIMIT, truncation="error", positions=None)
        rows = examples.prepare(
            data.sources.train, data.template, data.tokenizer, options, config.cache_dir
        )
    return TokenLengths(
        rows, data.template.name, config.data.max_length, data.options.positions,
        config.micro_batch_size if micro != "auto" else 8, config.run.seed,
    )  # fmt: skip
