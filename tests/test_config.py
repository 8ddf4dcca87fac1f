"""The run config: strict, documented, and every problem at once."""

import getpass
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import ROOT, TINY_LLAMA, tracked

from finetune import config as configs
from finetune.config import Config, help, paths, sections
from finetune.config.choices import OBJECTIVES
from finetune.config.fields import usual_lr
from finetune.errors import ConfigError

COMPLETE: dict[str, Any] = {
    "run": {"name": "a"},
    "model": {"path": "some/model"},
    "data": {"train": "rows.jsonl"},
}
# Section -> its classes: one, or one for each kind.
SECTIONS = {
    name: get_args(field.annotation) or (field.annotation,)
    for name, field in Config.model_fields.items()
}
EACH = [
    (f"{section}.{name}", field)
    for section, classes in SECTIONS.items() for cls in classes for name,
    field in cls.model_fields.items()
]  # fmt: skip
FIELDS = list(dict(EACH))
ALL_KEYS = sections.keys_of(sections.with_inner(sections.sections_of_config()))
EVERYTHING: dict[str, Any] = {
    "run": {"name": "all-2.5_b", "dir": "/some/where", "seed": 7},
    "model": {
        "path": "some/model", "revision": "main", "tokenizer": "bytes", "dtype": "bfloat16",
        "attention": "sdpa", "trust_remote_code": True,
    },
    "adapter": {
        "kind": "lora", "r": 4, "alpha": 8.5, "dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
    },
    "data": {
        "train": ["a.jsonl", "owner/name:train"], "eval": ["b.jsonl"], "format": "question_answer",
        "columns": {"question": "Patient", "answer": "Doctor"},
        "system_prompt": "Bleib höflich:\n- kurz\n- \"klar\" 🙂\n",
        "template": "alpaca", "loss_on": "last_turn", "max_length": 77, "truncation": "drop",
        "group_by_length": True,
    },
    "optimizer": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
    "schedule": {"kind": "cosine", "warmup_steps": 3, "min_lr_fraction": 0.1},
    "train": {
        "epochs": 2, "max_steps": 9, "global_batch_size": 12, "micro_batch_size": 3,
        "precision": "bf16", "max_grad_norm": None,
    },
    "checkpoint": {"every_steps": 5, "every_minutes": None, "keep_last": 1, "resume": "never"},
    "evaluation": {"every_steps": 4, "micro_batch_size": 2},
    "tracking": {"log_every_steps": 2},
}  # fmt: skip
YAML = yaml.safe_dump(COMPLETE)


def changed(base: dict[str, Any] = COMPLETE, **changes: Any) -> dict[str, Any]:
    """A nested config with section__field=value set in it; a value of ... takes the key away."""
    return with_values({key.replace("__", "."): value for key, value in changes.items()}, base)


def with_values(changes: dict[str, Any], base: dict[str, Any] = COMPLETE) -> dict[str, Any]:
    """The same, with keys as section.field."""
    values = {section: dict(fields) for section, fields in base.items()}
    for key, value in changes.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
        if value is ...:
            del values[section][name]
    return values


def problems_of(values: dict[str, Any]) -> list[str]:
    """One line for each problem that loading reports."""
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(values)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.fixture
def parse(tmp_path: Path):
    """Parse a config, as the text of a YAML file, together with words of a command line."""

    def parse(text: str, *words: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return configs.parse(["--config", str(path), *words])[0]

    return parse


@pytest.fixture
def refusal(parse):
    """What the user reads about a YAML file and a command line that cannot be taken."""

    def refusal(text: str, *words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            parse(text, *words)
        return str(caught.value)

    return refusal


def test_every_problem_is_reported_at_once(refusal):
    message = refusal(
        """
        run: {name: "no/slash", sed: 1}
        model: {path: some/model, dtype: int8}
        data: {truncation: split}
        optimizer: {lr: -1, betas: [0.9]}
        train: {global_batch_size: 6, micro_batch_size: 4}
        """,
        "--train.epochs", "none", "--modl.path", "x",
    )  # fmt: skip
    keys = [line.split(":")[0].strip() for line in message.splitlines()[1:]]
    assert sorted(keys) == sorted(
        [
            "run.name", "run.sed", "model.dtype", "data.train", "data.truncation", "optimizer.lr",
            "optimizer.betas", "train.global_batch_size", "train.epochs", "--modl.path",
        ]
    )  # fmt: skip
    assert message.startswith("10 problems in ")
    assert "run.yaml" in message.splitlines()[0]


def test_missing_sections_and_fields_are_named():
    assert problems_of({"model": {"path": "m"}, "data": {}}) == [
        "run: is required (section run:)",
        "data.train: is required",
    ]


def test_one_wrong_value_is_one_problem():
    assert len(problems_of(changed(data__train=5))) == 1
    assert len(problems_of(changed(run__name=5))) == 1


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("run.nmae", "run.name"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("optimizer.wieght_decay", "optimizer.weight_decay"),
        ("data.max_len", "data.max_length"),
        ("model.seed", "run.seed"),
        ("train.lr", "optimizer.lr"),
        ("train.grad_checkpointing", "train.gradient_checkpointing"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("tracking.log_every", "tracking.log_every_steps"),
    ],
)
def test_a_misspelt_key_gets_the_nearest_valid_name(key, nearest):
    assert problems_of(with_values({key: 1})) == [f"{key}: unknown key; did you mean {nearest}?"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lr", 1, "did you mean optimizer.lr?"),
        ("seed", 1, "did you mean run.seed?"),
        ("max_length", 1, "did you mean data.max_length?"),
        ("schedul", {"kind": "cosine"}, "did you mean schedule?"),
        ("optimiser", {"kind": "cosine"}, "did you mean optimizer?"),
        ("trian", {"kind": "cosine"}, "did you mean train?"),
        ("adaptor", {"kind": "cosine"}, "did you mean adapter?"),
        ("eval", {"kind": "cosine"}, "did you mean data.eval"),
        ("run.seed", 1, "nest it: run: {seed: 1}"),
        ("optimizer.lr", 1, "nest it: optimizer: {lr: 1}"),
    ],
)
def test_the_error_for_an_unknown_section_names_the_nearest_setting(key, value, says):
    (problem,) = problems_of({**COMPLETE, key: value})
    assert problem.startswith(f"{key}: unknown key; {says}")


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--optimizer.lrr", "optimizer.lr"),
        ("--optimizer.lrr=3", "optimizer.lr"),
        ("--lr", "optimizer.lr"),
        ("--schedul.kind", "schedule.kind"),
        ("--optimiser.kind", "optimizer.kind"),
        ("--evaluate.every_steps", "evaluation.every_steps"),
        ("--data.max-length", "data.max_length"),
    ],
)
def test_a_misspelt_option_gets_the_nearest_valid_name(refusal, word, nearest):
    message = refusal(YAML, word, "cosine")
    assert f"{word.split('=')[0]}: unknown option; did you mean {nearest}?" in message
    assert message.startswith("1 problem in ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--", "--check", "--run.seed=3"),
            [f"{word}: stands after --, so it was not read as an option; remove the --"
             for word in ("--check", "--run.seed=3")],
        ),
        (("--run.seed", "9" * 5_000), ["(a number has too many digits)"]),
        (
            ("--optimizer", "{lr: 1e-3}"),
            ["--optimizer: is a section; set each of its settings by itself, as "
             "--optimizer.kind VALUE"],
        ),
        (
            ("--evaluation.micro_batch_size", "1"),
            ["evaluation.micro_batch_size: would be ignored: the run has no evaluation rows "
             "(data.eval); remove it"],
        ),
        (
            ("--train.activation_offload", "true", "--train.gradient_checkpointing", "false"),
            ["train.activation_offload: would be ignored: train.gradient_checkpointing: false "
             "keeps no inputs to recompute from; remove it"],
        ),
        (("run2.yaml",), ["'run2.yaml': unexpected word"]),
        (
            ("fast",),
            ["'fast': unexpected word on the command line; write settings as "
             "--section.field VALUE"],
        ),
        (("--run.name",), ["--run.name: has no value; write --run.name VALUE"]),
        *((("--data.columns", word), ["data.columns"])
          for word in ("{question: ", "{a: b, a: c}", "[a, b")),
        *((("--model.config", text), ["refers to itself"])
          for text in ("&a [*a]", "&a {b: *a}", "&a {<<: *a}", "&a [1, [*a]]")),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused(refusal, words, says):
    message = refusal(YAML, *words)
    assert all(part in message for part in says)
    assert len(message) < 400


