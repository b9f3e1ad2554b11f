"""datasets.py: folders with tables and masks, .npz, phantoms, labels."""
import numpy as np
import pytest
import torch

from pictures_on_disk import folder_of, write
from support import datasets
from support.command import UserError
from support.datasets import label_matrix, match_names, open_dataset


def opened(folder, **options):
    return open_dataset(str(folder), 8, **options)


def with_table(folder, names, *rows):
    folder_of(folder, names)
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


# ---- names and tables

@pytest.mark.parametrize("name, index", [
    ("a/x.png", 0), ("a\\x.png", 0), ("./a/x", 0), ("set/a/x.png", 0), ("/data/set/a/x.png", 0),
    ("x.png", None), ("b/x.jpg", 1), ("y.png", 3), ("y.jpg", 2), ("y", None), ("z", 4),
    ("z.dcm", 4), ("other/z.png", None), ("other/a/x.png", None), ("1.2.840.5", 5), ("", None),
    ("../a/x.png", None), ("w.png", 6), ("copy/w.png", 7)])
def test_what_a_name_means(name, index):
    """A path, or the end of exactly one; dots of an id are no suffix; names with other folders, and
    names of several files, mean nothing; a whole path goes before the end of another."""
    files = ["a/x.png", "b/x.png", "y.jpg", "y.png", "c/z.png", "c/1.2.840.5.png", "w.png",
             "copy/w.png"]
    assert match_names([name], files, "/data/set") == [index]


def test_a_folder_with_images_and_a_table(tmp_path):
    """images/ is the set; file, patient and split are no labels; what does not match is named."""
    folder = with_table(tmp_path, ["images/a.jpg", "images/sub/b.jpg", "images/c.png", "other.png"],
                        "file,patient,split,finding", "a.png,p1,train,x",
                        "images/sub/b.jpg,p2,test,y", "gone.png,p3,test,z")
    images = opened(folder)
    assert images.files == ["a.jpg", "c.png", "sub/b.jpg"]
    assert images.columns == {"finding": ["x", "", "y"]}
    assert images.groups == ["p1", "c.png", "p2"] and images.official == ["train", "", "test"]
    said = "\n".join(images.problems)
    for line in ("match no image, or several: 1 (gone.png)", "without a row in", "1 (c.png)"):
        assert line in said


@pytest.mark.parametrize("text, words", [
    ("file,label\na.png,1\na.png,2\n", "two rows for a.png"), ("name,label\na.png,1\n", "file"),
    ("file,label\nb.png,1\n", "names none")])
def test_bad_tables_are_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        opened(with_table(tmp_path, ["a.png"], text))


def test_a_table_of_other_names(tmp_path):
    """--table, --file-column and --group-column name what is called otherwise."""
    folder_of(tmp_path / "set", ["a.png", "b.png"])
    (tmp_path / "t.csv").write_text("image,subject,label\na,s1,x\nb,s1,y\n")
    images = opened(tmp_path / "set", table=tmp_path / "t.csv", file_column="image",
                    group_column="subject")
    assert images.groups == ["s1", "s1"] and images.columns == {"label": ["x", "y"]}
    with pytest.raises(UserError, match="no column 'case'"):
        opened(tmp_path / "set", table=tmp_path / "t.csv", file_column="image", group_column="case")


# ---- patients, folders' names

def test_patients_from_paths(tmp_path):
    """The first group of the expression; one that matches nothing is an error; without any, the
    first lines say that patients are unknown."""
    folder_of(tmp_path, ["patient01/a.png", "patient01/b.png", "patient02/a.png", "x.png"])
    images = opened(tmp_path)
    assert images.groups is None and datasets.NO_PATIENTS in images.problems
    images = opened(tmp_path, patient_from=r"(patient\d+)/")
    assert images.groups == ["patient01", "patient01", "patient02", "x.png"]
    assert any("without a patient" in line and "1 (x.png)" in line for line in images.problems)
    with pytest.raises(UserError, match="matches no path"):
        opened(tmp_path, patient_from="(person)")


