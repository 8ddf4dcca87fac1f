"""RMSNorm and the product of a gated MLP (SwiGLU, GeGLU) as one kernel each, by Liger Kernel.

PyTorch runs an RMSNorm in 16 bits as seven kernels forward and about fifteen backward, each of
which reads and writes all states; Liger runs one and one. Modules are known by what they compute,
not by their names, and only the forward of a model's own modules is replaced: another model in the
process keeps its own, weights stay where adapters, sharding and checkpoints expect them.

Not taken from Liger:
- Rotary embedding. It writes into queries and keys where they are, which autograd does not see:
  outputs of products that selective recomputation keeps would be rotated twice. And transformers
  calls it by a global name of a module that all models of a family share.
- The gradient of a norm in place of the gradient it receives: where a norm's output is added to
  the residual (Gemma 2, OLMo 2), that gradient is also the residual's.
"""

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from finetune import kernels
from finetune.models.attention_choice import has_package

OnMain = Callable[[Callable[[], Any]], Any]
Tensors = list[torch.Tensor]
RMS_NORM, SWIGLU = "rms_norm", "swiglu"
"""Names in FINETUNE_WITHOUT_KERNELS."""
EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SwiGLU": F.silu,
    "GeGLU": lambda states: F.gelu(states, approximate="tanh"),
}
ROWS = 301  # more than the multiprocessors of a GPU, which share them in backward
# Liger has another kernel for norms of at most 256 numbers (of heads) from 32,768 rows on.
SMALL, MANY_ROWS = 256, 32_768 + 301
# How far a kernel may be from PyTorch in float32 (seen: 1e-6, by the order of sums): a kernel in
# float32 itself, and in 16 bits as far as PyTorch's operations are, or two roundings of bfloat16
# (each 2^-9 at most, 2^-10 by root mean square).
WITHIN, TIMES, ROUNDINGS = 1e-5, 1.1, 2**-9


