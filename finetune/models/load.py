"""Load model and tokenizer, from a folder or the Hub, or make a model of random weights.

Translates the errors of transformers.
"""

import copy
import difflib
import inspect
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from finetune import failures, places
from finetune.config import Model, base, model_files, quantized
from finetune.config.choices import objective_kind
from finetune.errors import ModelError
from finetune.models import attention as attention  # registers the kernel for documents
from finetune.models import base_identity, embeddings, families
from finetune.models.attention_choice import is_padded
from finetune.models.families import CAUSAL, MASKED, SEQ2SEQ, Family

# Pad tokens that vocabularies contain without declaring them.
PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|pad_token|>")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(model: Model, family: Family = CAUSAL) -> Any:
    """Return the model's tokenizer, with a pad token. Raises ModelError.

    If it declares none, a token of the vocabulary serves, at worst EOS: padding is masked by
    position, so EOS is supervised all the same. `family`: decides the tokens of that of bytes.
    """
    name = model.tokenizer or model.path or ""
    if name == "bytes":
        return _with_new_tokens(bytes_tokenizer(family), model.new_tokens)
    _require_folder_or_hub("model.tokenizer" if model.tokenizer else "model.path", name)
    if os.path.exists(name) and (problem := base.tokenizer_problem(name)):
        raise ModelError(f"model.tokenizer: {problem}")
    with translated(f"tokenizer {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            # model.revision belongs to the repository of the model.
            revision=None if model.tokenizer else model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer {name!r} has no fast version, which training needs to map tokens to text; "
            "choose another with model.tokenizer"
        )
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        own = next((token for token in PADS if token in vocabulary), None)
        tokenizer.pad_token = own or tokenizer.eos_token or tokenizer.unk_token
    return _with_new_tokens(tokenizer, model.new_tokens)


def part_padding(tokenizer: Any, ends: Collection[int]) -> None:
    """Set another pad token where that of a tokenizer is among `ends`. Raises ModelError."""
    if tokenizer.pad_token_id not in ends:
        return
    added = tokenizer.added_tokens_decoder
    special = [str(each) for number, each in sorted(added.items()) if each.special]
    taken = {tokenizer.bos_token, tokenizer.eos_token}
    free = [each for each in special if each not in taken
            and tokenizer.convert_tokens_to_ids(each) not in ends]  # fmt: skip
    named = [each for each in (*PADS, *special) if each in free]
    if not named:
        raise ModelError(
            f"model.tokenizer: {tokenizer.pad_token!r} pads and ends answers, and a model for "
            "sequence classification reads the last token that is not padding; add a pad token "
            "with model.new_tokens: ['<|pad|>']"
        )
    tokenizer.pad_token = named[0]


def _with_new_tokens(tokenizer: Any, new: list[str]) -> Any:
    known = [token for token in new if token in tokenizer.get_vocab()]
    if known:
        raise ModelError(f"model.new_tokens: {known[0]!r} is already in the vocabulary; remove it")
    if new:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": new}, replace_extra_special_tokens=False
        )
    return tokenizer


def load_config(model: Model, objective: str = "sft") -> Any:
    """Return the config of the architecture. Raises ModelError if the objective cannot train it."""
    config = _config_of(model, objective)
    families.require_fits(config, objective)
    if objective_kind(objective).family == families.SCORES.name:
        families.set_labels(config, ["score"])
    return config


def _config_of(model: Model, objective: str) -> Any:
    if model.config is not None:
        values = dict(model.config)
        kind = values.pop("model_type")
        with translated(f"model.config with model_type {kind!r}"):
            usual, config = AutoConfig.for_model(kind), AutoConfig.for_model(kind, **values)
        families.require_fits(config, objective)
        family = families.ALL[objective_kind(objective).family]
        module = inspect.getmodule(families.model_class(config, family))
        source = inspect.getsource(module or load_config)
        names = [name for name in vars(usual) if not name.startswith("_")]
        for key in values:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
            if near and not hasattr(usual, key) and key not in source:
                raise ModelError(
                    f"model.config: {kind} has no setting {key!r}; did you mean {near[0]}?"
                )
        if problem := base.values_problem("model.config", values):
            raise ModelError(problem)
        return config
    _require_folder_or_hub("model.path", model.path)
    with translated(f"model {model.path!r}: its config.json", base.config_of(str(model.path))):
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    values = config.to_dict()
    problem = base.values_problem(_where(model), values)
    if problem := problem or base.architecture_problem(str(model.path), values, objective):
        raise ModelError(f"model.path: {problem}")
    is_quantized = hasattr(config, "quantization_config")
    if is_quantized and (model.init == "random" or quantized.quantization(vars(config)) is None):
        del config.quantization_config  # the weights are not used, or have neither 4 nor 8 bits
    return config


