"""Move a language model of plain text to a stated style by DPO, and say what that cost.

    python benchmarks/style.py FOLDER_OF_A_MODEL --out FOLDER

The style: short sentences, as a rule counts them (words per sentence). The model samples openings,
and continuations of each; of these the one with the shortest sentences is chosen, the one with the
longest rejected, and DPO learns the pairs. Then base and tuned model continue openings that were
not trained on, and both read texts that the base wrote: the cross-entropy of plain text is the
cost. Everything follows from --seed. Needs `pip install 'finetune[eval]'`.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune.evaluation.statistics import difference

ROOT = Path(__file__).resolve().parents[1]
OPENING, CONTINUATION = 32, 72  # tokens at most
AT_ONCE = 512  # sequences that are sampled together
ROUNDS = 20  # of openings, before the model is taken to write no more
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"']?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--openings", type=int, default=400, help="to train on")
    parser.add_argument("--unseen", type=int, default=100, help="further openings, to measure on")
    parser.add_argument("--samples", type=int, default=6, help="continuations of an opening")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--sft-weight", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    torch.manual_seed(arguments.seed)
    base = Model(arguments.model)
    openings = unlike(base, arguments.openings + arguments.unseen)
    trained, unseen = openings[: arguments.openings], openings[arguments.openings :]
    rows = pairs_of(base, trained, arguments.samples)
    tuned = Model(train(arguments, rows))
    report(base, tuned, unseen, arguments.samples)


class Model:
    """A causal model that continues text at temperature 1, and reads it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.chat_template = None
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.ends = sorted({each for each in known if each is not None})
        self.start = self.ends[0] if known[0] is None else known[0]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return [self.start, *ids]

    def continued(self, texts: list[str], most: int) -> list[str]:
        """Return a continuation of each, of at most that many tokens."""
        found: list[str] = []
        for begin in range(0, len(texts), AT_ONCE):
            ids = [self._ids(text) for text in texts[begin : begin + AT_ONCE]]
            width = max(map(len, ids))
            rows = torch.tensor([[self.ends[0]] * (width - len(each)) + each for each in ids])
            mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in ids])
            with torch.no_grad():
                made = self.model.generate(
                    rows, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=most, eos_token_id=self.ends, pad_token_id=self.ends[0],
                )  # fmt: skip
            whole = self.tokenizer.batch_decode(made, skip_special_tokens=True)
            asked = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            found += [text.removeprefix(start) for text, start in zip(whole, asked)]
        return found

    def nats(self, text: str) -> tuple[float, int]:
        """Return the cross-entropy of a text, summed, and its tokens."""
        ids = torch.tensor([self._ids(text)])
        with torch.no_grad():
            logprobs = self.model(ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])
        return -float(taken.double().sum()), len(taken)


def whole_sentences(text: str) -> str:
    """Return a text up to its last sentence end, or nothing."""
    found = list(SENTENCE.finditer(text))
    return text[: found[-1].end()] if found else ""


def words_per_sentence(text: str) -> float:
    """Return the words of a mean sentence; NaN without one."""
    found = SENTENCE.findall(text)
    return statistics.fmean(len(each.split()) for each in found) if found else math.nan


def unlike(model: Model, count: int) -> list[str]:
    """Return different first sentences that the model writes."""
    found: dict[str, None] = {}
    for _ in range(ROUNDS):
        for text in model.continued([""] * AT_ONCE, OPENING):
            if sentence := SENTENCE.match(text):
                found.setdefault(sentence[0].strip())
        if len(found) >= count:
            return list(found)[:count]
    raise SystemExit(f"the model writes only {len(found)} different first sentences")


def sampled(model: Model, openings: list[str], samples: int) -> list[list[str]]:
    """Return continuations of each opening, cut to whole sentences."""
    texts = model.continued([each for each in openings for _ in range(samples)], CONTINUATION)
    cut = [whole_sentences(text) for text in texts]
    return [cut[begin : begin + samples] for begin in range(0, len(cut), samples)]


