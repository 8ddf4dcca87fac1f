"""The picture of runs: drawn from what is on record, of one or several, finished or not."""

import math
import struct

import pytest
from conftest import Workshop, pairs, write_jsonl

from finetune import curves
from finetune.__main__ import main
from finetune.errors import RunDirectoryError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("original"))
    return workshop.train(data__eval_fraction=0.2, evaluation__every_steps=2)


@pytest.fixture
def run(workshop, original):
    return workshop.copy_of(original)


def is_picture(path):
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data.startswith(b"\x89PNG") and width > 1000 and height > 500


def test_one_run_is_drawn_into_its_directory(run, capsys):
    assert main(["curves", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    assert is_picture(run / "curves.png")


def test_the_picture_shows_the_logged_values(run, monkeypatch):
    """The lines of the figure hold the numbers of the files."""
    from matplotlib.figure import Figure

    drawn = {}
    monkeypatch.setattr(
        Figure, "savefig",
        lambda figure, *_, **__: drawn.update({a.get_title(loc="left"): [
            line.get_xydata().tolist() for line in a.lines
        ] for a in figure.axes}),
    )  # fmt: skip
    curves.draw([run], run / "x.png")
    metrics, evals = curves.read(run / "metrics.jsonl"), curves.read(run / "eval.jsonl")
    raw, _, evaluation, exported = drawn["loss, nats per learned token"]
    assert [x for x, _ in exported] == 2 * [curves.exported_step(run)]
    assert raw == [[line["step"], line["loss"]] for line in metrics]
    assert evaluation == [[line["step"], line["eval_loss"]] for line in evals]
    for key, title in curves.PANELS.items():
        assert drawn[title] == [[[line["step"], line[key]] for line in metrics]]


def figure_of(run, monkeypatch, log=False):
    """What is drawn of a run."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    curves.draw([run], run / "x.png", log)
    return {axis.get_title(loc="left"): axis for axis in kept[0].axes}


def test_a_run_of_one_step_is_a_dot(run, monkeypatch):
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (run / "metrics.jsonl").write_text(first + "\n")
    axis = figure_of(run, monkeypatch)["loss, nats per learned token"]
    assert axis.lines[1].get_marker() == "."
    assert axis.get_xlabel() == "step"


def test_on_request_scales_are_logarithmic(run, monkeypatch):
    assert {axis.get_yscale() for axis in figure_of(run, monkeypatch).values()} == {"linear"}
    assert {axis.get_yscale() for axis in figure_of(run, monkeypatch, log=True).values()} == {"log"}


@pytest.mark.slow
def test_several_runs_stand_in_one_picture(run, workshop, tmp_path):
    other = workshop.train("other", optimizer__lr=1e-3)
    curves.draw([run, other], tmp_path / "both.svg")
    text = (tmp_path / "both.svg").read_text()
    assert text.startswith("<?xml")
    assert curves.name_of(run, [run, other]) == "run"
    assert curves.name_of(run, [run, tmp_path / "elsewhere/run"]) == str(run)


def test_an_unfinished_run_is_drawn_so_far(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": null, "lr": 0.1}\n{"step": 7, "lo')
    curves.draw([run], run / "now.png")
    assert is_picture(run / "now.png")
    steps, values = curves.series(curves.read(run / "metrics.jsonl"), "loss")
    assert steps[-1] == 6
    assert math.isnan(values[-1])


def test_smoothing_keeps_level_and_ends_and_spikes_do_not_spread_over_gaps():
    flat = [2.0] * 100
    assert curves.smoothed(flat) == flat
    assert curves.smoothed([1.0, 5.0]) == [1.0, 5.0]
    holes = curves.smoothed([1.0] * 60 + [math.nan] + [1.0] * 60)
    assert holes == [1.0] * 121


def test_a_folder_without_a_run_is_an_error(workshop, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", pairs())
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl"):
            curves.draw([path], tmp_path / "x.png")
    assert main(["curves", str(tmp_path / "nothing")]) == 2
    assert "runs/my_run" in capsys.readouterr().err


def test_a_picture_never_overwrites_its_logs(run, tmp_path, capsys):
    link = tmp_path / "picture.png"
    link.symlink_to(run / "metrics.jsonl")
    before = link.read_bytes()
    assert main(["curves", str(run), "--output", str(link)]) == 2
    assert "which is an input; choose another path" in capsys.readouterr().err
    assert link.read_bytes() == before


def test_a_picture_that_cannot_be_written_is_an_error(run, tmp_path):
    for name in ("no/such/folder.png", "picture.words"):
        with pytest.raises(RunDirectoryError, match="cannot be written"):
            curves.draw([run], tmp_path / name)
