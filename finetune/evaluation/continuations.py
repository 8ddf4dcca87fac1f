"""How probable a model finds texts that continue others: what multiple choice is scored by.

A context and its continuations are a tree of tokens, each of which sees those that lead to it. So
the layers compute a context once, as they do the beginning of several continuations, and the output
projection only what is asked. The tokens, limits and sums are those of lm-evaluation-harness
0.4.13.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from finetune import failures
from finetune.data.batches import Batch
from finetune.errors import ModelError
from finetune.models import cross_entropy, families, head
from finetune.models.policy import Policy

Ids = tuple[int, ...]

AT_ONCE = {"cpu": 2048}
"""Tokens of a batch; elsewhere AT_ONCE_ON_GPU."""
AT_ONCE_ON_GPU = 16_384
NEARLY = 0.95  # of the longest tree: shorter ones join only a quarter of a batch
CHUNK_BYTES = {"cpu": 31 * 2**20}
"""Logits at once in float32: below 32 MiB, from which glibc asks the system for each block."""
DEFAULT_LENGTH = 2048  # of a model that does not say how many positions it has
UNSET_LENGTH = 10**9  # tokenizers that know no limit name a larger one
# Mean distance of log-probabilities, per token, up to which two ways to compute them agree.
EXACT, ROUNDED = 1e-4, 0.1
# Tokens of continuations for one of their context: attention takes the square of both together.
SHARE = 4


class Request(NamedTuple):
    """Tokens of a context, at least one, and of a text that continues it, at least one."""

    context: Ids
    continuation: Ids


class Found(NamedTuple):
    """The log-probability of a continuation, in nats, and whether each token is the likeliest.

    is_greedy: False where it was not asked for.
    """

    logprob: float
    is_greedy: bool


class Asked(NamedTuple):
    """A label that is predicted at a node of a tree, and the number of the branch that has it."""

    node: int
    label: int
    branch: int


@dataclass(frozen=True)
class Tree:
    """A context and its continuations, and the numbers of the requests that each answers."""

    context: Ids
    branches: tuple[Ids, ...]
    requests: tuple[tuple[int, ...], ...]

    @cached_property
    def nodes(self) -> tuple[list[int], list[int], list[Asked]]:
        """Return (the tokens that the model reads; the node before each; what is asked, by node).

        The context comes first. The model predicts the last token of a branch, and reads it only
        where another branch goes on.
        """
        size = len(self.context)
        tokens, before, asked = list(self.context), list(range(-1, size - 1)), list[Asked]()
        known: dict[tuple[int, int], int] = {}
        for number, branch in enumerate(self.branches):
            node = size - 1
            for token in branch[:-1]:
                asked.append(Asked(node, token, number))
                if (node, token) not in known:
                    known[node, token] = len(tokens)
                    tokens.append(token)
                    before.append(node)
                node = known[node, token]
            asked.append(Asked(node, branch[-1], number))
        return tokens, before, sorted(asked)

    @property
    def length(self) -> int:
        """Return the tokens that the model reads."""
        return len(self.nodes[0])

    @property
    def deepest(self) -> int:
        """Return the positions of the longest branch and its context."""
        return len(self.context) + max(map(len, self.branches)) - 1

    def parted(self, most: int = 0) -> list["Tree"]:
        """Return trees of the same branches, each with at most `most` tokens of them, or one."""
        groups: list[list[int]] = []
        room = 0
        for number, branch in enumerate(self.branches):
            if not groups or len(branch) > room:
                groups.append([])
                room = most
            groups[-1].append(number)
            room -= len(branch)
        return [
            Tree(
                self.context,
                tuple(self.branches[number] for number in group),
                tuple(self.requests[number] for number in group),
            )
            for group in groups
        ]


# ------------------------------------------------------------------------------------------ tokens


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Return the tokens of (context, continuation), each text tokenised as a whole.

    White space at the end of a context belongs to the continuation. What stands behind as many
    tokens as the context has by itself is the continuation, even where tokens span the boundary. An
    empty context is BOS, or the end of a text where the tokenizer has no BOS.
    """
    moved = [_moved(context, continuation) for context, continuation in pairs]
    texts = list(dict.fromkeys(context for context, _ in moved if context))
    contexts = dict(zip(texts, _encoded(tokenizer, texts)))
    whole = _encoded(tokenizer, [context + more for context, more in moved if context])
    bare = _encoded(tokenizer, [more for context, more in moved if not context], bare=True)
    of_context, of_empty, requests = iter(whole), iter(bare), []
    for context, _ in moved:
        if context:
            before = contexts[context]
            requests.append(Request(tuple(before), tuple(next(of_context)[len(before) :])))
        else:
            ids, first = next(of_empty), _prefix_id(tokenizer)
            starts_so = ids[:1] == [first]
            requests.append(Request((first,), tuple(ids[1:] if starts_so else ids)))
    return requests