def _where(model: Model) -> str:
    """Return where the values of a config are, for messages."""
    return "model.config" if model.config is not None else f"{model.path}/config.json"


def load_model(
    model: Model, config: Any, tokenizer: Any, attention: str, dtype: torch.dtype,
    quantization: dict[str, Any] | None = None, family: Family = CAUSAL,
) -> Any:  # fmt: skip
    """Return the model in `dtype`, with saved or random weights. Raises ModelError.

    It is on the CPU; if quantised, where bitsandbytes puts it. `quantization`: arguments of
    BitsAndBytesConfig; embedding, head and norms stay in `dtype`. A saved quantisation is kept,
    except for the dtype of its arithmetic. The tokenizer completes `config` if it is model.config.
    """
    config = complete(config, model, tokenizer)
    if model.init == "random":
        with translated("random weights"):
            loaded = family.auto.from_config(
                config,
                attn_implementation=attention,
                dtype=dtype,
                trust_remote_code=model.trust_remote_code,
            )
    else:
        with translated(f"model {model.path!r}"):
            loaded, info = family.auto.from_pretrained(
                model.path, attn_implementation=attention, dtype=dtype, revision=model.revision,
                trust_remote_code=model.trust_remote_code, output_loading_info=True,
                **quantized_as(config, quantization),
            )  # fmt: skip
        require_all_weights(model.path, loaded, info, may_be_new=True)
        _require_tied_as_configured(model.path, loaded, config)
        _require_embedding(model.path, loaded)
    return _completed(loaded, model, tokenizer)


def require_all_weights(
    path: Any, model: Any, info: dict[str, Any], may_be_new: bool = False
) -> None:
    """Raise ModelError if loading dropped saved layers, or left weights random.

    `info`: the loading info of from_pretrained. `may_be_new`: whether the head of a classifier may
    be random, as before its training.
    """
    _require_all_layers(path, model, info["unexpected_keys"])
    known = families.of_model(model)
    missing = sorted(
        name
        for name in info["missing_keys"]
        if not (may_be_new and known.has_new_head and families.is_of_new_head(name, model))
    )
    absent = missing + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ModelError(
            f"model {path!r}: {len(absent)} weights are missing or of another shape, such as "
            f"{absent[0]}; they would be random"
        )


def _require_embedding(path: Any, model: Any) -> None:
    """Raise ModelError for an embedding of zeros: no gradient would reach the weights."""
    weight = model.get_input_embeddings().weight
    if not weight[:64].any() and not weight.any():  # the first rows decide for nearly every model
        raise ModelError(
            f"model {path!r}: its embedding holds only zeros, so it cannot learn; download the "
            "model again"
        )


def _require_tied_as_configured(path: Any, model: Any, config: Any) -> None:
    """Raise ModelError if a config ties embedding and head, but the saved ones differ.

    Libraries disagree on which of them such a model has.
    """
    weights = [module.weight for module in embeddings.embedding_and_head(model)]
    text = config.get_text_config()
    is_tied = config.tie_word_embeddings or getattr(text, "tie_word_embeddings", False)
    if is_tied and len(weights) == 2 and weights[0] is not weights[1]:
        raise ModelError(
            f"model {path!r}: its config.json has tie_word_embeddings: true, but embedding and "
            "head are saved and differ; set it to false in (a copy of) the folder to train and "
            "export both, or remove one of the two weights"
        )


