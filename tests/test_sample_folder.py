"""support/sample_folder.py: what a call that is cut off leaves."""
import csv

import pytest

from small_run import make
from support import sample_folder
from support.command import UserError


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
