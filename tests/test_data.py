"""data.py: every kind of image file, labels, masks, splits, safe files, charts, progress."""

import argparse
import io
import os
import pickle
import re
import sys

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


def opened(folder, **options):
    return open_dataset(str(folder), 8, **options)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ---- images

def test_every_eight_bit_mode(tmp_path):
    """Grey, 1-bit, RGB, palette, alpha and CMYK files come out as the colour they show."""
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for name, image, expected in [
        ("l.png", Image.new("L", (8, 8), 51), (51, 51, 51)),
        ("1.png", Image.new("1", (8, 8), 1), (255, 255, 255)),
        ("rgb.bmp", Image.new("RGB", (8, 8), (10, 100, 200)), (10, 100, 200)),
        ("p.png", red.quantize(4), (255, 0, 0)),
        ("p.gif", red.quantize(4), (255, 0, 0)),
        ("rgba.png", Image.new("RGBA", (8, 8), (200, 100, 0, 51)), (40, 20, 0)),  # 51 is a fifth
        ("la.png", Image.new("LA", (8, 8), (255, 51)), (51, 51, 51)),
        ("clear.webp", Image.new("RGBA", (8, 8), (255, 255, 255, 0)), (0, 0, 0)),
        ("cmyk.tif", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
    ]:
        x = load_image(write(tmp_path / name, image), 8)
        assert x.shape == (3, 8, 8) and x.dtype == torch.float32, name
        want = torch.tensor(expected).view(3, 1, 1) / 127.5 - 1
        assert (x - want).abs().max() < STEP, name


def test_palette_with_a_transparent_colour_lies_over_black(tmp_path):
    """A palette's transparent entry turns black, not into the colour that it hides."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 255, 255])
    assert load_image(write(tmp_path / "p.png", image, transparency=1), 4).max() == -1


@pytest.mark.parametrize("name, dtype", [("a.png", "<u2"), ("a.tif", "<u2"), ("a.tif", ">u2"),
                                         ("a.tif", "<i4"), ("a.tif", "<f4")])
def test_sixteen_bits_survive(tmp_path, name, dtype):
    """A ramp over all 65,536 values keeps every step: 1e-4 is far below 8 bits' 8e-3."""
    ramp = np.arange(65536, dtype=dtype).reshape(256, 256)
    x = load_image(write(tmp_path / name, ramp), 256)
    want = torch.from_numpy(ramp.astype(np.float64) / 65535 * 2 - 1)
    assert (x[0] - want).abs().max() < 1e-4 and len(x[0].unique()) == 65536


def test_deep_grey_is_resized_in_float(tmp_path):
    """Two 16-bit values within one 8-bit level stay apart after a resize."""
    a, b = (load_image(write(tmp_path / f"{v}.png", np.full((64, 64), v, np.uint16)), 16)
            for v in (40000, 40020))
    assert (b - a).mean() == pytest.approx(20 / 65535 * 2, rel=0.01)  # float32 rounding


@pytest.mark.parametrize("top, full", [(1000, 1023), (1024, 4095), (4095, 4095), (5000, 16383),
                                       (16384, 65535)])
def test_bit_depth_is_the_smallest_that_holds_the_maximum(tmp_path, top, full):
    """Files of 16 bits that carry 10, 12 or 14 are scaled by what they carry."""
    x = load_image(write(tmp_path / "x.png", np.full((4, 4), top, np.uint16)), 4)
    assert x.mean() == pytest.approx(top / full * 2 - 1, abs=1e-5)


def test_tiff_states_its_maximum_and_white(tmp_path):
    """MaxSampleValue wins over the guess, and photometric 0 means that 0 is white."""
    pixels = np.full((4, 4), 1000, np.uint16)
    x = load_image(write(tmp_path / "x.tif", pixels, tiffinfo={281: 4095}), 4)
    assert x.mean() == pytest.approx(1000 / 4095 * 2 - 1, abs=1e-5)
    path = write(tmp_path / "white.tif", pixels)
    raw = bytearray(path.read_bytes())  # Pillow writes tag 262 itself: turn its value 1 into 0
    at = raw.index(bytes([6, 1, 3, 0, 1, 0, 0, 0, 1, 0]))
    raw[at + 8] = 0
    path.write_bytes(raw)
    assert load_image(path, 4).mean() == pytest.approx(1 - 1000 / 1023 * 2, abs=1e-5)


def test_float_images_within_one_stay(tmp_path):
    """A float TIFF from 0 to 1 is taken as it is; below 0 it is refused."""
    x = load_image(write(tmp_path / "f.tif", np.full((4, 4), 0.25, np.float32)), 4)
    assert x.mean() == pytest.approx(-0.5, abs=1e-6)
    with pytest.raises(UserError, match="n.tif"):
        load_image(write(tmp_path / "n.tif", np.full((4, 4), -1000, np.int32)), 4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_rotation(tmp_path, suffix):
    """All eight orientations give the upright picture, in 8-bit files and in deep ones."""
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:] = 255, 128
    half = upright[::-1, ::-1]
    stored = {1: upright, 2: upright[:, ::-1], 3: half, 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright), 7: half.T, 8: np.rot90(upright, -1)}
    for turn, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        pixels = np.ascontiguousarray(pixels)
        pixels = pixels * np.uint16(257) if suffix == "tif" else pixels
        x = load_image(write(tmp_path / f"{turn}.{suffix}", pixels, exif=exif), 16)
        want = torch.from_numpy(upright / 127.5 - 1)
        assert (x[0] - want).abs().mean() < 0.02, turn  # JPEG is lossy; a wrong turn gives over 0.5