def quantized_as(config: Any, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of from_pretrained for `config` and `quantization`.

    A saved quantisation is kept, with the compute dtype of `quantization`.
    """
    saved = quantized.quantization(vars(config))
    if saved is None or quantization is None:
        wanted = BitsAndBytesConfig(**quantization) if quantization else None
        return {"config": config, "quantization_config": wanted}
    config = copy.deepcopy(config)
    config.quantization_config = dict(saved)
    if "load_in_4bit" in quantization:
        dtype = quantization["bnb_4bit_compute_dtype"]
        config.quantization_config["bnb_4bit_compute_dtype"] = dtype
    return {"config": config}


def _completed(loaded: Any, model: Model, tokenizer: Any) -> Any:
    """Return the model with new tokens and checked, whether it has weights or not."""
    if model.new_tokens:
        embeddings.extend(loaded, tokenizer.convert_tokens_to_ids(model.new_tokens))
    check_vocabulary(loaded, tokenizer)
    keep_layout(loaded)
    # padding_idx would give the pad row no gradient. Padding is masked by position, and if EOS
    # serves as pad its embedding must train like any other.
    loaded.get_input_embeddings().padding_idx = None
    return loaded


def keep_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in memory.

    On CPUs with AVX512-BF16, version 0.50 repacks them at the first evaluation, for a product in
    bfloat16 without a gradient: training would silently continue without one.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _require_all_layers(path: Any, model: Any, unexpected: Any) -> None:
    """Raise ModelError if saved layers would be dropped, as the config has fewer layers.

    `unexpected`: names of saved weights that the model lacks. Those that differ only in their
    number from names of the model belong to such layers.
    """

    def pattern(name: str) -> str:
        return re.sub(r"\d+", "N", name)

    known = {pattern(name) for name, _ in model.named_parameters()}
    # transformers omits some on purpose, such as DeepSeek V3's layers that predict further tokens.
    omitted = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    lost = sorted(name for name in unexpected if pattern(name) in known and pattern(name) != name)
    lost = [name for name in lost if not any(re.search(each, name) for each in omitted)]
    if lost:
        raise ModelError(
            f"model {path!r}: its config has fewer layers than its weights: {len(lost)} of them "
            f"would be dropped, such as {lost[0]}; correct the number of layers in config.json"
        )


def skeleton(
    model: Model, config: Any, tokenizer: Any, attention: str, dtype: torch.dtype = torch.float32,
    family: Family = CAUSAL,
) -> Any:  # fmt: skip
    """Return the model on the meta device, without memory for its weights. Raises ModelError."""
    config = complete(config, model, tokenizer)
    config = copy.deepcopy(config)  # new tokens change it
    what = f"{_where(model)}: architecture {config.model_type}"
    with torch.device("meta"), translated(what, config.to_dict()):
        meta = family.auto.from_config(
            config,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=attention,
            dtype=dtype,
        )
    return _completed(meta, model, tokenizer)


def check_shapes(skeleton: Any) -> None:
    """Raise ModelError if shapes in a model on the meta device do not fit each other."""
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    inputs = families.inputs_of(ids, skeleton)
    if not is_padded(skeleton.config._attn_implementation):
        inputs |= {"cu_seq_lens_q": torch.tensor([0, 2]), "max_length_q": 2}  # one document
    try:
        skeleton(**inputs)
    except RuntimeError as exc:
        # Other errors are of the meta device, which cannot choose experts, and not of the model.
        if re.search("size|shape|dimension", str(exc)):
            raise ModelError(
                f"architecture {skeleton.config.model_type}: tokens cannot pass through it: "
                f"{str(exc).splitlines()[0]}; "
                "do the sizes in its config (heads, hidden_size, ...) fit each other?"
            ) from exc


def check_weights(skeleton: Any, model: Model) -> None:
    """Raise ModelError if a folder lacks weights of the architecture, or has other shapes.

    Reads headers only. If a saved name is unknown, transformers may rename weights on loading;
    `require_all_weights` finds then what is missing.
    """
    if model.init != "pretrained":
        return
    folder = model.path or ""
    saved = model_files.shapes(folder) or shapes_of_pickle(Path(folder, "pytorch_model.bin"))
    if saved is None or quantized.quantization(skeleton.config.to_dict()) is not None:
        return
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    known = parameters.keys() | dict(skeleton.named_buffers()).keys()
    _require_all_layers(model.path, skeleton, saved.keys() - known)
    if not saved.keys() <= known:
        return
    both = saved.keys() & parameters.keys()
    held = {id(parameters[name]) for name in both}  # tied weights are saved under one name
    absent = sorted(name for name, parameter in parameters.items() if id(parameter) not in held)
    if families.of_model(skeleton).has_new_head:
        absent = [name for name in absent if not families.is_of_new_head(name, skeleton)]
    extended = (
        embeddings.embedding_and_head(skeleton) if model.new_tokens else []
    )  # new tokens add rows
    may_differ = {id(p) for module in extended for p in module.parameters(recurse=False)}
    compared = [name for name in both if id(parameters[name]) not in may_differ]
    other = sorted(name for name in compared if saved[name] != list(parameters[name].shape))
    if absent or other:
        raise ModelError(
            f"model {model.path!r}: {len(absent) + len(other)} weights are missing or of "
            f"another shape, such as {(absent or other)[0]}; "
            "they would be random; download the model again, or correct its config.json"
        )


def shapes_of_file(file: Path) -> dict[str, list[int]] | None:
    """Return names and shapes in one file of weights; None for formats before torch 1.6."""
    return shapes_of_pickle(file) if file.suffix == ".bin" else model_files.tensors_in(file)[0]


def shapes_of_pickle(file: Path) -> dict[str, list[int]] | None:
    """Return names and shapes in a zip file of torch.save; None for older formats.

    Executes no code of the file and reads no values.
    """
    if not zipfile.is_zipfile(file):
        return None
    with translated(str(file)):
        found = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    if not isinstance(found, dict):
        raise ModelError(
            f"{file}: holds {type(found).__name__}, not weights by their names; {model_files.AGAIN}"
        )
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def check_config_vocabulary(config: Any, tokenizer: Any, model: Model) -> None:
    """Raise ModelError if the vocabulary of a saved config is too small for the tokenizer.

    Needs no model. The tokenizer completes model.config itself, which is not checked.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if model.config is None and isinstance(rows, int):
        ids = tokenizer.get_vocab()  # once: it takes 20 ms for 50,000 tokens
        known = ids.keys() - set(model.new_tokens)
        _require_rows(rows, max(ids[token] for token in known))


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise ModelError if the embedding has too few rows for the tokenizer."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        raise ModelError(
            f"architecture {model.config.model_type}: its input embeddings are not a layer with a "
            "row for each token, which training needs; take another model"
        )
    _require_rows(weight.shape[0], max(tokenizer.get_vocab().values()))


