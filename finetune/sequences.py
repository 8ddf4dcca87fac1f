"""The rows of data.train and data.eval as sequences: in memory, or shard by shard on the disk."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune.config import Config
from finetune.data import building, examples, layout, order, shards, source_files, stream
from finetune.data.places import list_columns
from finetune.data.source_files import Sources
from finetune.data.templates import Template
from finetune.data.tokenised import Options
from finetune.data.views import View
from finetune.errors import ConfigError, DataError
from finetune.rollouts import prompts

# Share of the evaluation rows that may also be training rows: common data sets have a few.
MAX_EVAL_OVERLAP = 0.1


class Found(NamedTuple):
    """Sequences to train on, and those of evaluation, if any.

    num_known: evaluation examples that are also trained on. num_rows: all training rows, of which
    data.max_rows may select fewer.
    """

    train: Any
    evals: Any
    num_known: int
    num_rows: int


@dataclass(frozen=True)
class Reader:
    """What rows become tokens by. Its methods raise UserError for rows that cannot."""

    config: Config
    sources: Sources
    template: Template
    tokenizer: Any
    options: Options
    view: View

    def in_memory(self) -> Found:
        wanted, seed = self.config.data, self.config.run.seed
        train = replace(self._read(self.sources.train, self.template, self.options), view=self.view)
        evals = self._of_evaluation(train)
        num_rows = train.num_rows
        if wanted.max_rows is not None:
            train = examples.draw(train, wanted.max_rows, seed)
        if wanted.eval_fraction:
            train, evals = examples.hold_out(train, wanted.eval_fraction, seed)
        train = self._mixed(train)
        known = examples.num_trained_on(evals, train) if evals else 0
        _require_other_rows(evals, known)
        return Found(self._sequences(train), self._sequences(evals), known, num_rows)

    def streamed(self, early: bool | None = None) -> Found:
        """Return the sequences of rows that stay on the disk.

        `early`: whether this process makes the shards beside the run; None: all are made first.
        """
        config, wanted, recipe = self.config, self.config.data, self._recipe()
        evals: Any
        if early is None:
            train, evals = stream.opened(*shards.prepare(recipe))
        else:
            self._require_positions()
            train, evals = stream.opened(*building.begin(recipe, early))
            train.require_once_whole(functools.partial(_require_steps, config))
        if self.sources.eval:
            evals = self._sequences(self._of_evaluation(train.examples))
        for part, what in ((train, "leaves no rows to train on"), (evals, "holds none out")):
            if wanted.eval_fraction and not len(part or ()):
                raise DataError(
                    f"data.eval_fraction: {wanted.eval_fraction} of {train.examples.num_rows:,} "
                    f"rows {what}: each row is drawn by its content; change the fraction or "
                    "run.seed"
                )
        counted = evals and train.is_whole
        known = stream.num_known(evals.examples.digests(), train.examples) if counted else 0
        _require_other_rows(evals and evals.examples, known)
        return Found(train, evals, known, train.examples.num_rows)

    def _read(
        self, sources: Mapping[str, str], template: Template, options: Options
    ) -> examples.Examples:
        """Return rows as tokens: conversations, or where the run samples, prompts."""
        config, tokenizer = self.config, self.tokenizer
        if config.rollouts:
            most = config.rollouts.max_new_tokens
            return prompts.prepare(sources, template, tokenizer, options, most)
        return examples.prepare(sources, template, tokenizer, options, config.cache_dir)

    def _sequences(self, found: examples.Examples | None) -> order.Sequences | None:
        wanted = self.config.data
        if found is None:
            return None
        return order.Sequences(found, wanted.packing, wanted.max_length, self.config.run.seed)

    def _of_evaluation(self, train: Any) -> examples.Examples | None:
        """Return the examples of data.eval. Raise DataError if they do not fit `train`."""
        if not self.sources.eval:
            return None
        same = replace(self.template, learn_opening=train.learn_opening)
        alike = replace(self.options, labels=tuple(train.labels))
        evals = replace(self._read(self.sources.eval, same, alike), view=self.view)
        if evals.learn_opening != train.learn_opening:
            raise DataError(
                f"data.eval: some of its answers do not begin with {self.template.opening!r}, "
                "which the template puts before every answer of data.train; evaluation rows have "
                "thoughts that no training row has"
            )
        if evals.columns.keys() != train.columns.keys():
            here, there = (list_columns(sorted(e.columns)) for e in (evals, train))
            raise DataError(
                f"data.eval: data.format gives its rows the fields {here}, and those of "
                f"data.train {there}; return the same for every row"
            )
        return evals

    def _mixed(self, train: examples.Examples) -> examples.Examples:
        """Return the training examples in the shares of data.weights and data.token_budgets."""
        wanted = self.config.data
        if not wanted.weights and not wanted.token_budgets:
            return train
        files, shares = list(self.sources.train), []
        for name, amount in [*wanted.weights.items(), *wanted.token_budgets.items()]:
            found = source_files.expand(name, "data.train")[0]
            numbers = [files.index(file) for file in found if file in files]
            weight = amount if name in wanted.weights else None
            shares.append(examples.Share(name, numbers, weight, None if weight else int(amount)))
        return examples.mixed(train, shares, self.config.run.seed)

    def _recipe(self) -> shards.Recipe:
        config, wanted, options = self.config, self.config.data, self.options
        if hasattr(config.objective, "labels") and not options.labels:
            raise ConfigError(
                "objective.labels: name the labels, as data.streaming does not have all rows when "
                "it numbers the first"
            )
        seed, window = config.run.seed, wanted.window_gb
        plan = layout.Plan(wanted.packing, wanted.max_length, seed, wanted.eval_fraction)
        return shards.Recipe(
            shards.root(config.cache_dir), self.sources.train, self.template, self.tokenizer,
            options, plan, config.cache_dir, self.view, wanted.shards,
            None if window is None else int(window * 1e9),
        )  # fmt: skip

    def _require_positions(self) -> None:
        """Raise ConfigError if a row that is not tokenised yet may be too long for the model."""
        most, positions = self.config.data.max_length, self.options.positions
        if positions is not None and most > positions:
            raise ConfigError(
                f"data.max_length: {most}, but the model has only {positions} positions, and with "
                "data.window_gb and train.max_steps training starts before all rows are measured; "
                "lower it"
            )


def _require_steps(config: Config, num_sequences: int) -> None:
    """Raise DataError if the rows end before train.max_steps, on which the learning rates rely."""
    per_epoch = -(-num_sequences // config.train.global_batch_size)
    steps, most = math.ceil(per_epoch * config.train.epochs - 1e-9), config.train.max_steps or 0
    if steps < most:
        raise DataError(
            f"train.max_steps: {most:,}, but train.epochs: {config.train.epochs} of the rows are "
            f"{steps:,} steps; set it to {steps:,}, or raise train.epochs, under another run.name"
        )


def _require_other_rows(evals: Any, known: int) -> None:
    """Raise DataError if too many evaluation rows are also trained on."""
    if evals and known > MAX_EVAL_OVERLAP * len(evals):
        raise DataError(
            f"data.eval: {known:,} of its {len(evals):,} examples are also trained on, so it would "
            "measure memorisation; remove them from one of the two"
        )