def test_centre_square_and_first_frame(tmp_path):
    """The middle of a wide image is kept, and an animation gives its first frame."""
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 255
    assert load_image(write(tmp_path / "wide.png", wide), 8).min() == 1
    assert load_image(tmp_path / "wide.png", None).shape == (3, 8, 8)
    frames = [Image.new("L", (8, 8), value) for value in (255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif", 8).min() == 1


def test_resize_is_antialiased(tmp_path):
    """A one-pixel chequerboard becomes even grey; without antialiasing it stays black and white."""
    board = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)
    x = load_image(write(tmp_path / "b.png", board), 16)  # every third pixel is the pattern again
    assert x.abs().max() < 0.1  # the filter's leak at a third, far from the pattern's 1


def test_bad_files_are_named(tmp_path, monkeypatch):
    """Missing, foreign, cut and too large files give one line that names the file."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.tif"):
        whole = write(tmp_path / name, noise).read_bytes()
        (tmp_path / name).write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "cut.jpg", "cut.tif", "text.png", "empty.png", "missing.png"):
        with pytest.raises(UserError, match=name) as error:
            load_image(tmp_path / name, 8)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # between one and two times the 4,096
    with pytest.raises(UserError, match="big.png"):
        load_image(write(tmp_path / "big.png", noise), 8)


def test_masks_of_zero_and_one_or_255(tmp_path):
    """Masks stored as 0/1, 0/255, 1-bit or JPEG are alike; an empty one is empty."""
    shape = np.zeros((16, 24), np.uint8)
    shape[4:12, 8:16] = 1
    for name, pixels in (("a.png", shape), ("b.png", shape * 255), ("c.jpg", shape * 255),
                         ("d.png", shape.astype(bool))):
        mask = data.load_mask(write(tmp_path / name, pixels), 8)
        assert mask.dtype == torch.bool and mask.shape == (1, 8, 8)
        assert mask[0, 2:6, 2:6].all() and mask.sum() == 16, name  # cut by 4, then halved
    assert not data.load_mask(write(tmp_path / "e.png", shape * 0), 8).any()
    for column, count in ((4, 0), (5, 8)):  # nearest neighbour at half the side takes odd columns
        line = np.zeros((16, 16), np.uint8)
        line[:, column] = 255
        assert data.load_mask(write(tmp_path / "line.png", line), 8).sum() == count


def test_saved_png_comes_back(tmp_path):
    """save_png then load_image is exact to half a grey level, in grey and in colour."""
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data.save_png(tmp_path / "new" / "x.png", x)
    assert (load_image(tmp_path / "new" / "x.png", 8) - x).abs().max() <= STEP
    data.save_png(tmp_path / "g.png", x[:1])
    assert Image.open(tmp_path / "g.png").mode == "L"
    assert os.listdir(tmp_path / "new") == ["x.png"]  # no temporary file is left


# ---- folders, labels, masks

def test_folder_order_depth_and_hidden(tmp_path):
    """Images at any depth are sorted; hidden files, masks folders and other files are no images."""
    folder_of(tmp_path, ["b.png", "a/z.JPG", "a/c.png", ".hidden.png", ".cache/x.png",
                         "masks/b.png", "masks_manual/b.png"])
    (tmp_path / "notes.txt").write_text("x")
    images = opened(tmp_path)
    assert images.files == ["a/c.png", "a/z.JPG", "b.png"] and len(images) == 3
    assert images[2].mean() == -1 and images[0].mean() == pytest.approx(20 / 127.5 - 1, abs=STEP)
    assert images.batch([0, 1]).shape == (2, 3, 8, 8) and len(list(images)) == 3
    assert torch.equal(images[-1], images[2])


def test_images_folder_masks_and_labels_beside_it(tmp_path):
    """A folder that holds images/ means that one; masks match by stem and kind, or are None."""
    folder_of(tmp_path, ["images/a.jpg", "images/sub/b.jpg", "other.png"])
    write(tmp_path / "masks" / "a.png", np.full((8, 8), 255, np.uint8))
    write(tmp_path / "masks" / "lost.png", np.full((8, 8), 255, np.uint8))
    write(tmp_path / "masks_manual" / "b.png", np.full((8, 8), 255, np.uint8))
    (tmp_path / "labels.csv").write_text("file,finding\na.png,x\nsub/b.jpg,y\n")
    for place in (tmp_path, tmp_path / "images"):
        images = opened(place)
        assert images.files == ["a.jpg", "sub/b.jpg"]
        assert images.columns == {"finding": ["x", "y"]}
        assert images.mask_kinds == ("masks", "masks_manual")
        assert images.mask(0).all() and images.mask(1) is None
        assert images.mask(0, "masks_manual") is None and images.mask(1, "masks_manual").all()
        assert any("lost.png" in problem for problem in images.problems)
    with pytest.raises(UserError, match="masks_other"):
        images.mask(0, "masks_other")


def test_labels_and_files_for_single_images(tmp_path):
    """labels_of finds the row of one file, by path or bare name; list_images lists a folder."""
    folder_of(tmp_path, ["images/a.png", "images/sub/b.png", "images/sub/c.png", "masks/a.png"])
    (tmp_path / "labels.csv").write_text("file,x\na.jpg,1\nsub/b.png,2\nother/c.png,3\n")
    paths = data.list_images(tmp_path)
    assert [path.name for path in paths] == ["a.png", "b.png", "c.png"]
    assert [data.labels_of(path) for path in paths] == [{"x": "1"}, {"x": "2"}, {}]
    with pytest.raises(UserError, match="no image"):
        (tmp_path / "empty").mkdir()
        data.list_images(tmp_path / "empty")


def test_masks_of_equal_names_in_two_folders(tmp_path):
    """Images of one name in two folders get the masks of their own folder, never each other's."""
    folder_of(tmp_path, ["images/a/x.png", "images/b/x.png", "images/x.png"])
    for name, value in (("a/x", 255), ("x", 0)):
        write(tmp_path / "masks" / f"{name}.png", np.full((8, 8), value, np.uint8))
    images = opened(tmp_path)
    assert images.mask(0).all() and images.mask(1) is None and not images.mask(2).any()


@pytest.mark.parametrize("text", [
    "file,label,age\na.png,x,1\nb.png,y,2\n",
    "\ufefffile;label;age\r\na.png;x;1\r\nb.png;y;2\r\n",
    "label,File,age\nx,./a,1\ny,b.dcm,2\n",
    'file,label,age\n"a.png", x ,1\n\nb.png,y,2',
])
def test_labels_in_every_dialect(tmp_path, text):
    """Comma, semicolon, BOM, CRLF, quotes, blank lines, other extensions: the same cells."""
    folder_of(tmp_path, ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_bytes(text.encode())
    images = opened(tmp_path)
    assert images.columns == {"label": ["x", "y"], "age": ["1", "2"]} and images.problems == []


def test_labels_of_the_parent_and_unmatched_rows(tmp_path):
    """Rows name paths below the parent; lost rows and images without one are counted and named."""
    folder_of(tmp_path, ["set/a.png", "set/b.png", "set/c.png"])
    (tmp_path / "labels.csv").write_text("file,label\nset/a.png,x\nset/b.png\nother/c.png,z\n")
    images = opened(tmp_path / "set")
    assert images.columns == {"label": ["x", "", ""]}
    assert any("1 (other/c.png)" in problem for problem in images.problems)
    assert any("1 (c.png)" in problem for problem in images.problems)


def test_ambiguous_names_are_not_guessed(tmp_path):
    """A bare name that two images share, or a stem of two files, matches none."""
    folder_of(tmp_path, ["a/x.png", "b/x.png", "y.png", "y.jpg"])
    (tmp_path / "labels.csv").write_text("file,label\nx.png,1\ny.tif,2\na/x.png,3\n")
    images = opened(tmp_path)
    assert dict(zip(images.files, images.columns["label"])) == {
        "a/x.png": "3", "b/x.png": "", "y.jpg": "", "y.png": ""}


@pytest.mark.parametrize("text, words", [
    ("file,label\na.png,1\na,2\n", "two rows for a.png"), ("name,label\na.png,1\n", "file"),
    ("file,x,x\na.png,1,2\n", "alike"), ("file,label\n../a.png,1\n", "'../a.png'"),
    ("file,label\n/etc/a.png,1\n", "/etc"), ("file,label\nC:\\a.png,1\n", "C:"), ("", "none"),
    ("file,label\na.png,caf\xe9\n", "UTF-8"),
])
def test_bad_labels_are_refused(tmp_path, text, words):
    """Two rows for an image, no file column, paths out of the folder, and Latin-1 are errors."""
    folder_of(tmp_path, ["a.png"])
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(words)):
        opened(tmp_path)


def test_links_that_leave_the_folder_are_skipped(tmp_path):
    """Links out, to a file or a folder, are named and never read; a link inside works."""
    folder_of(tmp_path / "out", ["secret.png", "many/x.png"])
    inside = folder_of(tmp_path / "in", ["a.png"])
    (inside / "b.png").symlink_to(inside / "a.png")
    (inside / "c.png").symlink_to(tmp_path / "out" / "secret.png")
    (inside / "d").symlink_to(tmp_path / "out" / "many")
    images = opened(inside)
    assert images.files == ["a.png", "b.png"]
    assert "links skipped: 2 (c.png, d/)" in images.problems
    (inside / "images").symlink_to(tmp_path / "out")
    assert opened(inside).files == ["a.png", "b.png"]


def test_unreadable_images_are_dropped_and_named(tmp_path):
    """One bad file in twenty is left out; three are over 10 % and stop; so does an empty folder."""
    folder_of(tmp_path, [f"{i:02d}.png" for i in range(20)])
    (tmp_path / "00.png").write_text("no image")
    images = opened(tmp_path)
    assert len(images) == 19 and any("1 (00.png)" in problem for problem in images.problems)
    for name in ("01.png", "02.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="02.png"):
        opened(tmp_path)
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere", "00.png"):
        with pytest.raises(UserError, match=place):
            opened(tmp_path / place)


def test_cache_and_workers_change_nothing(tmp_path, monkeypatch):
    """With a cache, without, spoiled by the caller, pickled or in two workers: the same pixels."""
    generator = np.random.default_rng(0)
    for i in range(6):
        write(tmp_path / f"{i}.png", generator.integers(0, 255, (12, 12, 3), dtype=np.uint8))
    images = opened(tmp_path)
    first = images.batch(range(6))
    images[0].zero_()
    assert len(images._cache) == 6 and torch.equal(images.batch(range(6)), first)
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 3 * 8 * 8 * 4)  # room for two images
    small = pickle.loads(pickle.dumps(opened(tmp_path)))
    assert torch.equal(small.batch(range(6)), first) and len(small._cache) == 2
    loader = torch.utils.data.DataLoader(images, batch_size=3, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), first)


