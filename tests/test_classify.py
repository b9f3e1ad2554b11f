"""experiments/classify.py: sets side by side on the same real images; labels that cannot serve."""
import json

import pytest
import torch

from experiments import classify
from experiments.__main__ import main as experiments
from support.command import UserError
from support.files import write_csv
from support.pictures import save_png

FLAGS = ["--device", "cpu", "--seeds", "0", "1", "--cnn-steps", "2", "--label-column", "kind"]


def write_set(folder, kinds):
    """Noise images with a column `kind`."""
    for i in range(len(kinds)):
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1
        save_png(folder / "images" / f"{i}.png", image)
    rows = [[f"{i}.png", kind] for i, kind in enumerate(kinds)]
    write_csv(folder / "labels.csv", [["file", "kind"], *rows])


def test_command(labelled_run, tmp_path, capsys):
    """A row for real images and for each set: images, mean and deviation over seeds."""
    write_set(tmp_path, ["even", "odd"] * 3)
    experiments(["classify", "--checkpoint", str(labelled_run), *FLAGS, "--turns", "--train",
                 str(tmp_path)])
    assert "AUC of even on" in capsys.readouterr().out  # of two labels one is scored
    table = json.loads((labelled_run / "classify.json").read_text())
    assert list(table) == ["real", str(tmp_path)] and table[str(tmp_path)]["images"] == 6
    for row in table.values():
        assert 0 <= row["AUC"] <= 1 and row["sd"] >= 0
        assert 0 <= row["labels, by the referee"] <= 1


def test_the_referee_knows_right_labels_from_wrong_ones(labelled_run, tmp_path, monkeypatch):
    """A set whose labels are right is judged near 1, the same with its labels exchanged near 0;
    one with a single label is not judged."""
    def bright(net, images, device, batch):
        return images.mean(axis=(1, 2, 3))[:, None]
    monkeypatch.setattr(classify, "predict", bright)
    for name, kinds in (("right", ["even", "odd"]), ("wrong", ["odd", "even"]),
                        ("one", ["odd", "odd"])):
        for i in range(len(kinds)):
            save_png(tmp_path / name / "images" / f"{i}.png", torch.full((3, 32, 32), 0.5 - i))
        write_csv(tmp_path / name / "labels.csv",
                  [["file", "kind"], *[[f"{i}.png", kind] for i, kind in enumerate(kinds)]])
    sets = [str(tmp_path / name) for name in ("right", "wrong", "one")]
    experiments(["classify", "--checkpoint", str(labelled_run), *FLAGS, "--train", *sets])
    table = json.loads((labelled_run / "classify.json").read_text())
    assert [table[name]["labels, by the referee"] for name in sets] == [1, 0, None]


def test_one_label_alone_is_refused(labelled_run):
    with pytest.raises(UserError, match="column 'sick' of the held-out images holds .'1'."):
        experiments(["classify", "--checkpoint", str(labelled_run), *FLAGS, "--label-column",
                     "sick"])