def _require_rows(rows: int, highest: int) -> None:
    if highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, but the embedding has {rows} rows; "
            "take the tokenizer that belongs to the model, or a larger vocab_size"
        )


def bytes_tokenizer(family: Family = CAUSAL) -> Any:
    """Return a tokenizer of 256 bytes, BOS, EOS, PAD and ChatML's two tokens: ids 0 to 260.

    Encoders get a mask token as well, encoder-decoders that and NUM_SENTINELS sentinels of T5.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    masks = family in (MASKED, SEQ2SEQ)
    sentinels = [f"<extra_id_{n}>" for n in range(NUM_SENTINELS)] if family == SEQ2SEQ else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>", *sentinels],
        clean_up_tokenization_spaces=False, **({"mask_token": "<|mask|>"} if masks else {}),
    )  # fmt: skip


def decoder_start(config: Any, model: Model, tokenizer: Any) -> int:
    """Return what a decoder reads first; -1 without a decoder. Raise ModelError if it is unknown.

    In a model.config it is the pad token, as in T5, unless that names another.
    """
    if not families.is_encoder_decoder(config):
        return -1
    found = getattr(config, "decoder_start_token_id", None)
    if model.config is not None:
        found = model.config.get("decoder_start_token_id", tokenizer.pad_token_id)
    if not isinstance(found, int):
        raise ModelError(
            f"{_where(model)}: names no decoder_start_token_id, which the decoder reads first; add "
            "it"
        )
    return found


NUM_SENTINELS = 32


def complete(config: Any, model: Model, tokenizer: Any) -> Any:
    """Set vocabulary and special tokens from the tokenizer where model.config does not give them.

    The config of a saved model stays as it is.
    """
    if (given := model.config) is None:
        return config
    if "vocab_size" not in given:
        config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        if name not in given and (value is None or value < config.vocab_size):
            setattr(config, name, value)
    if families.is_encoder_decoder(config):
        for name in ("decoder_start_token_id", "forced_eos_token_id"):
            value = config.pad_token_id if "start" in name else None
            setattr(config, name, given.get(name, value))
    return config


def _require_folder_or_hub(key: str, name: str | None) -> None:
    """Raise ModelError for a name that is neither an existing folder nor formed like a Hub id."""
    if problem := base.name_problem(name):
        raise ModelError(f"{key}: {problem}")


def _reason(exc: Exception, values: Mapping[str, Any]) -> str:
    """Return why loading failed, in the words of a library where they help.

    `values`: those of the config that was loaded.
    """
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    if isinstance(exc, pickle.UnpicklingError) or "Weights only load failed" in str(exc):
        # torch advises weights_only=False, which would run the code in the file.
        return (
            "a file in PyTorch's own format (.bin) is damaged, or holds other Python objects than "
            "tensors, which could run code and are never opened; give the weights as .safetensors, "
            "or download them again"
        )
    unknown = exc.args[0] if isinstance(exc, KeyError) and exc.args else None
    if of_torch := re.search(r"module 'torch' has no attribute '(\w+)'", str(exc)):  # a dtype
        unknown = of_torch[1]
    dtypes = ((name, values.get(name)) for name in ("dtype", "torch_dtype"))
    for name, value in (*base_identity.fields(dict(values)), *dtypes):
        if isinstance(value, str) and value == unknown:
            return f"{name} is {value!r}, which transformers does not know; correct it"
    if isinstance(exc, KeyError):
        return (
            f"one of its files lacks the key {exc}, or holds a word that transformers does not "
            f"know; correct it, or {model_files.AGAIN}"
        )
    return " ".join(lines[:2]) or type(exc).__name__


@contextmanager
def translated(what: str, values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Raise ModelError for any error that is not the machine's: transformers raises many types.

    `what` cannot be loaded; `values`: those of its config, to name the wrong one.
    """
    try:
        yield
    except Exception as exc:
        failures.reraise(exc, f"{what} cannot be loaded now")
        reason = _reason(exc, values or {})
        if "huggingface.co" in reason:
            reason += f" (and no such folder in {places.looked_in()})"
        raise ModelError(f"{what} cannot be loaded: {reason}") from exc
