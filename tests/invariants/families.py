"""Tiny models of other families than the causal one, and rows for objectives of their own."""

import numpy as np
from conftest import TINY_LLAMA, pairs, write_jsonl

# Small sizes by all names that encoders of transformers have for them; each takes those it knows.
SMALL = {
    "hidden_size": 32, "d_model": 32, "emb_dim": 32, "dim": 32, "embedding_size": 32,
    "intermediate_size": 64, "hidden_dim": 64, "num_hidden_layers": 2, "n_layers": 2, "n_layer": 2,
    "num_attention_heads": 4, "n_heads": 4, "n_head": 4, "num_key_value_heads": 4, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
SIZES = {
    "convbert": {"head_ratio": 2},
    "esmc": {"head_dim": 8},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 64},
    "longformer": {"attention_window": [8, 8], "pad_token_id": 1},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_blocks": 1},
    "reformer": {
        "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8,
        "attn_layers": ["local", "lsh"], "feed_forward_size": 64, "is_decoder": False,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "ultravbert": {
        name: {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
               "num_attention_heads": 2, **more}
        for name, more in {
            "text_config": {
                "vocab_size": 300, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
            },
            "vision_config": {"image_size": 32, "patch_size": 16},
        }.items()
    },
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def small(config_class):
    """Return the settings of a tiny model of a class of configs."""
    name, known = config_class.model_type, config_class().to_dict()
    sizes = {key: value for key, value in SMALL.items() if key in known}
    return {"model_type": name, **sizes, **SIZES.get(name, {})}


# No dropout: it would differ between ways to cut up a step.
BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0,
}  # fmt: skip
BART = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 128, "dropout": 0.0,
}  # fmt: skip


