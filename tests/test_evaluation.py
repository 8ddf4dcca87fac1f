"""Scores, and base beside tuned."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from conftest import Workshop, pairs, read_jsonl, short, write_jsonl
from safetensors.torch import save_file

from finetune import files
from finetune.__main__ import main
from finetune.data.tokens import encode_prompt
from finetune.errors import DataError
from finetune.evaluation import held_out, scores
from finetune.generation import generate


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("a b c", "a b c", 1),
        ("a x c", "a b c", 2 / 3),
        ("a b c d", "a b c", 3 / 4),
        ("", "a", 0),
        ("a", "a b", 1 / 2),
    ],
)
def test_word_accuracy(answer, wanted, score):
    assert scores.word_accuracy(answer, wanted) == pytest.approx(score)


QUICK = {"train__max_steps": 1, "train__micro_batch_size": 8}


def on(base, **changes):
    return {
        "model__init": "pretrained", "model__path": str(base), "model__config": None,
        "model__tokenizer": None, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def base_and_tuned(tmp_path_factory):
    """A base of untrained weights, and the same tuned until it knows four answers by heart."""
    shared = Workshop(tmp_path_factory.mktemp("shared"))
    rows = write_jsonl(
        shared.rows, [{"question": q, "answer": q.upper()} for q in ("ab", "cd", "ef", "gh")]
    )
    sizes = {"train__global_batch_size": 4, "train__micro_batch_size": 4}
    base = shared.train("base", optimizer__lr=1e-12, train__max_steps=1, **sizes) / "model"
    tuned = shared.train("tuned", **on(base), **sizes, train__epochs=120, train__max_steps=120)
    return base, tuned / "model", rows


@pytest.fixture
def model(base_and_tuned, tmp_path):
    """A copy of the base that a test may change."""
    return shutil.copytree(base_and_tuned[0], tmp_path / "base")


def evaluate(*arguments, base="a", tuned="b", data="c"):
    """Return the exit code of `finetune evaluate`."""
    given = ["--base", base, "--tuned", tuned, "--data", data, *arguments]
    return main(["evaluate", *map(str, given)])


ONE_WORD = ("--limit", 1, "--max-new-tokens", 1)


@pytest.mark.slow
def test_base_and_tuned_are_compared_on_the_same_rows(base_and_tuned, tmp_path, capsys):
    base, tuned, rows = base_and_tuned
    output = tmp_path / "answers.jsonl"

    def compared(*arguments):
        asked = ("--scores", "exact-match", "words", "--max-new-tokens", 8, "--output", output)
        return evaluate(*asked, *arguments, base=base, tuned=tuned, data=rows)

    assert compared("--batch-size", 3) == 0
    table = capsys.readouterr().out
    assert "4 held-out rows" in table
    assert "exact match         0.0%  100.0%   +100.0 (+2.0 to +100.0)" in table
    assert "cut                    4       0   answers not ended after 8 tokens" in table
    assert "tuned   AB" in table
    lines = read_jsonl(output)
    assert [line["tuned"] for line in lines] == ["AB", "CD", "EF", "GH"]
    assert lines[0]["row"] == f"{rows}:1"
    assert lines[0]["prompt"] == [{"role": "user", "content": "ab"}]
    assert [(line["base_cut"], line["tuned_cut"]) for line in lines] == [(True, False)] * 4
    assert list(lines[0])[-4:] == [
        f"{score}_{of}" for score in ("exact_match", "words") for of in ("base", "tuned")
    ]
    assert compared("--limit", 1) == 0, "what evaluate wrote it may replace"
    assert len(read_jsonl(output)) == 1
    assert [path.name for path in tmp_path.glob(".writing*")] == []


@pytest.mark.slow
def test_scores_and_suites_are_named_on_the_command_line(base_and_tuned, tmp_path, capsys):
    base, tuned, rows = base_and_tuned
    models = ["--base", str(base), "--tuned", str(tuned), "--max-new-tokens", "8"]
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "name: letters\nrows:\n- {prompt: ab, rules: {contains: ab}}\n"
        "- {prompt: cd, rules: {regex: '^X'}}\n"
    )
    assert main(["evaluate", *models, "--suite", str(suite), "--scores", "words"]) == 0
    printed = capsys.readouterr().out
    assert "letters             0.0%   50.0%   +50.0" in printed
    assert "\nwords " in printed
    asked = ["label", "reference-loss", "bleu"]
    assert main(["evaluate", *models, "--data", str(rows), "--scores", *asked]) == 0
    printed = capsys.readouterr().out
    assert "label               0.0%  100.0%" in printed
    assert "label of tuned:\n  accuracy 100.0%, macro F1 100.0%, 4 rows, 4 labels" in printed
    assert re.search(r"\nBLEU of the corpus: base \d.*; tuned less base ", printed)
    before, after = re.findall(r"perplexity under (?:base|tuned): ([\d,]+\.\d\d), over", printed)
    assert float(before.replace(",", "")) > float(after) >= 1
    for wrong, says in (
        (["--data", str(rows), "--suite", str(suite)], "--data and --suite both name rows"),
        (["--suite", str(tmp_path / "none.yaml")], "no such file"),
        (["--data", str(rows), "--scores", "rouge-k"], "did you mean rouge-l?"),
        (["--data", str(rows), "--scores", str(tuned)], "name the run before --scores"),
    ):
        assert main(["evaluate", *models, *wrong]) == 2
        assert says in capsys.readouterr().err


def test_scores_are_listed_without_models(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--scores", "list"])
    assert caught.value.code == 0
    assert "\nrouge-l  " in capsys.readouterr().out


@pytest.mark.slow
def test_run_directories_stand_for_their_models_and_duplicates_are_refused(base_and_tuned, capsys):
    base, _, rows = base_and_tuned
    assert evaluate("--max-new-tokens", 1, base=base.parent, tuned=base, data=rows) == 0
    assert "note: --base and --tuned are the same model" in capsys.readouterr().err
    chat = ["chat", "--model", str(base.parent), "--prompt", "ab", "--max-new-tokens", "1"]
    assert main(chat) == 0


def test_held_out_rows_may_be_a_folder_and_every_error_is_reported(tmp_path, capsys):
    (tmp_path / "test.csv").write_text("question;answer\nwhy;because\n")
    write_jsonl(tmp_path / "train.jsonl", pairs())
    [prompt] = held_out.read(str(tmp_path))
    assert prompt.place == f"{tmp_path}/test.csv:2"
    assert (
        f"note: --data does not read {tmp_path}/train.jsonl (not named as test rows)"
        in capsys.readouterr().err
    )
    path = write_jsonl(tmp_path / "bad.jsonl", [{"question": "q", "answer": ""}] * 20)
    with pytest.raises(
        DataError, match=r"20 of 20 rows are wrong:\n  .*bad.jsonl:1: column 'answer' is empty"
    ):
        held_out.read(str(path))


def test_columns_beside_the_question_are_named_and_those_that_rate_answers(tmp_path, capsys):
    """Nothing is learned here, so bad answers cannot be."""
    row = {"question": "q", "answer": "a", "input": "i", "score": 0.5, "rejected": "b"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, row])
    assert len(held_out.read(str(path))) == 2
    assert capsys.readouterr().err == (
        "note: columns ['input', 'rejected', 'score'] are not part of a prompt; --group and scores "
        "can use them, and every answer counts as right\n"
    )
    path = write_jsonl(tmp_path / "more.jsonl", [{"question": "q", "answer": "a", "topic": "t"}])
    assert held_out.read(str(path))[0].fields["topic"] == "t"
    assert capsys.readouterr().err.endswith("scores can use them\n")


def test_skipped_rows_are_counted_as_in_training(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    for rows, number, skipped in (
        ("q,a\n,\n,\nr,b\n", 2, "2 empty rows"),
        (",\nr,b\n", 1, "1 empty row"),
    ):
        path.write_text(f"question,answer\n{rows}")
        assert len(held_out.read(str(path))) == number
        assert capsys.readouterr().err == f"note: {skipped} skipped\n"


def test_row_errors_use_the_options_of_the_command(tmp_path):
    with pytest.raises(DataError, match=r"; --data takes files, folders") as caught:
        held_out.read(str(tmp_path / "missing.jsonl"))
    assert "data.train" not in str(caught.value)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="name its column with --columns, for example"):
        held_out.read(str(path))


def test_special_tokens_of_a_row_are_asked_as_text(bytes_tokenizer, tmp_path):
    rows = [{"question": "x<|eos|>", "answer": "y"}]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    bytes_tokenizer.chat_template = "{{ messages[0].content }}<|im_end|>"
    [read] = held_out.read(path)
    [prompt] = generate.prompts_of(bytes_tokenizer, [read.conversation])
    ids = encode_prompt(prompt, bytes_tokenizer)
    assert bytes_tokenizer.decode(ids) == "x<|eos|><|im_end|>"
    assert bytes_tokenizer.eos_token_id not in ids


@pytest.mark.slow
@pytest.mark.parametrize("kind", short(["lora", "qlora"], "lora"))
def test_an_adapter_of_another_base_is_reported(
    workshop, base_and_tuned, model, tmp_path, capsys, kind
):
    base, other, _ = base_and_tuned
    tuned = workshop.train("tuned", **on(base, adapter__kind=kind, **QUICK))
    for given, is_other in ((model, False), (other, True)):
        assert evaluate(*ONE_WORD, base=given, tuned=tuned, data=workshop.rows) == 0
        assert (f"was trained on another base ({base})" in capsys.readouterr().err) == is_other


def small_adapter(folder):
    """The files of an adapter that is looked at and never put on a base."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"a.lora_A.weight": torch.zeros(1, 1)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("command", ["chat", "export"])
