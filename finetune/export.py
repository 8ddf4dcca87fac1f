"""Trained weights -> a folder that transformers or peft opens, verified by opening it."""

import argparse
import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file, chat_template_utils

from finetune import failures, files
from finetune.config import paths
from finetune.config.base import (
    adapter_problem,
    decides_what_opens,
    folder_problem,
    is_adapter,
    is_model_or_adapter,
    model_argument,
    recorded_base,
    require_model,
    tokenizer_problem,
)
from finetune.data.rows import Message
from finetune.data.templates import QUESTION, Template
from finetune.data.tokens import encode_prompt, tokenizer_fingerprint, uses_bos
from finetune.errors import ExportError, ModelError, Outage, OutOfMemory
from finetune.models import adapters, attention, base_identity, embeddings
from finetune.models.load import keep_layout, quantized_as, refuse_lost, translated

PROBE_TOKENS = 16
# Largest difference of logits between the trained and the reloaded model, as a part of the largest
# logit. float32: the two attention kernels add in another order. Half precision: bf16 keeps 8 bits
# (a relative error of 2^-9 each operation), and training may have run under autocast.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


@dataclass(frozen=True)
class Base:
    """Where a model came from: what its folder holds in addition to the weights goes into the export."""

    path: str | None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Trained:
    """What an export is compared with once it is opened. Of the model that was trained it holds `weights` only, on the CPU."""

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
    """`model` gives class and settings; its weights may be shared between processes, `weights` are whole."""
    is_adapter = adapters.are_in(model)
    dtype = getattr(torch, model.base_record["dtype"]) if is_adapter else embedding_dtype(model, weights)
    return Trained(
        weights, logits, device, dtype, probe_dtype, precision, is_adapter, generation(model, tokenizer, template).eos_token_id,
        with_template(tokenizer, template, system_prompt),
    )  # fmt: skip


def save(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, template: Template | None, folder: Path,
    system_prompt: str | None = None, base: Base | None = None,
) -> None:  # fmt: skip
    """Write model (`weights` whole, on the CPU) and tokenizer into a fresh `folder`. What it is given stays as it is.

    The tokenizer carries the template as its chat template, and the generation config every token
    that ends an answer. What else `base` has that a user of the model needs comes along.
    """
    shutil.rmtree(folder, ignore_errors=True)
    is_adapter = adapters.are_in(model)
    # Resized embeddings are saved because they train (modules_to_save), not because peft finds them to be of another size.
    own = {"save_embedding_layers": False} if is_adapter else {}
    before, model.generation_config = model.generation_config, generation(model, tokenizer, template)
    try:
        model.save_pretrained(folder, state_dict=dict(weights), **own)  # a copy: transformers empties the mapping
        model.generation_config.save_pretrained(folder)  # peft leaves it out, and with it the token that ends an answer
    finally:
        model.generation_config = before
    if not is_adapter:
        config = copy.deepcopy(model.config)
        config.dtype = embedding_dtype(model, weights)  # an engine may have trained on 16-bit copies of what is saved
        if not _may_be_tied(model, weights):
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        config.save_pretrained(folder)
    _save_tokenizer(with_template(tokenizer, template, system_prompt), folder, base)
    if is_adapter:
        (folder / base_identity.FILE).write_text(json.dumps(model.base_record, indent=1))
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form
    elif base is not None:
        _bring_along(base, folder)
    written = [path for path in folder.rglob("*") if path.is_file()]
    files.follow_umask(*written)
    for path in written:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


