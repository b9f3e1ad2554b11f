"""datasets.py: folders, tables as the public sets ship them, masks, .npz, .h5, phantoms."""
import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pictures_on_disk import folder_of, write
from support import datasets
from support.command import UserError
from support.datasets import open_dataset
from support.images import list_images
from support.splits import split_holdout
from support.tables import labels_of

STEP = 1 / 255 + 1e-6  # half a grey level of 8 bits in [-1, 1], and rounding


def opened(folder):
    return open_dataset(str(folder), 8)


class Payload(str):
    """Unpickling it would create a folder of that name."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


# ---- folders, labels, masks

def test_folder_order_depth_and_hidden(tmp_path):
    """Images at any depth are sorted; hidden files, masks folders and other files are no images."""
    folder_of(tmp_path, ["b.png", "a/z.JPG", "a/c.png", ".hidden.png", ".cache/x.png",
                         "masks/b.png", "masks_manual/b.png"])
    (tmp_path / "notes.txt").write_text("x")
    images = opened(tmp_path)
    assert images.files == ["a/c.png", "a/z.JPG", "b.png"] and len(list(images)) == 3
    assert images[2].mean() == -1 and images[0].mean() == pytest.approx(20 / 127.5 - 1, abs=STEP)


def test_images_folder_masks_and_labels_beside_it(tmp_path):
    """A folder that holds images/ means that one; masks match by stem and kind, or are None;
    labels_of finds the row of a single file."""
    folder_of(tmp_path, ["images/a.jpg", "images/sub/b.jpg", "other.png"])
    for name in ("masks/a", "masks/lost", "masks_manual/b"):
        write(tmp_path / f"{name}.png", np.full((8, 8), 255, np.uint8))
    (tmp_path / "labels.csv").write_text("file,finding\na.png,x\nsub/b.jpg,y\n")
    for place in (tmp_path, tmp_path / "images"):
        images = opened(place)
        assert images.files == ["a.jpg", "sub/b.jpg"]
        assert images.columns == {"finding": ["x", "y"]}
        assert images.mask(0).all() and images.mask(1) is None
        assert images.mask(0, "masks_manual") is None and images.mask(1, "masks_manual").all()
        assert images.problems == ["masks/ without an image: 1 (lost.png)"]
    assert [labels_of(path) for path in list_images(tmp_path)] == [
        {"finding": "x"}, {"finding": "y"}]
    assert labels_of(tmp_path / "other.png") == {}


@pytest.mark.parametrize("name, scale", [("x.png", 1), ("x.png", 255), ("x.jpg", 255),
                                         ("x.png", 0)])
def test_masks_of_zero_and_one_or_255(tmp_path, name, scale):
    """Masks stored as 0/1, 0/255 or JPEG are alike, cut as the image is; an empty one is empty."""
    shape = np.zeros((16, 24), np.uint8)
    shape[4:12, 8:16] = 1
    write(tmp_path / "x.bmp", shape)
    write(tmp_path / "masks" / name, shape * np.uint8(scale))
    mask = opened(tmp_path).mask(0)
    assert mask.dtype == torch.bool and mask.shape == (1, 8, 8)
    assert mask[0, 2:6, 2:6].all() == (scale > 0) and mask.sum() == (16 if scale else 0)


def test_equal_names_are_not_guessed(tmp_path):
    """Images that share a stem get the label and the mask of their own path, or none."""
    folder_of(tmp_path, ["a/x.png", "b/x.png", "y.jpg", "y.png", "masks/a/x.png", "masks/x.png"])
    (tmp_path / "labels.csv").write_text("file,label\nx.png,1\ny.jpg,2\ny.png,4\na/x.png,3\n")
    images = opened(tmp_path)
    assert images.files == ["a/x.png", "b/x.png", "y.jpg", "y.png"]
    assert images.columns["label"] == ["3", "", "2", "4"]
    assert [images.mask(i) is None for i in range(4)] == [False, True, True, True]


@pytest.mark.parametrize("text, columns, problems", [
    ("file,label,age\na.png,x,1\nb.png,y,2\n", [["x", "y"], ["1", "2"]], 0),
    ("\ufefffile;label;age\r\na.png;x;1\r\nb.png;y;2\r\n", [["x", "y"], ["1", "2"]], 0),
    ("label,file,age\nx,a,1\ny,b.dcm,2\n", [["x", "y"], ["1", "2"]], 0),
    ('file,label,age\n"set/a.png", x ,1\n\nb.png,y', [["x", "y"], ["1", ""]], 0),
    ("file,label,age\na.png,x,1\nc.png,y,2\n", [["x", ""], ["1", ""]], 2),
])
def test_labels_in_every_dialect(tmp_path, text, columns, problems):
    """Comma, semicolon, BOM, CRLF, quotes, blank lines, other extensions, in the parent: the same
    cells; rows without an image and images without a row are named."""
    folder_of(tmp_path, ["set/a.png", "set/b.png"])
    (tmp_path / "labels.csv").write_bytes(text.encode())
    images = opened(tmp_path / "set")
    assert images.columns == dict(zip(("label", "age"), columns))
    assert len(images.problems) == problems and all("1 (" in line for line in images.problems)


@pytest.mark.parametrize("text, words", [
    ("file,label\na.png,1\na.png,2\n", "2 rows for a.png"), ("name,label\na.png,1\n", "file"),
    ("", "none"), ("file,label\na.png,\x81\n", "UTF-8")])
def test_bad_labels_are_refused(tmp_path, text, words):
    """Two rows for an image, no file column, an empty file and bytes of no text are errors."""
    folder_of(tmp_path, ["a.png"])
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        opened(tmp_path)


def test_unreadable_images_and_links_out_are_dropped_and_named(tmp_path):
    """Two bad files in twenty are left out, three stop; links inside the folder work."""
    folder = folder_of(tmp_path / "in", [f"{i:02d}.png" for i in range(18)])
    (folder / "18.png").symlink_to(folder / "01.png")
    (folder / "19.png").symlink_to(write(tmp_path / "secret.png", np.zeros((8, 8), np.uint8)))
    (folder / "00.png").write_text("no image")
    images = opened(folder)
    assert len(images) == 18 and "18.png" in images.files
    assert all(name in images.problems[0] for name in (": 2 (", "00.png", "19.png"))
    (folder / "01.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for place, words in (("in", "01.png"), ("empty", "no image"), ("gone", "gone")):
        with pytest.raises(UserError, match=words):
            opened(tmp_path / place)


def test_cache_and_workers_change_nothing(tmp_path, monkeypatch):
    """From the cache, beyond its room, spoiled by the caller, in two workers: the same pixels."""
    for i in range(4):
        write(tmp_path / f"{i}.png", np.arange(i, i + 192, dtype=np.uint8).reshape(8, 8, 3))
    monkeypatch.setattr(datasets, "CACHE_BYTES", 2 * 3 * 8 * 8 * 4)  # room for two images
    images = opened(tmp_path)
    first = images.batch(range(4))
    images[0].zero_()
    assert len(images.cache) == 2 and torch.equal(images.batch(range(4)), first)
    loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), first)


# ---- phantoms and .npz

def test_phantoms_stand_in(tmp_path, monkeypatch):
    """--data cxr is phantoms that say so, unless data/cxr/ is there; a tiny side is refused."""
    monkeypatch.chdir(tmp_path)
    images = open_dataset("cxr", 16, seed=1, count=5)
    assert "phantoms, not real" in images.note and images.files[3] == "phantom_000003"
    assert images.batch([0, 4]).shape == (2, 3, 16, 16) and images.mask(0).shape == (1, 16, 16)
    assert set(images.columns) == {"cardiomegaly", "effusion", "opacity", "nodule"}
    with pytest.raises(UserError, match="too coarse"):
        open_dataset("phantoms", 8)
    folder_of(tmp_path, ["data/cxr/images/a.png"])
    assert open_dataset("cxr", 8).files == ["a.png"]
    assert len(open_dataset("phantoms", 16, count=3)) == 3


def npz(path, shape=(28, 28), dtype=np.uint8, labels=1):
    """A file as MedMNIST makes them: 4 training, 2 validation and 3 test images."""
    generator, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = generator.integers(0, 255, (n, *shape)).astype(dtype)
        arrays[f"{split}_labels"] = generator.integers(0, 2, (n, labels))
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize("shape, labels", [((28, 28), 1), ((28, 28, 3), 2)])
def test_medmnist(tmp_path, shape, labels):
    """Grey and RGB files open with labels; the official test part is what is held out."""
    arrays = npz(tmp_path / "x.npz", shape, labels=labels)
    images = open_dataset(tmp_path / "x.npz", 28)
    assert images.files[4] == "val_000000" and len(images.columns) == labels
    assert images.columns["label_0"][0] == str(arrays["train_labels"][0, 0])
    last = torch.from_numpy(arrays["test_images"][2].reshape(28, 28, -1)).permute(2, 0, 1)
    assert ((images[8] + 1) * 127.5 - last).abs().max() < 1e-3  # float32 rounding of 255
    assert split_holdout(images, 0.15, 0)[1].tolist() == [6, 7, 8]
    assert len(split_holdout(images, 0, 0)[1]) == 0


def test_bad_npz_is_refused(tmp_path):
    """Volumes, floats, pickled objects and cut files are refused with the file's name."""
    npz(tmp_path / "volume.npz", (8, 8, 8))
    npz(tmp_path / "float.npz", dtype=np.float32)
    payload = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "object.npz", train_images=payload, train_labels=np.zeros(1))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "volume.npz").read_bytes()[:900])
    for path in sorted(tmp_path.glob("*.npz")):
        with pytest.raises(UserError, match=path.name):
            open_dataset(path, 28)
    assert not (tmp_path / "ran").exists()