# ---- phantoms and .npz

def test_phantoms_stand_in(tmp_path, monkeypatch):
    """--data cxr and histology are phantoms that say so, unless data/NAME/ is there."""
    monkeypatch.chdir(tmp_path)
    images = open_dataset("cxr", 16, seed=1, count=5)
    assert "phantoms, not real" in images.note and images.files[3] == "phantom_000003"
    assert images.batch([0, 4]).shape == (2, 3, 16, 16) and images.mask(0).shape == (1, 16, 16)
    assert set(images.columns) == {"cardiomegaly", "effusion", "opacity", "nodule", "finding"}
    tissue = open_dataset("histology", 16, count=5)
    assert set(tissue.columns["label"]) <= {"healthy", "cancer"} and "morphology" in tissue.columns
    folder_of(tmp_path, ["data/cxr/images/a.png"])
    assert open_dataset("cxr", 8).files == ["a.png"]
    assert len(open_dataset("phantoms", 16, count=3)) == 3


def test_large_phantom_sets_are_drawn_when_asked_for():
    """A set too large to draw at once gives the same images, masks and labels, one by one."""
    many, few = (open_dataset("phantoms", side, seed=2, count=3) for side in (4096, 32))
    assert many.columns == few.columns and not many._cache
    lazy = data.ImageSet("", "", 32, few.files, {},
                         data.partial(data._read_phantom, data.chest_phantoms, 0, 32, 2))
    assert torch.equal(lazy.batch(range(3)), few.batch(range(3)))


