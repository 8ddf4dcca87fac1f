"""`finetune data mix --token-budgets`: whole rows of each source, up to a number of tokens."""

import json

import pytest
from conftest import read_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_preparation import Bench

LENIENT = {"deadline": None, "suppress_health_check": list(HealthCheck)}
COUNTED = ("--tokenizer", "bytes")


@pytest.fixture
def bench(tmp_path, capsys) -> Bench:
    return Bench(tmp_path, capsys)


@settings(max_examples=60, **LENIENT)
@given(
    sizes=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=3),
    data=st.data(), repeat=st.booleans(), seed=st.integers(0, 3),
)  # fmt: skip
def test_each_source_gives_whole_rows_up_to_its_budget(tmp_path_factory, sizes, data, repeat, seed):
    folder = tmp_path_factory.getbasetemp()
    bench = Bench(folder, type("", (), {"readouterr": lambda self: ("", "")})())
    files = [
        bench.rows([{"text": f"{source}{number:02}".ljust(3 + size, ".")}
                    for number, size in enumerate(each)], f"s{source}.jsonl")
        for source, each in enumerate(sizes)
    ]  # fmt: skip
    lengths = [[3 + size for size in each] for each in sizes]
    budgets = [data.draw(st.integers(max(each), 3 * sum(each))) for each in lengths]
    given = ["mix", *files, "--token-budgets", ",".join(map(str, budgets)), *COUNTED]
    given += ["--output", bench.out, "--force", "--seed", seed, *["--repeat"] * repeat]
    assert bench.run(*given) == 0
    texts = [row["text"] for row in read_jsonl(bench.out)]
    assert bench.run(*given) == 0
    assert [row["text"] for row in read_jsonl(bench.out)] == texts
    for source, (each, budget) in enumerate(zip(lengths, budgets)):
        own = [text for text in texts if text[0] == str(source)]
        numbers = [int(text[1:3]) for text in own]
        taken = sum(map(len, own))
        assert [len(text) for text in own] == [each[number] for number in numbers]
        assert taken <= budget
        if not repeat:
            assert numbers == sorted(set(numbers))
            assert taken == sum(each) or taken > budget - max(each)
        else:
            assert taken > budget - max(each)
            most, least = (f(numbers.count(number) for number in range(len(each)))
                           for f in (max, min))  # fmt: skip
            assert most - least <= 1


def test_budgets_are_counted_and_notes_say_what_is_less(bench):
    files = [bench.rows([{"text": "abcd"}] * 10, "a.jsonl"), bench.rows([{"text": "e"}], "b.jsonl")]
    out = ["--output", bench.out, "--counts", bench.folder / "counts.json"]
    assert bench.run("mix", *files, "--token-budgets", "21,9", *COUNTED, *out) == 0
    assert [row["text"] for row in read_jsonl(bench.out)].count("abcd") == 5
    changed = bench.counts["changed"]
    assert changed[f"tokens from {files[0]}"] == 20
    assert changed[f"tokens from {files[1]}"] == 1
    assert f"{files[1]} has 1 tokens, less than its budget: all its rows" in bench.stderr


@pytest.mark.slow
def test_tokens_are_those_of_the_tokenizer(bench):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"?": 0, "<s>": 1}, "?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = bench.folder / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(folder)
    rows = bench.rows([{"question": "one two", "answer": "three", "id": "not counted"}] * 10)
    out = ["--output", bench.out]
    assert bench.run("mix", rows, "--token-budgets", "17", "--tokenizer", folder, *out) == 0
    assert len(read_jsonl(bench.out)) == 5
    (folder / "tokenizer.json").write_text(json.dumps([]))
    given = ["mix", rows, "--token-budgets", "17", "--tokenizer", folder, *out, "--force"]
    assert bench.run(*given) == 2
    assert "tokenizer" in bench.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-budgets", "9"], "need each other; give both, or neither"),
        (["--tokenizer", "bytes"], "need each other; give both, or neither"),
        (["--token-budgets", "9,9", *COUNTED], "--token-budgets: 2 budgets for 1 inputs"),
        (["--token-budgets", "9", *COUNTED, "--rows", "2"], "remove --weights and --rows"),
        (["--token-budgets", "9", *COUNTED, "--weights", "2"], "remove --weights and --rows"),
        (
            ["--token-budgets", "3", *COUNTED],
            "3 tokens of in.jsonl are too few, as the first of its 2 rows to be drawn has 4",
        ),
        (["--token-budgets", "0", *COUNTED], "'0' should be a whole number, at least 1"),
        (["--token-budgets", "many", *COUNTED], "'many' should be a whole number"),
        (["--columns", "text"], "--columns is for --token-budgets"),
    ],
)
def test_wrong_budgets_are_named(bench, monkeypatch, options, message):
    monkeypatch.chdir(bench.folder)
    bench.rows([{"text": "abcd"}] * 2)
    assert bench.run("mix", "in.jsonl", "--output", bench.out, *options) == 2
    assert message in bench.stderr


def test_an_empty_source_cannot_be_repeated(bench):
    empty = bench.folder / "b.csv"
    empty.write_text("text,more\n,\n")
    files = [bench.rows([{"text": "a"}], "a.jsonl"), empty]
    given = ["--weights", "1,1", "--rows", 4, "--repeat", "--output", bench.out]
    assert bench.run("mix", *files, *given) == 2
    assert "2 rows are wanted of" in bench.stderr
