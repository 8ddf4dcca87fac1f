"""Check the output projection and the forecast of memory of every causal LM of transformers.

    python benchmarks/architectures.py        four minutes of CPU; prints those that fail

Each has the default sizes of its config, or those of SIZES, and two layers. Its head is followed;
the loss and the log-probabilities that it answers in chunks of tokens are those of all logits, with
their gradients; and the memory of a step is forecast without weights.

For losses and gradients only the head has weights, random ones, and what the model puts between it
and the layers; random hidden states take the place of what the layers return. So a gradient with
respect to those states is all that the layers would get.
"""

import contextlib
import itertools
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune.config import Config
from finetune.forecast.trace import Rehearsal, Shape
from finetune.models import cross_entropy, head, load

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
# Where the defaults of a config make no model, or too large a head.
SIZES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 4]},
    "rembert": {"output_embedding_size": 64},
    "xlm-roberta-xl": {"hidden_size": 128, "num_attention_heads": 8},
}
SECONDS = 60  # of CPU, as a busy machine is slow
# Losses in float32 differ by less than this share. Float64 would not test more: losses are summed
# in float32 whatever the precision of the model.
TOLERANCE = 1e-6
# Gradients differ by less than this share of their norm. Below 16 rows, BLAS on some CPUs adds up
# the words one after another: 3e-5 off on an AMD EPYC with AVX-512, below 1e-6 elsewhere.
OF_GRADIENT = 1e-4
BATCH, POSITIONS = (2, 10), range(3, 19, 2)
# Rows of logits in memory at once, and in float32 at once. The chunks have 3, 3 and 2 rows: for one
# row BLAS adds up the words one after another, which is 1e-5 off where there are 250,000.
CHUNK, BLOCK = 3, 2
# Numbers in a hidden state, where nothing lies between the layers and the head.
WIDTH = 32


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)  # torch logs each error of a forecast with its traceback
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, too_long)
    built, followed, equal, forecast, largest = 0, 0, 0, 0, (0.0, 0.0)
    for name in NAMES:
        try:
            config, model = build(name)
        except Exception as exc:  # a package is missing, or its defaults make no model
            print(f"{name}: not built, {reason(exc)}", flush=True)
            continue
        built += 1
        with reported(name):
            if why := head.install(model):
                print(f"{name}: holds all logits, as {why}", flush=True)
            else:
                followed += 1
                found = differences(model)
                largest = tuple(map(max, largest, found))
                equal += 1
        del model
        with reported(name):
            trace(name, config)
            forecast += 1
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}: {built} of "
        f"{len(NAMES)} are built; {followed} heads followed; {equal} answer as all logits do, "
        f"within {largest[0]:.1e} of the loss and {largest[1]:.1e} of a gradient's norm; "
        f"{forecast} forecast"
    )


@contextlib.contextmanager
def reported(name: str) -> Iterator[None]:
    """Print the error that ends the block, also that it took too long."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except Exception as exc:
        print(f"{name}: {reason(exc)}", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def reason(exc: Exception) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"


def build(name: str) -> tuple[Any, Any]:
    """Return the config and the model, without weights."""
    config = AutoConfig.for_model(name, **SIZES.get(name, {}))
    for depth in DEPTHS:
        if isinstance(getattr(config, depth, None), int):
            with contextlib.suppress(NotImplementedError):  # the sum of two other settings
                setattr(config, depth, 2)
    if getattr(config, "layer_types", None):
        with contextlib.suppress(AttributeError):  # made from other settings
            config.layer_types = list(config.layer_types)[:2]
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


def differences(base: Any) -> tuple[float, float]:
    """Compare losses, log-probabilities and gradients, in chunks and of all logits.

    `base` is without weights, and `head.install` has followed its head. Return the largest relative
    differences of a loss and of a gradient. Raise ValueError if one is over the tolerance, or if
    anything held the logits of all supervised tokens.
    """
    torch.manual_seed(0)
    try:
        states, weights = give_weights(base)
        found = {
            (want, holds_all): ask(base, want, holds_all, [states, *weights.values()])
            for holds_all in (True, False)
            for want in ("nll", "logprobs")
        }
    finally:
        base.to("meta")  # it refers to itself, and Python does not know how much memory it has
    of_loss, of_gradient, names = 0.0, 0.0, ["the hidden states", *weights]
    for (one, (loss, gradients)), (other, (right, wanted)) in itertools.combinations(
        found.items(), 2
    ):
        pair = f"{describe(*other)} and {describe(*one)}"
        if not (difference := abs(loss - right) / abs(loss)) <= TOLERANCE:
            raise ValueError(f"{pair} differ: {right:.8g}, {loss:.8g}")
        of_loss = max(of_loss, difference)
        for name, gradient, of_other in zip(names, gradients, wanted):
            if (gradient is None) != (of_other is None):
                raise ValueError(f"of {pair}, one gives {name} no gradient")
            if gradient is None:
                continue
            if not (difference := relative(gradient, of_other)) <= OF_GRADIENT:
                raise ValueError(f"{pair} differ by {difference:.1e} in the gradient of {name}")
            of_gradient = max(of_gradient, difference)
    return of_loss, of_gradient


def describe(want: str, holds_all: bool) -> str:
    return f"{want} {'of all logits' if holds_all else 'in chunks'}"


def relative(gradient: torch.Tensor, other: torch.Tensor) -> float:
    norm = gradient.norm()
    return float((gradient - other).norm() / norm) if norm else float(other.norm())


def give_weights(base: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Put hidden states in place of what the layers return, and weights where they go from there.

    Return the states [B, T, H] and the weights by name; all ask for their gradients.
    """
    projection = base.get_output_embeddings()
    layers = layers_of(base, projection)
    passed_over = {*layers.modules(), projection}
    modules = {name: m for name, m in base.named_modules() if m not in passed_over}
    biases = (projection.out_features,)
    width = base.config.get_text_config().hidden_size
    if all(p.shape == biases for m in modules.values() for p in m.parameters(recurse=False)):
        # All words, as a model may cut those that only pad its vocabulary; but few numbers each.
        width = WIDTH
        projection.weight = nn.Parameter(torch.empty(*biases, width, device="meta"))
    weights = random_weights({**modules, "head": projection})
    states = torch.randn(*BATCH, width, requires_grad=True)
    layers.forward = lambda *_, **__: head._Outputs(states)
    with torch.no_grad():
        # So that some words are likely and caps bend, whatever scales a model has.
        projection.weight *= 3 / base(input_ids=tokens(), use_cache=False).logits.std()
    return states, weights