def kaggle_folder(tmp_path, ids, rows):
    for name in ids:
        image = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
        (tmp_path / "train").mkdir(exist_ok=True)
        image.save(tmp_path / "train" / f"{name}.tif")
    (tmp_path / "test").mkdir()
    image.save(tmp_path / "test" / "unseen.tif")
    (tmp_path / "train_labels.csv").write_text("id,label\n" + "".join(
        f"{name},{label}\n" for name, label in rows))
    return tmp_path


def test_patchcamelyon_of_kaggle(tmp_path):
    """train_labels.csv with id,label beside train/*.tif: labels become words, test/ is left out;
    the folder train/ alone reads the same."""
    folder = kaggle_folder(tmp_path, ["aa", "bb", "cc"], [("cc", 1), ("aa", 0), ("bb", 1)])
    for place in (folder, folder / "train"):
        images = open_dataset(place, 8)
        assert images.files == ["aa.tif", "bb.tif", "cc.tif"]
        assert images.columns == {"label": ["healthy", "cancer", "cancer"]}


def test_kaggle_rows_without_images_are_refused(tmp_path):
    """An id without its .tif: one error with the count and the first name."""
    folder = kaggle_folder(tmp_path, ["aa"], [("aa", 0), ("gone", 1), ("lost", 1)])
    with pytest.raises(UserError, match="names 2 images that .*gone.*unpack"):
        open_dataset(folder, 8)


