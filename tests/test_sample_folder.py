"""support/sample_folder.py: the grid, the table, what a call that is cut off leaves."""
import csv

import numpy as np
import pytest
from PIL import Image

from small_run import make, pixels
from support import files, sample_folder
from support.command import UserError


def test_the_grid_shows_sources_and_samples(small_run, tmp_path):
    """A line a source: it, then its samples, as the PNGs have them; A and B at the ends of a strip;
    16 lines of 16 samples at most, and a note says what is left out."""
    def cells(path):
        grid = np.asarray(Image.open(path))
        return lambda line, column: grid[2 + 130 * line:130 + 130 * line:4,
                                         2 + 130 * column:130 + 130 * column:4]
    rows = make(small_run, tmp_path / "a", "--from-image", "IMAGE", "IMAGE2", "--count", "3",
                "--batch", "2")
    cell, images = cells(tmp_path / "a" / "grid.png"), pixels(tmp_path / "a", rows)
    for line in range(2):
        source = np.asarray(Image.open(small_run / "held_out" / f"{line}.png"))
        assert (cell(line, 0) == source).all()
        for column in range(3):
            assert (cell(line, 1 + column) == images[3 * line + column].numpy()).all()
    rows = make(small_run, tmp_path / "b", "--interpolate", "IMAGE", "IMAGE2", "--frames", "2")
    cell = cells(tmp_path / "b" / "grid.png")
    for column, path in ((0, "0.png"), (3, "1.png")):
        assert (cell(0, column) == np.asarray(Image.open(small_run / "held_out" / path))).all()


def test_a_long_call_shows_the_first_lines(small_run, tmp_path, monkeypatch, capsys):
    """The grid, and what is kept in memory for it, has a limit; a note says so."""
    monkeypatch.setattr(sample_folder, "GRID_ROWS", 2)
    monkeypatch.setattr(sample_folder, "GRID_COLUMNS", 3)
    rows = make(small_run, tmp_path / "out", "--random", "--count", "20", steps=1)
    assert len(rows) == 20
    assert Image.open(tmp_path / "out" / "grid.png").size == (2 + 3 * 130, 2 + 2 * 130)
    assert "grid.png shows the first 2 of 3" in capsys.readouterr().out


def test_the_table_grows_by_a_batch_and_names_whole_files(small_run, tmp_path, monkeypatch):
    """Rows are appended, each once, after the files they name; nothing is written twice, so a
    sample costs the same however many are there."""
    appended = []

    def append(path, rows):
        names = [row[0] for row in rows if row[0] != "file"]
        for name in names:
            Image.open(tmp_path / "out" / name).load()
        appended.append(len(names))
        files.append_csv(path, rows)
    monkeypatch.setattr(sample_folder, "append_csv", append)
    rows = make(small_run, tmp_path / "out", "--random", "--count", "7", "--batch", "3", steps=1)
    assert appended == [3, 3, 1]
    assert [row["file"] for row in rows] == [f"images/random_{i:05d}.png" for i in range(7)]
    assert not list((tmp_path / "out" / "images").glob(".*"))
    with pytest.raises(UserError, match="already contains samples"):
        make(small_run, tmp_path / "out", "--random")


def test_a_call_that_is_cut_off_leaves_a_table_of_what_is_there(small_run, tmp_path, monkeypatch):
    """An image of the second batch cannot be written: the table has the first batch alone."""
    save = sample_folder.save_pngs

    def full(paths, images):
        if "00002" in str(paths[0]):
            raise UserError("no space")
        save(paths, images)
    monkeypatch.setattr(sample_folder, "save_pngs", full)
    with pytest.raises(UserError, match="no space"):
        make(small_run, tmp_path / "out", "--random", "--count", "4", "--batch", "2", steps=1)
    assert len(list(csv.DictReader(open(tmp_path / "out" / "samples.csv")))) == 2
