"""An objective of a user's own, by FILE.py:NAME: its settings, its mistakes, its identity."""

import inspect
import re
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import read_jsonl
from invariants import objectives, sampled

from finetune import config as configs
from finetune import own_code, replay
from finetune.config.own import own_objective
from finetune.data.batches import Batch
from finetune.data.views import View
from finetune.errors import ConfigError, RunDirectoryError
from finetune.objectives import Objective, Own, Term

pytestmark = pytest.mark.slow

DFT = """
from finetune.objectives import Objective, Term
from pydantic import BaseModel, Field


class Dft(Objective):
    class Settings(BaseModel):
        beta: float = Field(1.0, ge=0)
        names: list[str] = []

    def loss(self, policy, batch, settings, prepared):
        logprobs = policy(batch, {"logprobs"}).logprobs
        weights = settings.beta * logprobs.exp().detach()
        return [Term("loss", -(weights * logprobs).sum(), per="tokens")]


dft = Dft()
number = 3
"""
LOSS = (
    "from finetune.objectives import Objective, Term\nclass Own(Objective):\n"
    "    def loss(self, policy, batch, settings, prepared):\n        "
)
NLL = "policy(batch, {'nll'}).nll"


@pytest.fixture
def own(workshop):
    """Write a file of the user's own next to the config; gives how a config names what is in it."""

    def own(source: str, name: str = "Own", file: str = "own.py") -> str:
        (workshop.folder / file).write_text(source)
        return f"{file}:{name}"

    return own


@pytest.fixture
def refusal(workshop):
    """The problems of a config with an objective of one's own."""

    def refusal(kind: str, **settings) -> str:
        with pytest.raises(ConfigError) as caught:
            configs.from_dict(
                workshop.config(objective__kind=kind, **settings), folder=workshop.folder
            )
        return str(caught.value).replace(f"{own_code.shown(workshop.folder)}/", "")

    return refusal


BATCH = Batch(
    dict.fromkeys(("input_ids", "position_ids"), torch.zeros(1, 9, dtype=torch.int64)),
    labels=torch.arange(5), positions=torch.arange(5), document=torch.tensor([0, 0, 0, 1, 1]),
    example=torch.tensor([0, 1]), ends=torch.tensor([4, 8]), lengths=(5, 4), num_documents=2,
    counts={"tokens": 5, "documents": 2, "examples": 2, "input_tokens": 9},
)  # fmt: skip


FILLER = Batch(
    {"input_ids": torch.zeros(1, 2, dtype=torch.int64)},
    **dict.fromkeys(("labels", "positions", "document", "example", "ends"), torch.zeros(0).long()),
    lengths=(2,), counts={"tokens": 0, "documents": 0, "examples": 0, "input_tokens": 0},
)  # fmt: skip


def rehearse(
    kind: str, batch: Batch = BATCH, filler: Batch = FILLER, *, has_adapters: bool = False
) -> None:
    settings = own_objective(kind)(kind=kind)
    Own(settings).rehearse(batch, filler, settings, has_adapters)


@pytest.mark.parametrize("name", ["Dft", "dft"])
def test_a_class_or_an_object_of_a_file_next_to_the_config_trains(workshop, own, name):
    run = workshop.train(objective__kind=own(DFT, name), objective__beta=0.5, train__max_steps=2)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    kind = f"{workshop.folder}/own.py:{name}"
    assert saved["objective"] == {"kind": kind, "beta": 0.5, "names": []}
    code = workshop.receipt()["identity"][f"code of objective.kind: own.py:{name}"]
    assert code == own_code.get(saved["objective"]["kind"]).sha256


def test_an_importable_module_is_written_with_dots(workshop, monkeypatch):
    package = workshop.folder / "losses"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "dft.py").write_text(DFT)
    monkeypatch.syspath_prepend(str(workshop.folder))
    configs.from_dict(workshop.config(objective__kind="losses.dft:Dft"))
    code = own_code.get("losses.dft:Dft")
    (package / "__init__.py").write_text("# another file of the package\n")
    assert own_code.sha256("losses.dft:Dft") != code.sha256