def test_a_base_is_checked_as_a_model_is(model, tmp_path, capsys, command):
    adapter = small_adapter(tmp_path / "adapter")
    whole = {
        "chat": ["chat", "--prompt", "a"],
        "export": ["export", "--merge", "--output", str(tmp_path / "m")],
    }[command]
    for opened, given, says in (
        (adapter, "./zz", "error: --base: ./zz: no such folder"),
        (adapter, tmp_path, "error: --base: "),
        (adapter, adapter, "is itself an adapter"),
        (model, model, "remove --base" if command == "chat" else "nothing to merge"),
    ):  # fmt: skip
        assert main([*whole, "--model", str(opened), "--base", str(given)]) == 2
        assert says in capsys.readouterr().err


def test_an_unwritable_merge_is_refused_before_the_work(tmp_path, capsys):
    adapter, file, link = small_adapter(tmp_path / "adapter"), tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(tmp_path / "nowhere")
    for output, says in (
        (file / "merged", f"{file} is not a folder"),
        (file, f"{file} exists"),
        (link, f"{link} exists"),
    ):
        assert main(["export", "--merge", "--model", str(adapter), "--output", str(output)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(base_and_tuned):
    from finetune.export.load import load, load_tokenizer

    _, tuned, _ = base_and_tuned
    model, tokenizer = load(tuned), load_tokenizer(tuned)
    prompts = [f"### Question:\n{q}\n\n### Answer:\n" for q in ("ab", "cd ef gh", "x", "gh")]
    alone = generate.answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    together = generate.answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    assert alone == together
    assert alone[0] == generate.Answer("AB", is_cut=False)


def test_a_long_prompt_is_cut_between_bos_and_end_with_a_note(base_and_tuned):
    from finetune.export.load import load, load_tokenizer

    base = base_and_tuned[0]
    model, tokenizer = load(base), load_tokenizer(base)
    seen, printed = [], []
    model.generate = lambda input_ids, **_: seen.append(input_ids) or input_ids
    prompts = ["<|bos|>" + "x" * 300 + "end", "short", "y" * 300]
    generate.answers(model, tokenizer, prompts, max_new_tokens=56, batch_size=1, log=printed.append)
    assert [tokenizer.decode(ids[0]) for ids in seen] == [
        "short",
        "<|bos|>" + "x" * 196 + "end",
        "y" * 200,
    ]
    assert len(printed) == 1
    assert "2 of 3 prompts are over 200 tokens" in printed[0]


def test_text_of_the_template_before_an_answer_is_not_scored(bytes_tokenizer):
    """Of models that were tuned elsewhere, so that they write it themselves."""
    bytes_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' "
        "%}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    answers = ["<think>\n\n</think>\n\nParis", "Rome", "<think>hm</think>Oslo"]
    opening = generate.opening_of(bytes_tokenizer)
    found = [generate.without_opening(answer, opening) for answer in answers]
    assert [answer.strip() for answer in found] == ["Paris", "Rome", answers[2]]


def test_a_chat_template_that_fails_is_exit_2(model, base_and_tuned, capsys):
    rows = base_and_tuned[2]
    (model / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    fails = "data.template 'chat' fails: TemplateError: never"
    assert main(["chat", "--prompt", "hi", "--model", str(model)]) == 2
    assert fails in capsys.readouterr().err
    assert evaluate(base=model, tuned=model, data=rows) == 2
    assert f"{rows}:1: {fails}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refused", "arguments", "says"),
    [
        (
            "==", ["--system", "Be brief."],
            "--system: the model's chat template takes no system message",
        ),
        ("==", ["--system", ""], "--system: the model's chat template takes no system message"),
        ("!=", [], "--system: the model's chat template needs a system message"),
    ],
)  # fmt: skip
def test_chat_names_the_option_where_a_template_does_not_take_the_system_message(
    model, capsys, refused, arguments, says
):
    (model / "chat_template.jinja").write_text(
        "{% if messages[0].role "
        + refused
        + " 'system' %}{{ raise_exception('not so') }}{% endif %}{{ messages[-1].content }}"
    )
    assert main(["chat", "--prompt", "hi", *arguments, "--model", str(model)]) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert "TemplateError: not so" in printed


def test_the_default_of_several_chat_templates_is_used(model, base_and_tuned):
    more = model / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ raise_exception('never') }}")
    assert main(["chat", "--prompt", "hi", "--max-new-tokens", "1", "--model", str(model)]) == 0
    assert evaluate(*ONE_WORD, base=model, tuned=model, data=base_and_tuned[2]) == 0


