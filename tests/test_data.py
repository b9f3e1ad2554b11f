"""data.py: every kind of image file, labels, masks, splits, safe files, charts, progress."""

import argparse
import io
import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UserError, load_image, open_dataset, split_holdout

STEP = 1 / 255 + 1e-6  # half a grey level of 8 bits in [-1, 1], and rounding


def write(path, array, **options):
    """Save an array as an image file, folders made on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def folder_of(tmp_path, names, side=8):
    """A folder of grey images, each of one value that tells its place in the list."""
    for i, name in enumerate(names):
        write(tmp_path / name, np.full((side, side), 10 * i % 256, np.uint8))
    return tmp_path


def opened(folder):
    return open_dataset(str(folder), 8)


class Payload(str):
    """Unpickling it would create a folder of that name."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


# ---- images

def flat(mode, colour):
    return Image.new(mode, (8, 8), colour)


PALETTE = flat("P", 1)
PALETTE.putpalette([0, 0, 0, 255, 255, 255])


@pytest.mark.parametrize("name, image, options, expected", [
    ("l.png", flat("L", 51), {}, (51, 51, 51)),
    ("1.png", flat("1", 1), {}, (255, 255, 255)),
    ("rgb.bmp", flat("RGB", (10, 100, 200)), {}, (10, 100, 200)),
    ("p.gif", flat("RGB", (255, 0, 0)).quantize(4), {}, (255, 0, 0)),
    ("clear.png", PALETTE, {"transparency": 1}, (0, 0, 0)),  # black, not the colour it hides
    ("rgba.png", flat("RGBA", (200, 100, 0, 51)), {}, (40, 20, 0)),  # 51 is a fifth
    ("la.png", flat("LA", (255, 51)), {}, (51, 51, 51)),
    ("clear.webp", flat("RGBA", (255, 255, 255, 0)), {}, (0, 0, 0)),
    ("cmyk.tif", flat("CMYK", (0, 255, 255, 0)), {}, (255, 0, 0)),
    ("first.gif", flat("L", 255), {"save_all": True, "append_images": [flat("L", 0)]}, (255,) * 3),
])
def test_every_eight_bit_mode(tmp_path, name, image, options, expected):
    """Grey, 1-bit, RGB, palette, alpha, CMYK and the first frame come out as they look."""
    x = load_image(write(tmp_path / name, image, **options), 8)
    assert x.shape == (3, 8, 8) and x.dtype == torch.float32
    assert (x - (torch.tensor(expected).view(3, 1, 1) / 127.5 - 1)).abs().max() < STEP


@pytest.mark.parametrize("name, dtype", [("a.png", "<u2"), ("a.tif", "<u2"), ("a.tif", ">u2"),
                                         ("a.tif", "<i4"), ("a.tif", "<f4")])
def test_sixteen_bits_survive(tmp_path, name, dtype):
    """A ramp over all 65,536 values keeps every step: 1e-4 is far below 8 bits' 8e-3."""
    ramp = np.arange(65536, dtype=dtype).reshape(256, 256)
    x = load_image(write(tmp_path / name, ramp), 256)
    want = torch.from_numpy(ramp.astype(np.float64) / 65535 * 2 - 1)
    assert (x[0] - want).abs().max() < 1e-4 and len(x[0].unique()) == 65536


@pytest.mark.parametrize("value, full", [
    (1000, 1023), (1024, 4095), (4095, 4095), (5000, 16383), (16384, 65535), (0.25, 1)])
def test_bit_depth_is_the_smallest_that_holds_the_maximum(tmp_path, value, full):
    """Files of 16 bits that carry 10, 12 or 14 are scaled by what they carry, floats stay; resizing
    rounds nothing to 8 bits."""
    dtype = np.float32 if full == 1 else np.uint16
    x = load_image(write(tmp_path / "x.tif", np.full((8, 8), value, dtype)), 4)
    assert x.mean() == pytest.approx(value / full * 2 - 1, abs=1e-5)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_rotation(tmp_path, suffix):
    """A picture stored on its side stands upright, in 8-bit files and in deep ones."""
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:] = 255, 128
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    pixels = np.rot90(upright) * (1 if suffix == "jpg" else np.uint16(257))
    x = load_image(write(tmp_path / f"x.{suffix}", np.ascontiguousarray(pixels), exif=exif), 16)
    want = torch.from_numpy(upright / 127.5 - 1)
    assert (x[0] - want).abs().mean() < 0.02  # JPEG is lossy; a wrong turn gives over 0.5


def test_centre_square_and_antialiasing(tmp_path):
    """The middle of a wide image is kept; a one-pixel chequerboard becomes even grey."""
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 255
    x = load_image(write(tmp_path / "wide.png", wide), None)
    assert x.shape == (3, 8, 8) and x.min() == 1
    board = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)
    x = load_image(write(tmp_path / "b.png", board), 16)  # every third pixel is the pattern again
    assert x.abs().max() < 0.1  # the filter's leak at a third, far from the pattern's 1


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "text.png", "missing.png", "big.png",
                                  "minus.tif"])