# What a base may have in addition to weights, config and tokenizer: how to prepare pictures and sounds, and on which terms it was
# given. Its README describes the base, not what it has become.
SETTINGS = re.compile(r"[^/]*processor_config\.json")
TERMS = re.compile(
    r"(^|.*[-_. ])((un)?licen[sc]es?|copying|copyright|(third[-_. ]?party[-_. ]?)?notices?|((acceptable|prohibited)[-_. ]?)?use[-_. ]?policy"
    r"|terms([-_. ]of[-_. ]use)?|patents)([-_. ].*|$)",
    re.IGNORECASE,
)
CODE = re.compile(r".*\.py|custom_generate/.*")  # what model.trust_remote_code allows
# Never terms, whatever they are called, and too large to be fetched by mistake.
NO_TERMS = re.compile(
    r".*\.(py|json|jsonl|csv|tsv|safetensors|bin|gguf|onnx|pth?|ckpt|h5|msgpack|parquet|zip|tar|gz)", re.IGNORECASE
)
# As globs, for the Hub, which fetches a little more than comes along.
TO_FETCH = [
    "*processor_config.json", "*.py", "custom_generate/*",
    *("*" + "".join(f"[{c}{c.upper()}]" for c in word) + "*" for word in ("licen", "copy", "notice", "policy", "terms", "patents")),
]  # fmt: skip
NOT_TO_FETCH = ["*.safetensors", "*.bin", "*.gguf", "*.onnx", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.parquet"]


def _comes_along(name: str, trust_remote_code: bool) -> bool:
    """Whether a file of a base, by its path within the folder, belongs into an export. Hidden ones never do."""
    if re.search(r"(^|/)\.", name):
        return False
    if CODE.fullmatch(name):
        return trust_remote_code
    return bool(SETTINGS.fullmatch(name) or (TERMS.fullmatch(name.split("/")[0]) and not NO_TERMS.fullmatch(name)))


def _bring_along(base: Base, folder: Path) -> None:
    source = _folder_of(base, local_files_only=True)
    if source is None:
        return
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        wanted = _comes_along(name, base.trust_remote_code) and path.is_file() and not (folder / name).exists()
        inner = [parent for parent in path.parents if source in parent.parents]
        if wanted and not any(
            is_model_or_adapter(parent) for parent in inner
        ):  # such as runs in the folder of their base
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def _folder_of(base: Base, local_files_only: bool) -> Path | None:
    """The folder of a base; of one on the Hub the small files of it, fetched unless `local_files_only`. None where there is none."""
    if base.path is None or os.path.isdir(base.path):
        return Path(base.path) if base.path else None
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                base.path,
                revision=base.revision,
                allow_patterns=TO_FETCH,
                ignore_patterns=NOT_TO_FETCH,
                local_files_only=local_files_only,
            )
        )
    except Exception:  # a Hub that does not answer: weights and tokenizer, which are needed, say so by themselves
        return None


def _save_tokenizer(tokenizer: Any, folder: Path | str, base: Base | None) -> None:
    """Save a tokenizer with every file of a vocabulary that its class names: classes of a base's own may not write all of theirs."""
    tokenizer.save_pretrained(folder)
    source = str(tokenizer.name_or_path or "")
    revision = base.revision if base and source == base.path else None
    for name in sorted({name for name in type(tokenizer).vocab_files_names.values() if name}) if source else ():
        target = Path(folder, name)
        if not target.exists() and (found := _held(source, name, revision)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)


def _held(source: str, name: str, revision: str | None) -> str | None:
    """The path of a file of a folder, or of a repository of the Hub that was read before; None where it has no such file."""
    try:
        found: str | None = cached_file(source, name, revision=revision, local_files_only=True)
    except OSError:
        return None
    return found


def _may_be_tied(model: Any, weights: dict[str, torch.Tensor]) -> bool:
    """Whether embedding and head hold the same values, so that what the config says of them can be true."""
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    found = [weights.get(names.get(id(getattr(end, "weight", None)), "")) for end in ends]
    return found[0] is None or found[1] is None or torch.equal(found[0], found[1])


def with_template(tokenizer: Any, template: Template | None, system_prompt: str | None) -> Any:
    """A copy of the tokenizer with the template as its chat template; others that it has by name stay."""
    exported = copy.deepcopy(tokenizer)
    if template is not None:
        source, named = chat_template(template, tokenizer, system_prompt), exported.chat_template
        exported.chat_template = {**named, "default": source} if isinstance(named, dict) else source
    return exported


