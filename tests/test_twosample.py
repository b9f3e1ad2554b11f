"""experiments/twosample.py: sets that can or cannot be separated, patients apart."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluate import sharpness
from experiments import __main__ as front_door
from experiments.twosample import halves_of
from support.phantoms import chest_phantoms
from support.pictures import save_png


def test_equal_and_blurred_sets(tmp_path):
    """Chests of one kind are near 0.5, blurred ones near 1."""
    chests = chest_phantoms(160, size=32, seed=0)[0].expand(-1, 3, -1, -1)
    for i, image in enumerate(chests):
        save_png(tmp_path / ("real" if i < 80 else "equal") / f"{i}.png", image)
        if i >= 80:
            blurred = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
            save_png(tmp_path / "blurred" / f"{i}.png", blurred)

    aucs = {}
    for name in ("equal", "blurred"):
        front_door.main(["twosample", str(tmp_path / "real"), str(tmp_path / name), "--device",
                         "cpu", "--cnn-steps", "40", "--seeds", "0"])
        table = json.loads((tmp_path / name / "twosample.json").read_text())
        aucs[name] = table["AUC"]
        assert table["seeds"] == {"seed 0": table["AUC"]} and table["images of each"] == 80
    assert 0.3 < aucs["equal"] < 0.7 and aucs["blurred"] > 0.95


def test_patients_are_never_parted():
    """Images of one patient share a half, by seed; those of patients of both halves get none."""
    patients = [{str(i // 4)} for i in range(40)]
    half = halves_of(patients, 0)
    assert (half.reshape(10, 4) == half[::4, None]).all() and half.sum() == 20
    assert any(not np.array_equal(half, halves_of(patients, seed)) for seed in (1, 2, 3))
    one = half.tolist().index(1) // 4
    zero = half.tolist().index(0) // 4
    assert halves_of([*patients, {str(one), str(zero)}, {str(one)}], 0)[-2:].tolist() == [-1, 1]


def test_sharpness():
    """Flat images and even slopes have none; a checkerboard's is known; blur lowers it."""
    slope = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert sharpness(slope).item() == pytest.approx(0, abs=1e-9)
    board = 2.0 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2) - 1
    assert sharpness(board.expand(1, 3, 32, 32)).item() == pytest.approx(16, rel=0.01)
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (sharpness(F.avg_pool2d(noise, 3, stride=1)) < sharpness(noise) / 4).all()
