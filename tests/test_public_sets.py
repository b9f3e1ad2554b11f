"""docs/data.md: each of its commands opens a miniature of the set that it names."""
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import test_tables as miniatures
import train
from pictures_on_disk import folder_of, write
from support.splits import image_groups
from support.training_set import open_training_set
from test_dicom import GREY, dicom

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
COMMANDS = re.findall(r"`python train\.py (--data [^`]*)`", PAGE.read_text())


def as_dicom(folder, suffix):
    """Each picture of the folder as a DICOM file in its place."""
    for path in list(folder.rglob("*.png")):
        dicom(path.with_suffix(suffix), GREY)
        path.unlink()


def chest_sets(folder):
    """Those with tables: by the makers of test_tables.py."""
    for name, make in (("nih", miniatures.nih), ("CheXpert-v1.0-small", miniatures.chexpert),
                       ("mimic-cxr-jpg", miniatures.mimic), ("vindr-cxr", miniatures.vindr),
                       ("rsna", miniatures.rsna), ("padchest", miniatures.padchest),
                       ("chest_xray", miniatures.kermany)):
        (folder / name).mkdir()
        make(folder / name)
    as_dicom(folder / "vindr-cxr", ".dicom")
    as_dicom(folder / "rsna", ".dcm")
    for path in (folder / "padchest").rglob("*.png"):
        write(path, np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)


def other_sets(folder):
    """Masks, arrays, histology, and a folder of one's own."""
    xrays = [f"MCUCXR_{i:04d}_{i % 2}" for i in range(6)]
    folder_of(folder / "MontgomerySet", [f"{place}/{name}.png" for name in xrays for place in (
        "CXR_png", "ManualMask/leftMask", "ManualMask/rightMask")])
    folder_of(folder / "ChinaSet_AllFiles", [f"CXR_png/{name}.png" for name in xrays]
              + [f"mask/{name}_mask.png" for name in xrays])
    pixels = np.zeros((6, 8, 8, 3), np.uint8)
    answers = np.arange(6)[:, None] % 2
    np.savez_compressed(folder / "chestmnist_128.npz", **{
        f"{split}_{name}": array for split in ("train", "val", "test")
        for name, array in (("images", pixels[..., 0]), ("labels", answers))})
    for name, array in (("x", pixels), ("y", answers)):
        with open(folder / f"camelyonpatch_level_2_split_train_{name}.h5", "wb") as file:
            np.savez(file, **{name: array})
    kaggle = folder / "histopathologic-cancer-detection"
    folder_of(kaggle, [f"train/{name}.tif" for name in xrays])
    miniatures.table(kaggle / "train_labels.csv", "id,label", *(f"{name},1" for name in xrays))
    folder_of(folder / "xrays", [f"{name}.png" for name in xrays])
    miniatures.table(folder / "xrays" / "labels.csv", "file,patient", *(
        f"{name}.png,{i // 2}" for i, name in enumerate(xrays)))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    pytest.importorskip("pydicom")
    folder = tmp_path_factory.mktemp("sets")
    chest_sets(folder)
    other_sets(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_public_set_opens(sets, monkeypatch, capsys, command):
    """Images on both sides, no patient on both, nothing that stops the run; masks are joined."""
    def opened(path, mode):
        return np.load(open(path, "rb"), allow_pickle=False)

    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=opened))
    monkeypatch.chdir(sets)
    args = train.parse([*shlex.split(command), "--no-drop-outliers", "--out", "none"])
    found = open_training_set(args)
    groups = image_groups(found.images)
    assert len(found.train) and len(found.test)
    assert not {groups[i] for i in found.train} & {groups[i] for i in found.test}
    if "MontgomerySet" in command or "ChinaSet" in command:
        assert all(found.images.masks["masks"]) and len(found.images) == 6
    first = capsys.readouterr().out.splitlines()[0]
    assert re.search("images from|reading", first)
