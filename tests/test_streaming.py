"""Rows that stay on the disk: any kill, world size and position gives the same stream of tokens."""

import contextlib
import os
import re
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import losses, pairs, read_jsonl, short, write_jsonl
from faults.forked import assert_same_end, forget
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import chat_for, load_template, options

from finetune import own_code, workers
from finetune.data import building, layout, prefetch, shards, source_files, stream
from finetune.data import examples as entries
from finetune.data.batches import Batches
from finetune.data.layout import Layout
from finetune.data.order import Sequences
from finetune.data.rows import own_shape
from finetune.data.views import Document, Masked
from finetune.errors import ConfigError, DataError, Outage, RunDirectoryError
from finetune.models.load import bytes_tokenizer
from finetune.survival.watchdog import Watchdog

pytestmark = pytest.mark.slow

ROWS, SHARD = 203, 20


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", SHARD)
    monkeypatch.setattr(workers, "cores", lambda: 1)  # a process more costs 2 s


class Streaming:
    """Writes rows to a file, and makes shards of them in this process."""

    def __init__(self, folder: Path, rows: Any = None) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.rows = write_jsonl(folder / "rows.jsonl", pairs(ROWS) if rows is None else rows)
        self.num_workers = 1

    def recipe(
        self, packing: bool = False, eval_fraction: float = 0.0, seed: int = 3,
        template: Any = None, url: str | None = None, window: int | None = None, **changes: Any,
    ) -> shards.Recipe:  # fmt: skip
        tokenizer = bytes_tokenizer()
        template = template or load_template(tokenizer, "plain")
        changes = {"format": "question_answer", "max_length": 120} | changes
        plan = layout.Plan(packing, changes["max_length"], seed, eval_fraction)
        sources = source_files.sources(str(self.rows), None).train
        return shards.Recipe(
            shards.root(str(self.cache)), sources, template, tokenizer, options(**changes), plan,
            str(self.cache), url=url, window=window,
        )  # fmt: skip

    def make(self, **changes: Any) -> tuple[shards.Recipe, Path]:
        return shards.prepare(self.recipe(**changes), self.num_workers)

    def open(self, **changes: Any) -> stream.StreamedSequences:
        return stream.opened(*self.make(**changes))[0]

    def whole(self, **changes: Any) -> Any:
        """Return the same rows as examples in memory."""
        recipe = self.recipe(**changes)
        return entries.prepare(
            recipe.sources, recipe.template, recipe.tokenizer, recipe.options, str(self.cache)
        )

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of every file of the shards."""
        root = self.cache / "shards"
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix != ".lock"
        }


@pytest.fixture
def streaming(tmp_path):
    return Streaming(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Streams of the same rows: alone and in packs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_ROWS", SHARD)
        found = Streaming(tmp_path_factory.mktemp("made"))
        for packing in (False, True):
            found.make(packing=packing)
        window = 3 * Layout(found.make()[1]).lines[0]["bytes"]
        yield (
            {
                (packing, size): found.open(window=size, packing=packing)
                for packing in (False, True)
                for size in (None, window)
            },
            found.whole(),
        )


def key(document: Document) -> tuple[bytes, bytes]:
    return document.ids.tobytes(), document.labels.tobytes()


def batches_of(sequences: Any, rank: int = 0, world: int = 1, **changes: Any) -> Batches:
    size = {"global_batch_size": 24, "micro_batch_size": 1, "pad_id": 0, "seed": 5, **changes}
    return Batches(sequences, rank=rank, num_processes=world, **size)


def tokens_of(batches: list[Any]) -> Counter[tuple[bytes, bytes]]:
    """Return what these micro-batches teach: each document's tokens, and its labels."""
    found: Counter[tuple[bytes, bytes]] = Counter()
    for batch in batches:
        bounds = batch.inputs["cu_seq_lens_q"]
        for number in range(batch.counts["documents"]):
            ids = batch.inputs["input_ids"][0, bounds[number] : bounds[number + 1]]
            labels = batch.labels[batch.document == number]
            found[ids.numpy().tobytes(), labels.numpy().tobytes()] += 1
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_streaming_trains_on_the_tokens_that_memory_would_hold(made, packing):
    """No supervised token is lost or invented, and totals are those of the documents."""
    streams, whole = made
    sequences = streams[packing, None]
    documents = [each for number in range(len(sequences)) for each in sequences.documents(number)]
    alone = Sequences(whole, False, 120, 0)
    wanted = [each for number in range(len(alone)) for each in alone.documents(number)]
    assert Counter(map(key, documents)) == Counter(map(key, wanted))
    assert len({each.example for each in documents}) == len(whole) == len(sequences.examples)
    assert sequences.all_counts() == whole.counts(np.arange(len(whole)))
    assert sequences.counts(np.arange(len(sequences))) == sequences.all_counts()
    for number in range(len(sequences)):
        members = sequences.documents(number)
        assert sequences.counts(np.array([number])) == {
            "tokens": sum(len(each.labels) for each in members), "documents": len(members),
            "examples": len(members), "input_tokens": sum(len(each.ids) for each in members),
        }  # fmt: skip
        assert sum(len(each.ids) for each in members) <= 120
    assert (len(sequences) < len(whole)) == packing


