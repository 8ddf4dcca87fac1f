"""Relative paths resolve in the working directory or the config's folder, never by guess."""

import os
import re

import pytest
import yaml

from finetune import config as configs
from finetune.errors import ConfigError, DataError


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A config and its rows in one folder, and the working directory in another."""
    (tmp_path / "project").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def parse(name="rows.jsonl", *arguments, **data):
        values = {
            "run": {"name": "r"},
            "model": {"init": "random", "tokenizer": "bytes"},
            "data": {"train": name, **data},
        }
        (tmp_path / "project/run.yaml").write_text(yaml.safe_dump(values))
        return configs.parse(
            ["--config", "../project/run.yaml", "--model.config={model_type: llama}", *arguments]
        )[0]

    return tmp_path, parse


def rows(folder):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "./rows.jsonl", "sub/rows.jsonl", "sub", "*.jsonl", "**/*.jsonl"]
)
def test_paths_beside_the_config_are_found(project, name):
    folder, parse = project
    rows(folder / "project")
    rows(folder / "project/sub")
    expected = os.path.join("..", "project", os.path.normpath(name))
    assert os.path.normpath(parse(name).data.train) == expected
    first, second = parse([name, "/tmp/x.jsonl"]).data.train
    assert (os.path.normpath(first), second) == (expected, "/tmp/x.jsonl")


def test_paths_in_the_working_directory_are_found(project):
    folder, parse = project
    rows(folder / "here")
    assert parse().data.train == "rows.jsonl"


def test_two_files_of_one_name_are_an_error(project):
    folder, parse = project
    rows(folder / "here")
    rows(folder / "project")
    here = re.escape(f"{folder}/here")
    says = f"data.train: rows.jsonl is in {here} and in .*project; write the full path"
    with pytest.raises(ConfigError, match=says):
        parse()
    os.remove(folder / "project/rows.jsonl")
    os.link(folder / "here/rows.jsonl", folder / "project/other.jsonl")
    assert parse().data.train == "rows.jsonl"


def test_paths_of_the_command_line_are_those_of_the_working_directory(project):
    folder, parse = project
    rows(folder / "project")
    assert parse("rows.jsonl", "--data.train", "rows.jsonl").data.train == "rows.jsonl"


def test_names_of_the_hub_and_full_paths_stay(project):
    folder, parse = project
    assert parse("owner/name:train").data.train == "owner/name:train"
    assert parse(str(folder / "x.jsonl")).data.train == str(folder / "x.jsonl")


def test_an_error_names_both_folders(project):
    from finetune.data import source_files

    folder, parse = project
    config = parse("missing.jsonl")
    here = re.escape(f"{folder}/here")
    with pytest.raises(DataError, match=f"missing.jsonl: no such file in {here} and .*project"):
        source_files.sources(config.data.train, None)


def test_models_templates_and_evaluation_rows_are_found_the_same_way(project):
    folder, parse = project
    rows(folder / "project")
    (folder / "project/chat.jinja").write_text("{{ messages }}")
    data = parse(eval="rows.jsonl", template="chat.jinja").data
    assert (data.eval, data.template) == ("../project/rows.jsonl", "../project/chat.jinja")


def test_files_of_rewards_are_found_beside_the_config(project):
    folder, parse = project
    rows(folder / "here")
    (folder / "project/schema.json").write_text("{}")
    listed = (
        "[{kind: json_schema, file: schema.json}, {kind: json_schema, file: gone.json, name: b}, "
        "{kind: judge, model: schema.json, url: 'http://a/v1', rubric: schema.json}]"
    )
    given = yaml.safe_load(f"{{kind: grpo, rewards: {listed}}}")
    path = folder / "project/run.yaml"
    parse()
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"objective": given}))
    config, _ = configs.parse(
        ["--config", "../project/run.yaml", "--model.config={model_type: llama}"]
    )
    schema, gone, judge = config.objective.rewards
    assert (schema.file, gone.file) == ("../project/schema.json", "gone.json")
    assert (judge.model, judge.rubric) == ("schema.json", "../project/schema.json")
