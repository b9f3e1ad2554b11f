"""experiments/report.py: what the page about a run holds, and what it must not hold."""
import base64
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import report
from experiments.__main__ import main as experiments
from support.command import UserError
from support.datasets import open_dataset
from support.files import append_jsonl, write_text_atomic
from support.images import load_image
from support.pictures import save_grid, save_png
from support.splits import split_holdout, write_split
from tests.outline import Outline, row_of

EVIL = "<script>alert('&')</script>"


@pytest.fixture
def run(tmp_path):
    """A small finished run on generated phantoms, with samples that are its held-out images."""
    folder, count = tmp_path / "run<b>", 24
    images = open_dataset("phantoms", 32, 0, count)
    train, test = split_holdout(images, 0.4, 0)
    write_split(folder / "split.csv", images, train, test)
    config = {"data": "phantoms", "size": 32, "seed": 0, "count": count, "note": EVIL}
    write_text_atomic(folder / "config.json", json.dumps(config))
    for stage in ("vae", "unet"):
        for step in range(1, 501):
            append_jsonl(folder / "log.jsonl", {"stage": stage, "step": step,
                                                     "loss": 10 * math.exp(-step / 100)})
    pictures = torch.zeros(3, 3, 32, 32)
    for step in (1, 2):
        save_grid(folder / f"grid_{step:06d}.png", [pictures] * 2, ["source", "sample"])
    save_grid(folder / "samples/interpolate/grid.png", [pictures])
    for number, i in enumerate(test.tolist()):
        save_png(folder / f"samples/interpolate/images/{number}.png", images[i])
    save_png(folder / "curves.png", pictures[0])
    save_png(folder / "held_out/a.png", pictures[0])
    save_png(folder / "closest_pairs.png", pictures[0])
    (folder / "cache").mkdir()
    (folder / "cache/progress.json").write_text('{"cached": 1}')
    (folder / "probe.json").write_text(json.dumps(
        {"CLS": {"mean": 0.5, "interval": [0.25, 0.75], "labels": {EVIL: 0.123456}}}))
    (folder / "samples/interpolate/images/fidelity.json").write_text('{"real": 80}')
    return folder


def write_report(run, *flags):
    experiments(["report", str(run), "--count", "10", *flags])
    return (run / "report.html").read_text()


def test_report_shows_what_the_run_holds(run, capsys):
    """Settings, curves, grids, samples, map, tables, pictures; escaped, balanced, offline."""
    page = write_report(run)
    outline = Outline(page)
    for title in ("Settings", "Training loss", "Sources, their VAE", "Samples and interpolations",
                  "on one map", "Evaluation", "More pictures", "Not for clinical use"):
        assert title in outline.text
    assert EVIL not in page and outline.text.count(EVIL) == 2 and "<script" not in page
    assert "run<b>" in outline.text and "<b></b>" not in page
    sources = outline.addresses
    assert len(sources) == 7 and all(s.startswith("data:image/png;base64,") for s in sources)
    embedded = [base64.b64decode(source.split(",")[1]) for source in sources]
    for chart in (0, 1, 5):  # two losses, and the map
        assert Image.open(io.BytesIO(embedded[chart])).size == (900, 540)
    assert embedded[2:5] + embedded[6:] == [(run / name).read_bytes() for name in (
        "grid_000002.png", "grid_000001.png", "samples/interpolate/grid.png", "closest_pairs.png")]
    assert row_of(outline, "CLS") == ["0.5", "0.25 to 0.75", "0.1235"]
    assert "real 80" in outline.text and "cached" not in outline.text
    assert "script-src 'none'" in page and "default-src 'none'" in page
    assert not re.search(r"https?://", page)
    assert "note:" not in capsys.readouterr().out
    assert write_report(run) == page  # nothing random


@pytest.fixture
def charts(monkeypatch):
    """The series (N, 2) of each chart that the page draws, by its title, and its labels."""
    drawn = []
    draw = report.draw_chart

    def keep(series, *arguments, **settings):
        drawn.append({name: np.array(points).T for name, points in series.items()})
        return draw(series, *arguments, **settings)

    monkeypatch.setattr(report, "draw_chart", keep)
    return drawn


def test_curves_are_drawn_where_they_belong(run, charts):
    """exp(-step) falls in a straight line on the logarithmic axis, in 200 bins."""
    write_report(run)
    vae, unet, _ = charts
    assert list(vae) == ["vae"] and list(unet) == ["unet"]
    for chart in (vae, unet):
        line, = chart.values()
        assert line.shape == (200, 2) and (np.diff(line[:, 0]) > 0).all()
        slope = np.diff(np.log(line[:, 1])) / np.diff(line[:, 0])
        assert (slope < 0).all()
        assert np.ptp(slope) < 0.35 * abs(slope.mean())  # bins hold 2 or 3 steps


