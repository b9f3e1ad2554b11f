"""Proofs about support/slides.py: places, feature files, tiles, folders, splits, refusals."""
import csv

import numpy as np
import pytest
import torch
from PIL import Image

from support.command import UserError
from support.slides import Slide, open_slides, read_features, snap_to_grid, split_slides
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
        rows.writerow(["slide", "label", *columns])
        for i, name in enumerate(names):
            rows.writerow([f"{name}.svs", labels[i], *(c[i] for c in columns.values())])
    return folder


# ---- places ----

def test_features_of_both_kinds_and_any_stride(tmp_path):
    """.npz and .pt, pixels and grid steps, with gaps, whole or float: all give the same grid."""
    grid = torch.tensor([[0, 0], [0, 1], [3, 1], [7, 4]])
    for i, coords in enumerate((grid.flip(1), grid.flip(1) * 224 + 1000, grid.flip(1) * 0.5e3)):
        torch.save({"features": torch.ones(4, 3), "coords": coords}, tmp_path / f"{i}.pt")
        np.savez(tmp_path / f"{i}.npz", features=np.ones((4, 3)), coords=coords)
        for suffix in ("pt", "npz"):
            content = read_features(tmp_path / f"{i}.{suffix}")
            found, moved = snap_to_grid(content["coords"])
            assert torch.equal(found, grid) and not moved
            assert content["features"].shape == (4, 3) and "pictures" not in content


@pytest.mark.parametrize("offsets", [[(0, 0)], [(0, 0), (131, 77), (8, 255)],
                                     [(64, 128), (192, 0), (128, 64)]])
def test_pieces_of_tissue_may_have_an_origin_each(offsets):
    """Step 256 whatever the common divisor of the origins (1, or 64): patches of one piece stay
    neighbours, every patch has a cell of its own, and the grid is as small as the slide."""
    block = np.stack(np.meshgrid(np.arange(4), np.arange(5)), -1).reshape(-1, 2)
    coords = np.concatenate([256 * block + [1000 + 7168 * k + x, 2000 + y]
                             for k, (x, y) in enumerate(offsets)])
    grid, moved = snap_to_grid(coords)
    assert not moved and len(grid.unique(dim=0)) == len(coords)
    for piece in grid.split(len(block)):
        assert torch.equal(piece - piece[0], torch.as_tensor(block).flip(1))
    assert grid.min() == 0 and grid.max() <= 28 * len(offsets)


def test_rounded_steps_do_not_drift_and_overlaps_move():
    """Steps of 255 and 256 in turn give 600 cells in a row; a piece that lies on another gets the
    free cells beside it; places of no lattice get a cell each; one patch is a grid."""
    row = np.stack([np.round(np.arange(600) * 255.5), np.zeros(600)], 1)
    grid, moved = snap_to_grid(row)
    assert grid[:, 1].tolist() == list(range(600)) and not moved and not grid[:, 0].any()
    block = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2) * 100
    grid, moved = snap_to_grid(np.concatenate([block, block[:12] + 30]))
    assert moved == 12 and len(grid.unique(dim=0)) == 48 and grid.max() <= 8
    scattered = np.random.default_rng(0).random((300, 2)) * 1e5
    grid, moved = snap_to_grid(scattered)
    assert len(grid.unique(dim=0)) == 300 and moved < 60 and grid.max() < 100
    assert snap_to_grid([[700, 9]])[0].tolist() == [[0, 0]]
    assert snap_to_grid(np.zeros((0, 2)))[0].shape == (0, 2)


# ---- feature files ----

@pytest.mark.parametrize("features, coords, why", [
    (np.ones((3, 2)), [[0, 0], [0, 1], [0, 0]], "repeat"),
    (np.full((1, 2), np.nan), [[0, 0]], "not finite"),
    (np.ones((1, 2)), [[0, np.inf]], "not finite"),
    (np.ones((3, 2)), [[0, 0]], "shapes"), (np.ones(3), [[0, 0]] * 3, "shapes"),
    (np.array([object()] * 3), [[0, 0]] * 3, "allow_pickle=False")])
def test_bad_features_are_refused(tmp_path, features, coords, why):
    """Repeated places, NaN, wrong shapes and pickles end in one line that names the file."""
    np.savez(tmp_path / "a.npz", features=features, coords=coords)
    with pytest.raises(UserError, match=f"a.npz cannot be used .*{why}.*are needed"):
        read_features(tmp_path / "a.npz")


