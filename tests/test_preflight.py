"""The summary notes settings without effect and requests that the model cannot meet."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY_LLAMA, pretrained, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune import config as configs
from finetune import summary
from finetune.data.examples import Ragged
from finetune.errors import ConfigError

MIXTRAL = {**TINY_LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
WITH_EVAL = {"data__eval_fraction": 0.2, "train__max_steps": None}  # 32 rows in 4 steps
ONE_LENGTH = {"objective__kind": "clm", "data__max_length": 8, "data__truncation": "right"}


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"train__max_steps": 6},
            "train.max_steps: 6 has no effect: train.epochs: 1 ends after 5 steps",
        ),
        ({"data__max_rows": 40}, "data.max_rows: 40 has no effect: there are 40 rows"),
        (
            {**WITH_EVAL, "evaluation__every_steps": 4},
            "evaluation.every_steps: 4 in a run of 4 steps: the only evaluation is at the end",
        ),
        (
            {**WITH_EVAL, "evaluation__every_steps": 9, "evaluation__export_best": True},
            "evaluation.export_best has no effect",
        ),
        (
            {**WITH_EVAL, "evaluation__every_steps": 1, "evaluation__patience": 3},
            "evaluation.patience: 3 has no effect in a run of 4 steps",
        ),
        (
            {"evaluation__sample_prompts": ["a"], "evaluation__sample_every_steps": 5},
            "evaluation.sample_every_steps: 5 in a run of 5 steps",
        ),
        (
            {"checkpoint__every_steps": 5},
            "checkpoint.every_steps: 5 in a run of 5 steps: by steps, only the end is saved",
        ),
        (
            {
                "checkpoint__every_steps": 2, "checkpoint__every_minutes": None,
                "checkpoint__keep_last": 4,
            },
            "checkpoint.keep_last: 4 has no effect: there are 3 checkpoints",
        ),
        (
            {"tracking__log_every_steps": 6},
            "tracking.log_every_steps: 6 in a run of 5 steps: only the last step is logged",
        ),
        ({"data__packing": True, "data__max_length": 90}, "data.packing packs nothing"),
        (
            {"data__group_by_length": True},
            "data.group_by_length saves nothing: with attention documents nothing is padded",
        ),
        (
            {"data__group_by_length": True, "model__attention": "sdpa", **ONE_LENGTH},
            "data.group_by_length has no effect",
        ),
        ({"data__loss_on": "last_turn"}, "data.loss_on: last_turn is the same as completion here"),
        (
            {"schedule__kind": "wsd"},
            "schedule.decay_fraction: 0.1 in a run of 5 steps is the last step alone",
        ),
        (
            {"model__config": MIXTRAL},
            "asks for a router balance loss (router_aux_loss_coef 0.001); it is not yet added",
        ),
        (
            {"model__config": {**MIXTRAL, "output_router_logits": True}},
            "(output_router_logits, router_aux_loss_coef 0.001)",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_setting_without_effect_in_this_run_is_noted(workshop, capsys, changes, note):
    workshop.check(**changes)
    assert any(
        line.startswith("note  ") and note in line for line in capsys.readouterr().out.splitlines()
    )


def test_settings_that_do_something_are_not_noted(workshop, capsys):
    """One less, or one more, than in the cases above."""
    workshop.check(
        train__max_steps=3, train__epochs=2, data__max_rows=39, data__eval_fraction=0.2,
        evaluation__every_steps=1, evaluation__patience=1, evaluation__export_best=True,
        evaluation__sample_prompts=["a"], evaluation__sample_every_steps=2,
        checkpoint__every_steps=2, tracking__log_every_steps=3, data__packing=True,
        data__max_length=256,
    )  # fmt: skip
    output = capsys.readouterr().out
    assert "steps       3 steps" in output
    assert "without train.max_steps" in output
    assert [
        line
        for line in output.splitlines()
        if line.startswith("note")
        and "change the model very little" not in line
        and "training rows are too much like evaluation rows" not in line  # they are alike
    ] == []


def test_unread_columns_and_empty_rows_of_training_and_evaluation_are_reported(workshop, capsys):
    held_out = "".join(f"q {n},a,x,{n}\n,,,\n" for n in range(3))
    (workshop.folder / "t.csv").write_text(
        "question,answer,source\n" + "".join(f"q{n},a,s\n,,\n" for n in range(8))
    )
    dev = workshop.folder / "dev.csv"
    dev.write_text("question,answer,topic,likes\n" + held_out)
    workshop.check(
        data__train=str(workshop.folder / "t.csv"), data__eval=str(dev), train__max_steps=1
    )
    output = capsys.readouterr().out
    assert (
        "not read    columns source (8 rows)\nnot read    in data.eval: columns likes (3 rows), "
        "topic (3 rows)\n" in output
    )
    assert (
        "8 rows -> 8 examples -> 8 sequences of at most 128 tokens; 8 empty rows skipped\n"
        in output
    )
    assert "evaluation  3 examples; 3 empty rows skipped\n" in output


def test_the_rows_of_the_summary_add_up(workshop, capsys):
    workshop.check(
        data__max_length=75,
        data__truncation="drop",
        data__max_rows=25,
        data__eval_fraction=0.2,
        train__max_steps=1,
    )
    output = capsys.readouterr().out
    [line] = [line for line in output.splitlines() if line.startswith("data  ")]
    rows, *fates = map(int, re.findall(r"(\d+) (?:rows|dropped|left out|held out|trained)", line))
    assert len(fates) == 4
    assert rows == sum(fates) == 40
    assert f"evaluation  {fates[2]} examples held out\n" in output
    assert f"{fates[3]} trained on -> {fates[3]} examples -> " in line
    assert "are dropped" not in output


def test_most_rows_dropped_is_a_note(workshop, capsys):
    workshop.check(data__max_length=65, data__truncation="drop", train__max_steps=1)
    says = "25 of 40 rows are dropped, as they are longer than data.max_length: 65 tokens"
    assert says in capsys.readouterr().out


def test_rows_that_were_split_are_not_called_cut(workshop, capsys):
    text = workshop.folder / "text.txt"
    text.write_text("".join(f"line {i} {'la ' * i}\n" for i in range(40)))
    workshop.check(
        data__train=str(text),
        objective__kind="clm",
        data__truncation="split",
        data__max_length=64,
        train__max_steps=1,
    )
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data  ")]
    assert re.match(
        r"data        40 rows -> \d\d examples -> .* of at most 64 tokens; "
        r"\d+ split into several examples$",
        line,
    )


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [("adamw", "2e-05"), ("lion", "4e-06"), ("adafactor", "0.001"), ("muon", "2e-05")],
)
def test_the_default_rate_suits_the_method_and_is_reported(workshop, capsys, optimizer, lr):
    workshop.check(optimizer__lr=None, optimizer__kind=optimizer)
    assert f"{optimizer}, lr {lr} (usual), linear" in capsys.readouterr().out


def test_the_summary_names_the_start_of_adapters_and_counts_prompts(workshop):
    config = configs.from_dict(workshop.config(evaluation__sample_prompts=["a"]))
    adapted = config.model_copy(update={"adapter": summary.Lora(kind="lora")})
    method, samples = summary._methods(adapted, is_quantized=False)
    assert "r 16, alpha 32, init default; " in method
    assert samples == "samples     1 prompt"


def test_every_document_of_the_first_example_is_shown_with_its_fields():
    ids, taught = np.arange(5), np.array([False, True, False, False, True])
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join("abcde"[each] for each in ids))
    example = SimpleNamespace(
        input=Ragged(ids, np.array([0, 2]), np.array([2, 5])), supervised=taught,
        documents=lambda _: range(2), columns={"margin": np.array([0.5, 2.0])},
    )  # fmt: skip
    assert summary._marked(example, tokenizer).splitlines() == [
        "  document 1 of 2  margin 0.5", "  | a[[b]]",
        "  document 2 of 2  margin 2", "  | cd[[e]]",
    ]  # fmt: skip


def test_the_first_example_is_shown_with_its_spaces():
    """SentencePiece takes the space from the beginning of what it decodes."""
    from test_tokens import like_llama

    tokenizer = like_llama()
    ids = tokenizer("What ever is it", add_special_tokens=False)["input_ids"]
    supervised = np.array(["ever" in tokenizer.convert_ids_to_tokens(i) for i in ids])
    stream = Ragged(np.array(ids), np.array([0]), np.array([len(ids)]))
    example = SimpleNamespace(
        input=stream, supervised=supervised, columns={}, documents=lambda example: range(1)
    )
    assert summary._marked(example, tokenizer) == "  | What[[ ever]] is it"


def test_rows_train_even_if_the_template_rejects_a_minimal_conversation(workshop):
    """As DeepSeek-R1's: the prompt opens the thoughts, and each row begins with them."""
    from test_templates import OPENS_AND_KEEPS

    from finetune.export.load import load, load_tokenizer

    (workshop.folder / "r1.jinja").write_text(OPENS_AND_KEEPS)
    write_jsonl(
        workshop.rows,
        [{"question": f"{n}?", "answer": f"<think>\nhm\n</think>\n\n{n}"} for n in range(20)],
    )
    run = workshop.train(data__template=str(workshop.folder / "r1.jinja"), train__max_steps=1)
    tokenizer, model = load_tokenizer(run / "model"), load(run / "model")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


def test_a_system_prompt_that_the_template_drops_is_refused(workshop):
    from test_templates import WITHOUT_SYSTEM

    (workshop.folder / "drops.jinja").write_text(WITHOUT_SYSTEM)
    workshop.check(data__template=str(workshop.folder / "drops.jinja"))
    with pytest.raises(ConfigError, match=r"^data\.system_prompt: would be ignored"):
        workshop.check(
            data__template=str(workshop.folder / "drops.jinja"), data__system_prompt="Be brief."
        )


def test_a_large_vocabulary_is_read_a_few_times(workshop, monkeypatch):
    """Reading 50,000 tokens takes 20 ms: once for each of them would take a quarter of an hour."""
    base = workshop.train("base", train__max_steps=1)
    read, get_vocab = [], PreTrainedTokenizerFast.get_vocab

    def counted(tokenizer):
        read.append(tokenizer)
        return get_vocab(tokenizer)

    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", counted)
    workshop.train(**pretrained(base / "model"), train__max_steps=1)
    assert 0 < len(read) < 20