def npz(path, shape=(28, 28), dtype=np.uint8, labels=1):
    """A file as MedMNIST makes them: 4 training, 2 validation and 3 test images."""
    generator, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = generator.integers(0, 255, (n, *shape)).astype(dtype)
        arrays[f"{split}_labels"] = generator.integers(0, 2, (n, labels))
    np.savez(path, **arrays)
    return arrays


def test_medmnist(tmp_path):
    """Grey and RGB files open with labels and split; the official test part is what is held out."""
    arrays = npz(tmp_path / "grey.npz")
    images = open_dataset(tmp_path / "grey.npz", 28)
    assert images.files[4] == "val_000000" and images.columns["split"].count("test") == 3
    assert images.columns["label"][0] == str(arrays["train_labels"][0, 0])
    first = torch.from_numpy(arrays["train_images"][0])
    assert ((images[0][1] + 1) * 127.5 - first).abs().max() < 1e-3  # float32 rounding of 255
    assert split_holdout(images, 0.15, 0)[1].tolist() == [6, 7, 8]
    assert len(split_holdout(images, 0, 0)[1]) == 0
    npz(tmp_path / "rgb.npz", (28, 28, 3), labels=2)
    images = open_dataset(tmp_path / "rgb.npz", 14)
    assert images[8].shape == (3, 14, 14) and {"label_0", "label_1"} < set(images.columns)