def test_map_lays_both_kinds_on_the_same_axes(run, charts):
    """Samples that equal the held-out images lie on them; brighter ones lie apart."""
    write_report(run, "--count", "24")
    training, held_out, samples = charts[-1].values()
    assert len(training) + len(held_out) == 24 and len(samples) == len(held_out)
    every = np.concatenate([training, held_out, samples])
    # 8-bit files move a feature by about 0.01 of the spread
    distances = np.linalg.norm((held_out[:, None] - samples[None]) / np.ptp(every, axis=0), axis=-1)
    assert distances.min(axis=1).max() < 0.01 and distances.min(axis=0).max() < 0.01
    for path in (run / "samples/interpolate/images").glob("*.png"):
        save_png(path, load_image(path, None) * 0.3 + 0.7)
    write_report(run)
    _, held_out, samples = charts[-1].values()
    gap = np.linalg.norm(held_out.mean(axis=0) - samples.mean(axis=0))
    assert gap > 2 * held_out.std(axis=0).max()


def test_unfinished_or_damaged_runs_are_still_shown(run, capsys, tmp_path):
    """What is missing or broken becomes a note with its file's name; the rest is shown."""
    shutil.rmtree(run / "samples")
    (run / "log.jsonl").unlink()
    (run / "broken.json").write_text("{")
    (run / "list.json").write_text("[" * 100_000)
    (run / "fake.png").write_text("no picture")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (run / "link.json").symlink_to(tmp_path / "secret.json")
    for i in range(26):
        save_png(run / f"segment/{i:02d}.png", torch.zeros(1, 4, 4))
    outline = Outline(write_report(run))
    for words in ("there is no log.jsonl", "no samples yet: make some", "broken.json: Expecting",
                  "list.json: ", "fake.png: cannot identify", "link.json: a link out of the run",
                  "4 more files, from ", "segment/22.png on", "Not for clinical use"):
        assert words in outline.text, words
    assert "secret" not in outline.text.replace("secret.json", "")
    assert len(outline.addresses) == 2 + 23  # grids; 24 files, one of them no picture
    assert "/closest_pairs.png" in outline.text  # many small pictures do not push it out
    assert capsys.readouterr().out.count("note: ") >= 7


def test_map_says_why_it_is_missing(run, tmp_path):
    """Data that moved away is a note that says so; --data finds it where it is now."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "gone")}))
    assert "there is no data set" in write_report(run)
    page = write_report(run, "--data", "phantoms")
    assert "there is no data set" not in page and "features of a random network" in page


def test_folders_that_are_no_run(tmp_path):
    """No folder, no config.json and a config.json that is no object are refused in one line."""
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[1]")
    for folder in ("absent", "list", "."):
        with pytest.raises(UserError, match="is no run .*config.json is needed"):
            experiments(["report", str(tmp_path / folder)])


@pytest.mark.parametrize("value, rows", [
    ({"a": {"x": 1, "sub": {"y": 2.5}}, "b": {"x": None}}, [["", "x", "sub y"], ["a", "1", "2.5"],
                                                            ["b", "", ""]]),
    ([{"n": "<i>", "v": True}, {"n": "k", "v": [1, 2]}], [["", "n", "v"], ["1", "<i>", "True"],
                                                          ["2", "k", "1 to 2"]]),
    ({"t": {"r": {"c": 1}, "s": {"c": 2}}}, [["", "c"], ["r", "1"], ["s", "2"]]),
    ({"one": {c: i for i, c in enumerate("abcdef")}}, [["", "one"], ["a", "0"], ["b", "1"],
                                                       ["c", "2"], ["d", "3"], ["e", "4"],
                                                       ["f", "5"]]),
    ({"n": list(range(40)), "e": {}}, []), (3, []), ([], []), ({}, [])])
def test_any_json_becomes_tables(tmp_path, value, rows):
    """Rows are the dicts that hold leaves, deeper names are joined, wide tables turned."""
    (tmp_path / "a.json").write_text(json.dumps(value))
    outline = Outline(report.html_json(tmp_path / "a.json"))
    assert outline.rows == rows
    if isinstance(value, dict) and "n" in value:
        assert "0, 1, 2, 3, 4, 5, 6, 7, ... (40 values)" in outline.text