class Writing:
    """A model on its way to `target`: saved next to it, verified, and only then put there; what was there before stays until then.

    Two calls, so that between them the model that was trained, its optimizer and its gradients can go:
    opening the export takes their room, on a GPU too, where a quantised base is opened.
    """

    def __init__(self, target: Path, template: Template | None, system_prompt: str | None, base: Base) -> None:
        self.target, self.template, self.system_prompt, self.base = target, template, system_prompt, base
        self.folder = target.with_name(f".writing-{target.name}")

    def save(
        self, model: Any, weights: dict[str, torch.Tensor], logits: torch.Tensor, tokenizer: Any, *,
        precision: str, device: torch.device, probe_dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        with self._writing():
            save(model, weights, tokenizer, self.template, self.folder, self.system_prompt, self.base)
        self._was = trained(
            model, weights, logits, tokenizer, self.template, system_prompt=self.system_prompt,
            precision=precision, device=device, probe_dtype=probe_dtype,
        )  # fmt: skip

    def publish(self) -> list[str]:
        """The files of the export, verified and in their place. Raises ExportError; what was saved then stays next to the target."""
        with self._writing():
            verify(
                self.folder, self._was, self.template,
                trust_remote_code=self.base.trust_remote_code, system_prompt=self.system_prompt,
            )  # fmt: skip
            names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
            publish(self.folder, self.target)
        return names

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Give back the space of what is half written: outcome.json needs some to tell of it. Raises Outage."""
        try:
            with failures.writing(self.target):
                yield
        except Outage:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise


def publish(folder: Path, target: Path) -> None:
    """Put a verified folder in its place, at once; what was there is replaced only now, but for what a user had added."""
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        _move_additions(old, target)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(folder, target)
    _move_additions(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _move_additions(old: Path, new: Path) -> None:
    """Move the files of one folder into another that has none of their names; those that would change what opens stay."""
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        if not decides_what_opens(name) and (path.is_file() or path.is_symlink()) and not os.path.lexists(new / name):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, new / name)


def rehearse(
    tokenizer: Any, model_config: Any, base: Base, template: Template | None, system_prompt: str | None
) -> None:
    """Raise ModelError for what would let the export fail after all the training: tokenizer, template or generation config.

    What a base on the Hub has in addition to its weights is fetched now: in days the Hub may not answer.
    """
    _folder_of(base, local_files_only=False)
    with tempfile.TemporaryDirectory() as name:
        model_config.save_pretrained(name)  # its model_type decides which class opens the tokenizer
        _save_tokenizer(with_template(tokenizer, template, system_prompt), name, base)
        again = load_tokenizer(name, base.trust_remote_code)
        if template is not None:
            template.stop_token()
            try:
                _verify_prompt(Path("data.template"), again, template, system_prompt)
            except ExportError as exc:
                raise ModelError(str(exc)) from exc
        if tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer):
            raise ModelError(
                f"model.tokenizer: saved with a model of type {model_config.model_type} it opens as {type(again).__name__}, "
                "which gives other tokens; take the tokenizer of a model of this type, or another model_type"
            )
    if base.path and os.path.lexists(os.path.join(base.path, "generation_config.json")):
        _require_generation_config(base.path, model_config)


def verify(
    folder: Path, was: Trained, template: Template | None, *, trust_remote_code: bool, system_prompt: str | None = None
) -> None:
    """Open `folder` as a user would and compare it with what was trained. Raises ExportError.

    Every tensor must be there bit for bit, no adapter may be zero, the logits of `probe_ids` must
    agree, the tokenizer must give the same ids, and its chat template the prompt that was trained.
    """
    try:
        stop = _require_as_trained(folder, was, trust_remote_code)
        has_room = True
    except Exception as exc:  # a quantised base opens on one GPU, which may have no room for what several shared
        has_room = was.device.type == "cpu" or not isinstance(failures.translate(exc), OutOfMemory)
        if has_room:
            raise
    if not has_room:  # outside of the handler, which holds what was loaded
        torch.cuda.empty_cache()
        stop = _require_as_trained(folder, replace(was, device=torch.device("cpu")), trust_remote_code)
    again = _opened(lambda: load_tokenizer(folder, trust_remote_code))
    if (
        tokenizer_fingerprint(again) != tokenizer_fingerprint(was.tokenizer)
        or again.chat_template != was.tokenizer.chat_template
    ):
        raise ExportError(f"{folder}: the tokenizer differs after reloading")
    if stop != was.eos_token_id:
        raise ExportError(f"{folder}: the tokens that end an answer differ after reloading")
    if template is not None:
        _verify_prompt(folder, again, template, system_prompt)


def _require_as_trained(folder: Path, was: Trained, trust_remote_code: bool) -> int | list[int] | None:
    """The tokens that end an answer of a saved model; raises ExportError if its weights or logits are not as trained."""
    reloaded = _opened(lambda: load(folder, was.dtype, trust_remote_code, device=was.device))
    if was.is_adapter and (dead := adapters.dead_adapters(reloaded)):
        raise ExportError(f"{folder}: {len(dead)} adapters are zero, such as {dead[0]}: they were never trained")
    _require_weights(folder, reloaded, was.weights)
    stop: int | list[int] | None = reloaded.generation_config.eos_token_id
    if why := disagreement(
        _as_trained(reloaded, was), was.logits, TOLERANCE[was.precision], attention.has_experts(reloaded)
    ):
        raise ExportError(f"{folder}: {why} after reloading")
    return stop


def _opened(opens: Callable[[], Any]) -> Any:
    """What was just saved: where it does not open, that is not the user's mistake."""
    try:
        return opens()
    except ModelError as exc:
        raise ExportError(str(exc)) from exc


def _require_weights(folder: Path, reloaded: Any, weights: dict[str, torch.Tensor]) -> None:
    """Raise ExportError for a tensor that is not there bit for bit."""
    state = {**dict(reloaded.named_buffers()), **dict(reloaded.named_parameters(remove_duplicate=False))}
    for name, tensor in weights.items():
        if name not in state or not torch.equal(state[name].cpu(), tensor):
            raise ExportError(
                f"{folder}: weight {name} is {'other than trained' if name in state else 'missing'} after reloading"
            )


def _as_trained(model: Any, was: Trained) -> torch.Tensor:
    """The `probe_logits` of a reloaded model on the device and in the dtype that those of the trained one were computed in.

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


def disagreement(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, has_experts: bool) -> str | None:
    """In words, how logits float32 [1, T, V] differ by more than `tolerance` x the largest one of `wanted`; None if they do not.

    A router that is nearly undecided may choose another expert when products are rounded differently,
    and then the logits of that token, and a little those of later ones, are another function's: right
    exports differ in some tokens, wrong ones (another rope theta, activation, or number of heads)
    in nearly all. So a mixture of experts must agree in half of its tokens, any other model in each.
    """
    differences = (found - wanted).abs().amax(-1).flatten() / wanted.abs().max()
    share = float((differences <= tolerance).float().mean())  # NaN counts as a difference
    if share >= (0.5 if has_experts else 1.0):
        return None
    return (
        f"logits of {1 - share:.0%} of the tokens differ, by up to {float(differences.max()):.3g} of the largest one,"
    )


def _verify_prompt(target: Path, tokenizer: Any, template: Template, system_prompt: str | None) -> None:
    """A question asked through the exported chat template must give the tokens that training put before answers."""
    template = replace(template, date=None)  # apply_chat_template knows only today's
    messages = QUESTION if system_prompt is not None else template.probe
    try:
        asked = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as exc:  # a template is a program
        raise ExportError(f"{target}: its chat template fails: {type(exc).__name__}: {exc}") from exc
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    system = [Message("system", system_prompt)] if system_prompt is not None else []
    trained = encode_prompt(template.prompt([*system, *messages]), tokenizer)
    if ids != trained:
        raise ExportError(
            f"{target}: its chat template gives the tokens {ids} for a prompt that was trained as {trained}"
        )


def load(
    path: str | Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, quantized: bool = True,
    base: str | None = None, device: torch.device | None = None,
) -> Any:  # fmt: skip
    """Full weights, or an adapter on its base, quantised as it was trained unless not `quantized`. Raises ModelError.

    `base`: where the base of an adapter is now, if it has moved since the training. Every value of its weights must be the
    same, except for quantised ones. `device`: the CPU, for a quantised base that would else open on the GPU.
    """
    folder = Path(path)
    with translated(f"model {str(path)!r}"):
        if not is_adapter(folder):
            opened, info = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
            refuse_lost(str(path), opened, info)
            return opened
        from peft import PeftConfig, PeftModel

        _require_adapter(folder)
        adapter = PeftConfig.from_pretrained(str(folder))
        record = base_identity.read(folder)
        where, revision = _base_of(folder, adapter, base)
        if base is None and os.path.isdir(where) and (problem := folder_problem(where, needs_weights=True)):
            raise ModelError(f"the base of {folder}: {problem}")
        quantization = (record.get("quantization") or None) if quantized else None
        if quantization and dtype == "auto":
            dtype = getattr(torch, record["dtype"])
        on_cpu = quantization is not None and device is not None and device.type == "cpu"
        with translated(f"--base: {where!r}") if base is not None else nullcontext():
            model = _load_base(where, revision, dtype, trust_remote_code, quantization, on_cpu)
            if not quantized and getattr(model, "is_quantized", False):  # it has no other weights than those
                model = model.dequantize(dtype=model.dtype)
                model._weight_conversions = None  # of transformers 5.23, which would quantise again while saving
        keep_layout(model)
        if record.get("new_token_ids"):
            embeddings.extend(model, record["new_token_ids"])
        if record:
            base_identity.require_architecture(model, record, folder, base)
            if quantization or not record["quantization"]:
                base_identity.require_weights(model, record, folder, base)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        adapted = PeftModel.from_pretrained(model, str(folder))
        adapters.require_whole(adapted, str(folder))
        return adapted


def _load_base(
    where: str, revision: str | None, dtype: torch.dtype | str, trust_remote_code: bool,
    quantization: dict[str, Any] | None, on_cpu: bool,
) -> Any:  # fmt: skip
    """The base of an adapter, with all its weights. Raises ModelError if some are lost."""
    config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    model, info = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, output_loading_info=True,
        **quantized_as(config, quantization), **({"device_map": {"": "cpu"}} if on_cpu else {}),
    )  # fmt: skip
    refuse_lost(where, model, info)
    if on_cpu:
        vars(model).pop("hf_device_map", None)  # peft would spread over the GPUs again what has it
    return model


def _require_adapter(folder: Path) -> None:
    if problem := adapter_problem(str(folder)):
        raise ModelError(problem)


def _base_of(folder: Path, adapter: Any, given: str | None) -> tuple[str, str | None]:
    """(folder or Hub id, revision) of an adapter's base. Raises ModelError if it was a folder that is not there any more."""
    known = adapter.base_model_name_or_path
    if given is not None:
        return given, None
    if not known:
        raise ModelError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path names no base; give --base with the folder of the base"
        )
    if os.path.isabs(known) and not os.path.isdir(known):
        raise ModelError(
            f"{folder} is an adapter, and its base is not in {known} any more; give --base with the folder where it is now"
        )
    return known, adapter.revision