@pytest.mark.parametrize("value", ["", " "])
@pytest.mark.parametrize(
    "key", ["run.dir", "model.path", "model.tokenizer", "data.cache_dir", "checkpoint.storage"]
)
def test_an_empty_path_is_refused(key, value):
    says = f"{key}: is empty; name a folder, or remove it"
    assert says in problems_of(with_values({key: value}))


def test_a_path_with_a_zero_byte_is_refused():
    assert "run.dir: holds a zero byte" in problems_of(changed(run__dir="a\0b"))[0]


def test_the_length_of_a_name_is_limited():
    configs.from_dict(changed(run__name="a" * 128))
    says = "run.name: at most 128 letters, got 256; choose a shorter one"
    assert problems_of(changed(run__name="a" * 256)) == [says]


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "a: &a [1, [*a]]"]
)
def test_an_alias_that_refers_to_itself_is_refused(refusal, text):
    assert "line 1: *a refers to itself; write it out" in refusal(text)


def test_an_alias_of_an_earlier_anchor_is_accepted(parse):
    more = "evaluation: {sample_prompts: &a [x, y]}\nadapter: {kind: full, freeze: *a}\n"
    assert parse(YAML + more).adapter.freeze == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (YAML.encode("utf-16"), "cannot read the config: it is UTF-16 .*save it as UTF-8"),
        (YAML.encode("utf-32"), "cannot read the config: it is UTF-16 .*save it as UTF-8"),
        (b"run: {name: caf\xe9}", "cannot read the config"),
        (b"# " + b"a" * 1_000_000, "it is larger than 1 MB"),
    ],
)
def test_a_file_that_cannot_be_a_config_is_refused(tmp_path, content, says):
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"given\.yaml: .*{says}"):
        configs.parse(["--config", str(path)])


def test_a_device_is_refused_as_a_config():
    with pytest.raises(ConfigError, match="it is a device or a socket; name a file"):
        configs.read_yaml("/dev/zero")


def test_a_config_may_come_through_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text(YAML))
    writer.start()
    assert configs.read_yaml(path) == COMPLETE
    writer.join()


def test_a_setting_without_effect_is_accepted_at_its_default(parse):
    """The program itself has written all defaults out."""
    given = changed(adapter__kind="lora", adapter__init="default", adapter__path=None)
    config = parse(yaml.safe_dump(given))
    assert parse(configs.to_yaml(config)) == config


def test_a_misspelt_column_is_refused():
    """A key of data.columns that no format knows would silently leave a column unread."""
    (problem,) = problems_of(
        changed(data__format="instruction", data__columns={"inptu": "Context"})
    )
    assert "data.columns" in problem
    assert "inptu" in problem
    assert re.search(r"\binput\b", problem)


def test_a_config_may_be_a_positional_argument(tmp_path):
    (tmp_path / "run.yaml").write_text(YAML)
    assert configs.parse([str(tmp_path / "run.yaml"), "--run.seed", "4"])[0].run.seed == 4


