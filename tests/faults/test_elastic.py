"""A run continues on another number of processes or topology, and ends with the same weights."""

import shutil
from pathlib import Path

import pytest
from conftest import TINY_LLAMA, Workshop, read_jsonl
from faults.forked import Launch, forget, long_form, start, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = {
    "train__max_steps": 8, "train__epochs": 9, "train__micro_batch_size": 2,
    "checkpoint__every_steps": 4, "checkpoint__keep_last": 9,
    "model__config": {**TINY_LLAMA, "tie_word_embeddings": True}, "data__eval_fraction": 0.2,
    "optimizer__weight_decay": 0.1,
}  # fmt: skip
METHODS = {
    "full": {},
    "lora": {
        "adapter__kind": "lora",
        "model__init": "pretrained",
        "model__config": None,
        "model__tokenizer": None,
    },
    "lion": {"optimizer__kind": "lion", "optimizer__lr": 1e-3},
    "averaged": {"train__ema_decay": 0.9},
}


def around(*places: tuple[str, int]) -> list:
    return list(zip(places, [*places[1:], places[0]]))


SHORT = [((("single", 1), ("fsdp2", 2)), "full"), ((("zero2", 2), ("zero1", 1)), "full")]
LONG = [
    ((("fsdp2", 2), ("ddp", 2)), "lora"),
    ((("ddp", 2), ("fsdp2", 2)), "averaged"), ((("zero3", 1), ("zero3", 2)), "full"),
    *((move, "full") for move in around(("ddp", 2), ("fsdp2", 4), ("single", 1))),
    *((move, "full") for move in around(("zero1", 1), ("zero2", 2), ("zero2", 4))),
    *((move, "full") for move in around(("zero3", 2), ("zero3", 4), ("zero3", 1))),
    ((("fsdp2", 2), ("single", 1)), "averaged"),
    *((move, "lora") for move in [(("zero2", 2), ("zero2", 1)), (("zero3", 2), ("zero3", 1))]),
]  # fmt: skip
MOVES = [*SHORT, *(pytest.param(*each, marks=long_form) for each in LONG)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("elastic"))
    launched(workshop, "base", ("single", 1), {**SETTINGS, "train__max_steps": 3})
    return workshop


def launched(
    workshop: Workshop, name: str, where: tuple[str, int], settings: dict, *arguments: str
) -> Launch:
    launch = start(workshop.write(workshop.config(name, **settings)), *where, *arguments)
    assert launch.codes() == [0] * where[1], launch.output()
    return launch


def copy_of(run: Path, folder: Path, step: int) -> Path:
    """A run elsewhere, as if the machine had gone after the checkpoint of a step."""
    shutil.copytree(run, folder / run.name)
    forget(folder / run.name, step)
    return folder / run.name


@pytest.mark.parametrize(
    ("move", "method"),
    MOVES,
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{t}{n}" for t, n in v),
)
def test_a_run_resumes_under_another_topology(shop, tmp_path, move, method):
    before, after = move
    settings = SETTINGS | METHODS[method]
    if method == "lora":
        settings["model__path"] = str(shop.run_dir("base") / "model")
    name = f"{method}-{before[0]}-{before[1]}"
    if not shop.run_dir(name).exists():
        launched(shop, name, before, settings)
    moved = copy_of(shop.run_dir(name), tmp_path, 4)
    launch = launched(shop, name, after, settings, "--run.dir", str(tmp_path))
    assert "at step 4" in launch.output()
    one, other = (read_jsonl(run / "metrics.jsonl") for run in (shop.run_dir(name), moved))
    assert [line["step"] for line in other] == list(range(1, 9))
    # Sums in another order, as in tests/invariants.
    for what, part in (("loss", 1e-5), ("grad_norm", 1e-4)):
        expected = pytest.approx([line[what] for line in one], rel=part)
        assert [line[what] for line in other] == expected
    whole, parts = (weights(run) for run in (shop.run_dir(name), moved))
    assert max(float((whole[n] - parts[n]).abs().max()) for n in whole) < 1e-4


@pytest.mark.parametrize(
    ("before", "after", "method", "says"),
    [("zero2", "ddp", "full", "was saved by zero2, and this is ddp"), pytest.param(
        "fsdp2", "zero3", "full", "was saved by fsdp2, and this is zero3", marks=long_form,
    ),
     pytest.param(
         "zero3", "zero2", "full", "was saved by zero3, and this is zero2", marks=long_form,
     ), pytest.param(
         "zero2", "zero1", "lion", "state of adamw only, not of lion", marks=long_form,
     )],
)  # fmt: skip
def test_a_checkpoint_unreadable_by_a_topology_is_refused_and_kept(
    shop, tmp_path, before, after, method, says
):
    settings, name = SETTINGS | METHODS[method], f"{method}-{before}-2"
    if not shop.run_dir(name).exists():
        launched(shop, name, (before, 2), settings)
    moved = copy_of(shop.run_dir(name), tmp_path, 4)
    files = {p: p.read_bytes() for p in (moved / "checkpoints").rglob("*") if p.is_file()}
    launch = start(shop.write(shop.config(name, **settings)), after, 2, "--run.dir", str(tmp_path))
    assert launch.codes() == [2, 2]
    assert says in launch.output()
    assert {p: p.read_bytes() for p in (moved / "checkpoints").rglob("*") if p.is_file()} == files