def require_base(base: str | None) -> None:
    """Raise ModelError at once for a --base that does not exist, or that is not a whole model."""
    if base is None:
        return
    require_model(base, "--base")
    if is_adapter(base):
        raise ModelError(f"--base: {base} is an adapter itself; give the whole model that it lies on")


def moved(path: str | Path, base: str) -> str | None:
    """`base`, if `path` is an adapter that names no base of its own, or one that is not where it was."""
    if not is_adapter(path):
        return None
    known = recorded_base(path)
    return base if not known or (os.path.isabs(known) and not os.path.isdir(known)) else None


def other_base(tuned: str, base: Any) -> str | None:
    """In words, how a loaded base differs from that of an adapter; None if it does not, or the adapter does not know its own."""
    record = base_identity.read(Path(tuned)) if is_adapter(tuned) else {}
    if not record.get("weights") or adapters.are_in(base):
        return None
    others = base_identity.other_weights(base, record)
    if not others:
        return None
    return (
        f"{tuned} was trained on another base ({recorded_base(tuned)}): {len(others)} weights of --base differ, such as "
        f"{others[0]}; the gain does not come from training alone"
    )


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an exported model. Raises ModelError."""
    if os.path.exists(path) and (problem := tokenizer_problem(str(path))):
        raise ModelError(problem)
    with translated(f"the tokenizer of {str(path)!r}"):
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)


def load_chat_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """As `load_tokenizer`. Raises ModelError for one without a chat template."""
    tokenizer = load_tokenizer(path, trust_remote_code)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{path}: its tokenizer has no chat template, so it cannot be asked; models tuned with objective.kind: sft have one"
        )
    return tokenizer


def probe_logits(model: Any, device: torch.device | None = None) -> torch.Tensor:
    """Logits of a model for `probe_ids`, float32 [1, PROBE_TOKENS, V] on the CPU. Collective where weights are shared.

    With the model's own attention, as a user who opens the export has it: the kernel of training adds in another order.
    """
    was_training, base = model.training, model.get_base_model() if adapters.are_in(model) else model
    device = device or model.get_input_embeddings().weight.device
    ids = probe_ids(model.config.get_text_config().vocab_size).to(device)
    model.eval()
    try:
        with torch.no_grad(), attention.own_attention(base):
            return model(input_ids=ids, use_cache=False).logits.float().cpu()
    finally:
        model.train(was_training)


def embedding_dtype(model: Any, weights: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype of the embedding in `weights`, which that of all others follows."""
    embedding = model.get_input_embeddings().weight
    return next(weights[name].dtype for name, p in model.named_parameters() if p is embedding)