@pytest.mark.slow
def test_chat_answers_one_prompt(base_and_tuned, capsys):
    _, tuned, _ = base_and_tuned
    assert main(["chat", "--model", str(tuned), "--prompt", "cd"]) == 0
    assert capsys.readouterr().out == "CD\n"


@pytest.mark.slow
def test_chat_talks_until_the_input_ends(base_and_tuned, capsys, monkeypatch):
    import io

    _, tuned, _ = base_and_tuned
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ngh\n"))
    assert main(["chat", "--model", str(tuned), "--one-turn"]) == 0
    assert capsys.readouterr().out.replace("> ", "") == "AB\nGH\n"


def test_a_model_without_chat_template_cannot_be_asked(workshop, capsys):
    text = workshop.folder / "text.txt"
    text.write_text("a line\n" * 9 + "another\n")
    run = workshop.train("plain", data__train=str(text), objective__kind="clm", **QUICK) / "model"
    assert main(["chat", "--model", str(run), "--prompt", "hi"]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert evaluate(base=run, tuned=run, data=workshop.rows) == 2


def test_a_model_that_is_not_there_is_exit_2(capsys):
    assert main(["chat", "--model", "/no/such/model", "--prompt", "hi"]) == 2
    assert "/no/such/model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--batch-size", "-1"], ["evaluate", "--batch-size", "0"],
        ["evaluate", "--limit", "0"], ["evaluate", "--max-new-tokens", "0"],
        ["evaluate", "--columns", "abc"], ["evaluate", "--columns", "{a: ["],
        ["evaluate", "--columns", "{a: b, a: c}"], ["evaluate", "--format", "bogus"],
        ["evaluate", "--temperature", "1e-40"], ["evaluate", "--temperature", "1e39"],
        ["chat", "--temperature", "-1"], ["chat", "--temperature", "nan"],
        ["chat", "--max-new-tokens", "-3"], ["export", "--weights", "1", "1e39"],
        ["export", "--weights", "1", "nan"], ["export", "--weights", "1", "-0.000000001"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_number_on_the_command_line_is_exit_2(arguments, capsys):
    needed = {"evaluate": ["--base", "a", "--tuned", "b", "--data", "c"], "chat": ["--model", "a"],
              "export": []}  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *needed[arguments[0]]])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert f"argument {arguments[1]}" in printed
    assert "invalid _" not in printed


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
@pytest.mark.parametrize("data", ["rows.jsonl", "."])
def test_held_out_rows_are_never_the_output(tmp_path, capsys, link, data):
    (tmp_path / "data").mkdir()
    rows = write_jsonl(
        tmp_path / "data/rows.jsonl", [{"row": "a", "wanted": "b", "question": "q", "answer": "a"}]
    )
    before, output = rows.read_bytes(), rows if link is None else tmp_path / "other"
    if link:
        getattr(output, link)(rows)
    assert evaluate("--output", output, data=tmp_path / "data" / data) == 2
    assert f"--output: {output} is a part of --data" in capsys.readouterr().err
    assert rows.read_bytes() == before


