"""Multiple choice by log-probability: packed equals one by one, by hand, and the harness."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from conftest import short, tiny_llama, write_jsonl

from finetune.errors import DataError, ModelError, UserError
from finetune.evaluation import benchmarks, continuations
from finetune.evaluation.benchmarks import Item
from finetune.evaluation.continuations import Continuations

ROWS = [
    {"query": "Question: What do bees make?", "choices": ["honey", "snow"], "gold": 0},
    {"query": "Question: What is frozen water?", "choices": ["ice", "fire", "a stone"], "gold": 0},
    {"question": "Which is wet?", "choices": {"label": ["A", "B"], "text": ["sand", "rain"]},
     "answerKey": "B"},
    {"ctx": "The boy kicked the", "endings": ["ball.", "übung", "ball", "b"], "label": "2"},
]  # fmt: skip


def made(**changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = tiny_llama(vocab_size=259, initializer_range=0.3, **dict(changes))
    return AutoModelForCausalLM.from_config(config).eval()


model_of = cache(made)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "facts.jsonl", ROWS)
    return benchmarks.read(str(path))


def by_hand(model, tokenizer, item: Item) -> list[float]:
    """Sum the log-probabilities of each choice by transformers alone, a choice at a time."""
    sums = []
    for choice in item.choices:
        before = tokenizer(item.context)["input_ids"]
        whole = torch.tensor([tokenizer(f"{item.context} {choice}")["input_ids"]])
        with torch.no_grad():
            logits = model(whole[:, :-1]).logits.log_softmax(-1)[0]
        places = range(len(before) - 1, whole.shape[1] - 1)
        sums.append(sum(logits[place, whole[0, place + 1]].item() for place in places))
    return sums


def scorer_of(model, tokenizer, together: bool) -> Continuations:
    """Return a scorer that lays choices together, or not."""
    scorer = Continuations(model, tokenizer)
    scorer._branches = together
    return scorer


def assert_near(found, wanted, distance=1e-4):
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(np.asarray(other), abs=distance)


def test_prompts_choices_and_right_answers_are_read_from_common_columns(benchmark):
    assert benchmark.name == "facts"
    assert [item.gold for item in benchmark.items] == [0, 0, 1, 2]
    assert benchmark.items[0].context == "Question: What do bees make?\nAnswer:"
    assert benchmark.items[2].context == "Question: Which is wet?\nAnswer:"
    assert benchmark.items[2].choices == ("sand", "rain")
    assert benchmark.items[3].context == "The boy kicked the"
    assert benchmark.items[3].place.endswith("facts.jsonl:4")


@pytest.mark.parametrize("together", [True, False])
def test_sums_are_those_by_hand(benchmark, bytes_tokenizer, together):
    model = model_of()
    scorer = scorer_of(model, bytes_tokenizer, together)
    found = benchmarks.logprobs(benchmark, scorer, bytes_tokenizer)
    assert_near(found, [by_hand(model, bytes_tokenizer, item) for item in benchmark.items])


def test_layers_read_a_context_once_and_the_head_only_what_is_asked(benchmark, bytes_tokenizer):
    model, read, projected = model_of(), [], []
    scorer = Continuations(model, bytes_tokenizer)
    benchmarks.logprobs(benchmark, scorer, bytes_tokenizer)  # proves that choices may lie together
    hooks = [
        model.model.register_forward_pre_hook(
            lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
        ),
        model.lm_head.register_forward_pre_hook(lambda _, given: projected.append(given[0].shape)),
    ]
    benchmarks.logprobs(benchmark, scorer, bytes_tokenizer)
    for hook in hooks:
        hook.remove()
    # What choices begin with alike is read once, and of each all but its last byte.
    begun = [
        {
            text[:end]
            for text in (f" {c}".encode() for c in item.choices)
            for end in range(1, len(text))
        }
        for item in benchmark.items
    ]  # fmt: skip
    assert len(begun[3]) < sum(len(choice.encode()) for choice in benchmark.items[3].choices)
    lengths = [len(item.context) + len(own) for item, own in zip(benchmark.items, begun)]
    assert len(read) == 1
    assert max(lengths) * len(lengths) == read[0]
    # The last token of a question stands for the first of each choice.
    states = sum(1 + len(own) for own in begun)
    assert projected[-1][0] == states  # the first call sees all states, and is passed over


KINDS = [
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    {"model_type": "mistral", "sliding_window": 8},
    {"model_type": "gemma2", "head_dim": 8, "sliding_window": 64},
    {"model_type": "bloom", "n_head": 4, "n_layer": 2},
    {"model_type": "mamba", "state_size": 4},
]


@pytest.mark.parametrize(
    "changes", short(KINDS, KINDS[1]), ids=lambda changes: changes["model_type"]
)
def test_models_of_any_kind_are_scored_right(benchmark, bytes_tokenizer, changes):
    """Windows, soft caps, ALiBi, recurrent layers: where masks do not hold, choices stand alone."""
    model = model_of(**changes)
    scorer = Continuations(model, bytes_tokenizer)
    found = benchmarks.logprobs(benchmark, scorer, bytes_tokenizer)
    assert_near(found, [by_hand(model, bytes_tokenizer, item) for item in benchmark.items])
    assert bool(scorer._branches) == (changes["model_type"] in ("gpt2", "gemma2"))


def test_accuracies_count_letters_and_bytes():
    items = [Item("a:1", "x", ("ab", "abcd"), 1), Item("a:2", "x", ("üü", "abc"), 1)]
    found = benchmarks.accuracies(items, [np.array([-2.0, -3.0]), np.array([-2.0, -3.5])])
    assert found == {"acc": [0.0, 0.0], "acc_norm": [1.0, 0.0], "acc_bytes": [1.0, 0.0]}
    assert benchmarks.accuracies(items[1:], [np.array([-2.4, -3.3])])["acc_norm"] == [1.0]
    assert benchmarks.accuracies(items[1:], [np.array([-2.4, -3.3])])["acc_bytes"] == [0.0]


def test_of_equal_choices_the_first_counts(bytes_tokenizer):
    items = [Item("a:1", "one two", ("three", "three"), 0)]
    scorer = Continuations(model_of(), bytes_tokenizer)
    found = benchmarks.logprobs(benchmarks.Benchmark("b", items), scorer, bytes_tokenizer)
    assert found[0][0] == found[0][1]
    assert benchmarks.accuracies(items, found)["acc"] == [1.0]


def test_a_context_that_does_not_fit_loses_its_beginning(bytes_tokenizer):
    model, long = model_of(), "word " * 60 + "is"  # the model has 256 positions
    items = [Item("a:1", long, ("yes", "perhaps"), 0)]
    benchmark = benchmarks.Benchmark("b", items)
    scorer = scorer_of(model, bytes_tokenizer, True)
    found = benchmarks.logprobs(benchmark, scorer, bytes_tokenizer)
    assert scorer.num_cut == 2
    for sum_, choice in zip(found[0], items[0].choices):
        whole = bytes_tokenizer(f"{long} {choice}")["input_ids"][-257:]
        with torch.no_grad():
            logits = model(torch.tensor([whole[:-1]])).logits.log_softmax(-1)[0]
        tail = len(choice) + 1
        right = sum(logits[-n, whole[-n]].item() for n in range(1, tail + 1))
        assert sum_ == pytest.approx(right, abs=1e-4)


def test_base_and_tuned_come_from_one_load_of_an_adapter(benchmark, bytes_tokenizer):
    from peft import LoraConfig, get_peft_model

    wanted = [by_hand(model_of(), bytes_tokenizer, item) for item in benchmark.items]
    adapted = get_peft_model(made(), LoraConfig(r=4, init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload()
    scorer = Continuations(adapted, bytes_tokenizer)
    with scorer.policy.without_adapters():
        assert_near(benchmarks.logprobs(benchmark, scorer, bytes_tokenizer), wanted)
    tuned = benchmarks.logprobs(benchmark, scorer, bytes_tokenizer)
    right = [by_hand(merged, bytes_tokenizer, item) for item in benchmark.items]
    assert_near(tuned, right, 1e-3)
    assert abs(right[0][0] - wanted[0][0]) > 0.01


def test_tokens_are_cut_as_the_harness_cuts_them(real_data):
    """White space belongs to the continuation, and a text that begins with BOS gets no other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "phi-3-mini")
    pairs = [("Question: x\nAnswer:", " yes"), ("Answer: ", "yes"), ("", "yes"), ("<s>a", " b")]
    found = continuations.encode(tokenizer, pairs)
    assert found[0].context == tuple(tokenizer("Question: x\nAnswer:")["input_ids"])
    assert found[1] == continuations.encode(tokenizer, [("Answer:", " yes")])[0]
    assert found[2].context == (tokenizer.bos_token_id,)
    assert found[3].context.count(tokenizer.bos_token_id) <= 1


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": ["a", "b"]}, "no column 'gold'; .*; name the column .* gold"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "should name one of the 2 choices"),
        ({"query": "q", "choices": ["a", "b"], "gold": None}, "should name one of the 2 choices"),
        ({"query": "q", "choices": ["a", " "], "gold": 0}, "choice 2 of 2 is empty; fill it or"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "a list of at least two answers"),
        ({"query": "q", "gold": 0}, "no column 'choices'"),
        ({"query": " ", "choices": ["a", "b"], "gold": 0}, "column 'query' is empty"),
        ({"text": "q", "choices": ["a", "b"], "gold": 0}, "no question; this row has"),
        ({"query": "q", "choices": ["a", "\ud800"], "gold": 0}, "choice 2 holds .*half of a char"),
    ],
)
def test_a_wrong_row_is_named_with_what_to_do(tmp_path, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        benchmarks.read(str(path))


def test_all_wrong_rows_are_counted(tmp_path):
    rows = [{"query": "q", "choices": ["a", "b"], "gold": 9 + n} for n in range(30)]
    with pytest.raises(DataError, match="30 of 31 rows are wrong:") as caught:
        benchmarks.read(str(write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], *rows])))
    assert "(29 more like it: 3, 4, 5" in str(caught.value)