def test_bad_npz_is_refused(tmp_path):
    """Volumes, floats, pickled objects and cut files are refused with the file's name."""
    npz(tmp_path / "volume.npz", (8, 8, 8))
    npz(tmp_path / "float.npz", dtype=np.float32)
    payload = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "object.npz", train_images=payload)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "volume.npz").read_bytes()[:900])
    for path in sorted(tmp_path.glob("*.npz")):
        with pytest.raises(UserError, match=path.name):
            open_dataset(path, 28)
    assert not (tmp_path / "ran").exists()


# ---- splits

def patients(tmp_path, count=60, per=3):
    """`count` images of `count / per` patients."""
    folder_of(tmp_path, [f"{i:03d}.png" for i in range(count)], side=2)
    rows = [f"{i:03d}.png,p{i // per},{i % 2}" for i in range(count)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,Patient ID,sex"] + rows))
    return opened(tmp_path)


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


def test_added_images_move_no_other(tmp_path):
    """Images that come later leave everyone else where they were."""
    before = split_holdout(patients(tmp_path, 60), 0.3, 0)[1].tolist()
    after = split_holdout(patients(tmp_path, 120), 0.3, 0)[1].tolist()
    assert [i for i in after if i < 60] == before


def test_holdout_by_file_of_names(tmp_path):
    """A list or CSV of names holds out those and all of their patients; unknown names stop."""
    images = patients(tmp_path / "images", 12)
    for text in ("004.png\n", "file,split\n000.png,train\n004.png,test\n", "\ufeff004\r\n\r\n"):
        (tmp_path / "names").write_text(text)
        assert split_holdout(images, tmp_path / "names", 0)[1].tolist() == [3, 4, 5]
    for text, words in (("zzz.png\n", "zzz.png"), ("", "names"), ("../004.png", "leaves")):
        (tmp_path / "names").write_text(text)
        with pytest.raises(UserError, match=words):
            split_holdout(images, str(tmp_path / "names"), 0)


def test_impossible_splits(tmp_path):
    """No such column, no such file, a fraction of 1 or more, and everything held out are errors."""
    images = patients(tmp_path, 12)
    images.columns["one"] = ["same"] * 12
    for holdout, column in ((0.5, "hospital"), (1.0, None), (-1, None), ("nan", None),
                            (0.2, "one"), ("no/such/file", None)):
        with pytest.raises(UserError):
            split_holdout(images, holdout, 0, column)


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


def test_outliers():
    """Black, blank and flat patches are found and named; textured tissue is kept."""
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    pictures = [noise, noise * 0.01 - 0.9, noise * 0.01 + 0.95, torch.zeros(3, 32, 32)]
    names = ["tissue", "dark", "pale", "soft"]
    images = data.ImageSet("x", "", 32, names, {}, pictures.__getitem__)
    assert [row[:2] for row in data.find_outliers(images)] == [
        ("dark", "black"), ("pale", "blank"), ("soft", "out of focus")]


# ---- files

def test_checkpoints(tmp_path):
    """A saved dict comes back; foreign, cut, older and malicious files are refused, and not run."""
    saved = {"version": data.CHECKPOINT_VERSION, "w": torch.arange(3.0), "name": "x"}
    data.save_atomic(tmp_path / "runs" / "a" / "model.pt", saved)
    path = tmp_path / "runs" / "a" / "model.pt"
    assert torch.equal(data.load_checkpoint(path)["w"], saved["w"])
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-200])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"version": 0}, tmp_path / "old.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"version": 1, "x": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "evil2.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), 2))
    for bad in ("cut", "text", "old", "list", "evil", "evil2", "missing"):
        with pytest.raises(UserError, match=f"{bad}.pt"):
            data.load_checkpoint(tmp_path / f"{bad}.pt")
    assert not (tmp_path / "ran").exists()