def test_bad_files_are_named(tmp_path, monkeypatch, name):
    """Cut, foreign, missing, too large and negative images give one line that names the file."""
    path, noise = tmp_path / name, np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    if name not in ("missing.png", "text.png"):
        write(path, np.int32(noise) - 1000 if name == "minus.tif" else noise)
    if name.startswith(("cut", "text")):
        path.write_bytes(path.read_bytes()[:2000] if name.startswith("cut") else b"hello")
    if name == "big.png":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # twice that is refused as a bomb
    with pytest.raises(UserError, match=name) as error:
        load_image(path, 8)
    assert "\n" not in str(error.value)


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
    assert [data.labels_of(path) for path in data.list_images(tmp_path)] == [
        {"finding": "x"}, {"finding": "y"}]
    assert data.labels_of(tmp_path / "other.png") == {}


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
    ("", "none"), ("file,label\na.png,caf\xe9\n", "UTF-8")])
def test_bad_labels_are_refused(tmp_path, text, words):
    """Two rows for an image, no file column, an empty file and Latin-1 are errors."""
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
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 3 * 8 * 8 * 4)  # room for two images
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


# ---- splits

def patients(tmp_path, count=60):
    """`count` images, three a patient."""
    folder_of(tmp_path, [f"{i:03d}.png" for i in range(count)], side=2)
    rows = [f"{i:03d}.png,p{i // 3},{i % 2},one" for i in range(count)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,Patient ID,sex,same"] + rows))
    return opened(tmp_path)


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
        images = data.open_dataset(place, 8)
        assert images.files == ["aa.tif", "bb.tif", "cc.tif"]
        assert images.columns == {"label": ["healthy", "cancer", "cancer"]}


def test_kaggle_rows_without_images_are_refused(tmp_path):
    """An id without its .tif: one error with the count and the first name."""
    folder = kaggle_folder(tmp_path, ["aa"], [("aa", 0), ("gone", 1), ("lost", 1)])
    with pytest.raises(UserError, match="names 2 images that .*gone.*unpack"):
        data.open_dataset(folder, 8)


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
        images = data.open_dataset(name, None)
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
        data.open_dataset(path, 8)


def test_h5_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    """h5py is asked for only where such a file is given."""
    (tmp_path / "a_x.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        data.open_dataset(tmp_path / "a_x.h5", 8)


def test_outliers():
    """Black, blank and blurred patches are found; sharp tissue, and bright fat with walls, stay."""
    tissue = data.open_dataset("histology", 96, count=40).batch(range(40))
    assert data.find_outliers(tissue) == [""] * 40
    fat = torch.full((1, 3, 96, 96), 0.9)
    fat[..., ::12] = 0.1
    odd = torch.cat([torch.full((1, 3, 96, 96), -0.9), torch.full((1, 3, 96, 96), 0.95),
                     torch.nn.functional.avg_pool2d(tissue[:1], 25, 1, 12), fat])
    assert data.find_outliers(odd) == ["black", "blank", "out of focus", ""]


def test_split_keeps_patients_together(tmp_path):
    """Every image is on one side, no patient on both, near the fraction, the same each time."""
    images = patients(tmp_path)
    train, test = split_holdout(images, 0.3, seed=1)
    assert sorted(train.tolist() + test.tolist()) == list(range(60)) and test.dtype == torch.int64
    assert not {i // 3 for i in train.tolist()} & {i // 3 for i in test.tolist()}
    assert 6 <= len(test) <= 33  # 20 patients at 0.3: two standard deviations are 12 images
    assert torch.equal(test, split_holdout(images, "0.3", seed=1)[1])
    assert not torch.equal(test, split_holdout(images, 0.3, seed=2)[1])
    assert {i % 2 for i in split_holdout(images, 0.45, 3, "sex")[1].tolist()} in ({0}, {1})
    assert len(split_holdout(images, 0, 0)[1]) == 0 and len(split_holdout(images, 1e-9, 0)[1]) == 3
    later = split_holdout(patients(tmp_path, 120), 0.3, seed=1)[1]
    assert later[later < 60].tolist() == test.tolist()  # added images move no other


def test_split_file_comes_back(tmp_path):
    """write_split then read_split is the same split; a name that the set lacks is an error."""
    images = patients(tmp_path / "a", 12)
    train, test = split_holdout(images, 0.3, 0)
    data.write_split(tmp_path / "split.csv", images, train, test)
    back = data.read_split(tmp_path / "split.csv", images)
    assert torch.equal(back[0], train) and torch.equal(back[1], test)
    assert (tmp_path / "split.csv").read_text().startswith("file,split,group\n")
    assert torch.equal(split_holdout(images, tmp_path / "split.csv", 9)[1], test)
    with pytest.raises(UserError, match="split.csv"):
        data.read_split(tmp_path / "split.csv", patients(tmp_path / "b", 3))
    (tmp_path / "names.csv").write_text("file\n004.png\n")  # no split column: all are held out
    assert split_holdout(images, str(tmp_path / "names.csv"), 0)[1].tolist() == [3, 4, 5]


@pytest.mark.parametrize("holdout, column", [
    (0.5, "hospital"), (1.0, None), (-1, None), ("nan", None), (0.2, "same"), ("no/file", None)])
def test_impossible_splits(tmp_path, holdout, column):
    """No such column, no such file, a fraction of 1 or more, and everything held out are errors."""
    with pytest.raises(UserError):
        split_holdout(patients(tmp_path, 12), holdout, 0, column)


# ---- files


# ---- scripts, devices, progress