def test_the_last_of_repeated_options_wins_with_a_note(parse, capsys):
    assert parse(YAML, "--run.seed", "1", "--run.seed=2").run.seed == 2
    assert capsys.readouterr().err == "note: --run.seed is given twice: '2' counts, not '1'\n"
    parse(YAML, "--run.seed", "2", "--run.seed=2")
    assert not capsys.readouterr().err, "the same value twice needs no note"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optimizer.lr", "--config", "c.yaml"], "--optimizer.lr VALUE"),
        (["--config", "c.yaml", "--optimizer.lr", "--check"], "--optimizer.lr VALUE"),
        (["--config", "--check"], "--config FILE"),
    ],
)
def test_an_option_without_its_value_is_refused_by_name(words, says):
    with pytest.raises(ConfigError, match=f"^{says.split()[0]}: has no value; write {says}$"):
        configs.parse(words)


def test_an_option_that_swallowed_the_config_path_is_reported(tmp_path, refusal):
    """A bare flag in front of a path takes it, and then every required setting would be missing."""
    path = tmp_path / "c.yaml"
    path.write_text(YAML)
    settings = {"data.packing": "true", "optimizer.lr": "VALUE", "run.name": "VALUE"}
    for setting, value in settings.items():
        with pytest.raises(ConfigError) as problem:
            configs.parse(["--check", f"--{setting}", str(path)])
        assert str(problem.value) == (
            f"1 problem in the command line:\n  {setting}: took the YAML file '{path}' as its "
            f"value; write --config {path} --{setting} {value}"
        )
    says = refusal(YAML, "--data.packing", "other.yaml")
    assert (
        "data.packing: took the YAML file 'other.yaml' as its value; write --data.packing true"
        in says
    )
    assert says.count("data.packing: ") == 1


def test_a_text_value_may_end_in_yaml(parse):
    assert parse(YAML, "--run.name", "v1.yaml").run.name == "v1.yaml"


def test_a_bare_flag_is_true_and_one_word_is_a_list_of_one(parse):
    config = parse(
        yaml.safe_dump(changed(tracking__trackers="trackio")), "--data.packing",
        "--train.gradient_checkpointing", "--evaluation.sample_prompts", "hello", "--run.seed", "3",
    )  # fmt: skip
    assert (config.data.packing, config.train.gradient_checkpointing) == (True, True)
    assert config.run.seed == 3
    assert (config.tracking.trackers, config.evaluation.sample_prompts) == (["trackio"], ["hello"])


def test_a_tilde_expands_to_the_home_directory_in_every_path(parse, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(
        "run: {name: a, dir: ~/runs}\nmodel: {path: ~/m, tokenizer: ~/t}\n"
        "adapter: {kind: lora, path: ~/a}\ndata: {train: [~/a.jsonl, b.jsonl], eval: ~/e.jsonl, "
        "template: ~/t.jinja, cache_dir: ~/c}\n",
        "--checkpoint.storage", "file://~/store",
    )  # fmt: skip
    found = configs.flatten(config.model_dump())
    expected = {
        "run.dir": "runs", "model.path": "m", "model.tokenizer": "t", "adapter.path": "a",
        "data.eval": "e.jsonl", "data.template": "t.jinja",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == {
        key: f"{tmp_path}/{name}" for key, name in expected.items()
    }
    assert config.data.train == [f"{tmp_path}/a.jsonl", "b.jsonl"]
    assert config.cache_dir == f"{tmp_path}/c"
    assert config.checkpoint.storage == f"file://{tmp_path}/store"
    (tmp_path / "run.yaml").write_text(YAML)
    assert configs.parse(["--config=~/run.yaml"])[0].run.name == "a"
    assert problems_of(changed(run__dir="~missing.user.name/runs")) == [
        "run.dir: begins with ~missing.user.name, but this machine has no such user; write the "
        "full path, got '~missing.user.name/runs'"
    ]


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("text", "words", "key"),
    [
        ('run: {name: "a\\ud83d"}', (), "run.name"),
        ('data: {train: [a, "\\udc4d"]}', (), "data.train"),
        ('data: {columns: {"\\ud83d": b}}', (), r"data.columns.\ud83d"),
        ("{}", ("--data.system_prompt", HALF), "data.system_prompt"),
        ("{}", (f"--{HALF}.x", "1"), r"--\ud83d.x"),
    ],
)
def test_a_lone_surrogate_is_refused(refusal, text, words, key):
    message = refusal(text, *words)
    message.encode()
    assert key in message
    assert "half a character" in message or "unknown option" in message


def test_a_lone_surrogate_in_the_config_path_is_refused():
    with pytest.raises(ConfigError, match="--config: .*half a character"):
        configs.parse(["--config", HALF])


def test_a_lone_surrogate_in_the_environment_is_refused(refusal, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "off\udce9")
    assert "WANDB_MODE in the environment: contains half a character" in refusal(YAML)


def test_a_missing_home_directory_or_user_name_is_accepted(monkeypatch, tmp_path):
    """OpenShift starts containers under user ids that nothing knows."""

    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "restored by monkeypatch")
        monkeypatch.delenv(name)
    for _ in range(2):  # before and after libraries were given a place
        assert configs.from_dict(changed(run__dir="somewhere")).cache_dir == "somewhere/.cache"
        (problem,) = problems_of(changed(run__dir="~/runs"))
        assert "run.dir: begins with ~, but this machine has no home directory; set HOME" in problem
        paths.give_home()
        assert getpass.getuser() == str(os.getuid())
        home = Path(os.path.expanduser("~"))
        assert home.parent == tmp_path
        assert home.stat().st_mode & 0o777 == 0o700


def test_the_cache_avoids_an_unwritable_home(monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    assert configs.from_dict(changed(run__dir="somewhere")).cache_dir == "somewhere/.cache"


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("objective.kind", "ipo", "ipo is a loss of dpo here: objective.kind: dpo, objective.loss"),
        ("objective.kind", "rm", "rm is called reward here"),
        ("objective.kind", "dapo", "dapo is a loss of grpo here: objective.kind: grpo"),
        ("tracking.trackers", "mlflow", "MLflow is not yet supported; use tensorboard"),
        ("tracking.trackers", ["wandb", "mlflow"], "MLflow is not yet supported"),
        ("train.precision", "mps", "Apple GPUs (mps) are not yet supported"),
    ],
)
def test_unsupported_features_are_refused_with_advice(key, value, advice):
    (problem,) = problems_of(with_values({key: value}))
    assert problem.startswith(f"{key}: ")
    assert advice in problem