def test_a_choice_longer_than_the_model_reads_is_named(bytes_tokenizer):
    items = [Item("rows.jsonl:3", "x", ("y", "long " * 60), 0)]
    scorer = Continuations(model_of(), bytes_tokenizer)
    with pytest.raises(DataError, match="rows.jsonl:3: a choice has 301 tokens, .* reads 256 at"):
        benchmarks.logprobs(benchmarks.Benchmark("b", items), scorer, bytes_tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ question }", "--benchmark-prompt: "), ("{{ absent }}", "rows.jsonl:1: .*'absent' is un"),
     ("{{ ''.__class__.__mro__ }}", "cannot be filled in"), ("{{ '' }}", "an empty question")],
)  # fmt: skip
def test_a_wrong_template_is_named(tmp_path, template, message):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:1])
    with pytest.raises(UserError, match=message):
        benchmarks.read(str(path), prompt=template)


def test_a_template_and_solved_examples_make_the_prompt(tmp_path, bytes_tokenizer):
    path = str(write_jsonl(tmp_path / "rows.jsonl", ROWS[:2]))
    template = "{{ query }}\n{% for c in choices %}- {{ c }}\n{% endfor %}Answer:"
    [shot, _] = benchmarks.read(path, prompt=template).items
    found = benchmarks.read(path, prompt=template, shots=[shot]).items[1]
    assert found.before == ("Question: What do bees make?\n- honey\n- snow\nAnswer: honey\n\n")
    assert found.context.endswith("frozen water?\n- ice\n- fire\n- a stone\nAnswer:")


def test_an_encoder_decoder_is_refused(bytes_tokenizer):
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model("t5", d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    with pytest.raises(ModelError, match="t5 is not a causal language model"):
        Continuations(AutoModelForSeq2SeqLM.from_config(config), bytes_tokenizer)