@dataclass(frozen=True)
class Norm:
    """x / rms(x) x (offset + weight), as a class of transformers computes it."""

    size: int
    eps: float
    offset: float
    rounds_first: bool
    """Whether it rounds to the dtype of x before the weight (Llama), or after it (Gemma)."""

    name = RMS_NORM
    title = "RMSNorm"

    def plain(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        exact = states.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        if self.rounds_first:
            return (self.offset + weight if self.offset else weight) * exact.to(states.dtype)
        return (exact * (self.offset + weight.float())).to(states.dtype)

    def fused(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        casting = "llama" if self.rounds_first else "gemma"
        in_place = False
        out: torch.Tensor = LigerRMSNormFunction.apply(
            states, weight, self.eps, self.offset, casting, in_place
        )
        return out

    def takes(self, states: torch.Tensor, weight: torch.Tensor) -> bool:
        """Return whether the kernel's output has the right dtype, which is that of its input."""
        wider = self.rounds_first and torch.promote_types(states.dtype, weight.dtype)
        return states.numel() > 0 and wider in (False, states.dtype)

    def examples(self, rows: int, random: torch.Generator) -> Tensors:
        return [torch.randn(shape, generator=random) for shape in ((rows, self.size), (self.size,))]


@dataclass(frozen=True)
class Gate:
    """activation(gate) x up, between the products of an MLP."""

    size: int
    title: str
    """One of ACTIVATIONS."""
    products: tuple[str, ...] = ("gate_proj", "up_proj")
    """The modules that make gate and up; one makes them side by side."""

    name = SWIGLU

    def plain(self, *given: torch.Tensor) -> torch.Tensor:
        gate, up = given if len(given) == 2 else given[0].chunk(2, -1)
        return ACTIVATIONS[self.title](gate) * up

    def fused(self, *given: torch.Tensor) -> torch.Tensor:
        # With two, backward writes both gradients over them: they are outputs of products, or of
        # an adapter's sum, which nothing else keeps.
        from liger_kernel.ops import geglu, swiglu

        function: Any = swiglu.LigerSiLUMulFunction
        if len(given) == 1:
            function = swiglu.LigerFusedGateUpSiLUMulFunction
        elif self.title == "GeGLU":
            function = geglu.LigerGELUMulFunction
        out: torch.Tensor = function.apply(*given)
        return out

    def takes(self, *given: torch.Tensor) -> bool:
        return given[0].numel() > 0 and given[0].dtype == given[-1].dtype

    def examples(self, rows: int, random: torch.Generator) -> Tensors:
        both = 3 * torch.randn(rows, 2 * self.size, generator=random)
        return list(both.chunk(2, -1)) if len(self.products) == 2 else [both]


Part = Norm | Gate


def parts(model: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[tuple[nn.Module, Part]]:
    """Yield the modules that a kernel can stand for, except in `without`, and what they compute.

    A module whose forward something else has replaced is left alone.
    """
    left_out = {id(inner) for module in without for inner in module.modules()}
    for module in model.modules():
        if id(module) in left_out or "forward" in vars(module):
            continue
        if part := norm_of(module) or gate_of(module):
            yield module, part


def install(
    model: nn.Module, *, on_main: OnMain, device: torch.device, dtypes: Sequence[torch.dtype],
    compiled: Iterable[nn.Module] = (),
) -> Iterator[str]:  # fmt: skip
    """Let kernels stand for the norms and gates of a model; yield which do, and why some do not.

    `on_main`: does something on the main process, whose result every process gets. `dtypes`: of
    the states. `compiled`: layers that are left alone: there Inductor fuses a norm with the casts
    and the residual around it, and a gate with the casts of the next product, which costs fewer
    passes than a kernel of a library, which it cannot open.
    """
    found = list(parts(model, compiled))
    kinds = list(dict.fromkeys(part for _, part in found))
    problems: dict[Part, str] = on_main(
        lambda: {part: why for part in kinds if (why := problem(part, device, dtypes))}
    )
    counts: Counter[str] = Counter()
    for module, part in found:
        if part not in problems:
            stand_for(module, part)
            counts[part.title] += 1
    if counts:
        named = " and ".join(f"{title} ({number})" for title, number in counts.items())
        yield f"{named} run by Liger's kernels"
    for why in dict.fromkeys(problems.values()):
        titles = dict.fromkeys(part.title for part, own in problems.items() if own == why)
        yield f"note: {' and '.join(titles)} by several kernels for one, because {why}"


def stand_for(module: Any, part: Part) -> None:
    """Let a module compute its part fused where the kernel takes its inputs."""
    if isinstance(part, Norm):
        module.forward = _norm_forward(module, part)
    else:
        module.forward = _gate_forward(module, part)


def problem(part: Part, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """Return why a kernel is not used, or ""."""
    if kernels.is_left_out(part.name):
        return f"{kernels.WITHOUT} names {part.name}"
    if not has_package("liger-kernel"):
        return "liger-kernel is not installed (pip install 'finetune[kernels]')"
    is_small = isinstance(part, Norm) and part.size <= SMALL
    each = (wrong(part, device, dtypes, rows) for rows in (ROWS, MANY_ROWS)[: 1 + is_small])
    return next(filter(None, each), "")


def _norm_forward(module: Any, norm: Norm) -> Callable[..., torch.Tensor]:
    plain = module.forward

    @functools.wraps(plain)
    def forward(*arguments: Any, **keywords: Any) -> torch.Tensor:
        (states,) = (*arguments, *keywords.values())
        if norm.takes(states, module.weight):
            return norm.fused(states, module.weight)
        out: torch.Tensor = plain(states)
        return out

    return forward


def _gate_forward(module: Any, gate: Gate) -> Callable[..., torch.Tensor]:
    @functools.wraps(module.forward)
    def forward(*arguments: Any, **keywords: Any) -> torch.Tensor:
        (states,) = (*arguments, *keywords.values())
        given = [getattr(module, name)(states) for name in gate.products]
        combine = gate.fused if gate.takes(*given) else gate.plain
        out: torch.Tensor = module.down_proj(combine(*given))
        return out

    return forward


def norm_of(module: nn.Module) -> Norm | None:
    """Return which RMSNorm a module computes, by running its class on a CPU; None if none."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    found = (getattr(module, name, None) for name in EPSILONS)
    eps = next((value for value in found if isinstance(value, float)), None)
    if own.keys() != {"weight"} or module._modules or eps is None or not _takes_one(module):
        return None
    whole = getattr(own["weight"], "ds_shape", own["weight"].shape)  # ZeRO-3 keeps it there
    random = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-3, 1e-2, 1, 30])[:, None]  # in the first rows epsilon decides
    states, weight = (torch.randn(shape, generator=random) for shape in ((4, 256), (256,)))
    states = states * scales
    pairs = list(itertools.product((torch.float32, torch.bfloat16), repeat=2))
    for offset, rounds_first in itertools.product((0.0, 1.0), (True, False)):
        norm = Norm(whole.numel(), eps, offset, rounds_first)
        if all(_computes(module, norm, states.to(a), weight.to(b)) for a, b in pairs):
            return norm
    return None


def _computes(module: nn.Module, norm: Norm, states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a module does what `norm` does; a rounding may differ once in a while."""
    try:
        own = _copy(module, _parameters={"weight": weight}).forward(states)
    except Exception:  # of any author's code
        return False
    right = norm.plain(states, weight)
    if not isinstance(own, torch.Tensor) or own.dtype != right.dtype or own.shape != right.shape:
        return False
    near = 1e-5 * right.abs() if right.dtype == torch.float32 else 0.0
    return ((own - right).abs() <= near).float().mean().item() > 0.98


def gate_of(module: nn.Module) -> Gate | None:
    """Return what an MLP does between its products, by running its class with others' products."""
    for products in (("gate_proj", "up_proj"), ("gate_up_proj",)):
        if module._modules.keys() >= {*products, "down_proj"} and _takes_one(module):
            return _gate_of(module, products)
    return None


def _gate_of(module: nn.Module, products: tuple[str, ...]) -> Gate | None:
    random = torch.Generator().manual_seed(0)
    both, states, result = (torch.randn(4, 16, generator=random) for _ in range(3))
    answers = list(both.chunk(2, -1)) if len(products) == 2 else [both]
    given: list[torch.Tensor] = []

    def answering(answer: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def answered(states: torch.Tensor) -> torch.Tensor:
            given.append(states)
            return answer

        return answered

    stands_in = dict(zip((*products, "down_proj"), map(answering, (*answers, result))))
    try:
        with torch.no_grad():
            out = _copy(module, _modules={**module._modules, **stands_in}).forward(states)
    except Exception:  # of any author's code
        return None
    size = getattr(getattr(module, products[0]), "out_features", 0) // (3 - len(products))
    is_usual = len(given) == len(products) + 1 and all(x is states for x in given[:-1])
    if out is not result or not is_usual or not size:
        return None
    for title in ACTIVATIONS if len(products) == 2 else ("SwiGLU",):  # all that Liger has
        gate = Gate(size, title, products)
        wanted = gate.plain(*answers)
        found = given[-1]
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
            return gate
    return None


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2  # self, and the states


def _copy(module: nn.Module, **values: Any) -> Any:
    """Return a copy with other parameters or children, and the forward of its class."""
    copy: Any = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, **values}
    copy.__dict__.pop("forward", None)
    return copy


def wrong(part: Part, device: torch.device, dtypes: Sequence[torch.dtype], rows: int = ROWS) -> str:
    """Return what is wrong with a kernel's outputs or gradients beside float32's, or ""."""
    examples = part.examples(rows, torch.Generator().manual_seed(0))
    for chosen in itertools.product(dtypes, repeat=len(examples)):
        given = [each.to(dtype).to(device) for each, dtype in zip(examples, chosen)]
        if not part.takes(*given):
            continue
        try:
            found = _run(part.fused, given)
        except Exception as exc:  # of a compiler, a loader, the kernel itself
            return kernels.reason(exc)
        # From the same rounded numbers.
        exact = _run(part.plain, [each.float() for each in given])
        for name, own, usual, right in zip(_COMPARED, found, _run(part.plain, given), exact):
            error, most = kernels.error(own, right), WITHIN
            if set(chosen) != {torch.float32}:
                most = max(TIMES * kernels.error(usual, right), ROUNDINGS)
            if own.dtype != usual.dtype or not error <= most:
                dtype = str(given[0].dtype).removeprefix("torch.")
                return f"in {dtype} its {name} is {error:.1e} away from float32's"
    return ""


_COMPARED = ("output", "gradient of its first input", "gradient of its second input")


def _run(compute: Callable[..., torch.Tensor], given: Tensors) -> Tensors:
    """Return output and gradients."""
    inputs = [each.clone().requires_grad_() for each in given]
    # What a kernel writes over is never a leaf in a model.
    out = compute(*(each.clone() if each.dim() > 1 else each for each in inputs))
    grad = torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach().clone(), *torch.autograd.grad(out, inputs, grad)]
