"""Tiny models of other families than the causal one, and rows for each of their objectives."""

from conftest import write_jsonl

# No dropout: it would differ between ways to cut up a step.
BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def texts(count=40):
    """Sentences of very different lengths, in which what comes next follows from what came."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven"]
    return [
        {"text": " ".join(numbers[(i + n) % 7] for n in range(2 + i * 5 % 11))}
        for i in range(count)
    ]


ROWS = {"mlm": texts}
SETTINGS = {"mlm": {"model__config": BERT, "objective__kind": "mlm"}}
PACKED = ["mlm"]


def settings(workshop, name):
    """The settings of one objective, and its rows in a file."""
    rows = write_jsonl(workshop.folder / f"{name}.jsonl", ROWS[name]())
    return SETTINGS[name] | {"data__train": str(rows)}
