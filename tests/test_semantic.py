"""`finetune data dedup --semantic`: rows that mean the same, found with vectors of texts."""

import json

import numpy as np
import pytest
from conftest import read_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_preparation import Bench

from finetune.errors import ModelError
from finetune.preparation import embeddings, semantic

LENIENT = {"deadline": None, "suppress_health_check": list(HealthCheck)}
WORDS = {"cat": (1, 0, 0), "kitten": (0.99, 0.1, 0), "sleeps": (0, 1, 0), "rests": (0, 1, 0.02),
         "tax": (0, 0, 1)}  # fmt: skip
ROWS = [
    {"text": "cat sleeps", "score": 1},
    {"text": "tax tax tax", "score": 1},
    {"text": "kitten rests", "score": 3},
    {"text": "cat sleeps ", "score": 2},
    {"text": "Cat, sleeps!", "score": 2},
]


@pytest.fixture
def bench(tmp_path, capsys) -> Bench:
    return Bench(tmp_path, capsys)


def tokenizer_file(folder, words):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, "?"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture
def static(tmp_path):
    """A folder as model2vec writes it."""
    from safetensors.numpy import save_file

    folder = tmp_path / "static"
    folder.mkdir()
    vectors = np.array([(0, 0, 0), *WORDS.values()], np.float16)
    save_file({"embeddings": vectors}, folder / "model.safetensors")
    tokenizer_file(folder, WORDS)
    return folder


def test_rows_that_mean_the_same_are_removed(bench, static):
    rejects = bench.folder / "r.jsonl"
    given = ["--semantic", "--embedding", static, "--rejects", rejects]
    assert bench.made("dedup", ROWS, *given) == ROWS[:2]
    reasons = [row["reason"] for row in read_jsonl(rejects)]
    assert reasons == ["same meaning", "exact duplicate", "near-duplicate"]
    assert read_jsonl(rejects)[0]["kept"].endswith(":1")
    assert bench.made("dedup", ROWS, *given, "--force", "--similarity", 1) == ROWS[:3]
    best = bench.made("dedup", ROWS, *given, "--keep", "best", "--by", "score")
    assert best == [ROWS[1], ROWS[2]]
    assert bench.made("dedup", ROWS, *given, "--exact") == ROWS[:2]


def test_output_is_the_same_at_any_number_of_workers(bench, static):
    source = np.random.default_rng(0)
    rows = [{"text": " ".join(source.choice([*WORDS, "?"], 6))} for _ in range(1_500)]
    given = ["--semantic", "--embedding", static, "--similarity", 0.999, "--workers"]
    one = bench.made("dedup", rows, *given, 1)
    assert 10 < len(one) < len({row["text"] for row in rows})
    assert bench.made("dedup", rows, *given, 2) == one


def components(vectors: np.ndarray, threshold: float) -> list[int]:
    """Compare all pairs one by one; return the first row of each row's component."""
    labels = list(range(len(vectors)))
    for i in range(len(vectors)):
        for j in range(i):
            if vectors[i].astype(float) @ vectors[j].astype(float) >= threshold - semantic.EQUAL:
                old, new = sorted((labels[i], labels[j]), reverse=True)
                labels = [new if label == old else label for label in labels]
    return labels