@pytest.mark.parametrize(
    ("word", "setting"),
    [
        ("use_peft", "adapter.kind"), ("val_split", "data.eval_fraction"),
        ("eval_split", "data.eval_fraction"), ("val_set_size", "data.eval_fraction"),
        ("bf16", "train.precision"), ("gradient_checkpointing", "train.gradient_checkpointing"),
        ("report_to", "tracking.trackers"), ("system", "data.system_prompt"),
        ("lorra", "the sections are"), ("deepspeed", "the topology file decides"),
        ("device", "(mps) are not yet supported"), ("xyzzy", "the sections are"),
    ],
)  # fmt: skip
def test_setting_names_of_other_tools_get_ours_suggested(refusal, word, setting):
    (problem,) = problems_of({**COMPLETE, word: 1})
    assert setting in problem
    if setting == "the sections are":
        assert all(section in problem for section in Config.model_fields)
    assert f"--{word}: unknown option; " in refusal(YAML, f"--{word}", "1")


def test_a_removed_setting_is_refused_with_advice_unless_at_its_default():
    from finetune.config import names

    values = configs.from_dict(changed(adapter__kind="lora")).model_dump()
    for key, (default, instead) in names.REMOVED.items():
        section, name = key.split(".")
        [problem] = problems_of(changed(adapter__kind="lora", **{f"{section}__{name}": "x"}))
        assert problem == f"{key}: was removed; {instead}"
        values[section][name] = default  # as an older version wrote it
    now = configs.from_dict(values)
    assert now == configs.from_dict(changed(adapter__kind="lora"))
    assert configs.differences(values, now) == []


def test_every_suggested_setting_exists():
    from finetune.config import names

    settings = {setting for setting in names.ELSEWHERE.values() if " " not in setting}
    assert settings <= set(ALL_KEYS)
    assert set(names.NOT_YET) <= set(FIELDS)


GRPO = YAML + "objective: {kind: grpo, rewards: [{kind: exact_match}]}"


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--objective.rollouts.temperature", "0.7"], "rollouts.temperature", 0.7),
        (["--objective.rollouts.engine.kind=local"], "rollouts.engine.kind", "local"),
        (["--objective.rewards.0.weight", "2"], "rewards.0.weight", 2.0),
        (
            ["--objective.rewards.1.pattern", "[0-9]", "--objective.rewards.1.kind=regex"],
            "rewards.1.pattern", "[0-9]",
        ),
        (
            ["--objective.rollouts.passes=2", "--objective.rollouts", "{passes: 3, group_size: 4}"],
            "rollouts.passes", 2,
        ),
    ],
)  # fmt: skip
def test_settings_inside_settings_can_stand_on_the_command_line(parse, words, key, value):
    place: Any = parse(GRPO, *words).objective.model_dump()
    for name in key.split("."):
        place = place[int(name) if name.isdigit() else name]
    assert place == value


def test_what_differs_inside_a_setting_is_named_alone(parse):
    saved = parse(GRPO).model_dump()
    words = ["--objective.rollouts.passes=2", "--objective.rewards.0.weight=2"]
    assert configs.differences(saved, parse(GRPO, *words)) == [
        "objective.rewards.0.weight: was 1.0, now 2.0",
        "objective.rollouts.passes: was 1, now 2",
    ]
    more = parse(GRPO, "--objective.rewards.1.kind=math")
    [whole] = configs.differences(saved, more)
    assert whole.startswith("objective.rewards: was [{kind: exact_match")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--objective.temperature=1"], "did you mean objective.rollouts.temperature?"),
        (["--objective.rolouts.passes=1"], "did you mean objective.rollouts.passes?"),
        (["--objective.rollouts.top_p=0.9"], "a cut distribution has another one; remove it"),
        (["--objective.rollouts.passes=x"], "objective.rollouts.passes: should be a valid integer"),
        (["--objective.rewards.3.weight=1"], "has 1 entry, so the next number is 1, not 3"),
        (["--objective.rewards.N.weight=1"], "write a number for N: 0 for the first"),
        (["--objective.rewards.0=1"], "as --objective.rewards.0.kind VALUE"),
        (["--objective.kind=dpo"], "it belongs to grpo, rloo, ppo and distill; remove it"),
        (["--num_generations=1"], "did you mean objective.rollouts.group_size?"),
    ],
)
def test_wrong_settings_inside_settings_are_named(refusal, words, says):
    assert says in refusal(GRPO, *words)


def test_help_has_the_rates_that_objectives_take():
    described = dict(EACH)["optimizer.lr"].description
    said = {
        kind: [float(rate) for rate in rates.split(",")]
        for kinds, rates in re.findall(r"([a-z_, ]+): (\de-\d,\s\de-\d)", described)
        for kind in kinds.split(",")
    }
    said = {kind.strip(): rates for kind, rates in said.items()}
    for kind in OBJECTIVES:
        rates = [usual_lr("adamw", adapter, kind) for adapter in ("full", "lora")]
        assert said.get(kind, [2e-5, 2e-4]) == rates, kind
    assert "null: 2e-5 for all weights, 2e-4 for adapters; dpo, " in described
    assert said.keys() < OBJECTIVES.keys()


def test_a_usual_rate_is_a_number_everywhere_and_resumes_as_one(parse):
    config = parse(yaml.safe_dump(changed(adapter__kind="lora")), "--optimizer.lr", "null")
    assert config.optimizer.lr == 2e-4
    old = changed(adapter__kind="lora", optimizer__lr=2e-4)
    assert configs.differences(configs.from_dict(old).model_dump(), config) == []
    assert configs.from_dict(changed(optimizer__kind="lion")).optimizer.lr == 4e-6


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("run: {name: a, name: b}", "name", 1),
        ("run: {name: a}\ndata: {train: x}\nrun: {seed: 1}", "run", 3),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(refusal, text, key, line):
    message = refusal(text)
    assert f"line {line}: '{key}' is given twice" in message
    assert "run.yaml" in message


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e-5", 2.5e-5), (".5", 0.5), ("1", 1.0), ("+1e0", 1.0)],
)
def test_a_number_is_a_number_however_it_is_written(parse, written, number):
    assert parse(f"{YAML}\noptimizer: {{lr: {written}}}").optimizer.lr == number
    assert parse(YAML, "--optimizer.lr", written).optimizer.lr == number