def texts(count=40):
    """Sentences of very different lengths, in which what comes next follows from what came."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven"]
    return [
        {"text": " ".join(numbers[(i + n) % 7] for n in range(2 + i * 5 % 11))}
        for i in range(count)
    ]


def reviews(count=40):
    """Texts of very different lengths, whose label follows from one word in them."""
    words = {"good": "praise", "fine": "praise", "dull": "blame", "weak": "blame"}
    filler = ["the", "plot", "of", "it", "was", "so"]
    rows = []
    for i in range(count):
        word = [*words][i * 3 % 4]
        text = [*filler[: 1 + i * 5 % 6], word, *filler[i % 6 :]]
        rows.append({"text": " ".join(text), "label": words[word]})
    return rows


def entities(count=40):
    """Sentences whose words are names, places or neither."""
    names, towns = ["ann", "bob", "eva", "ian"], ["rome", "oslo", "bonn"]
    rows = []
    for i in range(count):
        words = [names[i % 4], *["really"] * (i * 7 % 5), "likes", towns[i % 3], "in", "may"]
        labels = ["O"] * len(words)
        labels[0], labels[-3] = "PER", "LOC"
        rows.append({"tokens": words, "labels": labels})
    return rows


def orders(count=40):
    """Three words, and the same the other way round."""
    words = ["red", "tall", "new", "cold", "big", "dry"]
    rows = []
    for i in range(count):
        chosen = [words[(i * 5 + n * (1 + i % 4)) % 6] for n in range(1 + i % 3)]
        rows.append({"question": " ".join(chosen), "answer": " ".join(reversed(chosen))})
    return rows


def preferences(count=40):
    """Prompts with a chosen answer and one or two rejected ones, of very different lengths."""
    words, rows = ["a", "bc", "def", "g", "hi", "jkl"], []
    for i in range(count):
        chosen = "".join(words[(i + n) % 6] for n in range(1 + i % 3))
        rejected = ["".join(words[(i * 5 + n) % 6] for n in range(1 + k + i % 4)) for k in (0, 1)]
        bad = rejected if i % 5 == 0 else rejected[0]
        rows.append({"prompt": f"{i}", "chosen": f"+{chosen}", "rejected": bad})
    return rows


def judged(count=40):
    """Single answers, good or bad, and every tenth row a pair of both."""
    return [
        pair if i % 10 == 0 else
        {"prompt": pair["prompt"], "completion": pair["chosen"] + "?" * (i % 3), "label": i % 3 > 0}
        for i, pair in enumerate(preferences(count))
    ]  # fmt: skip


def sums(count=40):
    """Additions in one to three steps, some of them wrong, and all behind those."""
    rows = []
    for i in range(count):
        texts = [f"{i}+{n}={i + n + (i % 3 == n)}" for n in range(1 + i % 3)]
        labels = [i % 3 > n for n in range(len(texts))]
        rows.append({"prompt": str(i), "steps": texts, "labels": labels})
    return rows


def scored_preferences(count=40):
    """The same with a number by which the chosen answer leads."""
    return [{**row, "lead": (i % 4) / 2} for i, row in enumerate(preferences(count))]


ROWS = {
    "mlm": texts, "sequence_classification": reviews, "token_classification": entities,
    "seq2seq": orders, "span_corruption": texts, "text_infilling": texts,
    "dpo": preferences, "simpo": preferences, "orpo": preferences, "kto": judged,
    "distill": pairs,
    "reward": scored_preferences, "process_reward": sums,
}  # fmt: skip
MODELS = {"seq2seq": T5, "span_corruption": T5, "text_infilling": BART}
SETTINGS = {
    name: {"model__config": MODELS.get(name, BERT), "objective__kind": name} for name in ROWS
}
for name in ("dpo", "simpo", "orpo", "kto", "reward", "distill", "process_reward"):
    SETTINGS[name]["model__config"] = TINY_LLAMA
# The tokens of longer answers count half, and those of chosen answers a second time.
SETTINGS["dpo"] |= {"objective__ld_alpha": 0.5, "objective__sft_weight": 0.5}
# By this seed and rate z is above 0 from the second step on.
SETTINGS["kto"] |= {
    "objective__beta": 0.5, "objective__undesirable_weight": 2.0, "run__seed": 7,
    "optimizer__lr": 3e-3,
}  # fmt: skip
SETTINGS["reward"] |= {
    "objective__center_rewards_coefficient": 0.3, "data__columns": {"margin": "lead"},
}  # fmt: skip
SETTINGS["distill"] |= {
    "objective__beta": 0.3, "objective__temperature": 2.0, "objective__sft_weight": 0.5,
}  # fmt: skip
TEACHER = {**TINY_LLAMA, "hidden_size": 48, "tie_word_embeddings": True}
SETTINGS["process_reward"] |= {"data__max_length": 160}
PACKED = ["mlm", "token_classification", "dpo", "simpo", "orpo", "kto", "reward", "process_reward",
          "distill"]  # fmt: skip


def settings(workshop, name):
    """The settings of one objective, and its rows in a file."""
    rows = write_jsonl(workshop.folder / f"{name}.jsonl", ROWS[name]())
    own = SETTINGS[name] | {"data__train": str(rows)}
    if name == "distill":
        teacher = workshop.train("teacher", model__config=TEACHER, train__max_steps=3)
        own["objective__teacher"] = str(teacher / "model")
    return own


def reversals(count=600, related=True):
    """Letters, and the same the other way round; or other letters, which nothing tells."""
    random = np.random.default_rng(0)

    def word():
        return "".join(random.choice(list("abcdefgh"), random.integers(3, 7)))

    words = [word() for _ in range(count)]
    return [{"question": each, "answer": each[::-1] if related else word()} for each in words]


def shuffled(rows):
    """The same texts with their letters in random order."""
    random = np.random.default_rng(1)
    return [{"text": "".join(random.permutation(list(row["text"])))} for row in rows]


def guesses(run):
    """Return the cross-entropy of held-out labels by the best mixture of two guesses.

    How often a label comes in training, and what the input holds at the same place, or before it.
    Special tokens cost nothing: where spans and texts end follows from the form alone.
    """
    from finetune import config as configs
    from finetune import preflight
    from finetune.engine.topology import Topology

    config = configs.parse(["--config", str(run / "config.yaml")])[0]
    data = preflight.prepare(config, Topology(config.train.precision, True))
    counts = dict.fromkeys(data.tokenizer.get_vocab().values(), 0.01)  # so that all are possible
    for step in (step for epoch in range(5) for step in data.train.epoch(epoch)):
        for label in (label for batch in step for label in batch.labels.tolist()):
            counts[label] += 1
    total, special = sum(counts.values()), set(data.tokenizer.all_special_ids)
    known, copied, free = [], [], 0
    for batch in (batch for step in data.eval.epoch() for batch in step):
        ids = batch.inputs["input_ids"]
        width = batch.inputs.get("decoder_input_ids", ids).shape[1]
        for label, place in zip(batch.labels.tolist(), batch.positions.tolist()):
            if label in special:
                free += 1
                continue
            row, at = divmod(place, width)
            near = ids[row, max(0, at - 1) : at + 1].tolist()
            known.append(counts[label] / total)
            copied.append(label in near)
    shares = np.linspace(0, 0.99, 100)[:, None]
    losses = -np.log(shares * np.array(copied) + (1 - shares) * np.array(known))
    return float(losses.sum(1).min()) / (len(known) + free)
