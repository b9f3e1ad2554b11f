"""Mosaics of support/slides.py: real labelled patches, patients apart, foci known."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import mil
from evaluate import bootstrap_interval
from support.command import UserError
from support.files import write_csv
from support.pictures import save_png
from support.slides import Patches, mosaic_slides, open_patches


def bank_of(patients=10, each=6):
    """Ten patients, three healthy and three cancer patches each; a feature tells them apart."""
    count = patients * each
    cancer = np.arange(count) % 2 == 1
    features = torch.from_numpy(cancer).float()[:, None] * 4 + torch.randn(
        count, 3, generator=torch.Generator().manual_seed(0))
    return Patches(features, torch.zeros(count, 3, 16, 16), cancer,
                   np.repeat([f"p{i}" for i in range(patients)], each))


def test_patients_are_apart_and_foci_are_what_cancer_is():
    """Train and test slides share no patient; cancer patches lie in foci and nowhere else; a focus
    is 3 to 30 % of the tissue; one seed gives one set."""
    bank = bank_of()
    slides = mosaic_slides(bank, 0, 40)
    seen = {False: set(), True: set()}
    for slide in slides:
        rows = slide.rows.numpy()
        seen[slide.is_test] |= set(bank.patients[rows].tolist())
        assert (bank.cancer[rows] == slide.foci.numpy()).all()
        share = slide.foci.float().mean().item()
        assert (0.029 < share < 0.301) if slide.label else share == 0
        assert len(set(bank.patients[rows[slide.foci]].tolist())) <= 1
    assert not seen[False] & seen[True] and len(seen[True]) == 3
    assert [sum(s.is_test for s in slides), sum(s.label for s in slides)] == [8, 20]
    again = mosaic_slides(bank, 0, 40)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(slides, again))
    assert not torch.equal(slides[0].rows, mosaic_slides(bank, 1, 40)[0].rows)


def test_an_official_test_part_makes_the_test_slides():
    """Then features may have been learned on all others: no test slide has seen their patients."""
    bank = replace(bank_of(), test_patients=("p2", "p7"))
    patients = {side: {name for slide in mosaic_slides(bank, 3, 20) if slide.is_test == side
                       for name in bank.patients[slide.rows.numpy()]} for side in (True, False)}
    assert patients[True] == {"p2", "p7"} and not patients[True] & patients[False]


def write_patches(folder, **columns):
    rows = [["file", "label", "patient", *columns]]
    for i in range(16):
        colour = torch.tensor([0.2, -0.5, 0.4]).view(3, 1, 1) * (1 if i % 2 else -1)
        save_png(folder / f"{i}.png", colour.expand(3, 48, 48) + 0.1 * torch.randn(3, 48, 48))
        rows.append([f"{i}.png", ("cancer", "healthy")[i % 2], f"p{i // 4}",
                     *(column[i // 4] for column in columns.values())])
    write_csv(folder / "labels.csv", rows)


def test_command(tmp_path, monkeypatch):
    """From a folder of patches to heat maps; --positive names the label of a focus."""
    monkeypatch.setattr(mil, "bootstrap_interval", partial(bootstrap_interval, rounds=20))
    write_patches(tmp_path / "patches")
    mil.main(["--patches-of", str(tmp_path / "patches"), "--positive", "cancer",
              "--count", "10", "--models", "2x2", "--steps", "2", "--device", "cpu",
              "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "heat_2x2.png").exists()


def test_bad_input(tmp_path):
    def embed(images):
        return images.mean(dim=(2, 3))
    write_patches(tmp_path / "two")
    bank = open_patches(tmp_path / "two", embed, "label")
    assert bank.cancer.sum() == 8 and bank.cancer[0] != bank.cancer[1]
    assert not bank.test_patients
    write_patches(tmp_path / "split", split=["train", "test", "train", "test"])
    assert open_patches(tmp_path / "split", embed, "label").test_patients == ("p1", "p3")
    with pytest.raises(UserError, match="--positive tumour"):
        open_patches(tmp_path / "two", embed, "label", "tumour")
    bank.cancer[:] = False
    with pytest.raises(UserError, match="0 with cancer patches"):
        mosaic_slides(bank, 0, 10)
