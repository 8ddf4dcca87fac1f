"""The house rules that a machine can see: width, words, and who may call the model."""

import ast
import re
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [ROOT / "train.py", *sorted(ROOT.glob("data_scripts/*.py"))]
CODE = [*SCRIPTS, *sorted(ROOT.glob("finetune/**/*.py"))]
TESTS = [*sorted(ROOT.glob("tests/**/*.py")), *sorted(ROOT.glob("benchmarks/**/*.py"))]
PAGES = [*sorted(ROOT.glob("docs/*.md")), *ROOT.glob("*.md"), ROOT / "benchmarks/LOG.md"]
# The words of docs/architecture.md and of PyTorch and Hugging Face stand for these.
NAMES = {
    "Job", "Wish", "wish", "finding", "learned", "look", "said", "say", "still", "targets",
    "tell", "told",
}  # fmt: skip
GAP = r"[\s#]+"  # between words, which may stand in two lines of a comment
PHRASES = re.compile(
    rf"\b(is|are){GAP}no{GAP}(?![\s#]|longer|more)\b|\b(is|are|be){GAP}told\b|\bfor{GAP}ever\b"
    rf"|\bso{GAP}many\b|\bnobody\b|\bwhoever\b|\bas{GAP}ever\b",
    re.IGNORECASE,
)
# In training, the model is called by the policy alone: it knows what processes share.
TRAINING = [ROOT / "finetune" / name for name in ("loop.py", "run.py", "run_rollouts.py")]
TRAINING += [*ROOT.glob("finetune/engine/**/*.py"), *ROOT.glob("finetune/objectives/*.py")]


def places(path: Path, numbers) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{number}" for number in numbers]


def names_in(path: Path):
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.NAME:
                yield token.string, token.start[0]


def test_lines_have_at_most_100_columns():
    long = [
        place
        for path in [*CODE, *TESTS]
        for number, line in enumerate(path.read_text().split("\n"), 1)
        if len(line) > 100
        for place in places(path, [number])
    ]
    assert not long


def test_names_are_the_fields_words():
    found = [
        place
        for path in CODE
        for name, line in names_in(path)
        if name in NAMES
        for place in places(path, [line])
    ]
    assert not found


def test_sentences_are_plain_english():
    found = [
        (place, match.group())
        for path in [*CODE, *TESTS, *PAGES]
        if path != Path(__file__)
        for match in PHRASES.finditer(path.read_text())
        for place in places(path, [path.read_text().count("\n", 0, match.start()) + 1])
    ]
    assert not found


def calls_of_a_model(source: str) -> list[int]:
    """Lines that call a model: by its name, as `x.forward(...)`, or as `unwrap(x)(...)`."""
    models, found = {"base", "bare", "engine", "model", "module", "whole"}, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = node.func
            name = getattr(called, "id", None) or getattr(called, "attr", None)
            is_forward = isinstance(called, ast.Attribute) and name == "forward"
            inner = called.func if isinstance(called, ast.Call) else None
            is_unwrapped = getattr(inner, "attr", getattr(inner, "id", None)) == "unwrap"
            if name in models or is_forward or is_unwrapped:
                found.append(node.lineno)
    return found


def test_only_the_policy_calls_the_model_in_training():
    for path in TRAINING:
        assert not calls_of_a_model(path.read_text()), path


@pytest.mark.parametrize(
    "call",
    ["model(x)", "state.model(x)", "engine(x)", "model.forward(x)", "topology.unwrap(model)(x)"],
)
def test_a_call_of_the_model_elsewhere_would_be_caught(call):
    assert calls_of_a_model(f"def step(topology, state, model, engine, x):\n    return {call}") == [
        2
    ]


def test_the_first_line_of_a_module_says_what_is_in_it():
    """docs/architecture.md lists packages alone, and shows how to list their files by this line."""
    for path in sorted(ROOT.glob("finetune/**/*.py")):
        line = path.read_text().split("\n", 1)[0]
        assert re.fullmatch(r'"""\S.*[.:]("""|)', line), f"{path}: {line}"