@pytest.fixture
def h5py_of_dicts(monkeypatch):
    """A stand-in for h5py, which reads .npz files: so the pair is tested without the package."""
    def opened(path, mode):
        return np.load(open(path, "rb"), allow_pickle=False)

    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=opened))


def write_pair(folder, x, y):
    for part, array in (("x", x), ("y", y)):
        with open(folder / f"camelyon_valid_{part}.h5", "wb") as file:
            np.savez(file, **{part: array})
    return folder / "camelyon_valid_x.h5"


def test_patchcamelyon_as_h5(tmp_path, h5py_of_dicts):
    """The published pair: images by row, y (N, 1, 1, 1) becomes words, either file names both."""
    x = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    path = write_pair(tmp_path, x, np.array([0, 1, 1, 0]).reshape(4, 1, 1, 1))
    for name in (path, tmp_path / "camelyon_valid_y.h5"):
        images = open_dataset(name, None)
        assert images.columns == {"label": ["healthy", "cancer", "cancer", "healthy"]}
        assert torch.equal(images[2], torch.from_numpy(x[2]).permute(2, 0, 1) / 127.5 - 1)
    assert pickle.loads(pickle.dumps(images.sources))[1].shape == (8, 8, 3)  # for workers


@pytest.mark.parametrize("x,y", [
    (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3)),
    (np.zeros((4, 8, 8, 3), np.float32), np.zeros(4)),
    (np.zeros((4, 8, 8), np.uint8), np.zeros(4)), (None, None)])
def test_bad_h5_is_refused(tmp_path, h5py_of_dicts, x, y):
    """Unequal lengths, other types or shapes, a missing half."""
    path = tmp_path / "camelyon_valid_x.h5"
    path.write_bytes(b"no h5") if x is None else write_pair(tmp_path, x, y)
    with pytest.raises(UserError, match="camelyon_valid_x.h5"):
        open_dataset(path, 8)


def test_h5_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    """h5py is asked for only where such a file is given."""
    (tmp_path / "a_x.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        open_dataset(tmp_path / "a_x.h5", 8)


# ---- what is passed over, and depth

def test_the_first_lines_name_what_is_passed_over(tmp_path, monkeypatch):
    """DICOM without its package, .jp2, .jfif, further pages of a TIFF: counted, with names."""
    folder_of(tmp_path, ["a.png", "b.png"])
    page = Image.new("L", (8, 8))
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page, page])
    for name in ("x.jp2", "y.jfif", "z.dcm"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    said = "\n".join(opened(tmp_path).problems)
    assert all(name in said for name in ("x.jp2", "y.jfif", "z.dcm", "pip install pydicom",
                                         "several pages", "pages.tif"))


def test_depth_of_a_set(tmp_path):
    """Decided once, said in the first line, the same when a run passes it on; offsets are warned
    of."""
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for i, high in enumerate((4000, 900, 4095)):
        write(tmp_path / f"{i}.png", ramp * np.uint16(high // 63))
    images = opened(tmp_path)
    assert images.depth == {"black": 0.0, "white": 4095.0} and "white 4095" in images.note
    assert images[1].max() == pytest.approx(900 // 63 * 63 / 4095 * 2 - 1, abs=1e-5)
    kept = open_dataset(tmp_path, 8, depth={"black": 0, "white": 8190})
    assert kept.depth["white"] == 8190 and kept[2].max() < 0.01
    for i in range(3):
        write(tmp_path / f"{i}.png", ramp + np.uint16(32768))
    assert any("offset" in line for line in opened(tmp_path).problems)