def layers_of(base: Any, projection: nn.Module) -> Any:
    """Return the outermost module whose output the forward takes to the projection."""
    called: list[nn.Module] = []
    children = [child for child in base.children() if child is not projection]
    for layers in (*sorted(children, key=head._size, reverse=True), base.get_decoder()):
        with layers.register_forward_hook(lambda module, *_: called.append(module)):
            finish, _ = head._probe(base, projection, layers)
        if finish is not None and layers in called:
            return layers
    raise ValueError("its forward calls no module whose output reaches the head")


def random_weights(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Replace what has no memory by random numbers; what was shared stays so."""
    made: dict[int, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                new = torch.zeros(old.shape, dtype=old.dtype)
                if old.is_floating_point():
                    new = torch.randn(old.shape) / (old.shape[-1:] or [1])[0] ** 0.5
                if isinstance(old, nn.Parameter):
                    new = weights[f"{path}.{name}"] = nn.Parameter(new)
                made[id(old)] = new
            setattr(module, name, made[id(old)])
    return weights


def ask(
    base: Any, want: str, holds_all: bool, leaves: list[torch.Tensor]
) -> tuple[float, tuple[torch.Tensor | None, ...]]:
    """Return the sum of losses and the gradients, and check how many rows of logits were there."""
    words = base.get_output_embeddings().out_features
    positions = torch.tensor(POSITIONS)
    labels = torch.randint(words, (len(POSITIONS),), generator=torch.Generator().manual_seed(1))
    question = head.Question(labels, positions, frozenset({want}), block_bytes=BLOCK * words * 4)
    base.holds_all_logits = holds_all
    with mock.patch.object(cross_entropy, "CHUNK_BYTES", CHUNK * words * 4), Rows(words) as rows:
        answer = base(input_ids=tokens(), use_cache=False, question=question)[want]
        loss = answer if want == "nll" else -answer.sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    if holds_all != bool(rows.seen & {len(POSITIONS), tokens().numel()}):
        raise ValueError(f"{describe(want, holds_all)} held logits of {sorted(rows.seen)} tokens")
    return loss.item(), gradients


def tokens() -> torch.Tensor:
    return torch.zeros(BATCH, dtype=torch.long)


class Rows(TorchDispatchMode):
    """Remembers for how many tokens a new tensor held a number for each word."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.seen = words, set[int]()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.words,):
                self.seen.add(tensor.numel() // self.words)
        return out


def trace(name: str, model_config: Any) -> None:
    """Forecast the memory of a step. Raise what keeps it from being forecast."""
    sizes = {"model_type": name, **SIZES.get(name, {})}
    model = {"init": "random", "tokenizer": "bytes", "config": sizes}
    config = Config.model_validate({"run": {"name": "x"}, "data": {"train": "x"}, "model": model})
    tokenizer = load.load_tokenizer(config.model)
    rehearsal = Rehearsal(config, model_config, tokenizer, attention="eager", precision="bf16")
    rehearsal.trace(Shape(1, 16, 16))


def too_long(*_: Any) -> NoReturn:
    raise TimeoutError(f"took more than {SECONDS} seconds of CPU")


if __name__ == "__main__":
    main()