def test_newest_checkpoint(tmp_path):
    """Without an argument the newest run is taken; if none is there, the error says what to run."""
    with pytest.raises(UserError, match="python train.py --data cxr"):
        data.resolve_checkpoint(root=tmp_path)
    for i, name in enumerate(("new", "old")):
        path = tmp_path / name / "model.pt"
        path.parent.mkdir()
        path.touch()
        os.utime(path, (1000 - i, 1000 - i))
    assert data.resolve_checkpoint(root=tmp_path) == tmp_path / "new" / "model.pt"
    assert data.resolve_checkpoint(str(tmp_path / "old")) == tmp_path / "old" / "model.pt"
    assert data.resolve_checkpoint(path) == path
    with pytest.raises(UserError, match="train.py"):
        data.resolve_checkpoint(tmp_path)


def test_a_failed_save_keeps_the_old_file(tmp_path):
    """If writing fails half-way the old file stays whole and no temporary file is left."""
    data.save_atomic(tmp_path / "x.pt", {"a": 1})
    with pytest.raises(Exception):
        data.save_atomic(tmp_path / "x.pt", {"a": torch.zeros(1000), "b": lambda: 0})
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1}
    with pytest.raises(UserError, match="cannot be written"):
        data.write_text_atomic(tmp_path / "x.pt" / "below" / "a.txt", "x")
    assert os.listdir(tmp_path) == ["x.pt"]