def _moved(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    # A context of blanks stays as it is: without them nothing would be left.
    return (bare, context[len(bare) :] + continuation) if bare else (context, continuation)


def _prefix_id(tokenizer: Any) -> int:
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has neither bos_token nor eos_token, and a "
            "text without a context needs a token before it"
        )
    return int(found)


def _encoded(tokenizer: Any, texts: Sequence[str], bare: bool = False) -> list[list[int]]:
    """Return the tokens of texts, with the tokenizer's own special tokens unless `bare`.

    A text that begins with BOS gets no other.
    """
    begin = tokenizer.decode(_prefix_id(tokenizer)) if texts and not bare else ""
    results: list[list[int]] = [[]] * len(texts)
    for special in (True, False):
        chosen = [
            number for number, text in enumerate(texts)
            if (not bare and not text.startswith(begin)) == special
        ]  # fmt: skip
        if chosen:
            found = tokenizer([texts[n] for n in chosen], add_special_tokens=special)["input_ids"]
            for number, ids in zip(chosen, found):
                results[number] = ids
    return results


def context_length(config: Any, tokenizer: Any) -> int:
    """Return how many tokens a model reads at once."""
    text = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(text, name, None) is not None:
            return int(getattr(text, name))
    limit = tokenizer.model_max_length
    return int(limit) if limit is not None and limit < UNSET_LENGTH else DEFAULT_LENGTH


# ----------------------------------------------------------------------------------------- scoring