@settings(max_examples=80, **LENIENT)
@given(
    st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=40),
    st.sampled_from([0.5, 0.8, 0.9, 1.0]),
    st.sampled_from([(1, 1), (3, 5), (64, 64)]),
)
def test_blocks_find_what_comparing_all_pairs_finds(points, threshold, block):
    vectors = embeddings.unit(np.array(points, np.float32))
    labels = np.arange(2 * len(points))
    rows = np.arange(0, 2 * len(points), 2)  # those between have no vectors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic, "ROWS", block[0])
        patch.setattr(semantic, "COLUMNS", block[1])
        semantic.unite_near(labels, rows, vectors, threshold)
    assert (labels[rows] // 2).tolist() == components(vectors, threshold)
    assert (labels[rows + 1] == rows + 1).all()


@pytest.mark.parametrize(("above", "is_united"), [(-1e-5, False), (2e-6, True)])
def test_cosines_at_the_threshold_are_computed_exactly(above, is_united):
    """In 32 bits both could be on either side."""
    angle = np.arccos(0.95 + above)
    vectors = np.array([(1, 0), (np.cos(angle), np.sin(angle))], np.float32)
    labels = np.arange(2)
    semantic.unite_near(labels, labels.copy(), vectors, 0.95)
    assert labels.tolist() == ([0, 0] if is_united else [0, 1])


def test_thousands_of_equal_rows_are_one_pass():
    labels = np.arange(5_000)
    vectors = embeddings.unit(np.ones((5_000, 8), np.float32))
    semantic.unite_near(labels, labels.copy(), vectors, 1.0)
    assert set(labels) == {0}


def test_static_vectors_are_the_mean_of_those_of_words(static):
    [found, empty] = embeddings.embedder(str(static))(["cat sleeps unknown", "\ud83d"])
    whole = np.array([1, 1, 0], np.float32)
    assert found == pytest.approx(whole / np.linalg.norm(whole), abs=1e-3)
    assert not empty.any()


def test_what_wordllama_ships_needs_no_network():
    pytest.importorskip("wordllama", reason="wordllama is not installed")
    found = embeddings.embedder(None)(
        ["How do I get my money back?", "How can I get my money back again?", "What is a whale?"]
    )
    assert found.shape == (3, 256)
    assert found[0] @ found[1] > 0.9
    assert found[0] @ found[2] < 0.3


def test_templates_do_not_make_rows_alike(bench, static):
    head = "Below is an instruction that describes a task. Write a response that appropriately "
    head += "completes the request.\n\n### Instruction:\n"
    rows = [{"text": head + "cat"}, {"text": head + "tax"}]
    assert bench.made("dedup", rows, "--exact", "--semantic", "--embedding", static) == rows


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_an_encoder_is_pooled_as_its_folder_says(tmp_path, pooling):
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer_file(tmp_path, WORDS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="?", model_max_length=64
    )
    tokenizer.save_pretrained(tmp_path)
    model = BertModel(
        BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=16, max_position_embeddings=64)
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    settings = {"pooling_mode_cls_token": pooling == "first"}
    settings["pooling_mode_mean_tokens"] = pooling == "mean"
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(settings))
    texts = ["cat", "cat sleeps tax", "tax " * 200]
    found = embeddings.embedder(str(tmp_path))(texts)
    for text, vector in zip(texts[:2], found):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = states[0] if pooling == "first" else states.mean(0)
        assert vector == pytest.approx((expected / expected.norm()).numpy(), abs=1e-5)
    settings["pooling_mode_max_tokens"] = True
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="needs pooling_mode_max_tokens, which finetune does not"):
        embeddings.embedder(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--similarity", "0.9"], "are for --semantic; add it, or remove them"),
        (["--semantic", "--embedding", "missing"], "--embedding: missing: no such folder"),
        pytest.param(
            ["--semantic", "--embedding", "."],
            "holds no model that makes vectors of texts",
            marks=pytest.mark.slow,
        ),
        (["--semantic", "--embedding", "torn"], "torn/model.safetensors: cannot be read"),
        (["--semantic", "--similarity", "2"], "above 0, up to 1"),
    ],
)
def test_wrong_models_are_named(bench, monkeypatch, given, message):
    monkeypatch.chdir(bench.folder)
    torn = bench.folder / "torn"
    torn.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (torn / name).write_text("{")
    source = bench.rows(ROWS)
    assert bench.run("dedup", source, "--output", bench.out, *given) == 2
    assert message in bench.stderr
    assert not bench.out.exists()
