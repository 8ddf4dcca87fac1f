"""Trained weights -> a folder that transformers or peft opens, verified by opening it."""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from finetune.data.rows import Message
from finetune.data.templates import QUESTION, Template
from finetune.data.tokens import encode_prompt, tokenizer_fingerprint, uses_bos
from finetune.errors import ExportError, ModelError
from finetune.models import adapters, attention, bases, embeddings
from finetune.models.load import keep_layout, translated

PROBE_TOKENS = 16
# Largest difference of logits between the trained and the reloaded model, as a part of the largest
# logit. float32: the two attention kernels add in another order. Half precision: bf16 keeps 8 bits
# (a relative error of 2^-9 each operation), and training may have run under autocast.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


def save(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, template: Template | None, folder: Path,
    system_prompt: str | None = None,
) -> None:  # fmt: skip
    """Write model (`weights` whole, on the CPU) and tokenizer into a fresh `folder`.

    The tokenizer carries the template as its chat template, and the generation config every token
    that ends an answer.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if template is not None:
        tokenizer.chat_template = chat_template(template, tokenizer, system_prompt)
    _set_generation(model, tokenizer, template)
    # Resized embeddings are saved because they train (modules_to_save), not because peft finds them to be of another size.
    own = {"save_embedding_layers": False} if adapters.are_in(model) else {}
    model.save_pretrained(
        folder, state_dict=dict(weights), **own
    )  # a copy: transformers empties the mapping it is given
    if not adapters.are_in(model):
        # An engine may have trained on 16-bit copies of the weights that are saved here.
        model.config.dtype = embedding_dtype(model, weights)
        model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)  # peft leaves it out, and with it the token that ends an answer
    tokenizer.save_pretrained(folder)
    if adapters.are_in(model):
        (folder / bases.FILE).write_text(json.dumps(model.base_record, indent=1))
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def write(
    model: Any, weights: dict[str, torch.Tensor], logits: torch.Tensor, tokenizer: Any, template: Template | None, target: Path, *,
    system_prompt: str | None, precision: str, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Save beside `target`, verify, and only then put it there. Raises ExportError; what was there before stays.

    `model` gives class and settings; its weights may be shared between processes, `weights` are whole.
    `logits`: its `probe_logits`.
    """
    folder = target.with_name(f".writing-{target.name}")
    save(model, weights, tokenizer, template, folder, system_prompt)
    verify(
        folder, model, weights, logits, tokenizer, template,
        precision=precision, trust_remote_code=trust_remote_code, system_prompt=system_prompt,
    )  # fmt: skip
    publish(folder, target)


def publish(folder: Path, target: Path) -> None:
    """Put a verified folder in its place, at once; what was there is replaced only now."""
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def rehearse(
    tokenizer: Any, model_config: Any, path: str | None, template: Template | None, system_prompt: str | None, trust_remote_code: bool
) -> None:  # fmt: skip
    """Raise ModelError for what would let the export fail after all the training: tokenizer, template or generation config."""
    with tempfile.TemporaryDirectory() as name:
        model_config.save_pretrained(name)  # its model_type decides which class opens the tokenizer
        tokenizer.save_pretrained(name)
        again = load_tokenizer(name, trust_remote_code)
        if template is not None:
            again.chat_template = chat_template(template, tokenizer, system_prompt)
            template.stop_token()
            try:
                _verify_prompt(Path("data.template"), again, template, system_prompt)
            except ExportError as exc:
                raise ModelError(str(exc)) from exc
        if tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer):
            raise ModelError(
                f"model.tokenizer: saved beside a model of type {model_config.model_type} it opens as {type(again).__name__}, "
                "which gives other tokens; take the tokenizer of a model of this type, or another model_type"
            )
        if path and os.path.exists(os.path.join(path, "generation_config.json")):
            try:
                config = GenerationConfig.from_pretrained(path)
                _sample_if_it_says_how(config)
                config.validate(strict=True)
            except ValueError as exc:
                reason = " ".join(str(exc).split())[:200]
                raise ModelError(
                    f"model {path!r}: its generation_config.json cannot be saved again: {reason}; correct it"
                ) from exc


