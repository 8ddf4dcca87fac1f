"""Products of the layers in float8, by torchao, in passes that train.

Tensor cores multiply float8 at twice the rate of 16 bits (Micikevicius et al., 2022). Inputs,
weights and gradients are scaled and cast before each product; weights, gradients and optimizer
state keep their dtypes, so checkpoints, averages and exports do not know of it. Evaluations,
samples and the export's probe multiply in the run's own precision, as users of the export will.
"""

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from finetune import kernels
from finetune.errors import ConfigError, ModelError
from finetune.models import recompute

OLDEST = (0, 18)  # of torchao: the first that is safe from a miscompiled cast (triton#11111)
CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
UNIT = 16  # sizes of a product must be multiples of it
# Multiplications per value that is cast: K N / (K + N) for many tokens. Of T tokens a layer's three
# products take 6 T K N operations, at some 1,200 for 700 TFLOP/s: 3.6e-15 T K N seconds less. Casts
# read their input twice and write it twice, once transposed: 8 bytes for each value in T (K + N),
# at 3.3 TB/s. These are equal at K N / (K + N) = 670; weights and launches come on top.
WORTH = 1024
# Of a float8 with 3 bits after the point each value is 2.6 % off by root mean square, with 2 bits
# (gradients, with one scale a tensor) 5.2 %; of a product of two such 3.7 to 5.8 %.
WITHIN = 0.1


def require(device: torch.device) -> None:
    """Raise ConfigError if float8 cannot be had here."""
    needs = "train.float8: needs a GPU of compute capability 8.9 (Ada), 9 (Hopper) or newer"
    if device.type != "cuda":
        raise ConfigError(f"{needs}, and this run is on a CPU; remove it")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"{needs}, and {name} has {'.'.join(map(str, capability))}; remove it")
    try:
        version = metadata.version("torchao")
    except metadata.PackageNotFoundError:
        version = ""
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        found = f"{version} is installed" if version else "it is not installed"
        raise ConfigError(
            f"train.float8: needs the package torchao, {'.'.join(map(str, OLDEST))} or newer, and "
            f"{found}; pip install 'finetune[float8]'"
        )


def convert(model: nn.Module, kind: bool | str) -> None:
    """Let the products of the layers that are worth it run in float8. Raises ModelError.

    `kind`: as train.float8. Head and embedding are outside the layers; adapters are too small.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise" if kind is True else str(kind))
    large = {id(module) for module in large_products(model)}
    convert_to_float8_training(
        model, module_filter_fn=lambda module, _: id(module) in large, config=config
    )
    for module in converted(model):
        module.forward = _in_training(module)


def large_products(model: nn.Module) -> list[nn.Module]:
    """Return the linear layers that are worth it. Raises ModelError if there are none."""
    inner = (module for layer in recompute.layers(model) for module in layer.modules())
    if large := [module for module in inner if is_worth_it(module)]:
        return large
    raise ModelError(
        "train.float8: the layers of this model have no product that is large enough (inputs x "
        f"outputs / (inputs + outputs) of at least {WORTH:,}); remove it"
    )


def is_worth_it(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    inputs, outputs = module.in_features, module.out_features
    fits = inputs % UNIT == 0 and outputs % UNIT == 0
    return fits and inputs * outputs >= WORTH * (inputs + outputs)


def converted(model: nn.Module) -> Iterator[Any]:
    from torchao.float8.float8_linear import Float8Linear

    return (module for module in model.modules() if isinstance(module, Float8Linear))


def _in_training(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward in float8 while training with gradients, else that of a linear layer."""
    in_float8 = module.forward

    def forward(states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        if not (module.training and torch.is_grad_enabled()):
            return nn.Linear.forward(module, states)
        # The gradient of the weight is a product over tokens, of which there is any number. torchao
        # computes it for frozen weights, too; there a compiler leaves it out, but checks its sizes.
        flat = states.flatten(0, -2)
        out = in_float8(F.pad(flat, (0, 0, 0, -flat.shape[0] % UNIT)))
        return out[: flat.shape[0]].unflatten(0, states.shape[:-1])

    return forward


def check(model: nn.Module, device: torch.device) -> str:
    """Return a line that says which products are in float8. Raises ModelError for a wrong one."""
    products = list(converted(model))
    least = min(products, key=lambda m: m.in_features * m.out_features)  # a GPU may be nearly full
    for trains in {module.weight.requires_grad for module in products}:
        if why := wrong(least.config, least.in_features, least.out_features, trains, device):
            raise ModelError(f"train.float8: cannot be used here: {why}; remove it")
    names = ((n, m) for layer in recompute.layers(model) for n, m in layer.named_modules())
    number = sum(isinstance(module, nn.Linear) and "lora_" not in name for name, module in names)
    granularity = products[0].config.cast_config_input.scaling_granularity.value
    scales = "tensor" if granularity == "tensorwise" else "row"
    rest = "; the others are too small" if number > len(products) else ""
    return (
        f"{len(products)} of {number} products in the layers run in float8, with a scale for each "
        f"{scales}{rest}"
    )


def wrong(config: Any, inputs: int, outputs: int, trains: bool, device: torch.device) -> str:
    """Return what is wrong with a product in float8 and its gradients, or ""."""
    random = torch.Generator(device).manual_seed(0)
    weight, states, grad = (
        torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)
        for shape in ((outputs, inputs), (3, 67, inputs), (3, 67, outputs))
    )
    try:
        own = _gradients(config, weight, states, grad, trains)
    except Exception as exc:  # of a library, a driver
        return kernels.reason(exc)
    for name, found, right in zip(
        ("output", "gradient of the input", "gradient of the weight"),
        own,
        _gradients(None, weight, states, grad, trains),
    ):
        error = kernels.error(found, right)
        if not error <= WITHIN:
            return f"its {name} is {error:.1%} away from bfloat16's, more than {WITHIN:.0%}"
    return ""


def _gradients(
    config: Any, weight: torch.Tensor, states: torch.Tensor, grad: torch.Tensor, trains: bool
) -> list[torch.Tensor]:
    """Return output and gradients of a linear layer, in float8 if there is a `config`; float32."""
    from torchao.float8 import convert_to_float8_training

    layer: Any = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=trains)
    if config is not None:
        convert_to_float8_training(box := nn.ModuleList([layer]), config=config)
        layer = box[0]
        layer.forward = _in_training(layer)
    states = states.detach().requires_grad_()
    out = layer(states)
    grads = torch.autograd.grad(out, [states, *([layer.weight] if trains else [])], grad)
    return [each.detach().float() for each in (out, *grads)]