@pytest.mark.parametrize("names, labels", [
    (["NORMAL/a.png", "NORMAL/b.png", "ILL/a.png", "ILL/c.png"], ["ILL"] * 2 + ["NORMAL"] * 2),
    (["p1/a.png", "p1/b.png", "p2/a.png", "p2/c.png"], None),  # patients
    (["A/a.png", "A/b.png", "c.png"], None)])
def test_folders_as_labels(tmp_path, names, labels):
    assert opened(folder_of(tmp_path, names)).columns.get("label") == labels


# ---- masks

@pytest.mark.parametrize("name, scale", [("x.png", 1), ("x.png", 255), ("x.jpg", 255),
                                         ("x_mask.png", 255), ("x.png", 0)])
def test_masks_of_zero_and_one_or_255(tmp_path, name, scale):
    """Masks stored as 0/1, 0/255 or JPEG are alike, cropped as the image is; empty is empty."""
    shape = np.zeros((16, 24), np.uint8)
    shape[4:12, 8:16] = 1
    write(tmp_path / "x.bmp", shape)
    write(tmp_path / "masks" / name, shape * np.uint8(scale))
    mask = opened(tmp_path).mask(0)
    assert mask.dtype == torch.bool and mask.shape == (1, 8, 8)
    assert mask[0, 2:6, 2:6].all() == (scale > 0) and mask.sum() == (16 if scale else 0)


def test_masks_by_kind_and_name(tmp_path):
    """masks/, masks_manual/ and NAME_mask beside NAME; one without an image is named."""
    folder_of(tmp_path, ["images/a.jpg", "images/sub/b.jpg", "images/c.png", "images/c_mask.png",
                         "masks/a.png", "masks/lost.png", "masks_manual/sub/b.png"])
    images = opened(tmp_path)
    assert images.files == ["a.jpg", "c.png", "sub/b.jpg"]
    assert [images.mask(i) is None for i in range(3)] == [False, False, True]
    assert [images.mask(i, "masks_manual") is None for i in range(3)] == [True, True, False]
    assert "or not of two values): 1 (lost.png)" in images.problems[-1]


@pytest.mark.parametrize("mask", [
    np.kron([[0, 1], [2, 3]], np.ones((8, 16))), np.kron([[0, 1], [0, 1]], np.ones((8, 8)))])
def test_masks_that_are_left_out(tmp_path, mask):
    """Label maps, and masks that were stored square, are left out and named."""
    write(tmp_path / "x.png", np.zeros((16, 32), np.uint8))
    write(tmp_path / "masks/x.png", mask.astype(np.uint8))
    images = opened(tmp_path)
    assert images.mask(0) is None and images.problems[-1].startswith("masks left out")


# ---- pixels

def test_the_first_lines_name_what_will_not_be_seen(tmp_path):
    """Wide images, links out of the folder, unreadable files."""
    folder = folder_of(tmp_path / "set", [f"{i:02d}.png" for i in range(18)])
    write(folder / "wide.png", np.zeros((10, 40), np.uint8))
    folder_of(tmp_path / "elsewhere", ["x.png"])
    (folder / "link.png").symlink_to(tmp_path / "elsewhere/x.png")
    (folder / "inside.png").symlink_to(folder / "17.png")
    (folder / "masks_x").symlink_to(tmp_path / "elsewhere")
    (folder / "00.png").write_text("no image")
    images = opened(folder)
    said = "\n".join(images.problems)
    assert "links out of the folder, left out: 2 (link.png, masks_x)" in images.problems
    assert not images.masks
    assert "more than a quarter to the centre crop: 1 (wide.png)" in said
    assert "unreadable" in said and len(images) == 19 and "inside.png" in images.files


