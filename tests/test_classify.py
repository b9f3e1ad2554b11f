"""experiments/classify.py: sets side by side on the same real images; labels that cannot serve."""
import json

import pytest
import torch

from experiments.__main__ import main as experiments
from support.command import UserError
from support.files import write_csv
from support.pictures import save_png

FLAGS = ["--device", "cpu", "--seeds", "0", "1", "--cnn-steps", "2", "--label-column"]


def test_command(labelled_run, tmp_path):
    """A row for real images and for each set: images, mean and deviation over seeds."""
    rows = [["file", "label"]]  # as sample.py writes a prompt's label
    for i in range(6):
        save_png(tmp_path / "images" / f"{i}.png", torch.zeros(3, 32, 32))
        rows.append([f"{i}.png", ("Even", "odd")[i % 2]])
    write_csv(tmp_path / "labels.csv", rows)
    experiments(["classify", "--checkpoint", str(labelled_run), *FLAGS, "kind", "--train",
                 str(tmp_path)])
    table = json.loads((labelled_run / "classify.json").read_text())
    assert list(table) == ["real", str(tmp_path)] and table[str(tmp_path)]["images"] == 6
    assert 0 <= table["real"]["AUC"] <= 1 and table["real"]["sd"] >= 0
    assert table[str(tmp_path)]["AUC"] == pytest.approx(0.5, abs=0.2)  # learnt nothing


def test_one_label_alone_is_refused(labelled_run):
    with pytest.raises(UserError, match="column 'sick' has .* a label of all or none"):
        experiments(["classify", "--checkpoint", str(labelled_run), *FLAGS, "sick"])