class Continuations:
    """Scores continuations by one causal model, with or without adapters.

    num_cut: contexts that did not fit, whose beginnings were cut off, of the last call.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if families.of_model(self.base) != families.CAUSAL:
            raise ModelError(
                f"{self.base.config.model_type} is not a causal language model, and only those are "
                "scored by the log-probabilities of answers"
            )
        if not hasattr(self.base, "holds_all_logits"):
            head.install(self.base)
        model.eval()
        self.policy, self.max_length = Policy(model), context_length(self.base.config, tokenizer)
        self.num_cut = 0
        self.device = next(model.parameters()).device
        self._branches: bool | None = None

    def __call__(
        self, requests: Sequence[Request], greedy: bool = False, title: str = "scoring"
    ) -> list[Found]:
        """Return the log-probability of each continuation, in the order of `requests`.

        `greedy`: also whether each of its tokens is the likeliest.
        `title`: of the bar that a terminal shows.
        """
        results = [Found(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc=title, unit=" texts", disable=None, leave=False)
        with torch.inference_mode(), bar:
            for trees in self._batches(self._trees(requests)):
                numbers = [each for tree in trees for each in tree.requests]
                for same, found in zip(numbers, self._scored(trees, greedy)):
                    bar.update(len(same))
                    for number in same:
                        results[number] = found
        return results

    def _trees(self, requests: Sequence[Request]) -> list[Tree]:
        """Gather the continuations of equal contexts, the largest trees first."""
        gathered: dict[Ids, dict[Ids, list[int]]] = {}
        self.num_cut = 0
        for number, (context, continuation) in enumerate(requests):
            excess = len(context) + len(continuation) - (self.max_length + 1)
            self.num_cut += excess > 0
            kept = context[max(0, excess) :]
            gathered.setdefault(kept, {}).setdefault(continuation, []).append(number)
        trees = [
            Tree(context, tuple(found), tuple(map(tuple, found.values())))
            for context, found in gathered.items()
        ]
        window = _window(self.base.config)
        parted = [
            part
            for tree in trees
            for part in tree.parted(SHARE * len(tree.context) if tree.deepest <= window else 0)
        ]
        if not self._can_branch(parted):
            parted = [part for tree in parted for part in tree.parted()]
        return sorted(parted, key=lambda tree: -tree.length)

    def _can_branch(self, trees: list[Tree]) -> bool:
        """Return whether the model's layers keep to a mask; of recurrent ones they do not.

        The largest tree is scored both ways, once for each model.
        """
        several = [tree for tree in trees if len(tree.branches) > 1]
        if self._branches is None and several:
            largest = max(several, key=lambda tree: tree.length)
            alone = [self._scored([part], False)[0].logprob for part in largest.parted()]
            try:
                together = [found.logprob for found in self._scored([largest], False)]
            except Exception as exc:  # code of any author
                failures.reraise(exc)
                together = [float("nan")] * len(alone)
            distance = sum(abs(one - other) for one, other in zip(alone, together))
            is_exact = next(self.base.parameters()).dtype == torch.float32
            limit = (EXACT if is_exact else ROUNDED) * sum(map(len, largest.branches))
            self._branches = distance <= limit
        return bool(self._branches)

    def _batches(self, trees: list[Tree]) -> Iterator[list[Tree]]:
        """Yield trees of nearly equal length that fill a batch."""
        most, start = AT_ONCE.get(self.device.type, AT_ONCE_ON_GPU), 0
        while start < len(trees):
            width = trees[start].length
            few, end = max(1, most // width // 4), start + max(1, most // width)
            group = trees[start:end]
            group = [
                tree for number, tree in enumerate(group)
                if number < few or tree.length >= NEARLY * width
            ]  # fmt: skip
            yield group
            start += len(group)

    def _scored(self, trees: list[Tree], greedy: bool) -> list[Found]:
        """Return what is found of each branch, tree by tree."""
        laid = _lay(trees, self.base)
        batch = laid.batch.to(self.device)
        distribution = self.policy(batch, {"distribution"}).distribution
        assert distribution is not None
        labels, documents = laid.labels.to(self.device), laid.documents.to(self.device)
        places = laid.places.to(self.device)
        vocab_size = self.base.config.get_text_config().vocab_size
        sums, misses = (torch.zeros(laid.num_branches, device=self.device) for _ in range(2))
        most = CHUNK_BYTES.get(self.device.type, cross_entropy.CHUNK_BYTES)
        for part in cross_entropy.chunks(len(distribution.states), vocab_size * 4, most):
            log_CV = distribution.logits(distribution.states[part]).float().log_softmax(-1)
            # Labels are in the order of their places.
            bounds = torch.tensor([part.start, part.stop])
            own = slice(*torch.searchsorted(laid.places, bounds).tolist())
            rows, of = places[own] - part.start, documents[own]
            sums.index_add_(0, of, log_CV[rows, labels[own]])
            if greedy:
                misses.index_add_(0, of, (log_CV.argmax(-1)[rows] != labels[own]).float())
        is_greedy = (misses == 0).tolist() if greedy else [False] * len(sums)
        return [Found(*each) for each in zip(sums.tolist(), is_greedy)]


def _window(config: Any) -> float:
    """Return how many tokens a layer with the shortest sight sees; infinity if it sees all."""
    text = config.get_text_config()
    names = ("sliding_window", "attention_chunk_size")
    return min(getattr(text, name, None) or float("inf") for name in names)


class Laid(NamedTuple):
    """Trees as a batch, which asks for S states, and L labels that these predict.

    places: int64 [L], rising: which of the states predicts a label. documents: int64 [L], the
    branch of each label.
    """

    batch: Batch
    labels: torch.Tensor
    places: torch.Tensor
    documents: torch.Tensor
    num_branches: int


def _lay(trees: list[Tree], base: Any) -> Laid:
    """Lay each tree into a row, padded on the right.

    A node is asked for once, whatever number of branches go on from it.
    """
    width = max(tree.length for tree in trees)
    ids = torch.zeros((len(trees), width), dtype=torch.int64)
    states, labels, places, documents = list[int](), list[int](), list[int](), list[int]()
    first = 0  # branch of the row
    for row, tree in enumerate(trees):
        tokens, _, asked = tree.nodes
        ids[row, : len(tokens)] = torch.tensor(tokens)
        for node, of_node in groupby(asked, key=lambda each: each.node):
            for each in of_node:
                labels.append(each.label)
                places.append(len(states))
                documents.append(first + each.branch)
            states.append(row * width + node)
        first += len(tree.branches)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if any(len(tree.branches) > 1 for tree in trees):
        inputs |= _seen(trees, width, base)
    none, of_states = torch.zeros(0, dtype=torch.int64), torch.tensor(states)
    batch = Batch(
        inputs, torch.zeros_like(of_states), of_states, none, none, none,
        tuple(tree.length for tree in trees), {"tokens": len(states), "documents": 0},
    )  # fmt: skip
    return Laid(batch, torch.tensor(labels), torch.tensor(places), torch.tensor(documents), first)


def _seen(trees: list[Tree], width: int, base: Any) -> dict[str, torch.Tensor]:
    """Return positions [B, T], and which nodes each sees, [B, 1, T, T]: those that lead to it.

    Padding sees the first node, as softmax needs one. A term of the scores; for SDPA in 16 bits
    bool, which fits queries of any precision; in float32 each layer would turn it into such a term.
    """
    sees = np.zeros((len(trees), width, width), bool)
    position_ids = np.zeros((len(trees), width), np.int64)
    for row, tree in enumerate(trees):
        (tokens, before, _), size = tree.nodes, len(tree.context)
        sees[row, :size, :size] = np.tri(size, dtype=bool)
        sees[row, len(tokens) :, 0] = True
        position_ids[row, :size] = range(size)
        for node in range(size, len(tokens)):
            sees[row, node] = sees[row, before[node]]
            sees[row, node, node] = True
            position_ids[row, node] = position_ids[row, before[node]] + 1
    mask = torch.from_numpy(sees)[:, None]
    dtype = base.get_input_embeddings().weight.dtype
    if base.config._attn_implementation != "sdpa" or dtype == torch.float32:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return {"position_ids": torch.from_numpy(position_ids), "attention_mask": mask}
