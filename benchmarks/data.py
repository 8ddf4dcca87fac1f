"""Measure the speed, the memory and the finds of the data programs.

    python benchmarks/data.py                     # a million rows of 200 words: 20 minutes, 8 GB
    python benchmarks/data.py --rows 50000 --only near,language

Rows are made of an invented vocabulary with the frequencies of words in English; 2 in 100 are
edited copies, and 1 in 1,000 holds an evaluation row. Each program runs as a user starts it, with
two workers; memory is the sum over its processes.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORDS = 200
VOCABULARY = 50_000
AGAINST = 50_000  # evaluation rows
COMMON = "the of and to in a is that for it as was with be by on not he i this are or his from at"
GOALS = {  # of a million rows: seconds, and GB where the goal names them
    "near": (180, 4), "overlap": (120, None), "language": (60, None), "personal": (300, None),
    "packing": (5, None), "tokenising": (None, None),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", default=",".join(MEASURED), help="parts, as near,language")
    parser.add_argument("--folder", type=Path, help="keep the rows here, for another measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{arguments.rows:,} rows of {WORDS} words, {os.cpu_count()} cores")
        print("| what | seconds | GB | of a million, goal | |\n| --- | --- | --- | --- | --- |")
        for name in arguments.only.split(","):
            seconds, gigabytes, remark = MEASURED[name](folder, arguments.rows)
            goal = GOALS[name]
            scaled = seconds * 1e6 / arguments.rows
            print(
                f"| {name} | {seconds:.1f} | {gigabytes:.2f} | {scaled:.0f} s"
                f"{f', {goal[0]} s' if goal[0] else ''}{f', {goal[1]} GB' if goal[1] else ''} "
                f"| {remark} |",
                flush=True,
            )


# ----------------------------------------------------------------------------------------- rows


def texts(seed: int) -> Iterator[str]:
    """Yield texts without end: words by Zipf's law, half of them common English ones."""
    source = random.Random(seed)
    invented = [f"{a}{b}" for a, b in itertools.product(_syllables(), repeat=2)][:VOCABULARY]
    vocabulary = COMMON.split() + invented
    weights = [1 / (rank + 2) for rank in range(len(vocabulary))]
    cumulative = list(itertools.accumulate(weights))
    while True:
        yield " ".join(source.choices(vocabulary, cum_weights=cumulative, k=WORDS))


def _syllables() -> list[str]:
    return [a + b + c for a in "bdfghklmnprst" for b in "aeiou" for c in ("", "n", "r", "s")]


def edited(text: str, changes: int, source: random.Random) -> str:
    split = text.split(" ")
    for place in source.sample(range(len(split)), changes):
        split[place] = f"x{source.randrange(1_000_000)}"
    return " ".join(split)


def rows(folder: Path, count: int) -> tuple[Path, dict[int, int]]:
    """Write the rows; return the file, and for each edited copy its original."""
    path, planted_file = folder / f"rows-{count}.jsonl", folder / f"planted-{count}.json"
    if not planted_file.exists():
        source, planted, kept = random.Random(0), {}, []
        with path.open("w") as file:
            for number, text in zip(range(count), texts(1)):
                if number % 50 == 49:
                    original, text = source.choice(kept)
                    text = edited(text, source.randrange(14), source)
                    planted[number] = original
                elif source.random() < 0.05:
                    kept.append((number, text))
                file.write(json.dumps({"text": text}) + "\n")
        planted_file.write_text(json.dumps(planted))
    return path, {int(key): value for key, value in json.loads(planted_file.read_text()).items()}


def similarity(one: str, other: str) -> float:
    left, right = (set(zip(t.split(), t.split()[1:], t.split()[2:])) for t in (one, other))
    return len(left & right) / len(left | right)


# ------------------------------------------------------------------------------------- programs