def verify(
    target: Path, trained: Any, weights: dict[str, torch.Tensor], logits: torch.Tensor, tokenizer: Any, template: Template | None, *,
    precision: str, trust_remote_code: bool, system_prompt: str | None = None,
) -> None:  # fmt: skip
    """Open `target` as a user would and compare it with what was trained. Raises ExportError.

    Every tensor must be there bit for bit, no adapter may be zero, the logits of `probe_ids` must
    agree, the tokenizer must give the same ids, and its chat template the prompt that was trained.
    """
    try:
        of_base = getattr(torch, trained.base_record["dtype"]) if adapters.are_in(trained) else None
        reloaded = load(target, of_base or embedding_dtype(trained, weights), trust_remote_code)
        again = load_tokenizer(target, trust_remote_code)
    except ModelError as exc:
        raise ExportError(str(exc)) from exc
    if adapters.are_in(trained) and (dead := adapters.dead_adapters(reloaded)):
        raise ExportError(f"{target}: {len(dead)} adapters are zero, such as {dead[0]}: they were never trained")
    state = {**dict(reloaded.named_buffers()), **dict(reloaded.named_parameters(remove_duplicate=False))}
    for name, tensor in weights.items():
        if name not in state or not torch.equal(state[name].cpu(), tensor):
            raise ExportError(
                f"{target}: weight {name} is {'other than trained' if name in state else 'missing'} after reloading"
            )
    difference = _relative_difference(probe_logits(reloaded), logits)
    if not difference <= TOLERANCE[precision]:
        raise ExportError(f"{target}: logits differ by {difference:.3g} of the largest one after reloading")
    if (
        tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer)
        or again.chat_template != tokenizer.chat_template
    ):
        raise ExportError(f"{target}: the tokenizer differs after reloading")
    if reloaded.generation_config.eos_token_id != trained.generation_config.eos_token_id:
        raise ExportError(f"{target}: the tokens that end an answer differ after reloading")
    if template is not None:
        _verify_prompt(target, again, template, system_prompt)


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
    path: str | Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, quantized: bool = True
) -> Any:
    """Full weights, or an adapter on its base, quantised as it was trained unless not `quantized`. Raises ModelError."""
    folder = Path(path)
    with translated(f"model {str(path)!r}"):
        if not (folder / "adapter_config.json").exists():
            return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, trust_remote_code=trust_remote_code)
        from peft import PeftConfig, PeftModel

        adapter = PeftConfig.from_pretrained(str(folder))
        record = bases.read(folder)
        quantization = (record.get("quantization") or None) if quantized else None

        def load_base(dtype: torch.dtype | str) -> Any:
            return AutoModelForCausalLM.from_pretrained(
                str(adapter.base_model_name_or_path), dtype=dtype, revision=adapter.revision, trust_remote_code=trust_remote_code,
                quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
            )  # fmt: skip

        if quantization and dtype == "auto":
            dtype = getattr(torch, record["dtype"])
        base = load_base(dtype)
        keep_layout(base)
        if record.get("new_token_ids"):
            embeddings.extend(base, record["new_token_ids"])
        if record and (quantization or not record["quantization"]):
            bases.require_weights(bases.hashes(base), record, folder)
        if (folder / "generation_config.json").exists():
            base.generation_config = GenerationConfig.from_pretrained(folder)
        return PeftModel.from_pretrained(base, str(folder))


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an exported model. Raises ModelError."""
    if not (Path(path) / "config.json").exists() and (Path(path) / "model").is_dir():
        raise ModelError(f"{path} is a run directory; its model is in {Path(path) / 'model'}")
    with translated(f"the tokenizer of {str(path)!r}"):
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)


def probe_logits(model: Any, device: torch.device | None = None) -> torch.Tensor:
    """Logits of the trained model for `probe_ids`, float32 [1, PROBE_TOKENS, V] on the CPU. Collective where weights are shared."""
    was_training = model.training
    device = device or model.get_input_embeddings().weight.device
    ids = probe_ids(model.config.get_text_config().vocab_size).to(device)
    bounds = torch.tensor([0, PROBE_TOKENS], dtype=torch.int32, device=device)
    apart = not attention.pads(model.config._attn_implementation)
    one_document = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": PROBE_TOKENS,
        "max_length_k": PROBE_TOKENS,
    }
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **(one_document if apart else {})).logits.float().cpu()
    model.train(was_training)
    return logits


def embedding_dtype(model: Any, weights: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype of the embedding in `weights`, which that of all others follows."""
    embedding = model.get_input_embeddings().weight
    return next(weights[name].dtype for name, p in model.named_parameters() if p is embedding)