def clam_folder(root, slides=8, width=16):
    """What CLAM writes: h5_files, pt_files of bare tensors, a table; dots in names, two slides a
    patient, two pieces of tissue a slide."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    rows = ["case_id,slide_id,label"]
    for folder in ("h5_files", "pt_files"):
        (root / folder).mkdir(parents=True)
    for i in range(slides):
        name = f"TCGA-00-{i // 2:04d}-01Z-00-DX{1 + i % 2}.0A1B2C3D-{i:04d}"
        block = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(-1, 2) * 256
        coords = np.concatenate([block + rng.integers(0, 256, 2), block + [7000, 133]])
        features = rng.normal(size=(32, width)).astype(np.float32)
        with h5py.File(root / "h5_files" / f"{name}.h5", "w") as file:
            file["features"] = features
            file["coords"] = coords
        torch.save(torch.from_numpy(features), root / "pt_files" / f"{name}.pt")
        rows.append(f"patient_{i // 2},{name},{('normal_tissue', 'tumor_tissue')[i // 2 % 2]}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def test_folders_of_clam_are_read_as_they_are(tmp_path, capsys):
    """The whole folder, .h5 alone and .pt alone give the same slides, places and patients; .pt
    without their .h5 have no places, which is said."""
    root = clam_folder(tmp_path / "clam")
    whole = open_slides(root, tiling_of())
    assert "patients by column case_id: 4" in capsys.readouterr().out
    for folder in ("h5_files", "pt_files"):
        again = open_slides(root / folder, tiling_of())
        assert [s.name for s in again] == [s.name for s in whole]
        assert all(torch.equal(a.grid, b.grid) and torch.equal(a.read()[0], b.read()[0])
                   and a.has_places for a, b in zip(again, whole))
    assert [s.label for s in whole] == [0, 0, 1, 1] * 2 and len({s.group for s in whole}) == 4
    assert (root / "h5_files").rename(tmp_path / "away")
    read_features.cache_clear()
    bare = open_slides(root / "pt_files", tiling_of())
    assert not any(s.has_places for s in bare) and len(bare[0].grid.unique(dim=0)) == 32
    assert "without coordinates" in capsys.readouterr().out


def test_h5_of_one_slide_a_batch(tmp_path):
    """features (1, N, D) and coords (1, N, 2), as some write them, are one slide."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.ones((1, 3, 4), np.float16)
        file["coords"] = np.array([[[0, 0], [512, 0], [0, 512]]])
    content = read_features(tmp_path / "a.h5")
    assert content["features"].shape == (3, 4)
    assert snap_to_grid(content["coords"])[0].tolist() == [[0, 0], [0, 1], [1, 0]]
    (tmp_path / "b.h5").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="b.h5 cannot be used"):
        read_features(tmp_path / "b.h5")


# ---- folders ----

def test_what_cannot_be_used_is_counted_and_named(tmp_path, capsys):
    """A slide that labels.csv misses and one without patches are left out, by name."""
    folder = write_features(tmp_path / "f", ["a", "b", "c"])
    for name, n in (("extra", 4), ("empty", 0)):
        np.savez(folder / f"{name}.npz", features=np.ones((n, 6)), coords=np.eye(4, 2)[:n] * 0
                 + np.arange(n)[:, None])
    with open(folder / "labels.csv", "a") as file:
        file.write("empty,benign\r\n")
    found = open_slides(folder, tiling_of())
    assert [(s.name, s.label) for s in found] == [("a", 0), ("b", 1), ("c", 0)]
    said = capsys.readouterr().out
    assert "without a label, or links: 1 (extra)" in said and "without tissue: 1 (empty)" in said


def test_bad_folders_are_refused(tmp_path):
    """Unequal widths, three labels, no labels.csv and a patient in two splits: one line each."""
    folder = write_features(tmp_path / "w", ["a", "b"])
    np.savez(folder / "b.npz", features=np.ones((2, 5)), coords=[[0, 0], [0, 1]])
    with pytest.raises(UserError, match="width of the features {6: 'a', 5: 'b'}"):
        open_slides(folder, tiling_of())
    with pytest.raises(UserError, match="labels .'x', 'y', 'z'.*two labels"):
        open_slides(write_features(tmp_path / "l", "abc", labels="xyz"), tiling_of())
    (folder / "labels.csv").unlink()
    with pytest.raises(UserError, match="labels.csv cannot be read"):
        open_slides(folder, tiling_of())
    (folder / "labels.csv").write_text("name,label\na,0\nb,1\n")
    with pytest.raises(UserError, match="columns name, label.*slide_id"):
        open_slides(folder, tiling_of())
    both = write_features(tmp_path / "p", "abcd", patient="1221", split=["train"] * 3 + ["test"])
    with pytest.raises(UserError, match="in two splits: 1;"):
        split_slides(open_slides(both, tiling_of()), 5, 0)
    with pytest.raises(UserError, match="holds no slide"):
        (tmp_path / "none").mkdir()
        (tmp_path / "none/labels.csv").write_text("slide,label\na,0\n")
        open_slides(tmp_path / "none", tiling_of())


