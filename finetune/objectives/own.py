"""Run a user's own objective, and report mistakes in it with their file and line."""

import inspect
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune import failures, own_code
from finetune.config import OwnObjective
from finetune.data import batches as layouts
from finetune.data.batches import Batch
from finetune.data.views import View
from finetune.errors import ConfigError, FinetuneError
from finetune.models import scalar_heads
from finetune.models.distributions import Distribution, Reference
from finetune.models.logits import logprobs_and_entropy
from finetune.models.policy import Answers, Policy, require_reference
from finetune.objectives.advantages import Scored
from finetune.objectives.base import Encoding, Objective, Remark, Term, as_divisors, total
from finetune.objectives.sft import CROSS_ENTROPY

# Columns of metrics.jsonl and eval.jsonl that terms may not use.
TAKEN = {
    "step", "epoch", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_second",
    "seconds", "memory_gb", "mfu", "skipped", "cross_entropy", "loss_term", "eval_loss",
    "perplexity", "eval_tokens",
}  # fmt: skip
VOCABULARY = 8  # of the rehearsal, so that probabilities are neither near 0 nor near 1


class Own(Objective):
    """Call the user's objective and check what it returns. Raises ConfigError for every mistake."""

    def __init__(self, settings: OwnObjective) -> None:
        self.code, self.objective = settings.code, settings.objective
        self.has_turns = self.objective.has_turns
        self.asks = frozenset(self.objective.asks)
        self.samples, self.learns_rewards = self.objective.samples, self.objective.learns_rewards
        self.reports_cross_entropy = self.objective.reports_cross_entropy
        self.shares_beginnings = self.objective.shares_beginnings
        self._units: dict[str, dict[str, tuple[str, float]]] = {}  # of the terms of each method

    @property
    def prepares(self) -> bool:
        return bool(self.objective.prepares)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.objective.needs)

    def supervises(self, loss_on: str) -> str:
        with self._blamed():
            return str(self.objective.supervises(loss_on))

    def mismatches(self, settings: Any) -> bool:
        with self._blamed():
            return bool(self.objective.mismatches(settings))

    def notes(self, settings: Any, columns: Mapping[str, np.ndarray]) -> list[str]:
        with self._blamed():
            return list(map(str, self.objective.notes(settings, columns)))

    def view(self, settings: Any, encoding: Encoding) -> View:
        with self._blamed():
            view = self.objective.view(settings, encoding)
        if not isinstance(view, View):
            raise self._wrong("view", f"should return a View, got {_shown(view)}")
        return view

    def remark(self) -> Remark:
        with self._blamed():
            own = self.objective.remark()

        def remark(terms: Mapping[str, float]) -> str:
            with self._blamed():
                return str(own(terms) or "")

        return remark

    def runs_away(self, terms: Mapping[str, float], settings: Any) -> str:
        with self._blamed():
            return str(self.objective.runs_away(terms, settings) or "")

    def scored_by(self, settings: Any) -> frozenset[str]:
        with self._blamed():
            return frozenset(self.objective.scored_by(settings))

    def wants_reference(self, settings: Any) -> bool:
        with self._blamed():
            return bool(self.objective.wants_reference(settings))

    def wants_teacher(self, settings: Any) -> bool:
        with self._blamed():
            return bool(self.objective.wants_teacher(settings))

    def columns(
        self, scored: Scored, settings: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        with self._blamed():
            made, facts = self.objective.columns(scored, settings)
        count = int(scored.lengths.sum())
        if wrong := [name for name, values in made.items() if np.shape(values) != (count,)]:
            what = f"{wrong[0]!r} has the shape {list(np.shape(made[wrong[0]]))}"
            raise self._wrong("columns", f"{what}; give a number for each of {count} tokens")
        return dict(made), dict(facts)

    def prepare(
        self, policy: Policy, batches: Sequence[Batch], settings: Any
    ) -> dict[str, torch.Tensor]:
        with self._blamed():
            prepared = self.objective.prepare(policy, batches, settings)
        if not isinstance(prepared, dict) or not all(map(_is_number, prepared.values())):
            wanted = "should return a dict of names and tensors of one number"
            raise self._wrong("prepare", f"{wanted}, got {_shown(prepared)}")
        if taken := [name for batch in batches for name in prepared if name in batch.counts]:
            raise self._wrong("prepare", f"gives {taken[0]!r}, which is counted already; rename it")
        return prepared

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        with self._blamed():
            terms = self.objective.loss(policy, batch, settings, prepared)
        return self._checked("loss", terms, [*batch.counts, *prepared])

    def evaluate(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        with self._blamed():
            terms = self.objective.evaluate(policy, batch, settings, prepared)
        return self._checked("evaluate", terms, [*batch.counts, *prepared])

    def rehearse(self, batch: Batch, filler: Batch, settings: Any, has_adapters: bool) -> None:
        """Run on random answers, to find most mistakes before weights are loaded.

        `filler`: a batch without supervised tokens, which a process gets that has no sequence left.
        """
        self.remark()  # which only training asks for
        both = _twice(batch)  # first: an objective of a user's own may change the batch
        halves = [(batch, (0,)), (_copied(batch), (1,))]
        with torch.random.fork_rng(devices=[]):
            asked = self._rehearse(
                _copied(batch), settings, has_adapters, "log-probabilities around -2"
            )
            one = self._parted(_copied(batch), (0,), settings, has_adapters)
            two = self._parted(_twice(batch), (0, 0), settings, has_adapters)
            whole = self._parted(both, (0, 1), settings, has_adapters)
            parts = [
                self._parted(half, which, settings, has_adapters, whole) for half, which in halves
            ]
        # Sums over many tokens may be nearly 0, and their rounding is not.
        rounding = 1e-6 * len(both.labels)
        self._require_sums(whole, parts, rounding)
        for (method, what), value in one.values.items():
            # Not exactly twice as much: a term may subtract 1 from a count of the whole step.
            got = two.values[method, what]
            if abs(value) > rounding and math.isclose(got, value, rel_tol=1e-3):
                raise self._wrong(
                    method, f"{what} is {value:.3g}, and {got:.3g} where every document comes "
                    "twice, where a sum doubles; what divides it belongs into `per` alone"
                )  # fmt: skip
        # Last: the mean of nothing is NaN, but the check above says what to do.
        with torch.random.fork_rng(devices=[]):
            empty = "a batch without supervised tokens, as a process gets with no sequence left"
            if (of_filler := self._rehearse(filler, settings, has_adapters, empty)) != asked:
                # Processes that share weights or sequences would wait for each other.
                raise self._wrong(
                    "loss", f"asks the policy for {asked}, and for {of_filler} for {empty}; ask "
                    "the same of every batch"
                )  # fmt: skip

    def _require_sums(self, whole: "_Parted", parts: Sequence["_Parted"], rounding: float) -> None:
        """Raise ConfigError if values or gradients of a batch are not the sums of its parts'."""
        how = (
            "add up with .sum(), not with .mean(), name what divides the sum in `per`, which may "
            "be a name that prepare gives, and compare with nothing else of the batch"
        )
        for (method, what), value in whole.values.items():
            got = sum(part.values[method, what] for part in parts)
            is_sum = math.isclose(got, value, rel_tol=1e-2, abs_tol=rounding)
            if math.isfinite(value) and not is_sum:
                raise self._wrong(
                    method, f"{what} is {value:.3g} for a batch, and {got:.3g} for its two halves "
                    f"together; {how}"
                )  # fmt: skip
        for number, gradient in enumerate(whole.gradients):
            there = torch.cat([part.gradients[number] for part in parts])
            if (gradient - there).norm() > 1e-2 * gradient.norm() + 1e-9:
                what = "has other gradients for a batch than for its two halves"
                raise self._wrong("loss", f"{what}; {how}")

    def _parted(
        self, batch: Batch, which: tuple[int, ...], settings: Any, has_adapters: bool,
        whole: "_Parted | None" = None,
    ) -> "_Parted":  # fmt: skip
        """Return values and gradients of a part of a batch, or of all: without `whole`."""
        batch, policy = batch.to(torch.device("cpu")), _Rehearsal(has_adapters, self.heads, which)
        with torch.no_grad():
            own = self.prepare(policy, [batch], settings)
        prepared = whole.prepared if whole else own
        counts = whole.counts if whole else {name: max(n, 1) for name, n in batch.counts.items()}
        terms = self.loss(policy, batch, settings, prepared)
        with self._blamed():
            total(terms, {**counts, **as_divisors(prepared)}).backward()
        with torch.no_grad():
            evaluated = self.evaluate(policy, batch, settings, prepared)
        values = {("prepare", f"gives {name!r}, which"): n for name, n in own.items()}
        values |= {("loss", f"term {term.name!r}"): term.sum for term in terms}
        values |= {("evaluate", f"term {term.name!r}"): term.sum for term in evaluated}
        gradients = [each.grad for each in policy.leaves if each.grad is not None]
        return _Parted({k: v.item() for k, v in values.items()}, gradients, prepared, counts)

    def _rehearse(
        self, batch: Batch, settings: Any, has_adapters: bool, where: str
    ) -> list[list[str]]:
        """Run all methods, and return what each of their passes was asked for."""
        batch, policy = batch.to(torch.device("cpu")), _Rehearsal(has_adapters, self.heads)
        with torch.no_grad():
            prepared = self.prepare(policy, [batch], settings)
        terms = self.loss(policy, batch, settings, prepared)
        self._require_finite("loss", terms, where)
        counts = {name: max(count, 1) for name, count in batch.counts.items()}
        for term in terms:
            if term.per in prepared and not prepared[term.per] and term.sum:
                raise self._wrong("prepare", f"counts 0 of {term.per!r}, which divides a sum")
        loss = total(terms, {**counts, **as_divisors(prepared)})
        if not loss.requires_grad:
            raise self._wrong("loss", "does not depend on what the policy answers")
        with self._blamed():
            loss.backward()
        gradients = [leaf.grad for leaf in policy.leaves if leaf.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise self._wrong("loss", f"has a gradient that is NaN or infinite for {where}")
        with torch.no_grad():
            evaluated = self.evaluate(policy, batch, settings, prepared)
        self._require_finite("evaluate", evaluated, where)
        return policy.asked

    def _checked(self, method: str, terms: Any, counted: Sequence[str]) -> list[Term]:
        if not isinstance(terms, list | tuple):
            raise self._wrong(method, f"should return a list of terms, got {_shown(terms)}")
        for number, term in enumerate(terms):
            if not isinstance(term, Term):
                what = f"item {number} is {_shown(term)}"
                raise self._wrong(method, f"should return a list of terms, but {what}")
        reports = method == "evaluate" and self.reports_cross_entropy
        may_name = {CROSS_ENTROPY} if reports else set()
        for number, term in enumerate(terms):
            before = {other.name for other in terms[:number]}
            if why := _problem(term, counted, before, TAKEN - may_name):
                raise self._wrong(method, f"term {term.name!r}: {why}")
        if not terms:
            raise self._wrong(method, "returns no terms; for an empty batch return sums of 0")
        if not any(term.weight for term in terms):
            raise self._wrong(method, "returns only terms of weight 0; give the loss a weight")
        depends = any(term.weight and term.sum.requires_grad for term in terms)
        if method == "loss" and torch.is_grad_enabled() and not depends:
            raise self._wrong(method, "does not depend on what the policy answers")
        # Processes add up terms of one name, also where one has a batch without supervised tokens.
        units = {term.name: (term.per, term.weight) for term in terms}
        if (first := self._units.setdefault(method, units)) != units:
            raise self._wrong(
                method, f"returns the terms {units}, and returned {first} for another batch; "
                "return the same names, units and weights for every batch"
            )  # fmt: skip
        return list(terms)

    def _require_finite(self, method: str, terms: Sequence[Term], where: str) -> None:
        for term in terms:
            if not torch.isfinite(term.sum):
                raise self._wrong(method, f"term {term.name!r} is {term.sum.item()} for {where}")

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except FinetuneError:
            raise
        except (Exception, SystemExit) as exc:
            if isinstance(exc, Exception):
                failures.reraise(exc)
            if _is_of_model(exc):  # no mistake of the user's: its traceback says where it is
                raise
            raise ConfigError(f"objective.kind: {self.code.blame(exc)}") from exc

    def _wrong(self, method: str, what: str) -> ConfigError:
        code = getattr(inspect.unwrap(getattr(type(self.objective), method)), "__code__", None)
        where = str(self.code)
        if code and code.co_filename == str(self.code.path):
            where = f"{own_code.shown(self.code.path)}:{code.co_firstlineno}"
        return ConfigError(f"objective.kind: {where}: {method} {what}")


def _is_of_model(exc: BaseException) -> bool:
    """Whether an exception was raised inside a forward pass of the policy."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(exc.__traceback__)]
    calls = [place for place, code in enumerate(frames) if code is Policy.__call__.__code__]
    checks = (Policy.known.__code__, require_reference.__code__)
    return any(place + 1 < len(frames) and frames[place + 1] not in checks for place in calls)


def _problem(term: Term, counted: Sequence[str], before: Set[str], taken: Set[str]) -> str | None:
    if term.name in taken:
        return "the logs have a column of this name; choose another"
    if not isinstance(term.name, str):
        return f"the name should be text, got {_shown(term.name)}"
    is_number = isinstance(term.weight, int | float) and not isinstance(term.weight, bool)
    if not is_number or not math.isfinite(term.weight):
        return f"weight should be a number, got {term.weight!r}"
    if term.name in before:
        return "two terms have this name; choose another"
    if not _is_number(term.sum):
        return f"sum should be a tensor of one number, got {_shown(term.sum)}"
    if term.per not in counted:
        known = f"{', '.join(counted)}, or a name that prepare gives"
        return f"nothing counts {term.per!r}; per should be {known}"
    return None


@dataclass(frozen=True)
class _Parted:
    """What a rehearsal gives for a batch, or a part of it: values by method and name."""

    values: dict[tuple[str, str], float]
    gradients: list[torch.Tensor]
    prepared: Mapping[str, torch.Tensor]
    counts: Mapping[str, int]


def _copied(batch: Batch) -> Batch:
    return batch._each(torch.Tensor.clone)


def _twice(batch: Batch) -> Batch:
    """Return a batch with each document a second time, as a document of an example of its own."""

    def apart(numbers: torch.Tensor, count: int) -> torch.Tensor:
        return torch.cat([numbers, numbers + count])

    def repeated(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([each, each]) for name, each in values.items()}

    ids, lengths = batch.inputs["input_ids"], batch.lengths * 2
    if "attention_mask" in batch.inputs:
        inputs = repeated({k: v for k, v in batch.inputs.items() if isinstance(v, torch.Tensor)})
    else:
        places = batch.inputs["position_ids"]
        inputs = layouts._end_to_end(ids.repeat(1, 2), places.repeat(1, 2), lengths)
    return replace(
        batch, inputs=inputs, labels=batch.labels.repeat(2), lengths=lengths,
        positions=apart(batch.positions, ids.numel()), ends=apart(batch.ends, ids.numel()),
        document=apart(batch.document, batch.num_documents),
        example=apart(batch.example, batch.counts["examples"]),
        counts={name: 2 * count for name, count in batch.counts.items()},
        mismatched=batch.mismatched and _twice(batch.mismatched),
        weights=None if batch.weights is None else batch.weights.repeat(2),
        columns=repeated(batch.columns), token_columns=repeated(batch.token_columns),
        num_documents=2 * batch.num_documents,
    )  # fmt: skip


class _Rehearsal(Policy):
    """Answer with random numbers in the shapes of a batch."""

    def __init__(self, has_adapters: bool, heads: Set[str], which: Sequence[int] = (0,)) -> None:
        """`which`: the parts that batches consist of; each has answers of its own."""
        super().__init__(model=None)
        self.has_adapters, self.heads, self.which, self.calls = has_adapters, heads, which, 0
        self.leaves, self.asked = list[torch.Tensor](), list[list[str]]()
        torch.manual_seed(0)

    def __call__(
        self, batch: Batch, want: Any, *, label_smoothing: float = 0.0,
        reference: Reference | None = None, beta: float = 0.0, temperature: float = 1.0,
    ) -> Answers:  # fmt: skip
        wanted = self.known(want)
        self.asked.append(sorted(wanted))
        require_reference(wanted, batch, reference, beta)
        if missing := sorted(wanted & (scalar_heads.NAMES.keys() - self.heads)):
            raise ValueError(
                f"the policy has no head for {', '.join(missing)}; add "
                f"{', '.join(map(repr, missing))} to the needs of your objective"
            )
        tokens, documents = (len(of) // len(self.which) for of in (batch.labels, batch.ends))
        logits, values, scores = (
            self._drawn(*shape) for shape in ((tokens, VOCABULARY), (tokens,), (documents,))
        )
        self.calls += 1
        labels = torch.zeros_like(batch.labels)
        logprobs, entropy = logprobs_and_entropy(logits, labels, True, temperature)
        weighted = logprobs if batch.weights is None else batch.weights * logprobs
        answers: dict[str, Any] = {
            "nll": -weighted.sum(), "logprobs": logprobs, "entropy": entropy, "values": values,
            "scores": scores, "distribution": Distribution(logits.detach(), torch.Tensor.float),
            "predictions": logits.argmax(-1),
        }  # fmt: skip
        if reference is not None:
            found = reference.divergence(logits, reference.tensors, beta, temperature)
            answers["divergence"] = found
        return Answers(**{name: answers[name] for name in wanted})

    def _drawn(self, *shape: int) -> torch.Tensor:
        """Draw a leaf for each part of a batch; the same for the same call and part."""
        seeds = [2 * self.calls + part for part in self.which]
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in seeds]
        leaf = torch.cat(drawn).requires_grad_(torch.is_grad_enabled())
        self.leaves.append(leaf)
        return leaf

    def without_adapters(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.has_adapters else super().without_adapters()


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    if value.ndim:
        return f"a tensor of shape {list(value.shape)}; add it up with .sum()"
    return f"the tensor {value.item()}"
