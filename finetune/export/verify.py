"""Open an export as a user would, and compare it with what was trained."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import failures
from finetune.data.rows import Message
from finetune.data.templates import QUESTION, Template
from finetune.data.tokens import encode_prompt, tokenizer_fingerprint
from finetune.errors import ExportError, ModelError, OutOfMemory
from finetune.export.load import load, load_tokenizer
from finetune.export.save import embedding_dtype, generation, with_template
from finetune.models import adapters, attention_choice, attention_probe

PROBE_TOKENS = 16
# Largest difference of logits between the trained and the reloaded model, as a part of the largest
# logit. float32: the two attention kernels add in another order. Half precision: bf16 keeps 8 bits
# (a relative error of 2^-9 each operation), and training may have run under autocast.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


@dataclass(frozen=True)
class Trained:
    """What an export is compared with once it is opened. Of the model that was trained it holds
    `weights` only, on the CPU.
    """

    weights: dict[str, torch.Tensor]
    logits: torch.Tensor
    """Its `probe_logits`, float32 [1, PROBE_TOKENS, V]."""
    device: torch.device
    """Where they were computed."""
    dtype: torch.dtype
    """In which the export is opened."""
    probe_dtype: torch.dtype | None
    """To which the topology rounds weights for a pass; None: as they are."""
    precision: str
    is_adapter: bool
    eos_token_id: int | list[int] | None
    tokenizer: Any
    """As it is exported."""


def trained(
    model: Any, weights: dict[str, torch.Tensor], logits: torch.Tensor, tokenizer: Any, template: Template | None, *,
    system_prompt: str | None, precision: str, device: torch.device, probe_dtype: torch.dtype | None = None,
) -> Trained:  # fmt: skip
    """`model` gives class and settings; its weights may be shared between processes, `weights` are
    whole.
    """
    is_adapter = adapters.are_in(model)
    dtype = (
        getattr(torch, model.base_record["dtype"])
        if is_adapter
        else embedding_dtype(model, weights)
    )
    return Trained(
        weights, logits, device, dtype, probe_dtype, precision, is_adapter, generation(model, tokenizer, template).eos_token_id,
        with_template(tokenizer, template, system_prompt),
    )  # fmt: skip


def verify(
    folder: Path,
    was: Trained,
    template: Template | None,
    *,
    trust_remote_code: bool,
    system_prompt: str | None = None,
) -> None:
    """Open `folder` as a user would and compare it with what was trained. Raises ExportError.

    Every tensor must be there bit for bit, no adapter may be zero, the logits of `probe_ids` must
    agree, the tokenizer must give the same ids, and its chat template the prompt that was trained.
    """
    try:
        stop = _require_as_trained(folder, was, trust_remote_code)
        has_room = True
    except (
        Exception
    ) as exc:  # a quantised base opens on one GPU, which may have no room for what several shared
        has_room = was.device.type == "cpu" or not isinstance(failures.translate(exc), OutOfMemory)
        if has_room:
            raise
    if not has_room:  # outside of the handler, which holds what was loaded
        torch.cuda.empty_cache()
        stop = _require_as_trained(
            folder, replace(was, device=torch.device("cpu")), trust_remote_code
        )
    again = opened(lambda: load_tokenizer(folder, trust_remote_code))
    if (
        tokenizer_fingerprint(again) != tokenizer_fingerprint(was.tokenizer)
        or again.chat_template != was.tokenizer.chat_template
    ):
        raise ExportError(f"{folder}: the tokenizer differs after reloading")
    if stop != was.eos_token_id:
        raise ExportError(f"{folder}: the tokens that end an answer differ after reloading")
    if template is not None:
        verify_prompt(folder, again, template, system_prompt)


def _require_as_trained(
    folder: Path, was: Trained, trust_remote_code: bool
) -> int | list[int] | None:
    """The tokens that end an answer of a saved model; raises ExportError if its weights or logits
    are not as trained.
    """
    reloaded = opened(lambda: load(folder, was.dtype, trust_remote_code, device=was.device))
    if was.is_adapter and (dead := adapters.dead_adapters(reloaded)):
        raise ExportError(
            f"{folder}: {len(dead)} adapters are zero, such as {dead[0]}: they were never trained"
        )
    require_weights(folder, reloaded, was.weights)
    stop: int | list[int] | None = reloaded.generation_config.eos_token_id
    if why := disagreement(
        _as_trained(reloaded, was),
        was.logits,
        TOLERANCE[was.precision],
        attention_probe.has_experts(reloaded),
    ):
        raise ExportError(f"{folder}: {why} after reloading")
    return stop


def opened(opens: Callable[[], Any]) -> Any:
    """What was just saved: where it does not open, that is not the user's mistake."""
    try:
        return opens()
    except ModelError as exc:
        raise ExportError(str(exc)) from exc