def test_a_missing_config_is_reported_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/my_run.yaml").touch()
    near = "; did you mean configs/my_run.yaml?"
    expected = {
        **dict.fromkeys(("configs/my_rum.yaml", "my_run.yaml", "config/my_run.yaml"), near),
        "configs/MY_RUN.YAML": near,
        "away/other.yaml": "; the folder away does not exist",
        "absent.yaml": f" in {tmp_path}",
        f"{tmp_path}/absent.yaml": "",
    }
    for given, hint in expected.items():
        with pytest.raises(ConfigError) as caught:
            configs.parse(["--config", given])
        assert str(caught.value) == f"{given}: no such file{hint}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run: [", "not valid YAML"),
        ("- a\n- b", "expected sections"),
        ("just words", "expected sections"),
        ("", "expected sections"),
        (
            "run: {name: {{ name }}}",
            "line 1",
        ),  # a placeholder of Helm or Jinja that was never filled in
    ],
)
def test_a_file_without_a_config_is_refused_by_name(refusal, text, says):
    message = refusal(text)
    assert "run.yaml" in message
    assert says in message


def test_the_command_line_wins_over_the_file(parse):
    text = yaml.safe_dump(changed(optimizer__lr=1.0, run__seed=3))
    config = parse(text, "--optimizer.lr", "1e-3", "--run.seed=4")
    assert (config.optimizer.lr, config.run.seed) == (1e-3, 4)


@pytest.mark.parametrize("argv", [[], ["--check"]])
def test_a_command_without_a_config_asks_for_its_path(argv):
    with pytest.raises(ConfigError, match="nothing to do: give the path of a config"):
        configs.parse(argv)


def test_a_config_needs_no_file():
    config, check = configs.parse(
        ["--run.name", "a", "--model.path", "m", "--data.train", "rows.jsonl", "--check"]
    )
    assert config == configs.from_dict(changed(model__path="m"))
    assert check