def probe_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Merged:
    """Largest differences of logits that merging made, as a part of the largest logit.

    rounding: from the same base with the adapters on top; quantization: from the quantised base
    that they were trained on, None if there was none.
    """

    rounding: float
    quantization: float | None


def merge(
    sources: Sequence[Path], target: Path, dtype: str = "auto", trust_remote_code: bool = False, base: str | None = None
) -> Merged:
    """Add one or several adapters of the same base into it, W + sum of (alpha / r) B A, and save full weights.

    A base that was quantised for training is taken whole, except for adapters that LoftQ began:
    theirs make up for the quantisation, so they belong on what it left. `base`: see `load`. Raises ModelError if a
    source is not an adapter or `target` exists, ExportError if logits differ by more than rounding;
    then nothing is left at `target` or next to it.
    """
    _require_output(sources, target)
    require_mergeable(sources)
    first, alone = sources[0], len(sources) == 1
    tokenizer = load_tokenizer(first, trust_remote_code)
    _require_template(first, tokenizer)
    # float16 has fewer exponents than the others: adding comes first, rounding last.
    adding = {"auto": "auto", "bfloat16": torch.bfloat16, "float16": torch.float32, "float32": torch.float32}[dtype]
    model = load(first, adding, trust_remote_code, quantized=False, base=base)
    names = ["default", *(f"adapter_{number}" for number in range(1, len(sources)))]
    for name, source in zip(names[1:], sources[1:]):
        model.load_adapter(str(source), name)
        adapters.require_whole(model, str(source), name)
    trained = _beside_quantized_base(first, model, trust_remote_code, base)
    model.base_model.set_adapter(names)
    before = probe_logits(model)
    origin = Base(*_base_of(first, model.peft_config["default"], base), trust_remote_code)
    merged = adapters.merge(model, names)
    del model
    if dtype == "float16":
        merged = merged.half()
    folder = target.with_name(f".writing-{target.name}")
    try:
        weights = {name: tensor.detach().cpu() for name, tensor in merged.state_dict().items()}
        with failures.writing(target):
            save(merged, weights, tokenizer, None, folder, base=origin)
        tolerance = TOLERANCE[{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[merged.dtype]]
        del merged
        reloaded = _opened(lambda: load(folder, "auto", trust_remote_code))
        _require_weights(folder, reloaded, weights)
        after = probe_logits(reloaded)
        if why := disagreement(after, before, tolerance, attention.has_experts(reloaded)):
            raise ExportError(f"{target}: {why} once the adapter is merged; nothing was written")
        publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone if it was published; else of no use, and as large as the model
    rounding = _relative_difference(after, before)
    return Merged(rounding, _relative_difference(after, trained) if trained is not None and alone else None)


def _require_template(source: Path, tokenizer: Any) -> None:
    """Raise ModelError for a chat template with an error in its syntax, which would be copied into the merged model."""
    own = tokenizer.chat_template or {}
    for template in own.values() if isinstance(own, dict) else [own]:
        try:
            chat_template_utils._compile_jinja_template(template)
        except Exception as exc:  # a template is a program
            raise ModelError(
                f"{source}: the chat template of its tokenizer (chat_template.jinja) cannot be used: {exc}; correct it, or remove the file"
            ) from exc


def _beside_quantized_base(source: Path, whole: Any, trust_remote_code: bool, base: str | None) -> torch.Tensor | None:
    """`probe_logits` of an adapter on its base as that was quantised for training; None if it was not.

    LoftQ's adapters belong on what quantisation left: the base of `whole` becomes that.
    """
    record = base_identity.read(source)
    if not record.get("quantization"):
        return None
    quantized = load(source, trust_remote_code=trust_remote_code, base=base)
    if record.get("loftq"):
        adapters.copy_dequantized(quantized, whole)
    return probe_logits(quantized)


def _require_output(sources: Sequence[Path], target: Path) -> None:
    """Raise ModelError for a source that is not an adapter, and for a target that cannot be made."""
    for source in sources:
        if not is_adapter(source):
            raise ModelError(
                f"{source}: no adapter_config.json, so there is nothing to merge; give the model folder of a LoRA run"
            )
        _require_adapter(source)
    if os.path.lexists(target):
        raise ModelError(f"{target} exists; choose another --output")
    if problem := _problem_of_parent(target):
        raise ModelError(f"--output: {target}: {problem}")
    if any(source.resolve() in target.resolve().parents for source in sources):
        raise ModelError(f"{target} lies inside an adapter; choose another --output")


def _problem_of_parent(target: Path) -> str | None:
    """Why a new folder cannot be made there, found before models are loaded."""
    above = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        return f"{above} is not a folder"
    try:
        files.probe_folder(above)
    except OSError as exc:
        failures.reraise(exc, f"--output: {target} cannot be written now")
        return f"{above} cannot be written ({exc.strerror or exc})"
    return None


def require_mergeable(sources: Sequence[Path]) -> None:
    """Raise ModelError if adapters cannot simply be added: W + the sum of their changes must be what each of them meant."""
    if len(sources) == 1:
        return
    from peft import PeftConfig

    configs = [PeftConfig.from_pretrained(str(source)) for source in sources]
    records = [{k: v for k, v in base_identity.read(source).items() if k != "dtype"} for source in sources]
    for source, config, record in zip(sources, configs, records):
        if str(config.base_model_name_or_path) != str(configs[0].base_model_name_or_path) or record != records[0]:
            raise ModelError(
                f"{source} and {sources[0]} are adapters of different bases: they cannot be merged together"
            )
        if config.init_lora_weights in ("pissa", "olora", "corda") or record.get("loftq"):
            raise ModelError(
                f"{source} was begun from the weights of its base, which it changes (adapter.init); merge it alone"
            )
        if config.modules_to_save or config.bias != "none":
            raise ModelError(f"{source} holds whole modules or biases, and two of one cannot be added; merge it alone")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--merge", action="store_true", required=True, help="add adapters into their base")
    parser.add_argument(
        "--model",
        required=True,
        type=model_argument,
        nargs="+",
        help="adapter, as runs/<name> or runs/<name>/model; or several of one base",
    )
    parser.add_argument("--output", required=True, type=paths.argument, help="folder to write")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto: the base's own",
    )
    base_argument(parser)
    trust_remote_code_argument(parser)