def require_weights(folder: Path, reloaded: Any, weights: dict[str, torch.Tensor]) -> None:
    """Raise ExportError for a tensor that is not there bit for bit."""
    state = {
        **dict(reloaded.named_buffers()),
        **dict(reloaded.named_parameters(remove_duplicate=False)),
    }
    for name, tensor in weights.items():
        if name not in state or not torch.equal(state[name].cpu(), tensor):
            raise ExportError(
                f"{folder}: weight {name} is "
                f"{'other than trained' if name in state else 'missing'} after reloading"
            )


def _as_trained(model: Any, was: Trained) -> torch.Tensor:
    """The `probe_logits` of a reloaded model on the device and in the dtype that those of the
    trained one were computed in.

    Where the device has no room for it, as for a model that several GPUs shared, on the CPU.
    """
    if was.probe_dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(was.probe_dtype)
    if not getattr(model, "is_quantized", False):  # those are on the GPU already, and stay
        try:
            model.to(was.device)
        except torch.OutOfMemoryError:
            model.to("cpu")
            torch.cuda.empty_cache()
    return probe_logits(model)


def disagreement(
    found: torch.Tensor, wanted: torch.Tensor, tolerance: float, has_experts: bool
) -> str | None:
    """In words, how logits float32 [1, T, V] differ by more than `tolerance` x the largest one of
    `wanted`; None if they do not.

    A router that is nearly undecided may choose another expert when products are rounded
    differently, and then the logits of that token, and a little those of later ones, are another
    function's: right exports differ in some tokens, wrong ones (another rope theta, activation, or
    number of heads) in nearly all. So a mixture of experts must agree in half of its tokens, any
    other model in each.
    """
    differences = (found - wanted).abs().amax(-1).flatten() / wanted.abs().max()
    share = float((differences <= tolerance).float().mean())  # NaN counts as a difference
    if share >= (0.5 if has_experts else 1.0):
        return None
    return f"logits of {1 - share:.0%} of the tokens differ, by up to {float(differences.max()):.3g} of the largest one,"


def verify_prompt(
    target: Path, tokenizer: Any, template: Template, system_prompt: str | None
) -> None:
    """A question asked through the exported chat template must give the tokens that training put
    before answers.
    """
    template = replace(template, date=None)  # apply_chat_template knows only today's
    messages = QUESTION if system_prompt is not None else template.probe
    try:
        asked = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as exc:  # a template is a program
        raise ExportError(
            f"{target}: its chat template fails: {type(exc).__name__}: {exc}"
        ) from exc
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    system = [Message("system", system_prompt)] if system_prompt is not None else []
    trained = encode_prompt(template.prompt([*system, *messages]), tokenizer)
    if ids != trained:
        raise ExportError(
            f"{target}: its chat template gives the tokens {ids} for a prompt that was trained as "
            f"{trained}"
        )


def probe_logits(model: Any, device: torch.device | None = None) -> torch.Tensor:
    """Logits of a model for `probe_ids`, float32 [1, PROBE_TOKENS, V] on the CPU. Collective where
    weights are shared.

    With the model's own attention, as a user who opens the export has it: the kernel of training
    adds in another order.
    """
    was_training, base = model.training, model.get_base_model() if adapters.are_in(model) else model
    device = device or model.get_input_embeddings().weight.device
    ids = probe_ids(model.config.get_text_config().vocab_size).to(device)
    model.eval()
    try:
        with torch.no_grad(), attention_choice.own_attention(base):
            return model(input_ids=ids, use_cache=False).logits.float().cpu()
    finally:
        model.train(was_training)


def probe_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(1))
