"""Open an export as a user would, and compare it with the trained model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import failures
from finetune.data.conversations import Message
from finetune.data.templates import QUESTION, Template
from finetune.data.tokens import encode_prompt, tokenizer_fingerprint
from finetune.errors import ExportError, ModelError, OutOfMemory
from finetune.export.load import load, load_tokenizer
from finetune.export.save import stop_tokens
from finetune.models import adapters, attention_choice, attention_probe, families
from finetune.models.document_scores import Scored, plain

PROBE_TOKENS = 16
# Largest difference of logits between the trained and the reloaded model, relative to the largest
# logit. float32: the two attention kernels add in another order. Half precision: bf16 keeps 8 bits
# (a relative error of 2^-9 in each operation), and training may have run under autocast.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


@dataclass(frozen=True)
class Trained:
    """What an export is compared with; of the trained model it keeps only weights, on the CPU."""

    weights: dict[str, torch.Tensor]
    logits: torch.Tensor
    """Its `probe_logits`, float32 [1, PROBE_TOKENS, V]."""
    device: torch.device
    """Where they were computed."""
    dtype: torch.dtype
    """Dtype to open the export in."""
    probe_dtype: torch.dtype | None
    """Dtype to which the topology rounds weights in a forward pass; None: as they are."""
    precision: str
    is_adapter: bool
    eos_token_id: int | list[int] | None
    tokenizer: Any
    """The exported one."""
    scored: Scored | None = None
    """Documents and their scores, of a reward model."""


def verify(
    folder: Path, trained: Trained, template: Template | None, *, trust_remote_code: bool,
    system_prompt: str | None = None,
) -> None:  # fmt: skip
    """Open `folder` as a user would and compare it with what was trained. Raises ExportError.

    Every tensor must be equal bit for bit, no adapter may be zero, the logits of `probe_ids` must
    agree, and so must the scores of a reward model; the tokenizer must give the same ids, and its
    chat template the prompt of training.
    """
    has_room = True
    try:
        eos_token_id = _verify_model(folder, trained, trust_remote_code)
    except Exception as exc:
        # One GPU may lack memory for what several shared.
        is_out_of_memory = isinstance(failures.translate(exc), OutOfMemory)
        if trained.device.type == "cpu" or not is_out_of_memory:
            raise
        has_room = False
    if not has_room:  # outside the handler, whose exception keeps the model in memory
        torch.cuda.empty_cache()
        moved = replace(trained, device=torch.device("cpu"))
        eos_token_id = _verify_model(folder, moved, trust_remote_code)
    found, wanted = opened(lambda: load_tokenizer(folder, trust_remote_code)), trained.tokenizer
    if (
        tokenizer_fingerprint(found) != tokenizer_fingerprint(wanted)
        or found.chat_template != wanted.chat_template
    ):
        raise ExportError(f"{folder}: the tokenizer differs after reloading")
    if eos_token_id != trained.eos_token_id:
        raise ExportError(f"{folder}: the tokens that end an answer differ after reloading")
    if template is not None:
        verify_prompt(folder, found, template, system_prompt)


def _verify_model(
    folder: Path, trained: Trained, trust_remote_code: bool
) -> int | list[int] | None:
    """Raise ExportError if weights or logits of a saved model differ; return its EOS tokens."""
    reloaded = opened(lambda: load(folder, trained.dtype, trust_remote_code, device=trained.device))
    if trained.is_adapter and (dead := adapters.dead_adapters(reloaded)):
        raise ExportError(
            f"{folder}: {len(dead)} adapters are zero, such as {dead[0]}: they were never trained"
        )
    require_weights(folder, reloaded, trained.weights)
    eos_token_id = stop_tokens(getattr(reloaded, "generation_config", None))
    logits = _logits_as_trained(reloaded, trained)
    has_experts = attention_probe.has_experts(reloaded)
    if why := disagreement(logits, trained.logits, TOLERANCE[trained.precision], has_experts):
        raise ExportError(f"{folder}: {why} after reloading")
    if trained.scored is not None:
        require_scores(folder, reloaded, trained.scored, trained)
    return eos_token_id


def require_scores(folder: Path, reloaded: Any, scored: Scored, trained: Trained) -> None:
    """Raise ExportError if a reward model, as transformers opens it, scores documents otherwise.

    Relative to the largest score, or 1, as `disagreement` does for logits.
    """
    found, wanted = plain(reloaded, scored.documents, trained.device), scored.scores
    off = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    tolerance = TOLERANCE[trained.precision]
    if not off <= tolerance and not attention_probe.has_experts(reloaded):  # NaN differs
        raise ExportError(
            f"{folder}: scores {[round(each, 4) for each in found.tolist()]} of documents after "
            f"reloading, and {[round(each, 4) for each in wanted.tolist()]} in training"
        )


def opened(open_: Callable[[], Any]) -> Any:
    """Return `open_()`; a ModelError becomes an ExportError, as we saved what does not open."""
    try:
        return open_()
    except ModelError as exc:
        raise ExportError(str(exc)) from exc


def require_weights(folder: Path, reloaded: Any, weights: dict[str, torch.Tensor]) -> None:
    """Raise ExportError unless every tensor of `weights` was reloaded bit for bit."""
    state = dict(reloaded.named_buffers())
    state |= dict(reloaded.named_parameters(remove_duplicate=False))
    for name, tensor in weights.items():
        if name not in state:
            raise ExportError(f"{folder}: weight {name} is missing after reloading")
        if not torch.equal(state[name].cpu(), tensor):
            raise ExportError(f"{folder}: weight {name} differs from training after reloading")


def _logits_as_trained(model: Any, trained: Trained) -> torch.Tensor:
    """Return the `probe_logits` of a reloaded model on the device and in the dtype of training."""
    if trained.probe_dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(trained.probe_dtype)
    if not getattr(model, "is_quantized", False):  # a quantised one was loaded onto its device
        model.to(trained.device)
    return probe_logits(model)


def disagreement(
    found: torch.Tensor, wanted: torch.Tensor, tolerance: float, has_experts: bool
) -> str | None:
    """Return a message if logits differ by more than `tolerance` x the largest one of `wanted`.

    Both float32 [1, T, V], or [1, labels] of a classifier: relative to 1 at least, as a score may
    be near 0, where its rounding is as large as itself. Returns None if they agree: in half of the
    tokens for a mixture of experts, in all for any other model. A router that is nearly undecided
    may choose another expert when products round differently, which changes that token's logits
    and, a little, later ones. So right exports differ in some tokens; wrong ones (another rope
    theta, activation or number of heads) differ in nearly all.
    """
    largest = wanted.abs().max().clamp(min=1.0 if wanted.ndim == 2 else 0.0)
    differences = (found - wanted).abs().amax(-1).flatten() / largest
    share = float((differences <= tolerance).float().mean())  # NaN counts as a difference
    if share >= (0.5 if has_experts else 1.0):
        return None
    most = float(differences.max())
    return (
        f"logits of {1 - share:.0%} of the tokens differ, by up to {most:.3g} of the largest one,"
    )


def verify_prompt(
    target: Path, tokenizer: Any, template: Template, system_prompt: str | None
) -> None:
    """Raise ExportError unless the exported chat template gives the prompt tokens of training."""
    template = replace(template, date=None)  # apply_chat_template uses today's date
    messages = QUESTION if system_prompt is not None else template.probe
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as exc:  # a template is a program
        raise ExportError(
            f"{target}: its chat template fails: {type(exc).__name__}: {exc}"
        ) from exc
    found = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    system = [Message("system", system_prompt)] if system_prompt is not None else []
    wanted = encode_prompt(template.prompt([*system, *messages]), tokenizer)
    if found != wanted:
        raise ExportError(
            f"{target}: its chat template gives the tokens {found} for a prompt that was trained "
            f"as {wanted}"
        )


def probe_logits(model: Any, device: torch.device | None = None) -> torch.Tensor:
    """Return a model's logits for `probe_ids`, float32 [1, PROBE_TOKENS, V] on the CPU.

    Of a classifier of rows [1, labels].

    Collective if weights are sharded. Uses the model's own attention, as a user of the export will:
    the kernel of training adds in another order.
    """
    was_training, base = model.training, model.get_base_model() if adapters.are_in(model) else model
    device = device or model.get_input_embeddings().weight.device
    ids = probe_ids(model.config.get_text_config().vocab_size).to(device)
    model.eval()
    try:
        with torch.no_grad(), attention_choice.own_attention(base):
            return model(**families.inputs_of(ids, base)).logits.float().cpu()
    finally:
        model.train(was_training)


def probe_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(1))
