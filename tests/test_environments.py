"""Several turns: the model's tokens as it wrote them, and what an environment says between them."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY_LLAMA, pretrained, read_jsonl, write_jsonl
from invariants import sampled
from test_rewards import run_until
from test_rollouts import Killed, asking, equal, killed, tokens

from finetune import own_code
from finetune.config import reader
from finetune.config.rollout_fields import Rollouts as Settings
from finetune.data import chat_templates
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.errors import ConfigError, DataError
from finetune.generation.completions import Prompt
from finetune.models.load import bytes_tokenizer
from finetune.rollouts import episodes, group_examples
from finetune.rollouts.episodes import Environments, Episode
from finetune.rollouts.phases import Group
from finetune.rollouts.sampling import Drawn
from finetune.rollouts.shard_file import ShardFile
from finetune.rollouts.turns import Turns

pytestmark = pytest.mark.slow

ECHO = """
class Game:
    def reset(self, row):
        self.turn, self.row = 0, row

    def step(self, text):
        self.turn += 1
        if text == "quit":
            return [], 1.0, True
        return f"turn {self.turn}: {text}", 0.25, False
"""


def doc_example(language):
    """The first block in a language of the section "Environments" of docs/reinforcement.md."""
    page = (ROOT / "docs/reinforcement.md").read_text()
    section = page[page.index("## Environments") :]
    return re.search(rf"```{language}\n(.+?)```", section, re.DOTALL)[1]


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def template_of(tokenizer, name="chatml"):
    vocabulary = tokenizer.get_vocab()
    return chat_templates.load(name, "messages", None, tokenizer.special_tokens_map, vocabulary)


@pytest.fixture(scope="module")
def turns(tokenizer):
    return Turns(template_of(tokenizer), tokenizer, "error")


class Here:
    """Calls environments in this process, which costs no start of another."""

    def __init__(self, make, arguments, gap, **limits):
        self.call = make(*arguments)

    def open(self, stop):
        pass

    def close(self):
        pass

    def __call__(self, moves):
        return self.call(moves)

    def __class_getitem__(cls, of):
        return cls


@pytest.fixture
def play(tmp_path, tokenizer, turns, monkeypatch):
    """Returns episodes of groups, whose turns are scripted, in an environment by its source."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = []

    def write(text):
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], end]

    def playing(source, *groups, most=200, max_turns=4, seconds=None, rows=None):
        if seconds is None:
            monkeypatch.setattr(episodes, "Apart", Here)
        path = tmp_path / "game.py"
        path.write_text(source)
        code = own_code.read(f"{path}:{re.search('class ([A-Za-z]+)', source)[1]}")
        prompt = tokenizer("go", add_special_tokens=False)["input_ids"]
        made = [[Episode(prompt, np.full(most, 0.5)) for _ in texts] for texts in groups]
        scripts = [[write(text) for text in texts] for group in groups for texts in group]
        flat = [each for group in made for each in group]
        turn_of = dict.fromkeys(range(len(flat)), 0)

        def draw(prompts, numbers):
            found, playing = [], [n for n, each in enumerate(flat) if each.is_open]
            playing = [n for n in playing if [*flat[n].prompt, *flat[n].ids] in prompts]
            asked.append((prompts, numbers))
            for number in playing:
                ids = scripts[number][turn_of[number]]
                turn_of[number] += 1
                found.append(Drawn(tuple(ids), np.full(len(ids), -0.5, np.float32), "stop"))
            return found

        rows = rows or [{}] * len(groups)
        prompts = [
            Prompt(Conversation((Message("user", "go"),), Place("rows", 1)), None, row)
            for row in rows
        ]
        with Environments(code, turns, max_turns, seconds or 5.0, lambda: False) as found:
            failed = found.play(
                made, prompts, draw, lambda drawn: tokenizer.decode(drawn.ids[:-1]),
                lambda any: any, lambda: None,
            )  # fmt: skip
        return SimpleNamespace(
            groups=made, failed=failed, asked=asked, write=write, prompt=prompt,
            rollouts=[[e.rollout(why) for e in g] for g, why in zip(made, failed, strict=True)],
        )  # fmt: skip

    return playing


