"""The story of docs/evaluation.md: a hole in the data is found, asked for, filled, and checked."""

import json
import random

import pytest
from conftest import ROOT, run_main, write_jsonl

from finetune.__main__ import main
from finetune.evaluation.results_file import read
from finetune.preparation import pig_latin, request

VOWELS = "aeiou"


class Words:
    """Invented words that begin with consonants or with vowels, a part of them for each split."""

    def __init__(self, seed=7):
        self._random = random.Random(seed)
        words = pig_latin.vocabulary(24_000, self._random)
        # One consonant and short: the model learns to move it in five minutes on two cores.
        simple = [w for w in words if w[0] not in f"{VOWELS}y" and w[1] in VOWELS and len(w) < 6]
        bare = {word[1:] for word in simple}
        self._pools = {"consonant": simple, "vowel": sorted(w for w in bare if len(w) > 2)}
        for pool in self._pools.values():
            self._random.shuffle(pool)

    def rows(self, starts, count, split):
        """Return rows of three words each: of the first 80% of the words, or of the last 20%."""
        pool = self._pools[starts]
        border = len(pool) * 8 // 10
        chosen = pool[:border] if split == "train" else pool[border:]
        sentences = (" ".join(self._random.sample(chosen, 3)) + "." for _ in range(count))
        return [
            {"question": text, "answer": pig_latin.pig_latin(text), "starts": starts}
            for text in sentences
        ]


@pytest.mark.proof
@pytest.mark.timeout(3_000)
def test_a_hole_in_the_data_is_found_and_filled_and_nothing_else_breaks(tmp_path, capsys):
    words = Words()
    rows = write_jsonl(tmp_path / "train.jsonl", words.rows("consonant", 14_400, "train"))
    asked = words.rows("consonant", 150, "test") + words.rows("vowel", 50, "test")
    test = write_jsonl(tmp_path / "test.jsonl", asked)
    dev = write_jsonl(tmp_path / "dev.jsonl", words.rows("consonant", 48, "test"))
    sentences = tmp_path / "sentences.txt"
    known = words.rows("consonant", 4_800, "train")
    sentences.write_text("".join(f"{row['question']}\n" for row in known))
    places = ["--run.dir", tmp_path / "runs", "--data.cache_dir", tmp_path / "cache"]
    pretrain = ["--config", ROOT / "configs/quickstart_pretrain.yaml", *places]
    assert run_main(*pretrain, "--data.train", sentences, "--train.max_steps", "12") == 0

    def trained(name, base, files, *words):
        quick = ["--config", ROOT / "configs/quickstart.yaml", *places, "--run.name", name]
        quick += ["--model.path", tmp_path / "runs" / base / "model", "--data.eval", dev, *words]
        assert run_main(*quick, "--data.train", json.dumps(list(map(str, files)))) == 0
        return tmp_path / "runs" / name

    def evaluated(run, *words):
        given = ["--data", test, "--max-new-tokens", "48", "--examples", "0"]
        given += ["--wrong-below", "token F1=0.5", *words]
        assert main(["evaluate", str(run), *map(str, given)]) == 0
        print(capsys.readouterr().out)
        return read(run / "evaluation/results.json")

    # The first round: all words that begin with a vowel go wrong, and the report says so.
    first = trained("hole", "quickstart_base", [rows])
    wanted = tmp_path / "request.json"
    found = evaluated(first, "--next-data", wanted)
    assert [each.name for each in found.slices if each.is_weak] == ["starts: vowel"]
    vowels = found.slices[0]
    consonants = next(each for each in found.slices if each.name == "starts: consonant")
    assert vowels.failures >= 0.9 * len(vowels.rows)
    assert consonants.failures <= 0.2 * len(consonants.rows)
    wrong = found.rows[vowels.rows[0]]
    assert all(near.question[0] not in VOWELS for near in wrong.nearest)

    # Rows by rule, as many as are asked for.
    asked_for = {each.name: each for each in request.read(str(wanted)).slices}
    hole = asked_for["starts: vowel"]
    more = write_jsonl(tmp_path / "more.jsonl", words.rows("vowel", hole.count, "train"))

    # The second round goes on with the model and all rows: most of the hole is filled.
    second = trained("filled", "hole", [rows, more], "--train.max_steps", "100")
    later = evaluated(second, "--before", first / "evaluation/results.json")
    by_slice = {f"{each.column}: {each.value}": each for each in later.round.slices}
    filled, others = by_slice["starts: vowel"], by_slice["starts: consonant"]
    assert filled.fixed >= 0.6 * len(vowels.rows)
    assert others.new <= 3
    assert later.verdict.kind == "better"