@pytest.mark.parametrize(
    "held", [b'{"model_type": "llama"}', b"\x00\x01", b'{"row": "a", "question": "b"}']
)
def test_an_output_that_evaluate_did_not_write_is_kept(tmp_path, capsys, held):
    """A file of a model, a log of a run, other rows."""
    rows, output = write_jsonl(tmp_path / "rows.jsonl", pairs(1)), tmp_path / "config.json"
    output.write_bytes(held)
    assert evaluate("--output", output, data=rows) == 2
    assert f"--output: {output} exists, and evaluate did not write it" in capsys.readouterr().err
    assert output.read_bytes() == held


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (".", "{output} is a folder; name a file"),
        ("no/such/folder/x", "{output}: its folder does not exist"),
    ],
)
def test_an_unwritable_output_is_refused_before_the_work(tmp_path, capsys, output, says):
    path = tmp_path / output
    assert evaluate("--output", path) == 2
    assert f"--output: {says.format(output=path)}" in capsys.readouterr().err


def test_a_read_only_output_folder_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    """Root may write everywhere, so the answer of the system is made up."""

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refused)
    rows, output = write_jsonl(tmp_path / "rows.jsonl", pairs(1)), tmp_path / "answers.jsonl"
    assert evaluate("--output", output, data=rows) == 2
    assert f"--output: {output}: cannot be written: Permission denied" in capsys.readouterr().err