def test_folders(tmp_path):
    """next_folder never names one that exists; a folder that cannot be made is a user error."""
    for name in ("x", "x_2", "x_3"):
        assert data.next_folder(tmp_path, "x") == tmp_path / name
        data.make_folder(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        data.make_folder(tmp_path / "file" / "below")


def test_safe_join(tmp_path):
    """Paths inside are joined; absolute ones, `..` and links out are refused."""
    (tmp_path / "out").symlink_to("/tmp")
    assert data.safe_join(tmp_path, "a/b.png") == tmp_path / "a/b.png"
    for name in ("/etc/passwd", "../x", "a/../../x", "..\\x", "C:\\x", "out/x"):
        with pytest.raises(UserError):
            data.safe_join(tmp_path, name)


def test_jsonl(tmp_path):
    """Rows come back; a cut last line is left out; a broken line before it is an error."""
    path = tmp_path / "log.jsonl"
    assert data.read_jsonl(path) == []
    for step in range(2):
        data.append_jsonl(path, {"step": step})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    assert data.read_jsonl(path) == [{"step": 0}, {"step": 1}]
    path.write_text('{"st\n{"step": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        data.read_jsonl(path)


def test_grid(tmp_path):
    """Tiny images are doubled to whole multiples, rows may differ in length and be grey."""
    rows = [torch.ones(3, 3, 64, 64), -torch.ones(2, 1, 64, 64)]
    data.save_grid(tmp_path / "grid.png", rows)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 + 2 * 130, 2 + 3 * 130, 3)
    assert (pixels[2:130, 2:130] == 255).all() and (pixels[132:260, 132:260] == 0).all()
    data.save_grid(tmp_path / "words.png", rows, captions=["real", "generated"])
    assert Image.open(tmp_path / "words.png").width > pixels.shape[1] + 40


def test_chart(tmp_path):
    """Lines are drawn in their colours at the right height; odd series do not break the chart."""
    path = tmp_path / "chart.png"
    data.line_chart(path, {"up": ([0, 100], [0, 1]), "down": ([0, 100], [1, 0])}, "t", "x", "y")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape == (540, 900, 3)
    plot = pixels[95:470, 90:860]
    for colour, rises in (((0x00, 0x72, 0xB2), True), ((0xD5, 0x5E, 0x00), False)):
        rows, columns = np.nonzero(abs(plot - colour).sum(-1) < 30)
        assert len(rows) > 300
        assert (np.corrcoef(rows, columns)[0, 1] < -0.99) == rises  # row 0 is the top
    nan = float("nan")
    for series in ({}, {"a": ([], [])}, {"a": ([3], [5])}, {"a": ([0, 1, 2], [nan, 0.0, 1e-3])},
                   {"a": ([0, 1], [2.0, 2.0])}, {"a": ([1e6, 2e6], [-1e-9, 1e9])}):
        for log_y in (False, True):
            data.line_chart(path, series, "t", "x", "y", log_y)
            Image.open(path).verify()


def test_ticks_are_round():
    """Ticks lie inside the range, are equally spaced and few."""
    assert data._ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert data._ticks(-3, 1017) == pytest.approx([0, 200, 400, 600, 800, 1000])
    assert data._ticks(0.003, 9, log_y=True) == pytest.approx([0.01, 0.1, 1])


# ---- scripts, devices, progress

def test_run_script(capsys):
    """User errors are one line and code 2, Ctrl-C is 130, programming errors pass through."""
    def fail(error):
        def main():
            raise error
        with pytest.raises(SystemExit) as end:
            data.run_script(main)
        return end.value.code, capsys.readouterr().err

    assert fail(UserError("side 250", "a multiple of 64", "pass --size 256")) == (
        2, "error: side 250: a multiple of 64: pass --size 256\n")
    assert fail(UserError("Caught in worker\nTraceback\ndata.UserError: bad file")) == (
        2, "error: bad file\n")
    code, text = fail(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert code == 2 and "--batch" in text and "--preset" in text and text.count("\n") == 1
    assert fail(KeyboardInterrupt())[0] == 130
    with pytest.raises(ZeroDivisionError):
        data.run_script(lambda: 1 / 0)
    with pytest.raises(UserError, match="side 7"), data.user_errors():
        raise ValueError("side 7")


def test_a_worker_error_is_one_line(tmp_path, capsys):
    """A bad image met in a DataLoader worker ends a script with one line and code 2."""
    folder_of(tmp_path, ["a.png"], side=64)
    path = tmp_path / "a.png"
    path.write_bytes(path.read_bytes()[:-30])  # a good header, cut pixels
    loader = torch.utils.data.DataLoader(opened(tmp_path), num_workers=1)
    with pytest.raises(SystemExit) as end:
        data.run_script(lambda: list(loader))
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("\n") == 1
    assert text.startswith("error: ") and "a.png" in text and "Traceback" not in text


def test_number_flags():
    """Each argparse type takes its range and refuses the rest in words."""
    for kind, good, bad in ((data.positive_int, "3", ("0", "-1", "x", "1.5")),
                            (data.not_negative_int, "0", ("-1", "x")),
                            (data.positive_float, "1e-4", ("0", "nan", "inf", "x")),
                            (data.not_negative, "0", ("-1", "nan")),
                            (data.share_above_zero, "1", ("0", "1.1", "nan")),
                            (data.fraction, "0.15", ("1.1", "-0.1", "nan", ""))):
        assert kind(good) == float(good)
        for text in bad:
            with pytest.raises(argparse.ArgumentTypeError, match="pass"):
                kind(text)


def test_devices():
    """auto always finds one; absent and unknown devices and dtypes are user errors."""
    assert data.pick_device().type in ("cuda", "mps", "cpu")
    assert data.pick_device("cpu") == torch.device("cpu")
    for name in ("tpu", "cuda:99", "cpu:x", ""):
        with pytest.raises(UserError, match="--device"):
            data.pick_device(name)
    cpu = torch.device("cpu")
    assert data.autocast_dtype(cpu) in (torch.bfloat16, torch.float32)
    assert data.autocast_dtype(cpu, "bf16") == torch.bfloat16
    assert data.autocast_dtype(cpu, "fp32") == torch.float32
    assert data.autocast_dtype(torch.device("mps")) == torch.float32
    with pytest.raises(UserError, match="fp16"):
        data.autocast_dtype(cpu, "fp16")


def test_status_line(monkeypatch, capsys):
    """Into a file: a line per interval and one at the end, with smoothed loss, speed, time left."""
    clock = [100.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: clock[0])
    status = data.StatusLine(400, "vae")
    for step in range(1, 121):
        clock[0] += 0.125  # exact in binary
        status.update(step, loss=2.0 if step % 2 else 1.0, images=16)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1  # 15 s at an interval of 10 s
    label, percent, loss, speed, left = lines[0].split("  ")
    assert (label, percent, speed, left) == ("vae 80/400", "20 %", "128 images/s", "ETA 0:40")
    assert 1.4 < float(loss.split()[1]) < 1.6  # the mean of 1 and 2, not pulled to the zero start
    status.update(400)
    assert "400/400  100 %" in capsys.readouterr().out
    clock[0] += 100
    resumed = data.StatusLine(10_000, "unet", start=5000)
    clock[0] += 20
    resumed.update(5010)
    assert capsys.readouterr().out == "unet 5010/10000  50 %  ETA 2 h 46\n"  # 4,990 steps of 2 s


def test_status_line_on_a_terminal(monkeypatch):
    """On a terminal the line is drawn over itself, and the longer one before leaves nothing."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    status = data.StatusLine(2, "vae")
    status.printed -= 1
    status.began -= 100_000  # the first line's time left is long
    status.update(1, loss=100.0)
    status.update(2)
    status.close()
    first, second = screen.getvalue().strip("\r\n").split("\r")
    assert len(second) >= len(first) and screen.getvalue().count("\n") == 1
