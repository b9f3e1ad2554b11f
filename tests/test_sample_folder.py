"""support/sample_folder.py: the grid, and what a call that is cut off leaves."""
import csv

import numpy as np
import pytest
from PIL import Image

from small_run import make, pixels
from support import sample_folder
from support.command import UserError


def test_the_grid_shows_sources_and_samples(small_run, tmp_path):
    """A line a source: it, then its samples, as the PNGs have them."""
    rows = make(small_run, tmp_path / "a", "--from-image", "IMAGE", "IMAGE2", "--count", "3",
                "--batch", "2")
    grid, images = np.asarray(Image.open(tmp_path / "a" / "grid.png")), pixels(tmp_path / "a", rows)

    def cell(line, column):
        return grid[2 + 130 * line:130 + 130 * line:4, 2 + 130 * column:130 + 130 * column:4]

    for line in range(2):
        source = np.asarray(Image.open(small_run / "held_out" / f"{line}.png"))
        assert (cell(line, 0) == source).all()
        for column in range(3):
            assert (cell(line, 1 + column) == images[3 * line + column].numpy()).all()


def test_a_call_that_is_cut_off_leaves_a_table_of_what_is_there(small_run, tmp_path, monkeypatch):
    """An image of the second batch cannot be written: the table has the first batch alone."""
    save = sample_folder.save_png

    def full(path, image, sync):
        if "00002" in str(path):
            raise UserError("no space")
        save(path, image, sync)
    monkeypatch.setattr(sample_folder, "save_png", full)
    with pytest.raises(UserError, match="no space"):
        make(small_run, tmp_path / "out", "--random", "--count", "4", "--batch", "2", steps=1)
    assert len(list(csv.DictReader(open(tmp_path / "out" / "samples.csv")))) == 2