def test_facts_of_a_stream_are_those_of_its_rows(made):
    streams, whole = made
    examples = streams[False, None].examples
    assert examples.quartiles() == whole.quartiles()
    assert sorted(examples.document_lengths()) == sorted(whole.document_lengths())
    assert examples.longest_document() == whole.longest_document()
    assert list(examples.places()) == list(whole.places())
    assert {examples.place(each) for number in range(len(streams[False, None]))
            for each in streams[False, None].members(number)} == {
        whole.place(number) for number in range(len(whole))}  # fmt: skip
    mine, own = examples.receipt(), whole.receipt()
    assert {**mine, "fingerprint": 0} == {**own, "fingerprint": 0, "shards": 11}
    largest = streams[False, None].largest(3, padded=False)
    assert streams[False, None].counts(largest)["input_tokens"] == sum(sorted(whole.lengths)[-3:])


@settings(max_examples=15, deadline=None)
@given(
    world=st.integers(1, 8), start=st.integers(0, 40), packing=st.booleans(),
    windowed=st.booleans(), seed=st.integers(0, 3),
)  # fmt: skip
def test_any_position_and_world_size_gives_the_same_stream(
    made, world, start, packing, windowed, seed
):
    """A process that starts at any step makes what one process alone makes there."""
    streams = made[0]
    window = next(size for name, size in streams if (size is not None) == windowed)
    sequences = streams[packing, window]
    alone = batches_of(sequences, seed=seed)
    for step in (start, start + 1):
        together = [
            batch
            for rank in range(world)
            for batch in batches_of(sequences, rank, world, seed=seed).at(step)
        ]
        assert tokens_of(together) == tokens_of(alone.at(step))
        sums = Counter()
        for batch in together:
            sums.update(batch.counts)
        assert sums == alone.totals(step)


@pytest.mark.parametrize("windowed", [False, True])
def test_an_epoch_has_every_row_once_in_another_order(made, windowed):
    streams = made[0]
    window = next(size for name, size in streams if (size is not None) == windowed)
    sequences = streams[False, window]
    batches = batches_of(sequences)
    epochs = [
        [batches.of_step(step) for step in range(n * batches.steps_per_epoch,
                                                 (n + 1) * batches.steps_per_epoch)]
        for n in range(3)
    ]  # fmt: skip
    orders = [np.concatenate(steps).tolist() for steps in epochs]
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    if windowed:  # rows of the first window come first
        assert len(sequences.windows) > 3
        first = SHARD * sequences.windows[0][1]
        assert set(orders[0][:first]) == set(range(first))
        assert orders[0][:first] != list(range(first))


# ------------------------------------------------------------------------------------- building


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path):
    found = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        each = Streaming(folder)
        each.num_workers = number
        each.make(packing=True, eval_fraction=0.2)
        found.append(each.contents())
    assert found[0] == found[1]
    assert len(found[0]) > 40


class Killed(BaseException):
    pass


@pytest.mark.parametrize("number", short([0, 1, 5, 10], 5))
def test_a_killed_build_goes_on_with_its_shards(streaming, monkeypatch, number, tmp_path):
    """Finished shards are kept as they are, and half a line of the index is written again."""
    (tmp_path / "other").mkdir()
    uninterrupted = Streaming(tmp_path / "other")
    shutil.copy2(streaming.rows, uninterrupted.rows)
    uninterrupted.make()
    take = shards.Builder._take

    def dying(self, finished, known):
        if finished.number == number:
            raise Killed
        take(self, finished, known)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Builder, "_take", dying)
        with pytest.raises(Killed):
            streaming.make()
    [index] = streaming.cache.rglob("index.jsonl") if number else [None]
    kept = {path: path.stat().st_mtime_ns for path in streaming.cache.rglob("input_ids.npy")}
    assert len(kept) >= number
    if index:
        index.write_bytes(index.read_bytes() + b'{"meta": "half a li')
        with (index.parent / "train.members").open("ab") as file:
            file.write(b"behind the last line")
    streaming.make()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert streaming.contents() == uninterrupted.contents()


def test_another_seed_lays_the_same_shards_out_anew(streaming, monkeypatch):
    first = streaming.open(packing=True)
    monkeypatch.setattr(shards, "records", None)  # rows need not be read again
    other = streaming.open(packing=True, seed=4)
    packs = [
        {tuple(sorted(each.members(number).tolist())) for number in range(len(each))}
        for each in (first, other)
    ]
    assert packs[0] != packs[1]
    assert first.all_counts() == other.all_counts()


def test_a_damaged_shard_is_refused_and_made_anew(streaming, capfd):
    recipe, laid_out = streaming.make()
    before = streaming.contents()
    folder = recipe.root / recipe.key / shards.entry_name(recipe.key, 4)
    with (folder / "input_ids.npy").open("r+b") as file:
        file.seek(400)
        file.write(b"\0\1\2")
    sequences = stream.opened(recipe, laid_out)[0]
    with pytest.raises(Outage, match=r"000004 is damaged; remove it, and run the same command"):
        sequences.documents(4 * SHARD)
    shutil.rmtree(folder)
    streaming.make()
    assert streaming.contents() == before


def test_a_damaged_shard_is_made_anew_before_it_is_laid_out(streaming, capfd):
    recipe, laid_out = streaming.make()
    before = streaming.contents()
    shutil.rmtree(laid_out)
    folder = recipe.root / recipe.key / shards.entry_name(recipe.key, 4)
    (folder / "meta.json").write_text("{}")
    streaming.make()
    assert "is damaged and will be built again" in capfd.readouterr().err
    assert streaming.contents() == before


def test_records_of_sequences_that_changed_are_written_again(streaming):
    _, laid_out = streaming.make()
    before = streaming.contents()
    with (laid_out / "train.sequences").open("r+b") as file:
        file.write(b"\7")
    streaming.make()
    assert streaming.contents() == before