def base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=model_argument,
        help="folder of the adapter's base, if you moved it after training; every value of its weights is compared",
    )


def trust_remote_code_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code from the model's Hub repository"
    )


def main(arguments: argparse.Namespace) -> None:
    for name in arguments.model:
        require_model(name, "--model")
    require_base(arguments.base)
    sources, target = list(map(Path, arguments.model)), Path(arguments.output)
    merged = merge(sources, target, arguments.dtype, arguments.trust_remote_code, arguments.base)
    print(
        f"{arguments.output}: merged; logits differ from base plus adapter by at most {merged.rounding:.2g} of the largest one"
    )
    if merged.quantization is not None:
        print(f"and by {merged.quantization:.2g} from the quantised base plus adapter, which is what was trained")


def chat_template(template: Template, tokenizer: Any, system_prompt: str | None = None) -> str:
    """The Jinja source to save, which renders what training put before answers and the template does not.

    These are the BOS, the system prompt, and the opening of answers. Callers that pass `enable_thinking` get the opening
    that the template itself has for it.
    """
    source = template.source
    system = [Message("system", system_prompt)] if system_prompt is not None else []
    messages = [*system, *QUESTION] if system else template.probe
    if uses_bos(tokenizer) and not template.prompt(messages).startswith(tokenizer.bos_token):
        source = "{{ bos_token }}" + source
    if template.opening and not template.learn_opening:
        source = (
            "{% set own_opening = enable_thinking is defined %}{{ '' }}" + source.removesuffix("\n")
            + "{%+ if add_generation_prompt and not own_opening %}{{ " + json.dumps(template.opening) + " }}{% endif %}"
        )  # fmt: skip
    if system_prompt is not None:
        message = json.dumps({"role": "system", "content": system_prompt}, ensure_ascii=False)
        source = (
            "{% if messages and messages[0]['role'] != 'system' %}{% set messages = [" + message + "] + messages %}{% endif %}"
            + source
        )  # fmt: skip
    return source


