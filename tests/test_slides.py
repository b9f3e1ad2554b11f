"""support/slides.py: grids, feature files, folders, splits, refusals."""
import csv

import numpy as np
import pytest
import torch

from support.command import UserError
from support.slides import Slide, open_slides, read_features, split_slides, to_grid
from support.tiles import Tiling


def slide_of(n=900, side=40, seed=0, name="s", label=0):
    """A slide of n patches at random places of a square, with random features."""
    g = torch.Generator().manual_seed(seed)
    cells = torch.randperm(side * side, generator=g)[:n]
    features = torch.randn(n, 6, generator=g)
    return Slide(name, label, name, False, torch.stack([cells // side, cells % side], 1),
                 torch.arange(n), lambda: (features, None))


def mean_colour(images):
    """An embedder for tests: (n, 3, H, W) -> mean and deviation of each channel, (n, 6)."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def tiling_of(folder="unused", **settings):
    return Tiling(mean_colour, "colour", folder, **{"side": 32, **settings})


def write_features(folder, names, d=6, n=30, labels=None, **columns):
    """A folder of .npz features, coords in pixels, and labels.csv."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        s = slide_of(n, 12, seed=i)
        np.savez(folder / f"{name}.npz", features=s.read()[0][:, :d] + (i % 2),
                 coords=s.grid.flip(1) * 256 + 17)
    labels = labels or ["benign", "malignant"] * len(names)
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", *columns])
        for i, name in enumerate(names):
            rows.writerow([f"{name}.svs", labels[i], *(c[i] for c in columns.values())])
    return folder


# ---- grids and feature files ----

GRID = torch.tensor([[0, 0], [0, 1], [3, 1], [7, 4]])


def test_feature_files(tmp_path):
    """.h5 and .npz, in steps or pixels, with gaps: all give the same grid."""
    for stride in (1, 224.0):
        content = {"features": np.ones((4, 3)), "coords": (GRID.flip(1) * stride + 1000).numpy()}
        path = tmp_path / f"{stride}.npz"
        np.savez(path, **content)
        features, pictures, grid = read_features(path)
        assert torch.equal(grid, GRID) and features.shape == (4, 3) and pictures is None
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for key, value in content.items():
            file[key] = value
    assert torch.equal(read_features(tmp_path / "a.h5")[2], GRID)


def test_a_given_step_joins_pieces_with_an_origin_each():
    """With a step, pieces of tissue off the common lattice are cut to cells; without one they are
    refused, as are two patches in a cell."""
    block = np.stack(np.meshgrid(np.arange(4), np.arange(5)), -1).reshape(-1, 2) * 256
    coords = np.concatenate([block, block + [7168 + 131, 77]])
    grid = to_grid(coords, step=256)
    assert torch.equal(grid[20:] - grid[20], grid[:20])
    assert len(grid.unique(dim=0)) == 40 and grid.max() < 40
    with pytest.raises(ValueError, match="no lattice of their smallest difference 7"):
        to_grid(coords)
    with pytest.raises(ValueError, match="two patches share a cell"):
        to_grid(np.concatenate([block, block + 20]), step=256)
    # Tiles of a coarser level: 384.012 full-resolution pixels, stored whole.
    level = (np.stack(np.meshgrid(np.arange(9), np.arange(7)), -1).reshape(-1, 2) * 384.012).round()
    assert torch.equal(to_grid(level, step=384.012), to_grid(level // 384 * 384, step=384))
    assert to_grid([[700, 9]]).tolist() == [[0, 0]] and to_grid(np.zeros((0, 2))).shape == (0, 2)


@pytest.mark.parametrize("features, coords, why", [
    (np.full((1, 2), np.nan), [[0, 0]], "not finite"),
    (np.array([object()] * 3), [[0, 0]] * 3, "allow_pickle=False")])
def test_bad_features_are_refused(tmp_path, features, coords, why):
    """NaN and pickles end in one line that names the file."""
    np.savez(tmp_path / "a.npz", features=features, coords=coords)
    with pytest.raises(UserError, match=f"a.npz cannot be used .*{why}.*are needed"):
        read_features(tmp_path / "a.npz")


# ---- folders ----

def test_slides_left_out_are_counted_and_named(tmp_path, capsys):
    """A slide that labels.csv lacks and one without patches are left out, by name; dots in names
    and suffixes in the table do not matter; without patients the first lines say so."""
    folder = write_features(tmp_path / "f", ["a", "b.1.x", "c"])
    for name, n in (("extra", 4), ("empty", 0)):
        np.savez(folder / f"{name}.npz", features=np.ones((n, 6)), coords=np.eye(4, 2)[:n])
    with open(folder / "labels.csv", "a") as file:
        file.write("empty,benign\r\n")
    slides = open_slides(folder, tiling_of())
    assert [(s.name, s.label) for s in slides] == [("a", 0), ("b.1.x", 1), ("c", 0)]
    printed = capsys.readouterr().out
    assert "without a label or tissue: 2 (empty, extra)" in printed
    assert "no column patient: slides are split one by one" in printed


def test_bad_folders_are_refused(tmp_path):
    """Two widths, three labels, two rows, no table, a patient on both sides: one line."""
    folder = write_features(tmp_path / "w", ["a", "b"])
    np.savez(folder / "b.npz", features=np.ones((2, 5)), coords=[[0, 0], [0, 1]])
    with pytest.raises(UserError, match="width .5, 6."):
        open_slides(folder, tiling_of())
    with pytest.raises(UserError, match="labels .'x', 'y', 'z'.*two labels"):
        open_slides(write_features(tmp_path / "l", "abc", labels="xyz"), tiling_of())
    (folder / "labels.csv").write_text("file,label\na.npz,x\na.svs,y\n")
    with pytest.raises(UserError, match="names a slide twice"):
        open_slides(folder, tiling_of())
    (folder / "labels.csv").unlink()
    with pytest.raises(UserError, match="labels.csv"):
        open_slides(folder, tiling_of())
    both = write_features(tmp_path / "p", "abcd", patient="1221", split=["train"] * 3 + ["test"])
    with pytest.raises(UserError, match="patients on both sides: 1;"):
        split_slides(open_slides(both, tiling_of()), 5, 0)


def test_folds_keep_patients_together_and_test_every_slide_once():
    """Cross-validation splits no patient; a given split is used as it is."""
    bags = [slide_of(3, 3, i, f"s{i}", i % 2) for i in range(20)]
    for i, slide in enumerate(bags):
        slide.patient = f"p{i // 4}"
    parts = split_slides(bags, 3, 0)
    assert sorted(s.name for _, test in parts for s in test) == sorted(s.name for s in bags)
    for train, test in parts:
        assert test and not {s.patient for s in train} & {s.patient for s in test}
    for slide in bags[:4]:
        slide.is_test = True
    (train, test), = split_slides(bags, 3, 0)
    assert test == bags[:4] and train == bags[4:]