def test_only_the_models_own_tokens_are_supervised(play, tokenizer):
    """Each turn goes on from the ids before it, which nothing renders or tokenises again."""
    played = play(ECHO, [["hey", "quit"], ["quit"]])
    [long, short] = played.rollouts[0]
    assert long.own_ids == (*played.write("hey"), *played.write("quit"))
    said = "\n<|im_start|>user\nturn 1: hey<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(np.array(long.ids)[~long.is_own]) == said
    assert played.asked[1][0] == [[*played.prompt, *long.ids[: long.heard[0][1]]]]
    assert (long.given, short.given, long.text, long.finish_reason) == (1.25, 1.0, "quit", "stop")
    group = Group(0, "rows:1", tuple(played.prompt), (long, short)).scored(
        [{"reward": 1.0, "parts": {}}, {"reward": 0.0, "parts": {}}]
    )
    zeros = {"old_logprobs": np.zeros(len(long.own_ids) + len(short.own_ids), np.float32)}
    [group] = group_examples.with_values([group], [group], zeros, Settings())
    made = group_examples.examples_of([group], Settings())
    ids = made.input.ids[made.supervised]
    assert ids.tolist() == [*long.own_ids, *short.own_ids]
    scored = group_examples.scored([group], Settings())
    assert scored.ends.tolist() == np.cumsum([len(long.own_ids), len(short.own_ids)]).tolist()
    assert len(scored.sampler_logprobs) == len(scored.old_logprobs) == len(ids)


def test_a_model_that_writes_other_tokens_than_the_tokenizer_keeps_them(turns, tokenizer):
    """The template strips spaces, and would write other tokens for the same text."""
    episode = Episode([1], np.zeros(99))
    odd = (32, 32, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    episode.write(Drawn(odd, np.zeros(3, np.float32), "stop"), lambda drawn: "")
    episode.hear(turns.between([Message("user", "a")]))
    episode.write(Drawn(odd, np.zeros(3, np.float32), "stop"), lambda drawn: "")
    assert episode.rollout("").own_ids == odd + odd


@pytest.mark.parametrize("said", [["b"], ["b", "c"], ["caf\u00e9 <tag> {x}"]])
def test_what_is_said_has_the_tokens_of_a_whole_conversation(turns, tokenizer, said):
    template = template_of(tokenizer)
    messages = [Message("user", "a"), Message("assistant", "yes")]
    prompt = template.prompt(messages[:1]) + "yes<|im_end|>"
    whole = template.prompt([*messages, *(Message("user", each) for each in said)])
    ids = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in (prompt, whole)]
    assert ids[0] + turns.between([Message("user", each) for each in said]) == ids[1]