def _relative_difference(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((logits - wanted).abs().max() / wanted.abs().max())


def generation(model: Any, tokenizer: Any, template: Template | None) -> GenerationConfig:
    """The generation config to save: it stops at EOS and at the token that ends a turn, and pads with the pad token."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop = template.stop_token() if template is not None else None
    ends = [tokenizer.convert_tokens_to_ids(stop) if stop else None, tokenizer.eos_token_id, *known]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.pad_token_id = tokenizer.pad_token_id
    _sample_if_it_says_how(config)
    return config


def _require_generation_config(path: str, model_config: Any) -> None:
    """Raise ModelError for a generation config that cannot be saved again, or whose end tokens are not ids of the vocabulary."""
    try:
        config = GenerationConfig.from_pretrained(path)
        _sample_if_it_says_how(config)
        config.validate(strict=True)
        # Only those that end an answer: the pad token is replaced anyway.
        size, given = model_config.get_text_config().vocab_size, config.eos_token_id
        for token in given if isinstance(given, list) else [] if given is None else [given]:
            if type(token) is not int or not 0 <= token < size:
                raise ValueError(f"eos_token_id is {given!r}, and ids are whole numbers from 0 to {size - 1}")
    except Exception as exc:  # any error here would otherwise stop the export, after all the training
        reason = " ".join(str(exc).split())[:200]
        raise ModelError(
            f"model {path!r}: its generation_config.json cannot be saved again: {reason}; correct it"
        ) from exc


def _sample_if_it_says_how(config: GenerationConfig) -> None:
    """Published models give a temperature and forget do_sample; transformers saves no such config that was changed."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