def test_settings_are_checked_like_those_of_every_section(workshop, own, refusal):
    kind = own(DFT, "Dft")
    message = refusal(kind, objective__bta=1.0)
    assert "objective.beta: should be" not in message
    for settings, says in (
        ({"bta": 1.0}, "objective.bta: unknown key; did you mean objective.beta?"),
        ({"beta": "x"}, "objective.beta: should be a valid number, got 'x'"),
        ({"beta": -1}, "objective.beta: should be greater than or equal to 0, got -1"),
        ({"label_smoothing": 0.1}, "objective.label_smoothing: objective.kind is"),
    ):
        given = {f"objective__{name}": value for name, value in settings.items()}
        assert says in refusal(kind, **given)


def test_the_command_line_knows_its_settings(workshop, own):
    source = DFT.replace("names: list[str] = []", "names: list[str] = Field(default_factory=list)")
    path = str(workshop.write(workshop.config(objective__kind=own(source, "Dft"))))
    config, _ = configs.parse(
        ["--config", path, "--objective.beta", "0.25", "--objective.names=[a, b]"]
    )
    assert (config.objective.beta, config.objective.names) == (0.25, ["a", "b"])
    with pytest.raises(
        ConfigError, match="--objective.bta: unknown option; did you mean objective.beta?"
    ):
        configs.parse(["--config", path, "--objective.bta", "0.25"])


def test_a_file_is_found_beside_the_config_and_from_here(workshop, own, monkeypatch, tmp_path):
    own(DFT)
    (workshop.folder / "elsewhere").mkdir()
    monkeypatch.chdir(workshop.folder / "elsewhere")
    assert own_code.find("own.py:Dft", workshop.folder) == f"{workshop.folder}/own.py:Dft"
    Path("own.py").write_text(DFT)
    with pytest.raises(
        ConfigError, match=r"own\.py is in .* and in .*elsewhere; write the full path"
    ):
        own_code.find("own.py:Dft", workshop.folder)
    (workshop.folder / "own.py").unlink()
    assert own_code.find("own.py:Dft", workshop.folder) == f"{workshop.folder}/elsewhere/own.py:Dft"


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        ("def f(:", "Own", "own.py:1: SyntaxError: invalid syntax"),
        ("import math\n\nmath.sqrt(-1)", "Own", "own.py:3: ValueError: "),
        ("import sys\nsys.exit(3)", "Own", "own.py:2: SystemExit: 3"),
        (
            "import no_such_module_here", "Own",
            "own.py:1: ModuleNotFoundError: No module named 'no_such_module_here'; install it, or",
        ),
        (DFT, "dtf", "own.py defines no dtf; did you mean Dft?"),
        (
            DFT, "number",
            "own.py:number is of type int, not an objective; "
            "derive it from finetune.objectives.Objective",
        ),
        ("class Own: ...", "Own", "own.py:Own is the class Own, not an objective; derive it from"),
        (
            LOSS + "...\n    Settings = 3", "Own",
            "own.py:Own: Settings should be a pydantic.BaseModel, got 3",
        ),
        *(
            (
                DFT.replace("names:", f"{name}:"), "Dft",
                f"own.py:Dft: Settings has a field {name}, which {use}; rename it",
            )
            for name, use in {
                "kind": "names objectives", "code": "the trainer uses itself",
                "objective": "the trainer uses itself",
            }.items()
        ),
        (LOSS + "...\n    def __init__(self, a): ...", "Own", "own.py: TypeError: "),
        (
            LOSS + "...\n    needs = {'rewards'}", "Own",
            "own.py:Own: needs names rewards; a policy can get heads for scores, values",
        ),
        (
            LOSS + "...\n    needs = 'scores'", "Own",
            "own.py:Own: needs should be a set, as {'scores'}, got 'scores'",
        ),
        (
            LOSS + "...\n    samples = True", "Own",
            "own.py:Own: samples is True, so Settings needs a field `rollouts: Rollouts`",
        ),
        (
            DFT.replace("names: list[str]", "rollouts: list[str]"), "Dft",
            "own.py:Dft: Settings has a field rollouts, so set samples to True, or rename it",
        ),
        (
            LOSS + "...\n    needs = None", "Own",
            "own.py:Own: needs should be a set, as {'scores'}, got None",
        ),
    ],
)  # fmt: skip
def test_a_file_that_gives_no_objective_is_refused_with_its_line(own, refusal, source, name, says):
    message = refusal(own(source, name), train__max_stps=3)
    assert f"objective.kind: {says}" in message
    assert "train.max_stps: unknown key" in message, "every problem is reported at once"


