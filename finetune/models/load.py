"""Model and tokenizer: from a folder, from the Hub, or with random weights. Errors of transformers
are translated here.
"""

import copy
import difflib
import inspect
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from finetune import failures, places
from finetune.config import Model, base
from finetune.errors import ModelError
from finetune.models import attention as attention  # registers the kernel for documents
from finetune.models import base_identity, embeddings

PADS = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|pad_token|>",
)  # what vocabularies hold and forget to name
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer, with a pad token. Raises ModelError.

    Without a pad token one of the vocabulary stands in, if need be EOS: padding is masked by
    position, so EOS is still learned.
    """
    name = model.tokenizer or model.path or ""
    if name == "bytes":
        return _with_new_tokens(bytes_tokenizer(), model.new_tokens)
    _require_folder_or_hub("model.tokenizer" if model.tokenizer else "model.path", name)
    if os.path.exists(name) and (problem := base.tokenizer_problem(name)):
        raise ModelError(f"model.tokenizer: {problem}")
    with translated(f"tokenizer {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=None
            if model.tokenizer
            else model.revision,  # the revision is that of the model's repository
            trust_remote_code=model.trust_remote_code,
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer {name!r} has no fast version, which training needs to map tokens to the "
            "text"
        )
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        own = next((token for token in PADS if token in vocabulary), None)
        tokenizer.pad_token = own or tokenizer.eos_token or tokenizer.unk_token
    return _with_new_tokens(tokenizer, model.new_tokens)


def _with_new_tokens(tokenizer: Any, new: list[str]) -> Any:
    known = [token for token in new if token in tokenizer.get_vocab()]
    if known:
        raise ModelError(f"model.new_tokens: {known[0]!r} is already in the vocabulary; remove it")
    if new:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": new}, replace_extra_special_tokens=False
        )
    return tokenizer


def load_config(model: Model) -> Any:
    """The architecture, without weights. Raises ModelError."""
    if model.config is not None:
        values = dict(model.config)
        kind = values.pop("model_type")
        with translated(f"model.config with model_type {kind!r}"):
            usual, config = AutoConfig.for_model(kind), AutoConfig.for_model(kind, **values)
        source = inspect.getsource(inspect.getmodule(model_class(config)) or load_config)
        for key in values:
            near = difflib.get_close_matches(
                key, [name for name in vars(usual) if not name.startswith("_")], n=1, cutoff=0.8
            )
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
    said = config.to_dict()
    if problem := base.values_problem(_where(model), said) or base.architecture_problem(
        str(model.path), said
    ):
        raise ModelError(f"model.path: {problem}")
    of_weights = hasattr(config, "quantization_config")
    if of_weights and (model.init == "random" or base.quantization(vars(config)) is None):
        del config.quantization_config  # of weights that are not used, or with neither 4 nor 8 bits
    return config


def _where(model: Model) -> str:
    """Where the values of a config are, for messages."""
    return "model.config" if model.config is not None else f"{model.path}/config.json"


def model_class(config: Any) -> Any:
    """The causal LM class of an architecture. Raises ModelError if it has none."""
    try:
        return transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        if getattr(config, "auto_map", None):
            return None  # code of its own, known only once it is loaded
        raise ModelError(
            f"model_type {config.model_type!r} has no causal language model in transformers "
            f"{transformers.__version__}"
        ) from None


def load_model(
    model: Model,
    config: Any,
    tokenizer: Any,
    *,
    attention: str,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
) -> Any:
    """The model in `dtype`, saved or random weights; on the CPU, or where quantised weights live.
    Raises ModelError.

    `quantization`: arguments of BitsAndBytesConfig; embedding, head and norms stay in `dtype`.

    `config` is completed from the tokenizer where it starts from nothing (model.config). A base
    that is quantised already stays as it is, but for the dtype in which it computes.
    """
    if model.config is not None:
        config = _complete(config, model.config, tokenizer)
    if model.init == "random":
        with translated("random weights"):
            loaded = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attention,
                dtype=dtype,
                trust_remote_code=model.trust_remote_code,
            )
    else:
        with translated(f"model {model.path!r}"):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model.path, attn_implementation=attention, dtype=dtype,
                revision=model.revision, trust_remote_code=model.trust_remote_code, output_loading_info=True,
                **quantized_as(config, quantization),
            )  # fmt: skip
        refuse_lost(model.path, loaded, info)
        _refuse_two_ends(model.path, loaded, config)
        _refuse_zeros(model.path, loaded)
    return _completed(loaded, model, tokenizer)


def refuse_lost(path: Any, model: Any, info: dict[str, Any]) -> None:
    """Raise ModelError if loading left out saved layers, or made up weights. `info`: what
    from_pretrained says of it.
    """
    _refuse_lost_layers(path, model, info["unexpected_keys"])
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ModelError(
            f"model {path!r}: {len(absent)} weights are missing or of another shape, such as "
            f"{absent[0]}; they would be random"
        )


def _refuse_zeros(path: Any, model: Any) -> None:
    """Raise ModelError for an embedding of zeros: all tokens would be alike to the model, and no
    gradient would reach its weights.
    """
    weight = model.get_input_embeddings().weight
    if not weight[:64].any() and not weight.any():  # the first rows decide for nearly every model
        raise ModelError(
            f"model {path!r}: its embedding holds only zeros, so it cannot learn; download the "
            "model again"
        )


def _refuse_two_ends(path: Any, model: Any, config: Any) -> None:
    """Raise ModelError where a config says that head and embedding are one, and they are two:
    libraries disagree on what that is.
    """
    ends = [
        getattr(end, "weight", None)
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    says_tied = config.tie_word_embeddings or getattr(
        config.get_text_config(), "tie_word_embeddings", False
    )
    if says_tied and ends[0] is not None and ends[1] is not None and ends[0] is not ends[1]:
        raise ModelError(
            f"model {path!r}: its config.json has tie_word_embeddings: true, but embedding and "
            "head are saved and differ; set it to "
            "false in (a copy of) the folder to train and export both, or take one of the two "
            "weights out"
        )


def quantized_as(config: Any, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments for from_pretrained: the config, and how to quantise; what is quantised already
    computes as `quantization` says.
    """
    own = base.quantization(vars(config))
    if own is None or quantization is None:
        return {
            "config": config,
            "quantization_config": BitsAndBytesConfig(**quantization) if quantization else None,
        }
    config = copy.deepcopy(config)
    computing = (
        {"bnb_4bit_compute_dtype": quantization["bnb_4bit_compute_dtype"]}
        if "load_in_4bit" in quantization
        else {}
    )
    config.quantization_config = own | computing
    return {"config": config}


