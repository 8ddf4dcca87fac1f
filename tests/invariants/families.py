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


ROWS = {"mlm": texts, "sequence_classification": reviews, "token_classification": entities}
SETTINGS = {name: {"model__config": BERT, "objective__kind": name} for name in ROWS}
PACKED = ["mlm", "token_classification"]


def settings(workshop, name):
    """The settings of one objective, and its rows in a file."""
    rows = write_jsonl(workshop.folder / f"{name}.jsonl", ROWS[name]())
    return SETTINGS[name] | {"data__train": str(rows)}
