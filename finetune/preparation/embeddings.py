"""Vectors of texts, of length 1, by a model on this machine: near ones mean nearly the same.

    vectors = embeddings.embedder(None)(["one text", "another"])  # float32 [texts, dimensions]

Without a folder the vectors of words that wordllama ships: a text is their mean, which takes no
GPU. A folder may hold such static vectors too (model2vec, sentence-transformers), or an encoder.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import extras, failures
from finetune.data.places import printable
from finetune.errors import ModelError

# wordllama 0.4.0 looks for its tokenizer in another folder than it ships it in, and would download
# it: so its files are read here.
SHIPPED = ("weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json")
STATIC = ("0_StaticEmbedding", ".")
VECTORS = ("embeddings", "embedding.weight")  # names of model2vec's and sentence-transformers'
Embed = Callable[[Sequence[str]], np.ndarray]


def embedder(folder: str | None) -> Embed:
    """Return what makes vectors of texts. Raise ModelError for a folder without such a model."""
    return static_embedder(folder) or encoder(str(folder))


def is_static(embed: Embed) -> bool:
    """Return whether vectors of words are added up, which is fast, and takes one core."""
    return isinstance(embed, _Static)


def static_embedder(folder: str | None) -> Embed | None:
    """Return what makes vectors by adding up those of words; None if the folder has no such."""
    if folder is None:
        extras.require("wordllama", "--semantic")
        [package] = importlib.util.find_spec("wordllama").submodule_search_locations  # type: ignore
        return _Static(*(Path(package) / name for name in SHIPPED))
    root = Path(folder)
    if not root.is_dir():
        raise ModelError(f"--embedding: {printable(folder)}: no such folder")
    for inner in STATIC:
        weights, tokenizer = root / inner / "model.safetensors", root / inner / "tokenizer.json"
        if weights.is_file() and tokenizer.is_file() and _vectors_name(weights):
            return _Static(weights, tokenizer)
    return None


def _vectors_name(weights: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), "numpy") as file:
            names = set(file.keys())
    except (OSError, SafetensorError) as exc:
        failures.reraise(exc, f"{printable(str(weights))}: cannot be read now")
        raise ModelError(f"{printable(str(weights))}: cannot be read: {exc}") from exc
    return next((name for name in VECTORS if name in names and len(names) <= 3), None)


def _read_vectors(weights: Path) -> np.ndarray:
    """Return the vectors of tokens: [vocabulary, dimensions] float32."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    name, shown = _vectors_name(weights), printable(str(weights))
    if name is None:
        raise ModelError(f"{shown}: holds no vectors of words; install or download it anew")
    try:
        tensors = load_file(weights)
        vectors = tensors[name].astype(np.float32)
        if "mapping" in tensors:  # tokens share vectors
            vectors = vectors[tensors["mapping"]]
        if "weights" in tensors:
            vectors = vectors * tensors["weights"].astype(np.float32)[:, None]
    except (IndexError, KeyError, OSError, SafetensorError, TypeError, ValueError) as exc:
        failures.reraise(exc, f"{shown}: cannot be read now")
        raise ModelError(f"{shown}: cannot be read: {exc}") from exc
    if vectors.ndim != 2:
        raise ModelError(f"{shown}: {name} should have two dimensions, got {vectors.ndim}")
    return vectors


class _Static:
    """The mean of the vectors of a text's tokens."""

    def __init__(self, weights: Path, tokenizer: Path) -> None:
        from tokenizers import Tokenizer

        self._vectors = _read_vectors(weights)
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as exc:  # tokenizers raises no other
            failures.reraise(exc, f"{printable(str(tokenizer))}: cannot be read now")
            raise ModelError(f"{printable(str(tokenizer))}: cannot be read: {exc}") from exc
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        whole = [text.encode("utf-8", "replace").decode() for text in texts]
        encoded = self._tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        found = np.zeros((len(whole), self._vectors.shape[1]), np.float32)
        for number, tokens in enumerate(encoded):
            ids = [token for token in tokens.ids if token < len(self._vectors)]
            if ids:
                found[number] = self._vectors[ids].mean(axis=0)
        return unit(found)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return scaled


def encoder(folder: str) -> Embed:
    """Return what makes vectors with an encoder, pooled as its folder says (sentence-transformers).

    Raises ModelError for a folder without one, or whose pooling is another.
    """
    pooling = _json(Path(folder) / "1_Pooling/config.json")
    is_first = pooling.get("pooling_mode_cls_token", pooling.get("pooling_mode") == "cls")
    others = [
        name for name, value in pooling.items()
        if name.startswith("pooling_mode_") and value is True
        and name not in ("pooling_mode_cls_token", "pooling_mode_mean_tokens")
    ]  # fmt: skip
    modules = _json(Path(folder) / "modules.json", list)
    others += [str(each) for each in modules if "Dense" in str(each)]
    if others:
        what = f"needs {', '.join(others)}, which finetune does not know"
        raise ModelError(f"--embedding: {printable(folder)}: {what}; choose another model")
    limit = _json(Path(folder) / "sentence_bert_config.json").get("max_seq_length")
    return _Encoder(folder, bool(is_first), limit if type(limit) is int else None)


def _json(path: Path, kind: type = dict) -> Any:
    """Return what a JSON file of a model's folder holds; an empty `kind` without the file."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelError(f"{printable(str(path))}: cannot be read: {exc}") from exc
    if not isinstance(values, kind):
        raise ModelError(f"{printable(str(path))}: should hold a JSON {kind.__name__}")
    return values


class _Encoder:
    BATCH = 32

    def __init__(self, folder: str, is_first: bool, limit: int | None) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch, self._is_first = torch, is_first
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as exc:
            failures.reraise(exc, f"--embedding: {printable(folder)}: cannot be read now")
            reason = str(exc).strip().split("\n")[0]
            what = f"holds no model that makes vectors of texts: {reason}"
            raise ModelError(f"--embedding: {printable(folder)}: {what}") from exc
        self._model = model.eval().to(self._device)
        positions = getattr(model.config, "max_position_embeddings", None) or 512
        self._limit = min(limit or positions, positions, self._tokenizer.model_max_length)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts in batches of similar length."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        parts = [self._batch([texts[number] for number in order[start : start + self.BATCH]])
                 for start in range(0, len(order), self.BATCH)]  # fmt: skip
        found = np.empty((len(texts), parts[0].shape[1]), np.float32)
        found[order] = np.concatenate(parts)
        return unit(found)

    def _batch(self, texts: list[str]) -> np.ndarray:
        limits = {"padding": True, "truncation": True, "max_length": self._limit}
        whole = [text.encode("utf-8", "replace").decode() for text in texts]
        inputs = self._tokenizer(whole, return_tensors="pt", **limits).to(self._device)
        with self._torch.no_grad():
            states = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        if self._is_first:
            pooled = states[:, 0]
        else:
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        vectors: np.ndarray = pooled.float().cpu().numpy()
        return vectors