def test_a_missing_file_is_refused_with_the_folders_searched(workshop, own, refusal):
    own(DFT)
    message = refusal("onw.py:Dft")
    assert (
        f"objective.kind: no file onw.py in {workshop.folder} or in {Path.cwd()}; did you mean "
        in message
    )
    assert "own.py?" in message
    assert "or FILE.py:NAME, got 'own.py'" in refusal("own.py")
    assert "no module no.such.module can be imported here" in refusal("no.such.module:Own")
    long = f"objective.kind: {'o' * 100}... cannot be a file: File name too long; correct the path"
    assert long in refusal(f"{'o' * 5000}.py:Own")
    assert "FILE.py:NAME, got 'own.py:Dft\\n'" in refusal("own.py:Dft\n")


NLL, LOGPROBS = "policy(batch, {'nll'}).nll", "policy(batch, {'logprobs'}).logprobs"


def term(value=NLL, more="per='tokens'"):
    """Return the last line of a loss of one term, whose sum is `value`."""
    return f"return [Term('loss', {value}, {more})]"


def prepare(line):
    """Return an empty loss, and a `prepare` of this line."""
    return f"...\n    def prepare(self, policy, batches, settings):\n        {line}"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 1 / 0", "own.py:4: ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "own.py:4: SystemExit"),
        (
            "return batch.columns['margin']",
            "own.py:4: NoColumn: no column 'margin'; batch.columns has [], the fields that the "
            "function of data.format returns",
        ),
        (
            "return policy(batch, {'logits'}).nll",
            "own.py:4: ValueError: a policy cannot be asked for logits",
        ),
        ("policy.without_adapters()", "own.py:4: ValueError: all weights are trained"),
        (
            "policy(batch, {'scores', 'nll'})",
            "own.py:4: ValueError: the policy has no head for scores; add 'scores' to the needs of "
            "your objective",
        ),
        (
            "policy(batch, {'divergence'})",
            "own.py:4: ValueError: divergence and reference come together; give both or neither",
        ),
        (
            "r = policy(batch, {'distribution'}).distribution\n"
            "        policy(batch, {'divergence'}, reference=r, beta=2)",
            "own.py:5: ValueError: beta is between 0 and 1, got 2",
        ),
        (f"return {NLL}", "own.py:3: loss should return a list of terms, got the tensor"),
        (f"return ['x', Term('loss', {NLL}, per='tokens')]", "item 0 is a str"),
        ("return []", "own.py:3: loss returns no terms; for an empty batch return sums of 0"),
        (
            term(more="per='tokens', weight=0"),
            "own.py:3: loss returns only terms of weight 0",
        ),
        (term(more="per='tokens', weight='2'"), "weight should be a number"),
        (
            term(more="per='token'"),
            "own.py:3: loss term 'loss': nothing counts 'token'; per should be tokens",
        ),
        (
            term(LOGPROBS),
            "own.py:3: loss term 'loss': sum should be a tensor of one number, got a tensor "
            "of shape [",
        ),
        (
            term("3.0"),
            "own.py:3: loss term 'loss': sum should be a tensor of one number, got a float",
        ),
        (
            term(f"{NLL}.detach()"), "own.py:3: loss does not depend on what the policy answers",
        ),
        (
            term(f"{LOGPROBS}.log().sum()"),
            "own.py:3: loss term 'loss' is nan for log-probabilities",
        ),
        (f"{term()} * 2", "own.py:3: loss term 'loss': two terms have this name"),
        (
            f"return [Term('lr', {NLL}, per='tokens')]",
            "own.py:3: loss term 'lr': the logs have a column of this name",
        ),
        (
            f"return [Term('cross_entropy', {NLL}, per='tokens')]",
            "the logs have a column of this name",
        ),
        (
            prepare("return [1]"), "own.py:5: prepare should return a dict of names and tensors",
        ),
        (
            prepare(f"return {{'tokens': {NLL.replace('batch', 'batches[0]')}}}"),
            "own.py:5: prepare gives 'tokens', which is counted already",
        ),
        (
            prepare("return {'n': 0.0 * batches[0].labels.sum()}").replace(
                "...", term(more="per='n'")
            ),
            "counts 0 of 'n', which divides a sum",
        ),
        (
            "...\n    def supervises(self, loss_on):\n        return 'nothing'",
            "own.py:Own: supervises should return one of completion, each_turn, last_turn, all, "
            "got 'nothing'",
        ),
        # A process without a sequence has no first token.
        (term(f"{LOGPROBS}.sum() + 0 * {LOGPROBS}[0]"), "own.py:4: "),
        (
            term(f"-{LOGPROBS}.mean() * len(batch.labels)", "per='documents'"),
            "for a batch without supervised tokens",
        ),
        (
            term(f"-{LOGPROBS}.mean()", "per='documents'"),
            "add up with .sum(), not with .mean()",
        ),
        (
            f"names = ['a'] if len(batch.labels) else []\n"
            f"        return [Term('loss', {NLL}, per='tokens'), *(Term(n, {NLL}, per='tokens', "
            "weight=0.0) for n in names)]",
            "return the same names, units and weights for every batch",
        ),
        (
            f"also = policy(batch, {{'entropy'}}) if len(batch.labels) else None\n"
            f"        {term()}",
            "asks the policy for [['entropy'], ['nll'], ['entropy'], ['nll']], and for [['nll'], "
            "['nll']] for a batch without supervised tokens, as a process gets with no sequence "
            "left; ask the same of every batch",
        ),
        (
            term(more="per='tokens', weight=float(len(batch.labels) + 1)"),
            "return the same names, units and weights for every batch",
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_an_objective_is_found_before_weights_are_loaded(workshop, own, body, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        rehearse(f"{workshop.folder}/{own(LOSS + body)}")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "return [Term('loss', nll / max(len(batch.labels), 1), per='tokens')]",
            "loss term 'loss' is 2.75 for a batch, and 5.5 for its two halves",
        ),
        (
            "return [Term('loss', nll, per='tokens'),\n"
            "            Term('most', nll.sum().clamp(max=1.0), per='tokens', weight=0)]",
            "loss term 'most' is 1 for a batch, and 2 for its two halves",
        ),
        (
            "return [Term('loss', nll / prepared['n'].clamp(min=1), per='n')]\n\n"
            "    def prepare(self, policy, batches, settings):\n"
            "        return {'n': sum((each.labels >= 0).sum() for each in batches)}",
            "loss term 'loss' is",
        ),
        (
            "return [Term('loss', nll, per='n')]\n\n"
            "    def prepare(self, policy, batches, settings):\n"
            "        return {'n': batches[0].labels.new_ones(())}",
            "prepare gives 'n', which is 1 for a batch, and 2 for its two halves",
        ),
        (
            "return [Term('loss', nll, per='tokens')]\n\n"
            "    def evaluate(self, policy, batch, settings, prepared):\n"
            "        nll = policy(batch, {'nll'}).nll\n"
            "        return [Term('loss', nll / max(len(batch.labels), 1), per='tokens')]",
            "evaluate term 'loss' is",
        ),
    ],
    ids=["mean", "clamp", "divided twice", "prepared", "evaluate"],
)
def test_a_value_that_is_not_a_sum_is_refused(workshop, own, body, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        rehearse(f"{workshop.folder}/{own(LOSS + f'nll = {NLL}; {body}')}")
    assert re.search(r"add up with \.sum\(\), |where a sum doubles", str(caught.value))


def test_a_mean_whose_value_is_zero_is_refused_for_its_gradient(workshop, own):
    """As in policy gradients, where each probability is divided by itself."""
    body = f"l = {LOGPROBS}; {term('(l - l.detach()).sum() / max(len(l), 1)')}"
    with pytest.raises(ConfigError, match=r"own\.py:3: loss has other gradients for a batch than"):
        rehearse(f"{workshop.folder}/{own(LOSS + body)}")


def test_a_comparison_inside_a_batch_is_refused_and_with_the_whole_step_is_not(workshop, own):
    body = (
        "l = policy(batch, {{'logprobs'}}).logprobs; x = l.detach()\n"
        f"        {term('-(({}) * l).sum()')}"
    )
    inside = own(LOSS + body.format("x - x.sum() / max(len(x), 1)"))
    with pytest.raises(ConfigError, match=r"own\.py:3: loss .* compare with nothing else of the"):
        rehearse(f"{workshop.folder}/{inside}")
    whole = own(
        LOSS + body.format("x - prepared['sum'] / (prepared['n'] - 1)") + "\n\n"
        "    def prepare(self, policy, batches, settings):\n"
        "        all = [policy(each, {'logprobs'}).logprobs for each in batches]\n"
        "        return {'sum': sum(x.sum() for x in all), 'n': sum((x < 1).sum() for x in all)}"
    )
    rehearse(f"{workshop.folder}/{whole}")


def answers_of_an_objective():
    """What a user's objective answers with, by the name of each public member."""
    one, numbers = torch.tensor(1.0), np.ones(5)
    terms = [Term("loss", one, "tokens")]
    return {
        "has_turns": False, "needs": {"scores", "reference"}, "heads": {"scores"}, "samples": True,
        "asks": {"entropy"}, "shares_beginnings": True,
        "learns_rewards": False, "reports_cross_entropy": True, "prepares": True,
        "mismatches": True, "notes": ["a note"], "supervises": "last_turn", "view": View(),
        "remark": lambda terms: f"kl {terms['kl']}", "runs_away": "too far",
        "scored_by": {"values"}, "wants_reference": True, "wants_teacher": True,
        "columns": ({"gain": numbers}, {"a": 1.0}),
        "prepare": {"n": one}, "loss": terms,
        "evaluate": [*terms, Term("cross_entropy", one, "tokens", weight=0.0)],
    }  # fmt: skip


def test_nothing_that_an_objective_of_ones_own_says_is_lost():
    """A new member of Objective fails here until `Own` passes it on."""
    answers = answers_of_an_objective()
    members = {name for name in dir(Objective) if not name.startswith("_")} - {"Settings"}
    assert answers.keys() == members

    class Everything(Objective):
        pass

    def giving(answer):
        return lambda *_: answer

    for name, answer in answers.items():
        is_method = inspect.isfunction(getattr(Objective, name))
        setattr(Everything, name, giving(answer) if is_method else answer)
    del Everything.heads, Everything.prepares  # they follow from the others
    section = types.SimpleNamespace(code=own_code.OwnCode, objective=Everything())
    own, batch = Own(section), BATCH
    given = {
        "policy": None, "batch": batch, "batches": [batch], "loss_on": "completion",
        "terms": {"kl": 3.0}, "prepared": {}, "encoding": None,
        "scored": types.SimpleNamespace(lengths=np.array([5])),
        "columns": {}, "settings": None,
    }  # fmt: skip
    for name, answer in answers.items():
        found = getattr(own, name)
        if callable(found):
            with torch.no_grad():
                found = found(*(given[each] for each in inspect.signature(found).parameters))
        if name == "remark":
            found, answer = found({"kl": 3.0}), "kl 3.0"
        assert found == answer, name


def test_a_mistake_in_what_an_objective_says_while_it_trains_has_its_line(workshop, own):
    methods = {
        "view": "self, settings, encoding", "remark": "self", "mismatches": "self, settings",
        "notes": "self, settings, columns",
    }  # fmt: skip
    for name, parameters in methods.items():
        body = f"{term()}\n\n    def {name}({parameters}):\n        return 1 / 0"
        with pytest.raises(ConfigError, match=r"own\.py:7: ZeroDivisionError"):
            workshop.check(objective__kind=own(LOSS + body))
    body = f"{term()}\n\n    def view(self, settings, encoding):\n        return 3"
    with pytest.raises(ConfigError, match=r"own\.py:6: view should return a View, got a int"):
        workshop.check(objective__kind=own(LOSS + body))


@pytest.mark.parametrize("name", objectives.SETTINGS)
def test_a_sum_of_documents_pairs_or_tokens_is_not_refused(name):
    pair = replace(
        BATCH, example=torch.tensor([0, 0]), counts={**BATCH.counts, "examples": 1},
        columns={"margin": torch.full((2,), 0.1)},
    )  # fmt: skip
    filler = replace(FILLER, columns={"margin": torch.zeros(0)})
    own = objectives.SETTINGS[name]
    rehearse(own["objective__kind"], pair, filler, has_adapters="adapter__kind" in own)


def test_a_check_rehearses_the_objective(workshop, own):
    with pytest.raises(
        ConfigError, match=r"objective.kind: .*own\.py:4: ZeroDivisionError: division by zero"
    ):
        workshop.check(objective__kind=own(LOSS + "return 1 / 0"))


def test_an_error_in_a_later_batch_ends_the_run_with_its_line(workshop, own):
    count = "self.calls = getattr(self, 'calls', 0) + 1"
    body = f"{count}\n        {term()} if self.calls < 15 else 1 / 0"
    with pytest.raises(ConfigError, match=r"objective.kind: .*own\.py:5: ZeroDivisionError"):
        workshop.train(objective__kind=own(LOSS + body))
    assert workshop.outcome()["state"] == "failed"


def test_without_a_finite_evaluation_none_is_called_the_best(workshop, own, capsys):
    """The rehearsal, which evaluates seven times, finds nothing."""
    body = (
        f"return [Term('loss', {NLL}, per='tokens')]\n\n"
        "    def evaluate(self, policy, batch, settings, prepared):\n"
        "        self.calls = getattr(self, 'calls', 0) + 1\n"
        f"        return [Term('loss', {NLL} * (1 if self.calls < 8 else float('nan')), 'tokens')]"
    )
    workshop.train(
        objective__kind=own(LOSS + body), data__eval_fraction=0.2, train__max_steps=4,
        evaluation__every_steps=1, evaluation__patience=2, evaluation__export_best=True,
    )  # fmt: skip
    outcome = workshop.outcome()
    assert outcome["exported_step"] == outcome["step"] == 3
    assert outcome["reason"] == (
        "stopped early, of 4 steps, because no evaluation loss was finite; the last weights, of "
        "step 3, exported and verified"
    )
    note = "note: no evaluation loss was finite, so none is best; exporting the last weights"
    assert note in capsys.readouterr().out


def test_settings_that_are_not_plain_values_are_refused(own, refusal):
    source = DFT.replace("names: list[str] = []", "names: object = BaseModel")
    assert "objective: these settings cannot be written to config.yaml" in refusal(
        own(source, "Dft")
    )


def test_a_resumption_with_another_file_is_refused_by_its_name(workshop, own):
    kind = own(DFT, "Dft")
    short = {"checkpoint__every_steps": 2, "objective__kind": kind}
    workshop.train(**short)
    own(DFT.replace("logprobs.exp()", "logprobs.exp().sqrt()"))
    with pytest.raises(
        RunDirectoryError,
        match=r"what differs:\n  code of objective.kind: own.py:Dft: was \w+, now \w+",
    ):
        workshop.train(**short)
    moved = workshop.folder / "moved"
    moved.mkdir()
    (moved / "own.py").write_text(DFT)
    workshop.train(**short | {"objective__kind": f"{moved}/own.py:Dft"})  # complete, and the same


def test_a_replay_executes_only_the_file_of_the_receipt(workshop, own, monkeypatch, capsys):
    run = workshop.train(objective__kind=own(DFT, "Dft"))
    arguments = type("Arguments", (), {"run": run, "name": None})
    monkeypatch.setattr(replay.launcher, "run", lambda environments, command: 7)
    assert replay.main(arguments) == 7
    assert (
        "note: this executes own.py:Dft, which has the content that"
        in capsys.readouterr().out.replace(f"{own_code.shown(workshop.folder)}/", "")
    )
    own("raise SystemExit('executed')")
    with pytest.raises(
        RunDirectoryError, match=r"own\.py.* is not the file that .* ran with: its sha256 was"
    ):
        replay.main(arguments)
    (workshop.folder / "own.py").unlink()
    with pytest.raises(RunDirectoryError, match=r"objective.kind: no file .*own\.py"):
        replay.main(arguments)


def test_an_error_inside_the_model_is_not_called_the_users(workshop, own, monkeypatch):
    from finetune.models import head

    def broken(*_):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(head, "_of_states", broken)
    monkeypatch.setattr(head, "check", lambda *_: None)
    kind = own(LOSS + term())
    with pytest.raises(RuntimeError, match="a bug of ours"):
        workshop.train(objective__kind=kind)


def test_a_loss_of_several_terms_is_logged_beside_each(workshop, own):
    terms = "[Term('loss', nll, per='tokens'), Term('b', nll, per='tokens')]"
    body = f"nll = {NLL}\n        return {terms}"
    run = workshop.train(objective__kind=own(LOSS + body), train__max_steps=1)
    [line] = read_jsonl(run / "metrics.jsonl")
    assert line["loss"] == pytest.approx(line["loss_term"] + line["b"])


def test_a_file_that_changes_the_working_directory_moves_no_path(workshop, own, monkeypatch):
    monkeypatch.chdir(workshop.folder)
    moves = "import os, tempfile\nos.chdir(tempfile.mkdtemp())\n"
    kind = own(moves + LOSS + term())
    workshop.check(objective__kind=kind, data__train=workshop.rows.name)
    assert Path.cwd() == workshop.folder


def test_an_objective_that_edits_its_batch_does_not_change_what_is_measured(workshop, own):
    kind = own(f"{LOSS}batch.labels.fill_(1)\n        {term()}")
    run = workshop.train(objective__kind=kind, train__max_steps=1, data__eval_fraction=0.2)
    [line] = read_jsonl(run / "eval.jsonl")
    assert line["cross_entropy"] != pytest.approx(line["eval_loss"], rel=1e-3)


def test_a_metric_that_is_not_finite_is_no_divergence(workshop, own):
    """A term of weight 0 counts for nothing, in training and in evaluation."""
    body = (
        "self.calls = getattr(self, 'calls', 0) + 1\n"
        f"        nll, bad = {NLL}, float('nan' if self.calls > 14 else 1)\n"
        "        return [Term('loss', nll, 'tokens'), Term('m', bad * nll.detach(), 'tokens', 0)]"
    )
    run = workshop.train(
        objective__kind=own(LOSS + body), data__eval_fraction=0.2, evaluation__every_steps=1,
        train__max_steps=1,
    )  # fmt: skip
    assert read_jsonl(run / "metrics.jsonl")[0]["m"] is None
    assert read_jsonl(run / "eval.jsonl")[0]["eval_loss"] is not None


@pytest.mark.slow
def test_an_evaluation_prepares_over_the_rows_of_a_step_however_it_is_cut_up(workshop, own):
    """As KTO's z: what is prepared enters each loss, so another step would be another loss."""
    kind = own(
        "import torch\nfrom finetune.objectives import Objective, Term\n\n\n"
        "class Own(Objective):\n"
        "    def prepare(self, policy, batches, settings):\n"
        "        found = [policy(each, {'logprobs'}).logprobs for each in batches]\n"
        "        count = sum(len(each.labels) for each in batches)\n"
        "        total = sum(each.sum() for each in found)\n"
        "        return {'sum': total, 'count': torch.tensor(count)}\n\n"
        "    def loss(self, policy, batch, settings, prepared):\n"
        "        z = prepared['sum'] / prepared['count'].clamp(min=1)\n"
        "        logprobs = policy(batch, {'logprobs'}).logprobs\n"
        "        return [Term('loss', -torch.sigmoid(logprobs - z).sum(), per='tokens')]\n"
    )
    found = []
    for size in (1, 8):
        run = workshop.train(
            f"at_once_{size}", objective__kind=kind, data__eval_fraction=0.5, train__max_steps=1,
            evaluation__micro_batch_size=size,
        )  # fmt: skip
        found.append(read_jsonl(run / "eval.jsonl")[-1]["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_terms_may_not_change_during_a_run(workshop, own):
    """Each step has one micro-batch here, so that steps are compared."""
    body = (
        "self.calls = getattr(self, 'calls', 0) + 1\n"
        f"        return [Term('loss', {NLL}, 'tokens', 1.0 if self.calls < 17 else 5.0)]"
    )
    with pytest.raises(ConfigError, match="the same names, units and weights for every batch"):
        workshop.train(
            objective__kind=own(LOSS + body), train__micro_batch_size=8, train__max_steps=9,
            train__epochs=9,
        )  # fmt: skip


@pytest.mark.proof
def test_an_objective_of_ones_own_learns_completions_without_rewards(workshop, own):
    """All rewards are equal, and no log-probabilities are asked for before the first step."""
    kind = own(
        "import numpy as np\nfrom pydantic import BaseModel\n"
        "from finetune.config.reward_fields import RewardList\n"
        "from finetune.config.rollout_fields import Rollouts\n"
        "from finetune.objectives import Objective, Term\n\n\n"
        "class Own(Objective):\n"
        "    samples, learns_rewards = True, False\n\n"
        "    class Settings(BaseModel):\n"
        "        rewards: RewardList\n"
        "        rollouts: Rollouts\n\n"
        "    def scored_by(self, settings):\n"
        "        return frozenset()\n\n"
        "    def columns(self, scored, settings):\n"
        "        return {'gain': scored.of_tokens(1.0 / scored.lengths)}, {}\n\n"
        "    def loss(self, policy, batch, settings, prepared):\n"
        "        logprobs = policy(batch, {'logprobs'}).logprobs\n"
        "        total = -(batch.token_columns['gain'] * logprobs).sum()\n"
        "        return [Term('loss', total, per='documents')]\n"
    )
    equal = [{"kind": "contains", "text": "no answer says this"}]
    run = workshop.train(
        **sampled.settings(workshop, kind, rewards=equal, train__max_steps=2), name="sampled"
    )
    assert [line["reward"] for line in read_jsonl(run / "metrics.jsonl")] == [0, 0]