def _completed(loaded: Any, model: Model, tokenizer: Any) -> Any:
    """What every model gets, with weights or without."""
    if model.new_tokens:
        embeddings.extend(loaded, tokenizer.convert_tokens_to_ids(model.new_tokens))
    check_vocabulary(loaded, tokenizer)
    keep_layout(loaded)
    # With padding_idx an embedding gives its pad row no gradient. Padding here is masked by
    # position, and where EOS serves as pad its embedding must learn like any other.
    loaded.get_input_embeddings().padding_idx = None
    return loaded


def keep_layout(model: Any) -> None:
    """Keep 4-bit weights as they are in memory.

    On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks them at the first evaluation, for a product
    in bfloat16 that has no gradient: training would go on without one, in silence.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _refuse_lost_layers(path: Any, model: Any, unexpected: Any) -> None:
    """Raise ModelError if saved weights would be dropped that are like others of the model: layers
    that its config forgot.
    """

    def pattern(name: str) -> str:
        return re.sub(r"\d+", "N", name)

    known = {pattern(name) for name, _ in model.named_parameters()}
    # Such as the layers of DeepSeek V3 that predict further tokens, which transformers leaves out
    # on purpose.
    spare = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    lost = sorted(
        name
        for name in unexpected
        if pattern(name) in known
        and re.search(r"\d", name)
        and not any(re.search(each, name) for each in spare)
    )
    if lost:
        raise ModelError(
            f"model {path!r}: its config has fewer layers than its weights: {len(lost)} of them "
            "would be dropped, such as "
            f"{lost[0]}; correct the number of layers in config.json"
        )


def skeleton(
    model: Model, config: Any, tokenizer: Any, attention: str, dtype: torch.dtype = torch.float32
) -> Any:
    """The model without memory for its weights (on the meta device): to count, to check, or to be
    sent them. Raises ModelError.
    """
    if model.config is not None:
        config = _complete(config, model.config, tokenizer)
    config = copy.deepcopy(config)  # new tokens change it
    with (
        torch.device("meta"),
        translated(f"{_where(model)}: architecture {config.model_type}", config.to_dict()),
    ):
        empty = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=attention,
            dtype=dtype,
        )
    return _completed(empty, model, tokenizer)


def check_shapes(skeleton: Any) -> None:
    """Raise ModelError if tokens cannot pass through the architecture. Nothing is computed on the
    meta device.
    """
    bounds = {
        "cu_seq_lens_q": torch.tensor([0, 2]),
        "max_length_q": 2,
    }  # one document, for those who ask
    try:
        skeleton(
            input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False, **bounds
        )
    except RuntimeError as exc:
        # Other errors say that the meta device cannot do it, as with the choice of experts, not
        # that the model cannot.
        if re.search("size|shape|dimension", str(exc)):
            raise ModelError(
                f"architecture {skeleton.config.model_type}: tokens cannot pass through it: "
                f"{str(exc).splitlines()[0]}; "
                "do the sizes in its config (heads, hidden_size, ...) fit each other?"
            ) from exc


def check_weights(skeleton: Any, model: Model) -> None:
    """Raise ModelError if a folder lacks weights of the architecture, or has them in other shapes.
    Reads headers only.

    Where one saved name is not a name of the architecture, transformers may rename on loading, and
    what is missing shows then.
    """
    if model.init != "pretrained":
        return
    folder = model.path or ""
    saved = base.shapes(folder) or shapes_of_pickle(Path(folder, "pytorch_model.bin"))
    if saved is None or base.quantization(skeleton.config.to_dict()) is not None:
        return
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    known = parameters.keys() | dict(skeleton.named_buffers()).keys()
    _refuse_lost_layers(model.path, skeleton, saved.keys() - known)
    if saved.keys() <= known:
        held = {
            id(parameters[name]) for name in saved.keys() & parameters.keys()
        }  # tied weights are saved under one name
        absent = sorted(name for name, parameter in parameters.items() if id(parameter) not in held)
        longer = (
            {id(end.weight) for end in _ends(skeleton)} if model.new_tokens else set()
        )  # new tokens add rows
        other = sorted(
            name
            for name in saved.keys() & parameters.keys()
            if saved[name] != list(parameters[name].shape) and id(parameters[name]) not in longer
        )
        if absent or other:
            raise ModelError(
                f"model {model.path!r}: {len(absent) + len(other)} weights are missing or of "
                f"another shape, such as {(absent or other)[0]}; "
                "they would be random; download the model again, or correct its config.json"
            )


def _ends(model: Any) -> list[Any]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in ends if getattr(end, "weight", None) is not None]


def shapes_of_file(file: Path) -> dict[str, list[int]] | None:
    """Names and shapes in one file of weights; None for formats before torch 1.6."""
    return shapes_of_pickle(file) if file.suffix == ".bin" else base.tensors_in(file)[0]


def shapes_of_pickle(file: Path) -> dict[str, list[int]] | None:
    """Names and shapes in a zip file of torch.save, of which nothing is executed and no values are
    read; None for older formats.
    """
    if not zipfile.is_zipfile(file):
        return None
    with translated(str(file)):
        found = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    if not isinstance(found, dict):
        raise ModelError(
            f"{file}: holds {type(found).__name__}, and should hold weights by their names; "
            f"{base.AGAIN}"
        )
    return {
        name: list(value.shape) for name, value in found.items() if isinstance(value, torch.Tensor)
    }


def check_config_vocabulary(config: Any, tokenizer: Any, model: Model) -> None:
    """Raise ModelError if a saved config has a vocabulary that is too small for the tokenizer,
    before anything is built from it.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if model.config is None and isinstance(
        rows, int
    ):  # from scratch it is completed from the tokenizer
        new = set(model.new_tokens)
        _require_rows(
            rows, max(number for token, number in tokenizer.get_vocab().items() if token not in new)
        )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise ModelError if the tokenizer can give ids that the embedding does not have."""
    _require_rows(model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()))


def _require_rows(rows: int, highest: int) -> None:
    if highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, but the embedding has {rows} rows; "
            "take the tokenizer that belongs to the model, or a larger vocab_size"
        )


def bytes_tokenizer() -> Any:
    """A tokenizer of 256 bytes, BOS, EOS, PAD and the two tokens of ChatML: ids 0 to 260, nothing
    to download.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _complete(config: Any, given: dict[str, Any], tokenizer: Any) -> Any:
    """A config from scratch takes vocabulary and special tokens from its tokenizer, unless they
    were given.
    """
    facts = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in facts.items():
        if name not in given and (
            name == "vocab_size" or value is None or value < config.vocab_size
        ):
            setattr(config, name, value)
    return config