def run(*words: object) -> tuple[float, float]:
    """Run a program with two workers; return (seconds, GB of all its processes at once)."""
    command = [sys.executable, "-m", "finetune", "data", *map(str, words), "--force"]
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(
        [*command, "--workers", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            peak = max(peak, sum(map(_memory, _family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{errors}")
    return time.perf_counter() - start, peak / 1e9


def _family(parent: int) -> list[int]:
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return []
    return [parent, *(each for child in children for each in _family(int(child)))]


def _memory(process: int) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE")


def near(folder: Path, count: int) -> tuple[float, float, str]:
    path, planted = rows(folder, count)
    rejects = folder / "rejects.jsonl"
    taken = run("dedup", path, "--output", folder / "out.jsonl", "--rejects", rejects)
    lines = rejects.read_text().splitlines()
    dropped = {int(json.loads(line)["place"].rpartition(":")[2]) - 1 for line in lines}
    wanted = set(planted) | set(planted.values())
    kept = {}
    with path.open() as file:
        for number, line in enumerate(file):
            if number in wanted:
                kept[number] = json.loads(line)["text"]
    similar = {n for n, original in planted.items() if similarity(kept[n], kept[original]) >= 0.8}
    hits = len(dropped & similar)
    recall, precision = hits / max(1, len(similar)), hits / max(1, len(dropped))
    return *taken, f"recall {recall:.4f}, precision {precision:.4f} of {len(similar):,} pairs"


def overlap(folder: Path, count: int) -> tuple[float, float, str]:
    path, _ = rows(folder, count)
    against, source = folder / "against.jsonl", random.Random(2)
    held_out = list(itertools.islice(texts(3), AGAINST))
    against.write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    mixed, hidden = folder / "mixed.jsonl", 0
    with path.open() as file, mixed.open("w") as out:
        for number, line in enumerate(file):
            if number % 1_000 == 0:
                part = source.choice(held_out).split()[50:65]
                line = json.dumps({"text": json.loads(line)["text"] + " " + " ".join(part)}) + "\n"
                hidden += 1
            out.write(line)
    counts = folder / "counts.json"
    output = ["--output", folder / "out.jsonl", "--counts", counts]
    taken = run("decontaminate", mixed, "--against", against, *output)
    found = sum(json.loads(counts.read_text())["dropped"].values())
    return *taken, f"{found:,} of {hidden:,} hidden parts found, against {AGAINST:,} rows"


def language(folder: Path, count: int) -> tuple[float, float, str]:
    path, _ = rows(folder, count)
    counts = folder / "counts.json"
    output = ["--output", folder / "out.jsonl", "--counts", counts]
    taken = run("clean", path, "--language", "en", "--certainty", "0.01", *output)
    return *taken, "with all steps of clean, reading and writing"


def personal(folder: Path, count: int) -> tuple[float, float, str]:
    path, _ = rows(folder, count)
    mixed, source, hidden = folder / "mixed.jsonl", random.Random(4), 0
    with path.open() as file, mixed.open("w") as out:
        for number, line in enumerate(file):
            if number % 10 == 0:
                mail, phone = f"a{number}@example.org", f"(415) 555-{source.randrange(10**4):04}"
                text = f"{json.loads(line)['text']} {mail}, {phone}"
                line = json.dumps({"text": text}) + "\n"
                hidden += 2
            out.write(line)
    counts = folder / "counts.json"
    taken = run("scrub", mixed, "--output", folder / "out.jsonl", "--counts", counts)
    changed = json.loads(counts.read_text())["changed"]
    found = changed["email"] + changed["phone"]
    return *taken, f"{found:,} of {hidden:,} found"


def packing(folder: Path, count: int) -> tuple[float, float, str]:
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from finetune.data.packing import pack

    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, count), 8, 2_048).astype(np.int64)
    start = time.perf_counter()
    packs = pack(lengths, 2_048, 0)
    seconds = time.perf_counter() - start
    full = lengths.sum() / (len(packs) * 2_048)
    return seconds, 0.0, f"{full:.1%} full"


def _tokenizer() -> Any:
    """Train a byte-level BPE of 16,000 tokens on the texts, with ChatML's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(itertools.islice(texts(6), 2_000), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=special[0], pad_token=special[0],
        extra_special_tokens=special[1:],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def tokenising(folder: Path, count: int) -> tuple[float, float, str]:
    """Tokenise conversations, beside `datasets.map` with the function that TRL's SFTTrainer maps.

    TRL renders and tokenises each prompt, then the prompt with its answer, a row at a time, and
    compares their beginnings.
    """
    sys.path.insert(0, str(ROOT))
    import datasets

    from finetune.data import chat_templates, tokenised

    rows = folder / f"conversations-{count}.jsonl"
    if not rows.exists():
        with rows.open("w") as file:
            for _, text in zip(range(count), texts(5)):
                asked, answer = text[:300], text[300:]
                turns = [{"role": "user", "content": asked}]
                completion = [{"role": "assistant", "content": answer}]
                file.write(json.dumps({"prompt": turns, "completion": completion}) + "\n")
    tokenizer = _tokenizer()
    template = chat_templates.load(
        "chat", "messages", tokenizer.chat_template, tokenizer.special_tokens_map,
        tokenizer.get_added_vocab(), None,
    )  # fmt: skip
    options = tokenised.Options("auto", {}, "line", None, "completion", 2_048, "error")

    def mapped(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(
            row["prompt"] + row["completion"], tokenize=True, return_dict=True
        )["input_ids"]
        assert whole[: len(prompt)] == prompt
        mask = [0] * len(prompt) + [1] * (len(whole) - len(prompt))
        return {"input_ids": whole, "completion_mask": mask}

    datasets.disable_caching()
    datasets.disable_progress_bars()
    ours, theirs = [], []
    for _ in range(3):
        start = time.perf_counter()
        made = tokenised.tokenise([str(rows)], template, tokenizer, options)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        table = datasets.load_dataset("json", data_files=str(rows), split="train")
        table = table.map(mapped, remove_columns=table.column_names)
        theirs.append(time.perf_counter() - start)
    for row, ids in zip(table, made.ids[:100]):
        assert row["input_ids"] == ids.tolist()
    ratio = statistics.median(there / here for here, there in zip(ours, theirs))
    return statistics.median(ours), 0.0, f"{ratio:.2f} times as fast as datasets.map (goal: 1.5)"


MEASURED: dict[str, Callable[[Path, int], tuple[float, float, str]]] = {
    "near": near,
    "overlap": overlap,
    "language": language,
    "personal": personal,
    "packing": packing,
    "tokenising": tokenising,
}

if __name__ == "__main__":
    main()