def probe_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Merged:
    """Largest differences of logits that merging made, as a part of the largest logit.

    rounding: from the same base with the adapters beside it; quantization: from the quantised base
    that they were trained on, None if there was none.
    """

    rounding: float
    quantization: float | None


def merge(sources: Sequence[Path], target: Path, dtype: str = "auto", trust_remote_code: bool = False) -> Merged:
    """Add one or several adapters of the same base into it, W + sum of (alpha / r) B A, and save full weights.

    A base that was quantised for training is taken whole, except for adapters that LoftQ began:
    theirs make up for the quantisation, so they belong on what it left. Raises ModelError if a
    source is no adapter or `target` exists, ExportError if logits differ by more than rounding;
    then nothing is left at `target`.
    """
    for source in sources:
        if not (source / "adapter_config.json").exists():
            raise ModelError(
                f"{source}: no adapter_config.json, so there is nothing to merge; give model/ of a LoRA run"
            )
    if target.exists():
        raise ModelError(f"{target} exists; choose another --output")
    if any(source.resolve() in target.resolve().parents for source in sources):
        raise ModelError(f"{target} lies inside an adapter; choose another --output")
    require_mergeable(sources)
    first, others = sources[0], sources[1:]
    # float16 has fewer exponents than the others: adding comes first, rounding last.
    adding = {"auto": "auto", "bfloat16": torch.bfloat16, "float16": torch.float32, "float32": torch.float32}[dtype]
    record = bases.read(first)
    model, tokenizer = load(first, adding, trust_remote_code, quantized=False), load_tokenizer(first, trust_remote_code)
    names = ["default"]
    for source in others:
        names.append(f"adapter_{len(names)}")
        model.load_adapter(str(source), names[-1])
    trained = None
    if record.get("quantization"):
        quantized = load(first, trust_remote_code=trust_remote_code)
        if record.get("loftq"):
            adapters.copy_dequantized(quantized, model)
        trained = probe_logits(quantized)
    model.base_model.set_adapter(names)
    before = probe_logits(model)
    merged = adapters.merge(model, names)
    if dtype == "float16":
        merged = merged.half()
    folder = target.with_name(f".writing-{target.name}")
    weights = {name: tensor.detach().cpu() for name, tensor in merged.state_dict().items()}
    save(merged, weights, tokenizer, None, folder)
    after = probe_logits(load(folder, trust_remote_code=trust_remote_code))
    rounding = _relative_difference(after, before)
    precisions = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    if not rounding <= TOLERANCE[precisions[merged.dtype]]:
        shutil.rmtree(folder)
        raise ExportError(
            f"{target}: merging changed the logits by {rounding:.3g} of the largest one; nothing was written"
        )
    publish(folder, target)
    return Merged(rounding, None if trained is None or others else _relative_difference(after, trained))


def require_mergeable(sources: Sequence[Path]) -> None:
    """Raise ModelError if adapters cannot simply be added: W + the sum of their changes must be what each of them meant."""
    if len(sources) == 1:
        return
    from peft import PeftConfig

    configs = [PeftConfig.from_pretrained(str(source)) for source in sources]
    records = [{k: v for k, v in bases.read(source).items() if k != "dtype"} for source in sources]
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
        type=Path,
        nargs="+",
        help="folder of the adapter, as in runs/<name>/model; or of several of one base",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto: the base's own",
    )
    trust_remote_code_argument(parser)


def trust_remote_code_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that a Hub model brings along"
    )


def main(arguments: argparse.Namespace) -> None:
    merged = merge(arguments.model, arguments.output, arguments.dtype, arguments.trust_remote_code)
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


def _set_generation(model: Any, tokenizer: Any, template: Template | None) -> None:
    """Generation stops at EOS and at the token that ends a turn, and pads with the pad token."""
    config = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop = template.stop_token() if template is not None else None
    ends = [tokenizer.convert_tokens_to_ids(stop) if stop else None, tokenizer.eos_token_id, *known]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.pad_token_id = tokenizer.pad_token_id
    _sample_if_it_says_how(config)


def _sample_if_it_says_how(config: GenerationConfig) -> None:
    """Published models give a temperature and forget do_sample; transformers saves no such config that was changed."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