@pytest.mark.parametrize(
    ("option", "word", "value"),
    [
        ("data.train", "a.jsonl", "a.jsonl"),
        ("data.train", "[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        *(("run.name", word, word) for word in ("5e-5", "2024")),
        ("model.revision", "1234567", "1234567"),
        ("model.revision", "null", None),
        ("data.columns", "{question: Patient}", {"question": "Patient"}),
        *(("data.system_prompt", word, word) for word in (
            "yes", "Answer: yes or no", "Answer: yes or no: nothing else", "'Quoted' and not",
            "@home #1",
        )),
        ("data.template", "[INST].jinja", "[INST].jinja"),
        ("run.dir", "*runs", "*runs"),
        ("train.max_grad_norm", "null", None),
        ("train.gradient_checkpointing", "true", True),
        ("train.gradient_checkpointing", "8", 8),
        ("optimizer.betas", "[0.8, 0.9]", [0.8, 0.9]),
    ],
)  # fmt: skip
def test_command_line_values_take_the_type_of_their_field(parse, option, word, value):
    assert configs.flatten(parse(YAML, f"--{option}={word}").model_dump())[option] == value


def test_an_expression_for_modules_needs_no_quotes_of_yaml(parse):
    text = yaml.safe_dump(changed(adapter__kind="lora"))
    adapter = parse(text, "--adapter.target_modules", "[qv]_proj").adapter
    assert adapter.target_modules == "[qv]_proj"


def test_an_option_does_not_hide_a_section_of_the_wrong_kind(refusal):
    assert "optimizer: a section" in refusal(
        yaml.safe_dump({**COMPLETE, "optimizer": 5}), "--optimizer.lr", "1e-4"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.name", 5), ("run.name", None), ("run.seed", "1"), ("run.seed", 1.0),
        ("run.seed", True), ("model.path", 5), ("model.trust_remote_code", "yes"),
        ("model.config", "llama"), ("adapter.kind", "dora"), ("adapter.r", 8.0),
        ("adapter.target_modules", 3), ("data.train", 5), ("data.train", {"a": 1}),
        ("data.columns", ["a"]), ("data.columns", {"question": 5}), ("data.packing", 1),
        ("data.format", "chat"), ("data.system_prompt", ["a"]), ("optimizer.lr", "fast"),
        ("optimizer.lr", "1e-4"), ("optimizer.betas", 0.9), ("optimizer.betas", [0.9]),
        ("optimizer.betas", [0.9, 0.99, 0.999]), ("train.epochs", "many"), ("train.max_steps", "3"),
        ("train.precision", "float16"), ("checkpoint.resume", True),
        ("evaluation.every_steps", "3"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named_with_its_key(key, value):
    problems = problems_of(with_values({"adapter.kind": "lora", key: value}))
    assert {problem.split(":")[0] for problem in problems} == {key}
    assert "got " in problems[0]


@pytest.mark.parametrize("section", ["run", "train", "data"])
@pytest.mark.parametrize("value", [5, None, ["a"], "text"])
def test_a_section_that_is_not_a_mapping_is_refused(section, value):
    says = f"{section}: a section with keys of its own, got "
    problems = problems_of({**COMPLETE, section: value})
    assert any(problem.startswith(says) for problem in problems)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", -1), ("run.seed", 2**31), ("run.name", ""), ("run.name", "../up"),
        ("run.name", "a b"), ("adapter.r", 0), ("adapter.alpha", 0), ("adapter.dropout", 1.0),
        ("adapter.dropout", -0.1), ("data.eval_fraction", 1.0), ("data.eval_fraction", -0.5),
        ("data.max_length", 0), ("data.max_length", -8), ("optimizer.lr", 0),
        ("optimizer.lr", -1e-4), ("optimizer.betas", [0.9, 1.0]), ("optimizer.betas", [-0.1, 0.9]),
        ("optimizer.eps", 0), ("optimizer.weight_decay", -0.1), ("schedule.warmup_steps", -1),
        ("schedule.min_lr_fraction", 1.1), ("train.epochs", 0), ("train.max_steps", 0),
        ("train.global_batch_size", 0), ("train.micro_batch_size", -2), ("train.max_grad_norm", 0),
        ("checkpoint.every_steps", 0), ("checkpoint.every_minutes", 0), ("checkpoint.keep_last", 0),
        ("evaluation.every_steps", 0),
        ("evaluation.micro_batch_size", 0), ("tracking.log_every_steps", 0),
        ("data.max_length", 1),  # a token and the one it predicts are two
    ],
)  # fmt: skip
def test_an_impossible_number_is_refused(key, value):
    problems = problems_of(with_values({"adapter.kind": "lora", key: value}))
    assert [problem.split(":")[0] for problem in problems] == [key]


NUMBERS = list(dict.fromkeys(key for key, field in EACH if "float" in str(field.annotation)))


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_number_may_be_infinite_or_undefined(key, value):
    value = [value, value] if key == "optimizer.betas" else value
    of_kind = {"adapter.kind": "lora"} if key.startswith("adapter.") else {}
    problems = problems_of(with_values({**of_kind, key: value}))
    assert {problem.split(":")[0] for problem in problems} == {key}


def with_batch(whole: int, micro: int) -> dict[str, Any]:
    return changed(train__global_batch_size=whole, train__micro_batch_size=micro)


def test_whole_numbers_stand_for_fractions():
    config = configs.from_dict(changed(adapter__kind="lora", adapter__alpha=8, optimizer__lr=1))
    assert (config.adapter.alpha, config.optimizer.lr) == (8.0, 1.0)


@pytest.mark.parametrize(("whole", "micro"), [(8, 3), (4, 8), (7, 2)])
def test_batch_sizes_that_do_not_divide_are_refused(whole, micro):
    assert problems_of(with_batch(whole, micro)) == [
        f"train.global_batch_size: {whole} is not a multiple of train.micro_batch_size {micro}"
    ]


@pytest.mark.parametrize(
    ("whole", "micro", "processes", "times"),
    [(8, 1, 1, 8), (8, 2, 1, 4), (8, 2, 4, 1), (24, 3, 2, 4)],
)
def test_accumulation_steps_follow_from_the_global_batch(whole, micro, processes, times):
    config = configs.from_dict(with_batch(whole, micro))
    assert configs.accumulation_steps(config, processes) == times


@pytest.mark.parametrize(
    ("processes", "multiple", "example"), [(3, 6, 12), (5, 10, 10), (8, 16, 16)]
)
def test_processes_that_the_batch_cannot_be_split_over_are_refused(processes, multiple, example):
    says = (
        f"train.global_batch_size: 8 cannot be split over {processes} processes .*"
        f"a multiple of {multiple}, for example {example}"
    )
    with pytest.raises(ConfigError, match=says):
        configs.accumulation_steps(configs.from_dict(with_batch(8, 2)), processes)


RANDOM = {
    "model__path": ..., "model__init": "random", "model__config": TINY_LLAMA,
    "model__tokenizer": "bytes",
}  # fmt: skip
CLM_ON_TEXT = {"objective__kind": "clm", "data__format": "text"}


@pytest.mark.parametrize(
    ("changes", "key", "word"),
    [
        ({"model__path": ...}, "model.path", ""),
        ({**RANDOM, "model__path": "m"}, "model.path", ""),
        ({**RANDOM, "model__init": "pretrained"}, "model.config", ""),
        ({**RANDOM, "model__tokenizer": ...}, "model.tokenizer", ""),
        ({**RANDOM, "model__config": {"hidden_size": 8}}, "model.config", ""),
        ({**RANDOM, "adapter__kind": "lora"}, "adapter.kind", ""),
        ({"data__truncation": "split"}, "data.truncation", ""),
        ({"data__format": "text"}, "objective.kind", ""),
        ({"data__packing": True, "model__attention": "sdpa"}, "data.packing", ""),
        ({"data__packing": True, "model__attention": "eager"}, "data.packing", ""),
        ({"objective__kind": "clm", "data__loss_on": "last_turn"}, "data.loss_on", "ignored"),
        ({**CLM_ON_TEXT, "data__template": "alpaca"}, "data.template", "ignored"),
        ({**CLM_ON_TEXT, "data__system_prompt": "s"}, "data.system_prompt", "ignored"),
        ({"data__eval": "b.jsonl", "data__eval_fraction": 0.1}, "data.eval_fraction", "ignored"),
        (
            {"data__packing": True, "data__group_by_length": True}, "data.group_by_length",
            "ignored",
        ),
        (
            {"schedule__kind": "constant", "schedule__min_lr_fraction": 0.1},
            "schedule.min_lr_fraction", "ignored",
        ),
        ({"evaluation__every_steps": 5}, "evaluation.every_steps", "ignored"),
        ({"evaluation__micro_batch_size": 5}, "evaluation.micro_batch_size", "ignored"),
        ({"data__text_unit": "paragraph"}, "data.text_unit", "ignored"),
        ({**RANDOM, "model__revision": "main"}, "model.revision", "ignored"),
        ({**RANDOM, "model__trust_remote_code": True}, "model.trust_remote_code", "ignored"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_together_or_would_be_ignored_are_refused(changes, key, word):
    (problem,) = problems_of(changed(**changes))
    assert problem.startswith(f"{key}: ")
    assert word in problem


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter__r": 8}, "adapter.r: adapter.kind is full; it belongs to lora and qlora"),
        (
            {"adapter__kind": "lora", "adapter__freeze": ["a"]},
            "adapter.freeze: adapter.kind is lora; it belongs to full",
        ),
        (
            {"adapter__kind": "lora", "adapter__quantization": "nf4"},
            "adapter.quantization: adapter.kind is lora; it belongs to qlora",
        ),
    ],
)  # fmt: skip
def test_a_setting_of_another_kind_is_an_unknown_key(refusal, changes, says):
    section = says.partition(".")[0]
    assert problems_of(changed(**changes)) == [f"{says}; remove it, or set {section}.kind"]
    *_, (last, value) = changes.items()
    assert says in refusal(
        yaml.safe_dump(changed(**changes | {last: ...})), f"--{last.replace('__', '.')}", str(value)
    )


def test_an_older_config_may_hold_settings_of_other_kinds(tmp_path):
    """It wrote all of them out; a run that resumes, or is repeated, reads its own config.yaml."""
    written = configs.from_dict(COMPLETE).model_dump()
    of_before = {**written, "adapter": {**written["adapter"], "r": 16, "quantization": "nf4"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(of_before))
    assert configs.read_resolved(tmp_path / "config.yaml") == written
    assert configs.differences(of_before, configs.from_dict(COMPLETE)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        RANDOM,
        {"model__init": "random"},
        {"adapter__kind": "lora", "adapter__r": 8},
        {**CLM_ON_TEXT, "data__truncation": "split", "data__packing": True},
        {"objective__kind": "clm", "data__train": "a.txt", "data__text_unit": "paragraph"},
        {"data__eval": "b.jsonl", "evaluation__every_steps": 5},
        {"data__eval_fraction": 0.1, "evaluation__micro_batch_size": 5},
        {"schedule__kind": "constant", "schedule__warmup_steps": 5},
    ],
)
def test_settings_that_belong_together_are_accepted(changes):
    assert list(configs.conflicts(configs.from_dict(changed(**changes)))) == []


def test_the_largest_example_sets_every_section():
    assert configs.from_dict(EVERYTHING).model_dump().keys() == EVERYTHING.keys() | {"objective"}


@pytest.mark.parametrize(
    "values",
    [
        COMPLETE, EVERYTHING, changed(**RANDOM),
        *(changed(model__revision=text) for text in (
            "5e-5", "1e5", "08", "0x1f", "1_000", "null", "~", "yes", "1:30", "", " a ",
            "2024-01-01", "a: b", "#a", "é🙂", "-", "[a]", "1.", ".5", "+5",
        )),
        changed(run__name="5e-5"), changed(data__system_prompt="two\n\n  lines \n"),
        changed(data__system_prompt="from a word\u2028processor"),
        changed(optimizer__eps=1e-30, optimizer__lr=123456789.0),
    ],
    ids=lambda values: f"{values['run']['name']} {values['model'].get('revision')!r}",
)  # fmt: skip
def test_the_resolved_config_reads_back_as_the_same_config(tmp_path, values):
    config = configs.from_dict(values)
    (tmp_path / "resolved.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
    assert configs.from_dict(configs.read_yaml(tmp_path / "resolved.yaml")) == config


def test_the_resolved_config_writes_every_field_out():
    written = list(configs.flatten(yaml.safe_load(configs.to_yaml(configs.from_dict(COMPLETE)))))
    of_kind = ["adapter.kind", "adapter.freeze", "objective.kind", "objective.label_smoothing"]
    assert written == [
        key for key in FIELDS if key in of_kind or not key.startswith(("adapter.", "objective."))
    ]


def test_the_shipped_configs_are_valid():
    shipped = [name for name in tracked() if re.fullmatch(r"configs/\w+\.yaml", name)]
    assert shipped
    for name in shipped:
        configs.parse(["--config", str(ROOT / name)])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer__lr": 1e-3}, "optimizer.lr: was 0.0003, now 0.001"),
        ({"data__train": "c.jsonl"}, "data.train: was [a.jsonl, 'owner/name:train'], now c.jsonl"),
        ({"train__global_batch_size": 6}, "train.global_batch_size: was 12, now 6"),
        ({"model__revision": None}, "model.revision: was main, now null"),
        ({"run__seed": 8}, "run.seed: was 7, now 8"),
        ({"adapter__r": 5}, "adapter.r: was 4, now 5"),
    ],
)
def test_a_difference_that_makes_another_run_is_shown_with_both_values(changes, named):
    old = configs.from_dict(EVERYTHING).model_dump()
    assert configs.differences(old, configs.from_dict(changed(EVERYTHING, **changes))) == [named]


def test_settings_that_may_change_on_resume_are_not_differences():
    old = configs.from_dict(EVERYTHING).model_dump()
    new = changed(
        EVERYTHING, run__dir="elsewhere", data__cache_dir="elsewhere", model__attention="eager",
        train__micro_batch_size=1, train__gradient_checkpointing=True, checkpoint__every_steps=1,
        checkpoint__keep_last=9, checkpoint__resume="auto", evaluation__every_steps=1,
        evaluation__micro_batch_size=1, tracking__log_every_steps=9,
    )  # fmt: skip
    assert configs.differences(old, configs.from_dict(new)) == []


def test_a_saved_config_of_another_version_differs_by_its_keys():
    old = configs.from_dict(COMPLETE).model_dump()
    old["data"]["gone"] = 1
    del old["optimizer"]["eps"]
    assert configs.differences(old, configs.from_dict(COMPLETE)) == [
        "data.gone: was 1, now null",
        "optimizer.eps: was null, now 1.0e-08",
    ]


def test_nothing_changes_a_config_after_it_was_read():
    config = configs.from_dict(COMPLETE)
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0


def test_reading_leaves_the_given_values_as_they_were():
    values = changed(data__max_length=0, run__sed=1)
    before = json.dumps(values)
    problems_of(values)
    assert json.dumps(values) == before


def test_every_field_is_documented():
    for key, field in EACH:
        text = field.description
        assert text, f"{key} has no line of documentation"
        assert text.endswith("."), key
        assert "\n\n" not in text, key


def imports(process: subprocess.CompletedProcess[str]) -> set[str]:
    """Modules that a process started with -X importtime has imported."""
    lines = process.stderr.splitlines()
    return {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}


def train_py(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )


def test_help_is_short_and_names_the_settings_that_matter_most(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    process = train_py("--help")
    assert process.returncode == 0
    lines = process.stdout.splitlines()
    assert len(lines) < 60
    assert all(f"--{key} " in process.stdout for key in help.ESSENTIAL)
    assert "--adapter.dora" not in process.stdout
    for way_on in ("train.py my_run.yaml --check", "--help SECTION", "--help all"):
        assert way_on in process.stdout


@pytest.mark.parametrize(
    ("asked", "has", "lacks"),
    [
        ("adapter", "--adapter.dora", "--optimizer.lr"),
        ("optimizer.lr", "--optimizer.lr", "--optimizer.kind"),
        ("adaptr", "did you mean adapter?", "--adapter.dora"),
        ("objective.rollouts", "--objective.rollouts.temperature FLOAT", "--objective.beta"),
        ("objective.rewards.N", "--objective.rewards.N.pattern STR regex:", "--objective.beta"),
        ("objective.beta", "(defaults: dpo, orpo, cpo, kto: 0.1; simpo: 2.0; ", "(default: "),
        ("objective.loss", "discopop or kto|apo_zero_unpaired or grpo|", "(default: "),
        (
            "nothing-like-it",
            "No section or setting is named 'nothing-like-it'. --help SECTION",
            "--run.name",
        ),
    ],
)
def test_help_answers_about_a_section_or_a_setting(capsys, asked, has, lacks):
    with pytest.raises(SystemExit) as ended:
        configs.parse(["--help", asked])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert has in shown
    assert lacks not in shown


def test_help_all_names_every_field_and_does_not_wait_for_torch():
    process = train_py("--help", "all")
    assert process.returncode == 0
    assert set(FIELDS) < set(ALL_KEYS)
    assert [key for key in ALL_KEYS if f"--{key} " not in process.stdout] == []
    text = " ".join(process.stdout.split())
    for key, field in EACH:
        assert " ".join(field.description.split()[:4]) in text, (
            f"{key}: its documentation is not in --help"
        )
    assert "finetune.config" in imports(process)
    assert not {"torch", "transformers", "numpy"} & imports(process)


def test_a_wrong_config_ends_with_code_2_before_torch_is_imported(tmp_path):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(changed(optimizer__lrr=1)))
    process = train_py("--config", str(tmp_path / "wrong.yaml"))
    assert process.returncode == 2
    assert "optimizer.lrr: unknown key; did you mean optimizer.lr?" in process.stderr
    assert "Traceback" not in process.stderr
    assert "torch" not in imports(process)


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value fits a JSON schema, as far as the run config uses that language."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in schema:
        return any(fits(value, option, root) for option in schema["anyOf"])
    types = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int,
        "number": (int, float), "null": type(None)
    }  # fmt: skip
    kind = schema.get("type")
    if kind and (
        not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "boolean")
    ):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if isinstance(value, list):
        size = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return size and all(fits(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= value.keys() and all(
            fits(item, known[key], root)
            if key in known
            else (others is True or (others and fits(item, others, root)))
            for key, item in value.items()
        )
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (
            value >= schema.get("minimum", value) and value <= schema.get("maximum", value)
            and value > schema.get(
                "exclusiveMinimum", value - 1,
            ) and value < schema.get("exclusiveMaximum", value + 1)
        )  # fmt: skip
    return True


@pytest.mark.parametrize(
    "values",
    [
        COMPLETE, EVERYTHING, changed(**RANDOM), configs.from_dict(COMPLETE).model_dump(),
        configs.from_dict(EVERYTHING).model_dump(),
    ],
    ids=["complete", "everything", "random", "complete, resolved", "everything, resolved"],
)  # fmt: skip
def test_the_schema_accepts_what_the_config_accepts(values):
    schema = configs.json_schema()
    assert fits(json.loads(json.dumps(values)), schema, schema)


@pytest.mark.parametrize(
    "values",
    [
        changed(run__nmae="a"), changed(data__train=...), changed(run__name="a b"),
        changed(run__seed="1"), changed(train__epochs=0), changed(optimizer__betas=[0.9]),
        changed(adapter__kind="dora"), changed(adapter__dropout=1.0), {**COMPLETE, "trian": {}},
        changed(data__train={"a": 1}), changed(run__seed=True),
        changed(data__columns={"question": 5}),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_config_refuses(values):
    schema = configs.json_schema()
    assert not fits(values, schema, schema)
    assert problems_of(values)


def test_the_schema_describes_every_field():
    sections = configs.json_schema()["$defs"]
    for cls in (cls for classes in SECTIONS.values() for cls in classes):
        properties = sections[cls.__name__]["properties"]
        described = {name for name, field in properties.items() if field.get("description")}
        assert described == set(cls.model_fields)


def test_the_schema_lists_the_choices_of_a_field():
    choices = configs.json_schema()["$defs"]["Data"]["properties"]["truncation"]["enum"]
    assert tuple(choices) == get_args(configs.Data.model_fields["truncation"].annotation)


def test_a_config_that_an_earlier_version_wrote_out_still_trains():
    """Before kinds had settings of their own, config.yaml held the defaults of all of them."""
    adapter = {
        "kind": "full", "freeze": [], "path": None, "r": 16, "alpha": 32, "dropout": 0.0,
        "target_modules": "all-linear", "layers": None, "rank_pattern": {}, "alpha_pattern": {},
        "rslora": False, "dora": False, "init": "default", "bias": "none", "train_norms": False,
        "modules_to_save": [], "quantization": "nf4", "double_quantization": True,
        "compute_dtype": "auto",
    }  # fmt: skip
    values = changed() | {"adapter": adapter}
    assert configs.from_dict(values) == configs.from_dict(changed())
    with pytest.raises(ConfigError, match="adapter.r: adapter.kind is full"):
        configs.from_dict(changed() | {"adapter": adapter | {"r": 8}})