PLAIN = """{% for each in messages %}{{ each.role }}: {{ each.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
DEAF = """{% for each in messages if each.role in ("user", "assistant") %}{{ each.role }}:
{{ each.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def test_a_template_that_cannot_take_turns_is_an_error(tmp_path, tokenizer):
    files = [tmp_path / "plain.jinja", tmp_path / "deaf.jinja"]
    for path, source in zip(files, (PLAIN, DEAF), strict=True):
        path.write_text(source)
    plain, deaf = (template_of(tokenizer, str(path)) for path in files)
    with pytest.raises(ConfigError, match="environment: .* ends answers without a token"):
        Turns(plain, tokenizer, "error")
    turns = Turns(deaf, tokenizer, "error")
    with pytest.raises(DataError, match="leaves out '12' of the role tool; give it another role"):
        turns.between([Message("tool", "12")])
    turns = Turns(template_of(tokenizer, "question_answer"), tokenizer, "error")
    with pytest.raises(DataError, match="writes the role tool as an answer of the model"):
        turns.between([Message("tool", "12")])


def test_limits_hold_over_all_turns(play):
    own = len(play(ECHO, [["hey", "quit"]]).rollouts[0][0].ids)
    for most in range(1, own + 1):
        [[found]] = play(ECHO, [["hey", "quit"]], most=most).rollouts
        assert len(found.ids) <= most
        assert found.is_cut == (most < own)
        assert found.is_own[-1]
        assert len(found.own_ids) == len(found.sampler_logprobs)
    [[found]] = play(ECHO, [["a", "b", "quit"]], max_turns=2).rollouts
    assert (found.finish_reason, found.given, found.text) == ("length", 0.5, "b")


def test_each_token_is_drawn_at_its_place_whichever_turn_it_is_in(play):
    played = play(ECHO, [["hey", "quit"], ["quit"]])
    assert [numbers.shape for _, numbers in played.asked] == [
        (2, 200), (1, 200 - played.rollouts[0][0].heard[0][1]),
    ]  # fmt: skip


WRONG = """
import os, time

class Game:
    def reset(self, row):
        assert row.get("kind") != "reset", "no board"

    def step(self, text):
        if text == "hang":
            time.sleep(60)
        if text == "end":
            os._exit(3)
        return {"raise": 1, "bare": "x", "nan": ("a", float("nan"), False), "done": ("a", 1, 1),
                "silent": ([], 1.0, False),
                "role": ([{"role": "assistant", "content": "a"}], 1, True),
                "forge": ("<|im_end|>", 1, False), "fine": ("", 1, True)}[text]
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("oops", "game.py:13: KeyError: 'oops'"),
        ("bare", "step should return (messages, reward or None, done), got 'x'"),
        ("nan", "the reward should be a finite number or None, got nan"),
        ("done", "done should be True or False, got 1"),
        ("silent", "messages should be a text, or a list of {role, content}"),
        ("role", "with other roles than assistant, got [{'role': 'assistant'"),
        ("forge", "the environment:1: the text contains '<|im_end|>', a control token"),
        ("hang", "game.py:Game: over 0.5 s"),
        ("end", "game.py:Game: its process ended (3)"),
    ],
)  # fmt: skip
def test_an_environment_that_fails_is_named_and_costs_its_group_alone(play, text, reason):
    seconds = 0.5 if text in ("hang", "end") else None
    played = play(WRONG, [["fine"], [text]], [["fine"], ["fine"]], seconds=seconds)
    assert reason in played.failed[0]
    assert played.failed[0].startswith("environment: ")
    assert played.failed[1] == ""
    assert [each.given for each in played.rollouts[1]] == [1.0, 1.0]
    assert [each.given for each in played.rollouts[0]] == [None, None]


def test_a_reset_that_fails_is_named(play):
    played = play(WRONG, [["fine"]], [["fine"]], rows=[{"kind": "reset"}, {}])
    assert "AssertionError: no board" in played.failed[0]
    assert (played.rollouts[0][0].ids, played.failed[1]) == ((), "")
    opened = ECHO.replace("self.turn, self.row = 0, row", "return 'a board'")
    assert "reset should return None" in play(opened, [["quit"]]).failed[0]


def test_a_group_whose_environment_failed_is_played_again(tmp_path, play):
    played = play(WRONG, [["oops"]], [["fine"]])
    groups = [Group(n, "", (1,), tuple(each)) for n, each in enumerate(played.rollouts)]
    file = ShardFile(tmp_path, 0, "run")
    file.sampled(groups)
    file.close()
    again = ShardFile(tmp_path, 0, "run")
    again.close()
    assert [again.lacks(number) for number in range(3)] == [True, False, True]
    assert again.groups[1].rollouts[0].given == 1.0


def test_the_example_of_the_documentation(play):
    groups = [["<calc>3 * 4</calc>", "12"], ["13"]]
    played = play(doc_example("python"), groups, rows=[{"prompt": "3 times 4?", "answer": 12}])
    assert played.failed == [""]
    assert [each.given for each in played.rollouts[0]] == [1.0, 0.0]


@pytest.mark.proof
def test_the_config_of_the_documentation(workshop):
    (workshop.folder / "tools.py").write_text(doc_example("python"))
    rows = [{"prompt": "3 times 4?", "answer": 12}] * 16
    given = yaml.safe_load(doc_example("yaml"))
    given["data"]["train"] = str(write_jsonl(workshop.folder / given["data"]["train"], rows))
    settings = {f"{part}__{n}": v for part, values in given.items() for n, v in values.items()}
    shape = TINY_LLAMA | {"max_position_embeddings": 1024}
    workshop.check(**{**settings, "data__max_length": 1024, "model__config": shape})


# -------------------------------------------------------------------------------- by the config


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def Game(): pass", "is of type function, not a class with reset and step"),
        ("class Game:\n  def reset(self, row): pass", r"has no method step\(self, text\)"),
        ("class Game:\n  def reset(self): pass\n  def step(self, text): pass",
         r"reset\(self, row\) is what is called: too many positional arguments"),
        ("class Game:\n    def __init__(self, size): pass\n" + ECHO.split("Game:\n")[1],
         r"__init__\(self\) is what is called: missing a required argument: 'size'"),
    ],
)  # fmt: skip
def test_a_class_that_is_not_an_environment_is_an_error(tmp_path, source, message):
    path = tmp_path / "game.py"
    path.write_text(source)
    named = {"objective": {"kind": "grpo", "rollouts": {"environment": f"{path.name}:Game"}}}
    [problem] = reader._with_own_code(named, tmp_path)[1]
    assert re.search(f"objective.rollouts.environment: .*{message}", problem)


def test_a_config_finds_it_beside_itself_and_records_its_hash(tmp_path):
    (tmp_path / "game.py").write_text(ECHO)
    named = {"objective": {"kind": "grpo", "rollouts": {"environment": "game.py:Game"}}}
    values, wrong = reader._with_own_code(named, tmp_path)
    assert wrong == []
    found = values["objective"]["rollouts"]["environment"]
    assert found == f"{tmp_path / 'game.py'}:Game"
    settings = {"objective.rollouts": {"environment": found}}
    assert reader.own_names(settings) == {"objective.rollouts.environment": found}


SERVER = {"kind": "server", "url": "http://localhost:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("rollouts", "more", "message"),
    [
        ({"environment": "GAME", "engine": SERVER}, {}, "environment: a server continues one"),
        ({"max_turns": 3}, {}, "max_turns: would be ignored without environment"),
        ({}, {"rewards": [{"kind": "environment"}]}, "and there is none; name one"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_errors(workshop, rollouts, more, message):
    (workshop.folder / "game.py").write_text(ECHO)
    rollouts = {n: "game.py:Game" if v == "GAME" else v for n, v in rollouts.items()}
    with pytest.raises((ConfigError, DataError), match=message):
        workshop.check(**sampled.settings(workshop, rollouts=rollouts, **more))


# ------------------------------------------------------------------------------------- a run

FUSSY = """
class Words:
    def reset(self, row):
        self.row = row

    def step(self, text):
        if self.row["answer"] == "3":
            raise ValueError("no board")
        return "go on", float(len(text.split())), False
"""


def fussy_settings(workshop, **more):
    """A run on a random model, some of whose answers end; the environment fails for one row."""
    (workshop.folder / "game.py").write_text(FUSSY)
    rollouts = {"environment": "game.py:Words", "max_new_tokens": 50, "max_turns": 2}
    return sampled.settings(
        workshop, rewards=[{"kind": "environment", "weight": 0.5}, sampled.WORDS],
        rollouts=rollouts, **{"data__template": "chatml", "train__max_steps": 3, **more},
    )  # fmt: skip


@pytest.mark.proof
def test_a_run_learns_from_several_turns_and_names_what_failed(workshop, capsys):
    run = workshop.train(**fussy_settings(workshop))
    lines = read_jsonl(run / "metrics.jsonl")
    assert all(line["ratio"] == 1 for line in lines)
    assert [line["failed_groups"] for line in lines] == [0, 1, 0]
    assert re.search(r"1 of 4 groups are left out: environment: .*ValueError: no board",
                     capsys.readouterr().out)  # fmt: skip
    assert {"reward_environment", "reward_score"} <= lines[0].keys()
    found = [rollout for path in sorted(run.glob("rollouts/*.jsonl"))
             for line in read_jsonl(path)[1:-1] for rollout in line["rollouts"]]  # fmt: skip
    several = [each for each in found if "heard" in each]
    assert several
    for each in found:
        assert len(each["ids"]) <= 50
        own = len(each["ids"]) - sum(end - start for start, end in each.get("heard", ()))
        assert len(each["sampler_logprobs"]) == own
        if each["reward"] is not None:
            parts = each["parts"]
            assert each["reward"] == 0.5 * parts["environment"] + parts["score"]


@pytest.mark.proof
@pytest.mark.parametrize("ends_at", [1, 9])
def test_what_was_played_before_a_kill_is_never_played_again(workshop, tmp_path, ends_at):
    own = fussy_settings(workshop, checkpoint__every_steps=1)
    with asking() as undisturbed:
        run = workshop.train(**own)
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(run)
    with asking(ends_at, killed) as before, pytest.raises(Killed):
        workshop.train(**own)
    with asking() as after:
        workshop.train(**own)
    for one, two, whole in zip(before, after, undisturbed, strict=True):
        assert sorted(one + two) == sorted(whole)
    assert tokens(run) == tokens(tmp_path / "copy")
    assert equal(run, tmp_path / "copy")


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("topology", ["ddp", "fsdp2"])
def test_two_processes_play_like_one(workshop, topology):
    """Under FSDP2 each pass needs both, however many turns the episodes of each have."""
    from invariants.test_topologies import several

    own = fussy_settings(workshop, train__micro_batch_size=4)
    alone = workshop.train("alone", **own)
    path = workshop.write(workshop.config(topology, **own))
    launch = several(workshop.folder, "ddp", 2, f"topology:{topology}", path)
    assert launch.codes() == [0, 0], launch.output()
    assert tokens(workshop.run_dir(topology)) == tokens(alone)


@pytest.mark.proof
def test_a_request_to_stop_does_not_wait_for_an_environment(workshop, tmp_path):
    """What was under way is played again, and no group is lost."""
    seen = tmp_path / "seen"
    slow = (
        FUSSY.replace('raise ValueError("no board")', "self.wait()")
        + f"""
    def wait(self):
        import pathlib, time

        seen = pathlib.Path({str(seen)!r})
        if not seen.exists():
            seen.touch()
            time.sleep(500)
"""
    )
    own = fussy_settings(workshop)
    own["objective__rollouts"]["turn_seconds"] = 600.0
    (workshop.folder / "game.py").write_text(slow)
    assert run_until(workshop.write(workshop.config(**own)), seen.exists) == 75
    run = workshop.train(**own)
    assert [line["failed_groups"] for line in read_jsonl(run / "metrics.jsonl")] == [0, 0, 0]


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_other_policy_gradients_and_evaluations_play_too(workshop, kind):
    own = fussy_settings(workshop, data__eval_fraction=0.2, evaluation__every_steps=2)
    run = workshop.train(**own | {"objective__kind": kind, "objective__beta": 0.05})
    assert all(line["ratio"] == 1 for line in read_jsonl(run / "metrics.jsonl"))
    assert {"eval_loss", "reward_environment"} <= read_jsonl(run / "eval.jsonl")[-1].keys()


GAME = """
class Letters:
    def reset(self, row):
        self.turn = 0

    def step(self, text):
        self.turn += 1
        if self.turn == 2:
            return None, 0.5 * (text == "d"), True
        return "next", 0.5 * (text == "a"), False
"""


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A workshop with a model that answers a or b, and in the next turn c or d, by chance."""
    from conftest import Workshop

    workshop = Workshop(tmp_path_factory.mktemp("letters"))
    (workshop.folder / "game.py").write_text(GAME)
    turns = [("user", "go"), ("assistant", ""), ("user", "next"), ("assistant", "")]
    rows = [
        {"messages": [
            {"role": role, "content": text or ["ab", "cd"][turn // 2][number >> (turn // 2) & 1]}
            for turn, (role, text) in enumerate(turns)
        ]}
        for number in range(4)
    ]  # fmt: skip
    own = {"data__train": str(write_jsonl(workshop.folder / "chats.jsonl", rows))}
    base = workshop.train(
        "base", **own, data__template="chatml", train__max_steps=60, train__epochs=200
    )
    workshop.base = base / "model"
    return workshop


def game_settings(workshop, **more):
    rollouts = {
        "max_new_tokens": 40, "environment": "game.py:Letters", "max_turns": 3, "group_size": 4,
        **more.pop("rollouts", {}),
    }  # fmt: skip
    own = sampled.settings(
        workshop, rewards=[{"kind": "environment"}], rollouts=rollouts,
        **pretrained(workshop.base), **{"data__template": "chatml", **more},
    )  # fmt: skip
    rows = [{"prompt": "go"} for _ in range(8)]
    return own | {"data__train": str(write_jsonl(workshop.folder / "games.jsonl", rows))}


LEARNS = {
    "train__max_steps": 24, "train__epochs": 24, "optimizer__lr": 5e-3,
    "train__global_batch_size": 64, "rollouts": {"group_size": 8, "shard_size": 8},
}  # fmt: skip


@pytest.mark.proof
def test_a_game_of_two_turns_is_learned(letters):
    """First a, then d: half of the letters are right by chance."""
    run = letters.train("game", **game_settings(letters, **LEARNS))
    lines = read_jsonl(run / "metrics.jsonl")
    assert all(line["ratio"] == 1 for line in lines)
    assert lines[0]["reward"] < 0.75
    assert np.mean([line["reward"] for line in lines[-3:]]) > 0.9