def pairs_of(model: Model, openings: list[str], samples: int) -> list[dict[str, str]]:
    """Return a row of each opening: the continuation with the shortest sentences, and the longest.

    Both had as many tokens before their last, unfinished sentence was cut off; so style is not
    brevity of the whole, which the report shows beside it.
    """
    rows = []
    for opening, texts in zip(openings, sampled(model, openings, samples)):
        ranked = sorted(filter(str.strip, texts), key=words_per_sentence)
        if len(ranked) > 1 and words_per_sentence(ranked[0]) < words_per_sentence(ranked[-1]):
            rows.append({"prompt": opening, "chosen": ranked[0], "rejected": ranked[-1]})
    print(f"{len(rows)} pairs of {len(openings)} openings; words per sentence: chosen "
          f"{_mean(rows, 'chosen'):.2f}, rejected {_mean(rows, 'rejected'):.2f}")  # fmt: skip
    return rows


def _mean(rows: list[dict[str, str]], name: str) -> float:
    return statistics.fmean(words_per_sentence(row[name]) for row in rows)


def train(arguments: Any, rows: list[dict[str, str]]) -> Path:
    """Run train.py on the pairs; return the folder of the tuned model."""
    out = arguments.out.resolve()
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "plain.jinja").write_text(TEMPLATE)
    config = {
        "run": {"name": "style", "dir": str(out), "seed": arguments.seed},
        "model": {"path": str(arguments.model.resolve())},
        "data": {
            "train": str(out / "pairs.jsonl"), "eval_fraction": 0.1, "max_length": 512,
            "template": str(out / "plain.jinja"), "packing": True, "truncation": "drop",
        },
        "objective": {
            "kind": "dpo", "beta": arguments.beta, "sft_weight": arguments.sft_weight,
        },
        "optimizer": {"lr": arguments.lr},
        "schedule": {"kind": "cosine", "warmup_steps": 5},
        "train": {"epochs": 3, "global_batch_size": 8, "micro_batch_size": 4},
    }  # fmt: skip
    (out / "style.yaml").write_text(json.dumps(config, indent=1))  # JSON is YAML
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(out / "style.yaml")]
    subprocess.run(command, check=True)
    return out / "style" / "model"


def report(base: Model, tuned: Model, unseen: list[str], samples: int) -> None:
    """Print the style on openings that were not trained on, and what it cost."""
    texts = {name: sampled(model, unseen, samples)
             for name, model in (("base", base), ("tuned", tuned))}  # fmt: skip
    style = {
        name: [statistics.fmean(_known(each)) for each in found] for name, found in texts.items()
    }
    told("words per sentence", style["base"], style["tuned"], f"{len(unseen)} unseen openings")
    lengths = {
        name: [statistics.fmean(len(text.split()) for text in each) for each in found]
        for name, found in texts.items()
    }
    told("words in all", lengths["base"], lengths["tuned"], "the same")
    plain = [f"{opening}{each[0]}" for opening, each in zip(unseen, texts["base"])]
    read = {name: [model.nats(text) for text in plain]
            for name, model in (("base", base), ("tuned", tuned))}  # fmt: skip
    per_token = {name: [nats / count for nats, count in found] for name, found in read.items()}
    told("nats a token", per_token["base"], per_token["tuned"], "texts that the base wrote")
    print(
        f"\nopening   {unseen[0]}\nbase     {texts['base'][0][0]}\ntuned    {texts['tuned'][0][0]}"
    )


def _known(texts: list[str]) -> list[float]:
    """Return the words per sentence of texts that have one."""
    found = [each for each in map(words_per_sentence, texts) if not math.isnan(each)]
    return found or [float(CONTINUATION)]


def told(what: str, before: list[float], after: list[float], where: str) -> None:
    gain = difference(before, after)
    low, high = gain.low or math.nan, gain.high or math.nan
    print(f"{what:<20} base {statistics.fmean(before):.3f}  tuned {statistics.fmean(after):.3f}  "
          f"{gain.mean:+.3f} ({low:+.3f} to {high:+.3f}) on {where}")  # fmt: skip


if __name__ == "__main__":
    main()