def test_rows_that_change_while_they_are_read_are_refused(streaming, monkeypatch):
    take = shards.Builder._take

    def changing(self, finished, known):
        with streaming.rows.open("a") as file:
            file.write("\n")
        take(self, finished, known)

    monkeypatch.setattr(shards.Builder, "_take", changing)
    with pytest.raises(DataError, match="changed while being read"):
        streaming.make()


def refused(call: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        call()
    return str(caught.value)


WRONG = {
    "one": (lambda rows: rows[90].pop("answer"), {}),
    "many of several kinds": (
        lambda rows: [rows[n].update(answer=None if n % 2 else 7) for n in range(15, 200, 9)],
        {},
    ),
    "too long": (lambda rows: [rows[n].update(answer="long " * n) for n in range(30, 200, 30)], {}),
    "all dropped": (
        lambda rows: [row.update(answer="x" * 300) for row in rows],
        {"truncation": "drop"},
    ),
    "columns": (lambda rows: None, {"columns": {"system": "prompt"}}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_are_reported_as_they_are_without_streaming(tmp_path, name):
    change, more = WRONG[name]
    rows = pairs(ROWS)
    change(rows)
    each = Streaming(tmp_path, rows)
    assert refused(lambda: each.make(**more)) == refused(lambda: each.whole(**more))


OWN_ROWS = """
def rows(row):
    made = {"prompt": row["question"], "completion": row["answer"]}
    if "text" in row:
        made = {"text": row["text"]}
    return made if "fields" not in row else {**made, "fields": row["fields"]}
"""


def own_format(folder: Path) -> str:
    (folder / "own.py").write_text(OWN_ROWS)
    own_code.read(f"{folder}/own.py:rows")
    return f"{folder}/own.py:rows"


@pytest.mark.parametrize("other", [{"text": "a"}, {"fields": {"rank": 3}}])
def test_rows_of_another_shape_in_another_shard_are_refused(tmp_path, other):
    """A user's own function decides the shape by its first row, as without streaming."""
    name, rows = own_format(tmp_path), [{**row} for row in pairs(ROWS)]
    for row in rows[SHARD : 2 * SHARD]:  # rows behind them would not be tokenised any more
        row.update(other)
    each, columns = Streaming(tmp_path, rows), {"format": name}
    shape = own_shape([str(each.rows)], "line", {}, name, False)
    assert refused(lambda: each.make(**columns, shape=shape)) == refused(
        lambda: each.whole(**columns)
    )


@pytest.mark.proof
def test_a_function_of_the_user_makes_rows_in_worker_processes(workshop):
    """All shards before the run, or beside it."""
    name = own_format(workshop.folder)
    write_jsonl(workshop.rows, pairs(150))
    settings = {
        "data__streaming": True, "data__format": name, "train__max_steps": 15,
        "data__max_length": 100,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "cores", lambda: 2)
        whole = losses(workshop.train("whole", **settings))
        shutil.rmtree(workshop.folder / "cache")
        assert losses(workshop.train("one", **settings, data__window_gb=1.0)) == whole
        shutil.rmtree(workshop.folder / "cache")
        several = {**settings, "data__window_gb": 2e-5}  # another order, by windows
        early = losses(workshop.train("early", **several))
        assert losses(workshop.train("again", **several)) == early != whole


def test_code_that_changes_while_it_is_read_again_is_refused(tmp_path):
    name = own_format(tmp_path)
    sha256 = own_code.get(name).sha256
    own_code.read_as(name, sha256)
    (tmp_path / "own.py").write_text(f"{OWN_ROWS}# edited")
    own_code.read_as(name, sha256)  # a process executes it once
    own_code._READ.pop(name)
    with pytest.raises(ConfigError, match=r"own\.py has changed since this command began"):
        own_code.read_as(name, sha256)


def test_skipped_rows_are_counted_and_kept_as_without_streaming(tmp_path):
    from finetune.data.problems import Skipping

    rows: list[Any] = pairs(ROWS)
    rows[30]["answer"] = rows[130]["answer"] = 7
    rows[90] = "no object"
    each = Streaming(tmp_path, rows)
    skips = {"skipping": Skipping(True, 0.1)}
    streamed, whole = each.open(**skips).examples, each.whole(**skips)
    for name in ("num_rows", "bad", "unread", "num_dropped"):
        assert getattr(streamed, name) == getattr(whole, name)
    kept = "".join(path.read_text() for path in streamed.reject_files)
    assert kept == whole.rejects.read_text()
    (moved := tmp_path / "a folder of another name").mkdir()
    other = Streaming(moved, rows)
    sizes = [[line["bytes"] for line in Layout(s.make(**skips)[1]).lines] for s in (each, other)]
    assert sizes[0] == sizes[1], "windows would end elsewhere"
    few = {"skipping": Skipping(True, 0.01)}
    assert refused(lambda: each.make(**few)) == refused(lambda: each.whole(**few))


def test_a_file_that_breaks_off_is_reported(streaming, tmp_path):
    import gzip

    whole = gzip.compress(streaming.rows.read_bytes())
    streaming.rows = tmp_path / "cut.jsonl.gz"
    streaming.rows.write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz: damaged or incomplete" in refused(streaming.make)


def test_shards_without_examples_take_no_place(tmp_path):
    rows = pairs(ROWS)
    for row in rows[20:60]:
        row["answer"] = "x" * 300
    each = Streaming(tmp_path, rows)
    sequences = each.open(truncation="drop", packing=True)
    assert [line["train"]["examples"] for line in sequences.laid_out.lines[:4]] == [20, 0, 0, 20]
    assert sequences.examples.num_dropped == 40
    order = sequences.order(1, 1)[:]
    assert sum(len(sequences.documents(number)) for number in order) == ROWS - 40


def test_rows_with_thoughts_late_in_the_stream_change_all_shards(tmp_path):
    from test_templates import THINKS_LAST

    rows = pairs(ROWS)
    rows[150]["answer"] = "<think>hm</think>a"
    each = Streaming(tmp_path, rows)
    template = chat_for(bytes_tokenizer(), THINKS_LAST)
    for _ in range(2):  # the second time from the cache
        streamed = each.open(template=template, max_length=200).examples
        assert streamed.learn_opening
    whole = each.whole(template=template, max_length=200)
    assert streamed.num_supervised_tokens == whole.num_supervised_tokens


# ------------------------------------------------------------------------------------ held out


def test_equal_rows_are_held_out_together(tmp_path):
    rows = pairs(100) * 3
    each = Streaming(tmp_path, rows)
    recipe, folder = each.make(eval_fraction=0.3, packing=True)
    train, evals = stream.opened(recipe, folder)
    assert len(train.examples) + len(evals.examples) == 300
    assert 45 < len(evals.examples) < 135
    assert len(evals.examples) % 3 == 0
    assert stream.num_known(evals.examples.digests(), train.examples) == 0
    _, held = stream.opened(*each.make(eval_fraction=0.3, packing=True, seed=9))
    assert list(held.examples.places()) != list(evals.examples.places())


# ------------------------------------------------------------------------------------- whole runs


def test_a_streaming_run_resumes_to_the_bit(workshop):
    """In the middle of the second epoch, with held-out rows and packs; not on other rows."""
    write_jsonl(workshop.rows, pairs(150))
    settings = {
        "data__streaming": True, "data__packing": True, "data__eval_fraction": 0.1,
        "train__epochs": 3, "train__max_steps": 11, "checkpoint__every_steps": 8,
        "evaluation__every_steps": 4,
    }  # fmt: skip
    run, whole = workshop.train(**settings), workshop.folder / "whole"
    assert losses(run)[-1] < losses(run)[0]
    receipt = workshop.receipt()
    assert receipt["train_data"]["shards"] == 8
    held_out = read_jsonl(run / "held_out.jsonl")
    assert len(held_out) == receipt["eval_data"]["examples"]
    assert all(row in pairs(150) for row in held_out)
    shutil.copytree(run, whole)
    forget(run, 8)
    shutil.rmtree(workshop.folder / "cache")
    assert_same_end(workshop.train(**settings), whole)
    forget(run, 8)
    before, rows = workshop.rows.stat(), workshop.rows.read_text()
    workshop.rows.write_text(rows.replace("what is 140 times", "what is 141 times"))
    os.utime(workshop.rows, ns=(before.st_atime_ns, before.st_mtime_ns))  # a row of the same size
    with pytest.raises(RunDirectoryError, match="of another run; what differs:\n  training data"):
        workshop.train(**settings)


def test_check_reports_on_the_first_shard(workshop, capsys):
    write_jsonl(workshop.rows, [*pairs(70), *pairs(3)])
    evals = write_jsonl(workshop.folder / "eval.jsonl", [{"question": "q", "answer": "a"}])
    settings = {"data__streaming": True, "data__eval": str(evals)}
    workshop.check(**settings)
    printed = capsys.readouterr().out
    assert "73 rows -> 73 examples -> 73 sequences" in printed
    write_jsonl(workshop.rows, [*pairs(3), *pairs(70)])
    workshop.check(**settings)
    printed = capsys.readouterr().out
    assert "3 examples are the same as an earlier one" in printed
    assert "of the first 20 examples" in printed


def test_evaluation_rows_that_are_trained_on_are_refused(workshop):
    write_jsonl(workshop.rows, pairs(70))
    evals = write_jsonl(workshop.folder / "eval.jsonl", pairs(66)[60:])
    with pytest.raises(DataError, match="6 of its 6 examples are also trained on"):
        workshop.check(data__streaming=True, data__eval=str(evals))


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("weights", {"rows": 2}, "finetune data mix"),
        ("token_budgets", {"rows": 20}, "finetune data mix"),
        ("max_rows", 10, "finetune data sample"),
        ("group_by_length", True, "data.packing leaves no padding"),
    ],
)
def test_settings_that_need_all_rows_at_once_are_refused(workshop, setting, value, remedy):
    if isinstance(value, dict):
        value = {str(workshop.rows): value["rows"]}
    with pytest.raises(ConfigError, match=rf"data\.{setting}: cannot .*data\.streaming.*{remedy}"):
        workshop.check(data__streaming=True, **{f"data__{setting}": value})


def test_too_few_rows_to_hold_some_out_is_an_error(workshop):
    write_jsonl(workshop.rows, pairs(30))
    says = r"data\.eval_fraction: 0\.001 of 30 rows holds none out"
    with pytest.raises(DataError, match=says):
        workshop.check(data__streaming=True, data__eval_fraction=0.001)


def test_show_says_how_to_see_rows_of_a_stream(workshop, capsys):
    from finetune import __main__ as commands

    config = workshop.write(workshop.config(data__streaming=True))
    assert commands.main(["show", str(config)]) == 2
    assert "finetune data sample" in capsys.readouterr().err


# ------------------------------------------------------------------------------- an object store


class Stored(Streaming):
    """Keeps shards in a store, of which this machine holds two windows of two shards."""

    def __init__(self, folder: Path, **more: Any) -> None:
        super().__init__(folder, **more)
        self.store = folder / "store"
        alone = Streaming(folder)
        size = max(line["bytes"] for line in Layout(alone.make()[1]).lines)
        shutil.rmtree(alone.cache)
        self.more = {"url": f"file://{self.store}", "window": 2 * size}

    def recipe(self, **changes: Any) -> shards.Recipe:
        return super().recipe(**self.more | changes)

    def num_here(self) -> int:
        return len(list(self.cache.glob("shards/*/[!.]*/input_ids.npy")))


@pytest.fixture
def stored(tmp_path):
    return Stored(tmp_path)


def epoch_of(sequences: Any, epoch: int = 1) -> list[tuple[bytes, bytes]]:
    order = sequences.order(5, epoch)[:]
    return [key(each) for number in order for each in sequences.documents(int(number))]


def test_shards_in_a_store_give_the_stream_that_the_cache_gives(stored):
    """From a machine that has built them, and from one that finds them in the store."""
    wanted = epoch_of(stored.open(url=None))
    shutil.rmtree(stored.cache)
    stored.make()
    assert stored.num_here() <= 4
    assert len(list(stored.store.rglob("input_ids.npy"))) == 11
    assert epoch_of(stored.open()) == wanted
    shutil.rmtree(stored.cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "records", None)  # rows are not read, and not tokenised
        sequences = stored.open()
    assert stored.num_here() == 0
    assert epoch_of(sequences) == wanted


def test_this_machine_holds_two_windows_and_fetches_the_next(stored):
    sequences = stored.open()
    batches, most = batches_of(sequences, global_batch_size=20), 0
    for step in range(2 * batches.steps_per_epoch):
        batches.at(step)
        sequences.opened.store.wait()
        most = max(most, stored.num_here())
    assert most <= 4
    order = sequences.order(5, 3)
    window, following = order.windows[:2].tolist()
    order[0:1]
    names = [sequences.opened.folder(n) for w in (window, following)
             for n in range(*sequences.windows[w])]  # fmt: skip
    sequences.opened.store.wait()
    assert all(path.is_dir() for path in names)


def test_a_build_that_was_killed_finds_its_shards_in_the_store(stored, monkeypatch):
    stored.make()
    store = {path: path.read_bytes() for path in stored.store.rglob("*") if path.is_file()}
    shutil.rmtree(stored.cache)
    [laid_out] = stored.store.glob("*/layout-*")
    shutil.rmtree(laid_out)
    lost = sorted(stored.store.glob("*/*.000003"))[0]
    shutil.rmtree(lost)
    made = []
    part = shards.tokenised.tokenise_part
    monkeypatch.setattr(
        shards.tokenised, "tokenise_part", lambda *a, **k: made.append(1) or part(*a, **k)
    )
    stored.make()
    assert len(made) == 1
    assert {path: path.read_bytes() for path in stored.store.rglob("*") if path.is_file()} == store


def test_a_shard_that_arrives_damaged_is_refused(stored):
    stored.make()
    shutil.rmtree(stored.cache)
    sequences = stored.open()
    for name, what in (("meta.json", "is not what was put there"), ("input_ids.npy", "is damaged")):
        [path] = stored.store.glob(f"*/*.000005/{name}")
        before = path.read_bytes()
        path.write_bytes(before[:-1] + b"\7")
        with pytest.raises(Outage, match=what):
            sequences.documents(5 * SHARD)
        path.write_bytes(before)
        for left in stored.cache.glob("shards/*/*.000005"):
            shutil.rmtree(left)
    assert sequences.documents(5 * SHARD)


def test_the_size_of_a_step_fetches_nothing(stored):
    sequences = stored.open()
    batches, entered = batches_of(sequences), []
    sizes = [len(batches.of_step(step)) for step in range(2 * batches.steps_per_epoch)]
    sequences.opened.enter = entered.append
    assert [batches.size_of(step) for step in range(len(sizes))] == sizes
    assert not entered


def test_the_longest_document_of_a_pair_may_be_its_target(tmp_path):
    rows = [{"question": "abc" * 9, "answer": "d"}, {"question": "a", "answer": "b" * 50}]
    each = Streaming(tmp_path, rows)
    streamed, whole = each.open(framed=True).examples, each.whole(framed=True)
    assert streamed.longest_document() == whole.longest_document()
    assert streamed.longest_document()[0] > 50


def test_a_shard_that_is_damaged_in_the_store_ends_a_build(stored):
    stored.make()
    shutil.rmtree(stored.cache)
    [path] = stored.store.glob("*/*.000005/input_ids.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(Outage, match="data.shards: file://.*000005 is damaged; remove it"):
        stored.make(seed=4)


def test_making_room_leaves_what_another_process_fetches(stored):
    sequences = stored.open()
    store, name = sequences.opened.store, sequences.opened.folder(5).name
    get, seen = store._system[0].get_file, []

    def interrupted(there, here):
        get(there, here)
        store.most_bytes = 0
        store.trim({})
        for left in store.folder.glob(".building-*"):  # as a build of other sequences does
            shutil.rmtree(left)
        seen.append(Path(here).exists())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store._system[0], "get_file", interrupted)
        store.fetch(name)
    assert all(seen)
    assert (store.folder / name / entries.META).is_file()


def test_a_shard_that_another_process_removes_is_fetched_again(stored, monkeypatch):
    """Between its arrival and its opening, or while it is opened."""
    sequences = stored.open()
    store, opened, times = sequences.opened.store, entries.opened, [2]
    fetch = store.fetch

    def fetched(name, *more, **options):
        fetch(name, *more, **options)
        if times[0] == 2:
            times[0] -= 1
            entries.remove(store.folder / name)

    def open_and_remove(folder, *more, **options):
        found = opened(folder, *more, **options)
        if times[0] == 1:
            times[0] -= 1
            entries.remove(folder)
        return found

    monkeypatch.setattr(store, "fetch", fetched)
    monkeypatch.setattr(entries, "opened", open_and_remove)
    assert sequences.documents(5 * SHARD)
    assert times == [0]


def test_shards_that_workers_may_read_stay_while_room_is_made(stored):
    """A window smaller than what is being made."""
    whole = stored.recipe(url=None, window=None)
    shards.prepare(whole, 1)  # all are here
    shutil.rmtree(next(stored.cache.glob("shards/*/layout-*")))
    builder = shards.Builder(stored.recipe(window=1), 1)
    names = [shards.entry_name(builder.key, number) for number in range(11)]
    assert builder._under_way(7) == dict.fromkeys(names[8:], 0)
    builder.store.trim(builder._under_way(7))
    assert sorted(path.name for path in stored.cache.glob("shards/*/[!.]*.0000??")) == names[8:]


def test_wrong_rows_are_kept_though_their_shards_left_this_machine(tmp_path):
    from finetune.data.problems import Skipping

    rows: list[Any] = pairs(ROWS)
    rows[30]["answer"] = rows[130]["answer"] = 7
    each, skips = Stored(tmp_path, rows=pairs(ROWS)), {"skipping": Skipping(True, 0.1)}
    write_jsonl(each.rows, rows)
    kept = "".join(path.read_text() for path in each.open(**skips).examples.reject_files)
    assert kept == each.whole(**skips).rejects.read_text()


def test_a_store_that_is_away_for_a_moment_is_asked_again(stored, monkeypatch):
    from finetune.data import shard_store

    monkeypatch.setattr(shard_store, "WAITS_SECONDS", (0, 0, 0))
    stored.make()
    shutil.rmtree(stored.cache)
    sequences = stored.open()
    system, failures = sequences.opened.store._system[0], [3]
    get = system.get_file

    def failing(*arguments):
        if failures[0]:
            failures[0] -= 1
            raise ConnectionResetError("gone")
        return get(*arguments)

    monkeypatch.setattr(system, "get_file", failing)
    assert sequences.documents(0)
    failures[0] = 4
    with pytest.raises(Outage, match="file://.*gone"):
        sequences.documents(5 * SHARD)


@pytest.mark.proof
def test_a_run_on_another_machine_goes_on_with_shards_of_the_store(workshop):
    write_jsonl(workshop.rows, pairs(150))
    settings = {
        "data__streaming": True, "data__shards": f"file://{workshop.folder}/store",
        "data__window_gb": 4e-5, "train__epochs": 2, "train__max_steps": 30,
        "checkpoint__every_steps": 22,
    }  # fmt: skip
    run, whole = workshop.train(**settings), workshop.folder / "whole"
    shutil.copytree(run, whole)
    forget(run, 22)
    shutil.rmtree(workshop.folder / "cache")
    assert_same_end(workshop.train(**settings), whole)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shards": "s3://b/c", "streaming": False}, "data.shards: would be ignored"),
        ({"window_gb": 3, "streaming": False}, "data.window_gb: would be ignored"),
        ({"shards": "/a/folder"}, "data.shards: /a/folder has no protocol"),
        ({"shards": "s3://b/c", "eval_fraction": 0.1}, "data.eval_fraction: each evaluation"),
    ],
)
def test_settings_of_a_store_that_do_not_fit_are_refused(workshop, changes, says):
    settings = {f"data__{name}": value for name, value in {"streaming": True, **changes}.items()}
    with pytest.raises(ConfigError, match=says):
        workshop.check(**settings)