def _require_folder_or_hub(key: str, name: str | None) -> None:
    """Raise ModelError at once for what is neither a folder that is there nor the form of a Hub id."""
    if problem := base.name_problem(name):
        raise ModelError(f"{key}: {problem}")


def _reason(exc: Exception, said: Mapping[str, Any] | None) -> str:
    """Why something cannot be loaded, in the words of a library where they help. `said`: the values
    of its config.
    """
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    if isinstance(exc, pickle.UnpicklingError) or "Weights only load failed" in str(exc):
        # torch advises to load it with weights_only=False, which would execute what is in it.
        return (
            "a file in PyTorch's own format (.bin) is damaged, or holds other Python objects than "
            "tensors, which could run code and "
            "are never opened; give the weights as .safetensors, or download them again"
        )
    of_torch = re.search(r"module 'torch' has no attribute '(\w+)'", str(exc))  # a dtype
    unknown = (
        of_torch[1] if of_torch else exc.args[0] if isinstance(exc, KeyError) and exc.args else None
    )
    for name, value in (
        *base_identity.fields(dict(said or {})),
        *((name, (said or {}).get(name)) for name in ("dtype", "torch_dtype")),
    ):
        if isinstance(value, str) and value == unknown:
            return f"{name} is {value!r}, which transformers does not know; correct it"
    if isinstance(exc, KeyError):
        return f"a file of it lacks the key {exc}, or holds a word that transformers does not know; correct it, or {base.AGAIN}"
    return " ".join(lines[:2]) or type(exc).__name__


@contextmanager
def translated(what: str, said: Mapping[str, Any] | None = None) -> Iterator[None]:
    """What the machine did not fail at is the user's to mend: transformers and its parts raise
    errors of many families for it.
    """
    try:
        yield
    except Exception as exc:
        failures.reraise(exc, f"{what} cannot be loaded now")
        reason = _reason(exc, said)
        if "huggingface.co" in reason:
            reason += f" (and no such folder in {places.looked_in()})"
        raise ModelError(f"{what} cannot be loaded: {reason}") from exc