@pytest.mark.parametrize("column", ["patient", "patient_id", "Patient ID", "case_id", "subject_id",
                                    "PatientID", "Participant", "group"])
def test_patients_are_found_in_any_spelling(tmp_path, column, capsys):
    """Five patients of two slides each are five groups, and the first lines say so."""
    folder = write_features(tmp_path / "f", [f"s{i}" for i in range(10)],
                            **{column: [f"p{i // 2}" for i in range(10)]})
    assert len({s.group for s in open_slides(folder, tiling_of())}) == 5
    assert f"patients by column {column}: 5" in capsys.readouterr().out


def test_no_patient_column_is_said(tmp_path, capsys):
    open_slides(write_features(tmp_path / "f", "ab"), tiling_of())
    assert "no patient column: slides count as their own patients" in capsys.readouterr().out


def test_names_with_folders_dots_and_rows_twice(tmp_path, capsys):
    """Names of any system, with and without suffix and dots; a name of two labels is left out."""
    folder = write_features(tmp_path / "f", ["a.1.x", "b.2.x", "c"])
    (folder / "labels.csv").write_text(
        "slide_id,label\nC:\\slides\\a.1.x.svs,0\n/mnt/b.2.x,1\nc,0\nc,1\n")
    assert [s.name for s in open_slides(folder, tiling_of())] == ["a.1.x", "b.2.x"]
    assert "left out, without a label, or links: 1 (c)" in capsys.readouterr().out


def test_folds_keep_groups_together_and_test_every_slide_once():
    """Cross-validation parts no patient; a given split is kept as it is."""
    bags = [slide_of(3, 3, i, f"s{i}", i % 2) for i in range(20)]
    for i, s in enumerate(bags):
        s.group = f"g{i // 4}"
    parts = split_slides(bags, 3, 0)
    assert sorted(s.name for _, test in parts for s in test) == sorted(s.name for s in bags)
    for train, test in parts:
        assert test and not {s.group for s in train} & {s.group for s in test}
    for s in bags[:4]:
        s.is_test = True
    (train, test), = split_slides(bags, 3, 0)
    assert test == bags[:4] and train == bags[4:]
    with pytest.raises(UserError, match="nobody; labels in each training part: .1."):
        split_slides([s for s in bags if s.is_test or s.label], 3, 0)


# ---- images ----

def picture(path, tissue, side=32):
    """White paper; the tiles of a grid that are named hold pink noise."""
    pixels = np.full((4 * side + 5, 5 * side + 9, 3), 240, np.uint8)
    pixels[:] += np.random.default_rng(0).integers(0, 4, pixels.shape, dtype=np.uint8)
    for i, j in tissue:
        noise = np.random.default_rng(i * 5 + j).integers(0, 60, (side, side, 3))
        pixels[i * side:(i + 1) * side, j * side:(j + 1) * side] = np.uint8(noise + [180, 80, 150])
    Image.fromarray(pixels).save(path)


def test_images_are_tiled_once_and_blank_tiles_counted(tmp_path, capsys):
    """Tissue tiles get features, places and thumbnails; paper does not; a second run reads the
    cache; another tile side does not; an image of paper only is named."""
    (tmp_path / "x").mkdir()
    tissue = [(0, 0), (1, 2), (3, 4)]
    picture(tmp_path / "x/a.png", tissue), picture(tmp_path / "x/b.png", [(2, 2), (2, 3)])
    picture(tmp_path / "x/paper.png", [])
    (tmp_path / "labels.csv").write_text("file,label,group\nx/a.png,0,p\nx/b.png,1,q\n"
                                         "x/paper.png,1,r\n")
    calls = []

    def embed(images):
        calls.append(1)
        return mean_colour(images)

    tiling = Tiling(embed, "colour", tmp_path / "out/features", 32)
    found = open_slides(tmp_path / "x", tiling)
    said = capsys.readouterr().out
    assert "without tissue: 1 (paper)" in said and "55 blank tiles left out, 5 patches" in said
    assert [s.grid.tolist() for s in found] == [[[0, 0], [1, 2], [3, 4]], [[0, 0], [0, 1]]]
    assert [s.group for s in found] == ["p", "q"] and found[0].take(torch.arange(3)).shape[1] > 5
    assert found[0].read()[1].shape == (3, 3, 8, 8) and calls
    calls.clear()
    open_slides(tmp_path / "x", tiling)
    assert not calls
    read_features.cache_clear()
    finer = Tiling(embed, "colour", tmp_path / "out/features", 16)
    assert sum(len(s.grid) for s in open_slides(tmp_path / "x", finer)) == 20 and calls