# ------------------------------------------------------------------------ before all shards exist


def build_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make shards beside a run in a thread of this process."""
    monkeypatch.setattr(building, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)

    class Thread(threading.Thread):
        exitcode = 1

    def build(recipe: shards.Recipe, laid_out: Path) -> None:
        with contextlib.suppress(SystemExit):
            building._build(recipe, recipe.code, laid_out)

    def start(builder: shards.Builder) -> Any:
        thread = Thread(target=build, args=(builder.recipe, builder.laid_out), daemon=True)
        thread.start()
        return thread

    monkeypatch.setattr(building, "_started", start)
    monkeypatch.setattr(workers, "depend_on_parent", lambda: None)


class Halting(Streaming):
    """Makes shards on a thread, each when it is let through."""

    def begin(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> stream.StreamedSequences:
        self.gate, self.let = threading.Semaphore(0), 0
        append = Layout.append

        def gated(layout: Layout, *arguments: Any) -> None:
            self.gate.acquire()
            append(layout, *arguments)

        monkeypatch.setattr(Layout, "append", gated)

        build_on_a_thread(monkeypatch)
        return stream.opened(*building.begin(self.recipe(**changes), is_first=True))[0]

    def let_through(self, number: int) -> None:
        for _ in range(number):
            self.gate.release()


@pytest.fixture
def halting(tmp_path):
    whole = Halting(tmp_path)
    size = max(line["bytes"] for line in Layout(Streaming.make(whole)[1]).lines)
    wanted = [batches_of(Streaming.open(whole, window=2 * size)).at(step) for step in range(18)]
    shutil.rmtree(whole.cache)
    return whole, 2 * size, [tokens_of(batches) for batches in wanted]


def test_training_starts_with_the_first_window_and_sees_the_same_stream(halting, monkeypatch):
    early, window, wanted = halting
    threading.Timer(0.1, lambda: early.let_through(3)).start()
    sequences = early.begin(monkeypatch, window=window)
    batches = batches_of(sequences)
    assert not sequences.is_whole
    assert sequences.num_known < ROWS
    assert [tokens_of(batches.at(0)), batches.num_epochs(1)] == [wanted[0], 0.0]
    for step in range(1, 18):  # two epochs; shards come as the run waits for them
        early.let_through(3)
        assert tokens_of(batches.at(step)) == wanted[step]
    assert sequences.is_whole
    assert batches.num_epochs(18) == 2


def test_a_step_waits_for_the_window_that_it_needs(halting, monkeypatch):
    early, window, wanted = halting
    threading.Timer(0.1, lambda: early.let_through(3)).start()
    batches = batches_of(early.begin(monkeypatch, window=window))
    found = []
    waiting = threading.Thread(target=lambda: found.append(tokens_of(batches.at(6))), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    early.let_through(8)
    waiting.join(30)
    assert found == [wanted[6]]


def waiting_for_shards(
    early: Halting, monkeypatch: pytest.MonkeyPatch, window: int, heartbeat: Any = lambda: None
) -> tuple[Batches, threading.Thread]:
    """Return batches of which a thread wants step 6, which needs a shard that is not there."""
    monkeypatch.setattr(prefetch, "BEAT_SECONDS", 0.02)
    threading.Timer(0.1, lambda: early.let_through(3)).start()
    batches = batches_of(early.begin(monkeypatch, window=window))
    ahead = prefetch.Prefetch(batches, 18, heartbeat=heartbeat)
    waiting = threading.Thread(target=lambda: ahead.at(6), daemon=True)
    waiting.start()
    return batches, waiting


def test_a_step_that_is_there_waits_for_no_later_one(halting, monkeypatch):
    """While the next one waits for its shards, all that the loop asks of this one is answered."""
    early, window, wanted = halting
    batches, waiting = waiting_for_shards(early, monkeypatch, window)
    asked = []

    def ask() -> None:
        asked.append((tokens_of(batches.at(0)), batches.size_of(0), batches.num_epochs(1)))
        batches.totals(0), batches.places(0)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(5)
    assert not asking.is_alive()
    assert asked == [(wanted[0], 24, 0.0)]
    assert waiting.is_alive()
    early.let_through(8)
    waiting.join(30)


@pytest.mark.proof
def test_a_step_may_wait_for_shards_as_long_as_some_are_made(halting, monkeypatch):
    """Each shard takes less than train.hang_minutes, all of them more; then the builder hangs."""
    early, window, _ = halting
    watchdog, problems = Watchdog(0, 1), list[str]()
    watchdog.start(1.5, problems.append)
    try:
        _, waiting = waiting_for_shards(early, monkeypatch, window, watchdog.heartbeat)
        watchdog.heartbeat("step 7")
        for _ in range(4):
            waiting.join(0.5)
            early.let_through(1)
        assert waiting.is_alive()
        assert not problems
        waiting.join(3)
        assert problems == ["every process has made no progress for 1.5 s at step 7"]
    finally:
        watchdog.stop()
    early.let_through(8)
    waiting.join(30)


def test_a_builder_that_was_killed_ends_the_run(halting, monkeypatch):
    early, window, _ = halting
    threading.Timer(0.1, lambda: early.let_through(3)).start()
    sequences = early.begin(monkeypatch, window=window)
    monkeypatch.setattr(sequences.opened.building.process, "is_alive", lambda: False)
    with pytest.raises(Outage, match=r"the process that tokenises was killed .* run the same comm"):
        batches_of(sequences).at(6)
    early.let_through(8)


def test_a_run_trains_while_shards_are_made(workshop, monkeypatch, capfd):
    """All but the first few wait for a step to be on record."""
    write_jsonl(workshop.rows, pairs(ROWS))
    metrics, late, append = workshop.run_dir("early") / "metrics.jsonl", [], Layout.append
    cache, ends = workshop.folder / "cache", time.monotonic() + 60

    def gated(known: Layout, *arguments: Any) -> None:
        if known.folder.is_relative_to(cache):  # not a thread that another test has left
            while len(known.lines) > 5 and not metrics.exists() and time.monotonic() < ends:
                time.sleep(0.02)
            late.append(not metrics.exists())
        append(known, *arguments)

    monkeypatch.setattr(Layout, "append", gated)
    build_on_a_thread(monkeypatch)
    settings = {"data__streaming": True, "data__window_gb": 4e-5, "train__max_steps": 20}
    run = workshop.train("early", **settings, data__max_length=100)
    assert late == [True] * 6 + [False] * 5
    assert len(losses(run)) == 20
    assert re.search(r"^data +\d+ rows so far -> \d+ examples", capfd.readouterr().out, re.M)


@pytest.mark.parametrize("number", [5, 190])
def test_a_wrong_row_ends_the_start_or_the_run(tmp_path, monkeypatch, number):
    rows = pairs(ROWS)
    rows[number]["answer"] = 7
    early = Halting(tmp_path, rows)
    size = 10_000
    threading.Timer(0.1, lambda: early.let_through(20)).start()
    says = rf"rows\.jsonl:{number + 1}: column 'answer' .* got 7"
    if number == 5:
        with pytest.raises(DataError, match=says):
            early.begin(monkeypatch, window=size)
        return
    batches = batches_of(early.begin(monkeypatch, window=size))
    assert batches.at(0)
    with pytest.raises(DataError, match=says):
        batches.at(8)


def test_thoughts_in_the_first_window_change_all_shards(tmp_path, monkeypatch):
    from test_templates import THINKS_LAST

    rows = pairs(ROWS)
    rows[25]["answer"] = "<think>hm</think>a"
    early = Halting(tmp_path, rows)
    threading.Timer(0.1, lambda: early.let_through(30)).start()
    template = chat_for(bytes_tokenizer(), THINKS_LAST)
    sequences = early.begin(monkeypatch, window=10**5, template=template, max_length=200)
    assert sequences.examples.learn_opening


@pytest.mark.proof
def test_a_run_that_starts_early_ends_as_one_that_found_its_shards(workshop):
    """With a real builder beside it; killed and resumed, too."""
    write_jsonl(workshop.rows, pairs(400))
    settings = {
        "data__streaming": True, "data__window_gb": 4e-5, "data__max_length": 100,
        "train__max_steps": 30, "checkpoint__every_steps": 22,
    }  # fmt: skip
    run, whole = workshop.train(**settings), workshop.folder / "whole"
    shutil.copytree(run, whole)
    forget(run, 22)
    shutil.rmtree(workshop.folder / "cache" / "shards")
    assert losses(workshop.train(**settings)) == losses(whole)
    settings["train__max_steps"] = None  # all shards are made before the first step
    later = workshop.train("later", **settings, schedule__kind="constant", train__epochs=0.01)
    assert losses(later)[0] == losses(whole)[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    short(
        [
            ({"train__max_steps": 3000}, r"train.max_steps: 3,000, but train.epochs: 1 of the row"),
            ({"data__max_length": 300}, r"data.max_length: 300, but the model has only 256 "),
        ],
        ({"data__max_length": 300}, r"data.max_length: 300, but the model has only 256 "),
    ),
)
def test_what_an_early_start_cannot_know_is_an_error(workshop, changes, says):
    settings = {"data__streaming": True, "data__window_gb": 4e-5, **changes}
    with pytest.raises((DataError, ConfigError), match=says):
        workshop.train(**settings)


def test_answers_are_streamed_as_memory_would_hold_them(tmp_path):
    """Each turn alone, with its weight, without thoughts, its special tokens as text."""
    rows = []
    for number in range(2 * SHARD):
        answers = (f"<|im_end|>{number}", f"<think>hm</think>{number}")
        turns = []
        for answer, weight in zip(answers, (1, 0.25 + number % 3)):
            turns += [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": answer, "weight": weight if number > SHARD else 1},
            ]
        rows.append({"messages": turns})
    found = Streaming(tmp_path, rows)
    changes = {
        "template": load_template(bytes_tokenizer(), "chatml"), "format": "messages",
        "loss_on": "each_turn", "thinking": "drop", "special_tokens_in_text": "text",
    }  # fmt: skip
    streamed, whole = found.open(**changes), Sequences(found.whole(**changes), False, 120, 0)

    def weighted(sequences: Any) -> Counter[tuple[bytes, bytes, bytes]]:
        documents = (each for n in range(len(sequences)) for each in sequences.documents(n))
        return Counter((*key(each), each.weights.tobytes()) for each in documents)

    assert weighted(streamed) == weighted(whole)
    assert len(streamed) == 2 * len(rows)


def test_what_is_masked_differs_between_shards_and_epochs(tmp_path):
    """Equal rows stand at the same place of each shard; totals are those in memory."""
    each = Streaming(tmp_path, [{"question": "what is it?", "answer": "so " * 20}] * (3 * SHARD))
    view = Masked(mask_id=0, ordinary=np.arange(1, 200), probability=0.3, seed=1)
    recipe = replace(each.recipe(), view=view)
    streamed = stream.opened(*shards.prepare(recipe, 1))[0]
    whole = Sequences(replace(each.whole(), view=view), False, 120, 0)
    assert streamed.all_counts() == whole.all_counts()
    drawn = {
        tuple(streamed.documents(number, epoch)[0].positions.tolist())
        for number in (0, SHARD, 2 * SHARD)
        for epoch in range(3)
    }
    assert len(drawn) == 9
    again = stream.opened(*shards.prepare(recipe, 1))[0]
    assert tokens_of(batches_of(again).at(5)) == tokens_of(batches_of(streamed).at(5))


@pytest.mark.proof
def test_two_processes_train_on_the_stream_of_one(workshop):
    """One of them makes the shards, and the other waits."""
    write_jsonl(workshop.rows, pairs(150))
    settings = {
        "data__streaming": True, "data__packing": True, "data__window_gb": 4e-5,
        "train__micro_batch_size": 2, "train__epochs": 3, "train__max_steps": 6,
    }  # fmt: skip
    result = workshop.launch("two", 2, **settings)
    assert result.returncode == 0, result.stdout
    together = losses(workshop.run_dir("two"))
    shutil.rmtree(workshop.folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_ROWS", 1 << 14)  # as in those processes
        alone = losses(workshop.train("one", **settings))
    assert together == pytest.approx(alone, rel=1e-5)