def test_the_cache_changes_nothing(tmp_path, monkeypatch):
    """From the cache, beyond its room, modified by the caller: the same pixels."""
    for i in range(4):
        write(tmp_path / f"{i}.png", np.arange(i, i + 192, dtype=np.uint8).reshape(8, 8, 3))
    monkeypatch.setattr(datasets, "CACHE_BYTES", 2 * 3 * 8 * 8 * 4)  # room for two images
    images = opened(tmp_path)
    first = images.batch(range(4))
    images[0].zero_()
    assert len(images.cache) == 2 and torch.equal(images.batch(range(4)), first)


# ---- phantoms and .npz

def test_phantoms_stand_in(tmp_path, monkeypatch):
    """--data cxr is phantoms that say so, unless data/cxr/ exists; a tiny side is refused."""
    monkeypatch.chdir(tmp_path)
    images = open_dataset("cxr", 16, seed=1, count=5)
    assert "phantoms, not real" in images.note and images.files[3] == "phantom_000003"
    assert images.batch([0, 4]).shape == (2, 3, 16, 16) and images.mask(0).shape == (1, 16, 16)
    assert set(images.columns) == {"cardiomegaly", "effusion", "opacity", "nodule"}
    assert len(set(images.groups)) == 5 and not images.problems
    with pytest.raises(UserError, match="too coarse"):
        open_dataset("phantoms", 8)
    folder_of(tmp_path, ["data/cxr/images/a.png"])
    assert open_dataset("cxr", 8).files == ["a.png"]


def npz(path, shape=(28, 28), labels=1):
    """A file as MedMNIST makes them: 4 training, 2 validation and 3 test images."""
    generator, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = generator.integers(0, 255, (n, *shape)).astype(np.uint8)
        arrays[f"{split}_labels"] = generator.integers(0, 2, (n, labels))
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize("shape, labels", [((28, 28), 1), ((28, 28, 3), 2)])
def test_medmnist(tmp_path, shape, labels):
    """Grey and RGB files open with labels and their official split; patients are unknown."""
    arrays = npz(tmp_path / "x.npz", shape, labels=labels)
    images = open_dataset(tmp_path / "x.npz", 28)
    assert images.files[4] == "val_000000" and len(images.columns) == labels
    assert images.columns["label_0"][0] == str(arrays["train_labels"][0, 0])
    last = torch.from_numpy(arrays["test_images"][2].reshape(28, 28, -1)).permute(2, 0, 1)
    assert ((images[8] + 1) * 127.5 - last).abs().max() < 1e-3  # float32 rounding of 255
    assert images.official == ["train"] * 6 + ["test"] * 3 and "unknown" in images.problems[0]


def test_bad_npz_is_refused(tmp_path):
    """Volumes and cut files are refused with the file's name."""
    npz(tmp_path / "volume.npz", (8, 8, 8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "volume.npz").read_bytes()[:900])
    for path in sorted(tmp_path.glob("*.npz")):
        with pytest.raises(UserError, match=f"{path.name}.*2-D"):
            open_dataset(path, 28)


# ---- labels

def test_label_matrix():
    """0/1 columns are labels; text is cut at |; empty cells and -1 are unknown; a value of two
    columns is called by both."""
    columns = {"ill": ["1", "0", "", "-1"], "finding": ["a|b", "b", "", "a"],
               "other": ["b", "c", "c", "c"]}
    labels, values = label_matrix(columns, ["ill", "finding", "other"])
    assert labels == ["ill", "a", "finding: b", "other: b", "c"]
    nan = np.nan
    np.testing.assert_array_equal(values, [
        [1, 1, 1, 1, 0], [0, 0, 1, 0, 1], [nan, nan, nan, 0, 1], [nan, 1, 0, 0, 1]])
    assert label_matrix(columns, [])[1].shape == (4, 0)
    with pytest.raises(UserError, match="no column 'x'"):
        label_matrix(columns, ["x"])