def test_a_full_disk_keeps_the_table_and_the_old_output(
    base_and_tuned, capsys, monkeypatch, tmp_path
):
    base, _, rows = base_and_tuned
    output = tmp_path / "answers.jsonl"
    output.write_text('{"row": "a:1", "prompt": []}\n')

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finetune.files.os.fsync", full)
    assert evaluate(*ONE_WORD, "--output", output, base=base, tuned=base, data=rows) == 1
    printed = capsys.readouterr()
    assert "contains" in printed.out
    assert f"failed: --output: {output}: cannot be written: No space left on device" in printed.err
    assert output.read_text() == '{"row": "a:1", "prompt": []}\n'
    assert list(tmp_path.glob(".writing*")) == []


def test_a_file_is_written_whole_through_a_link_and_keeps_its_mode(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("before")
    real.chmod(0o640)
    link.symlink_to(real)
    files.write_whole(link, "after")
    assert link.is_symlink()
    assert (real.read_text(), real.stat().st_mode & 0o777) == ("after", 0o640)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.require_writable(pipe)
    files.write_whole(pipe, "x")
    assert os.read(reader, 9) == b"x"
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("command", ["chat", "evaluate", "export", "merge"])
def test_an_invalid_model_is_refused_at_once(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs/my_run").mkdir(parents=True)
    for name in ("config.yaml", "outcome.json"):
        (tmp_path / "runs/my_run" / name).touch()
    for name, says in (
        ("my_run", "my_run: no such folder here; did you mean runs/my_run?"),
        ("models/x", "no such folder"), ("./x", "no such folder"), ("x/", "no such folder"),
        ("~/no/such", "no such folder"), ("runs/x", "no such folder"), ("my run", "no such folder"),
        ("./emty", "no such folder (looked for in {}); did you mean ./empty?"),
        ("empty", "is an empty folder"), ("", "is empty"),
    ):  # fmt: skip
        needed = {
            "chat": ["--model", name, "--prompt", "a"],
            "export": ["--merge", "--model", name, "--output", "m"],
            "merge": [name, "--output", "m"],
            "evaluate": ["--tuned", name, "--base", name, "--data", "rows.jsonl"],
        }  # fmt: skip
        assert main([command, *needed[command]]) == 2
        error = capsys.readouterr().err
        assert says.format(tmp_path) in error
        assert error.startswith("error: --")


def test_a_lone_surrogate_on_the_command_line_is_refused(capsys):
    assert main(["chat", "--model", "a", "--prompt", "\ud83d"]) == 2
    assert r"\ud83d: holds half a character" in capsys.readouterr().err


def test_the_last_of_repeated_options_wins_with_a_note(capsys):
    assert main(["chat", "--model", "a", "--model", "/no/such/folder", "--prompt", "x"]) == 2
    assert (
        "note: --model is given twice: '/no/such/folder' counts, not 'a'\n"
        in capsys.readouterr().err
    )
