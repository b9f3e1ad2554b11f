"""images.py: every kind of picture file, depth, DICOM, folders."""
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pictures_on_disk import folder_of, write
from support.command import UserError
from support.images import choose_depth, image_shape, load_image, scan_folder

STEP = 1 / 255 + 1e-6  # half a grey level of 8 bits in [-1, 1], and rounding


# ---- eight bits

def flat(mode, colour):
    return Image.new(mode, (8, 8), colour)


@pytest.mark.parametrize("name, image, options, expected", [
    ("1.png", flat("1", 1), {}, (255, 255, 255)),
    ("rgb.bmp", flat("RGB", (10, 100, 200)), {}, (10, 100, 200)),
    ("p.gif", flat("RGB", (255, 0, 0)).quantize(4), {}, (255, 0, 0)),
    ("rgba.png", flat("RGBA", (200, 100, 0, 51)), {}, (40, 20, 0)),  # 51 is a fifth
    ("la.png", flat("LA", (255, 51)), {}, (51, 51, 51)),
    ("cmyk.tif", flat("CMYK", (0, 255, 255, 0)), {}, (255, 0, 0)),
    ("first.gif", flat("L", 255), {"save_all": True, "append_images": [flat("L", 0)]}, (255,) * 3),
])
def test_every_eight_bit_mode(tmp_path, name, image, options, expected):
    """Grey, 1-bit, RGB, palette, alpha, CMYK and the first frame come out as they look."""
    x = load_image(write(tmp_path / name, image, **options), 8)
    assert x.shape == (3, 8, 8) and x.dtype == torch.float32
    assert (x - (torch.tensor(expected).view(3, 1, 1) / 127.5 - 1)).abs().max() < STEP


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


@pytest.mark.parametrize("name", ["cut.jpg", "text.png", "missing.png", "big.png", "minus.tif"])
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


# ---- depth

def chest(side=32):
    """An 8-bit picture that holds 0 and 255."""
    picture = np.random.default_rng(0).integers(0, 256, (side, side)).astype(np.uint8)
    picture[0, :2] = 0, 255
    return picture


ENCODINGS = {
    "8bit.png": lambda x: x,
    "12bit.png": lambda x: np.uint16(np.round(x / 255 * 4095)),
    "16bit.png": lambda x: np.uint16(x) * np.uint16(257),
    "8in16.png": lambda x: np.uint16(x),
    "float01.tif": lambda x: np.float32(x / 255),
    "float255.tif": lambda x: np.float32(x),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_one_picture_is_one_set_of_numbers(tmp_path, name):
    """8, 12, 16 bits, 8 bits in 16 and floats: equal pixels to half a level of their coarsest
    grey, alone, by the depth of their set, and by that of a model trained on 8 bits."""
    path = write(tmp_path / name, ENCODINGS[name](chest()))
    want = torch.from_numpy(chest() / 127.5 - 1)
    for depth in (None, choose_depth([path]), {"white": 255.0}):
        assert (load_image(path, 32, depth)[0] - want).abs().max() < 1.1 / 1023


@pytest.mark.parametrize("high", [800, 4000, 4110, 6000])
def test_the_set_decides_and_no_file(tmp_path, high):
    """A dark or overexposed file of a 12-bit set keeps its values; alone, a file that exceeds 12
    bits by half a percent is still one of 12 bits."""
    for i, most in enumerate((3000, 4095, high)):
        write(tmp_path / f"{i}.png", np.uint16(chest() / 255 * most))
    depth = choose_depth(scan_folder(tmp_path)[0][:2])
    assert depth == {"white": 4095.0}
    x = load_image(tmp_path / "2.png", 32, depth)[0]
    want = torch.from_numpy(np.floor(chest() / 255 * high) / 4095).clamp(0, 1) * 2 - 1
    assert (x - want).abs().max() < 1e-5
    if 4000 <= high < 4300:
        assert (load_image(tmp_path / "2.png", 32)[0] - want).abs().max() < 1e-3


@pytest.mark.parametrize("dtype, white", [(np.uint8, 255), (np.uint16, 4095)])
def test_white_is_zero_at_every_depth(tmp_path, dtype, white):
    """TIFF's PhotometricInterpretation 0 means that the least value is white."""
    grey = np.round(chest(8) / 255 * white).astype(dtype)
    black = write(tmp_path / "black.tif", grey)
    inverted = write(tmp_path / "white.tif", np.asarray(white - grey, dtype))
    entry = struct.pack("<HHII", 262, 3, 1, 1)
    assert entry in inverted.read_bytes()
    inverted.write_bytes(inverted.read_bytes().replace(entry, struct.pack("<HHII", 262, 3, 1, 0)))
    assert (load_image(black, 8) - load_image(inverted, 8)).abs().max() < 1e-5


# ---- DICOM

def dicom(path, grey, bits=12, **fields):
    """A DICOM file of grey in [0, 1], or of whole values as they are."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    values = grey if grey.dtype.kind in "iu" else np.round(grey * (2 ** bits - 1)).astype(np.uint16)
    file.SOPClassUID = meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    file.PhotometricInterpretation = "MONOCHROME2"
    file.SamplesPerPixel = 1
    file.Rows, file.Columns = values.shape[-2:]
    file.BitsAllocated = 16
    file.BitsStored = bits
    file.HighBit = bits - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    file.PixelData = values.tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


GREY = np.linspace(0, 1, 1024).reshape(32, 32)
WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


@pytest.mark.parametrize("grey, bits, fields", [
    (GREY, 12, WINDOW), (1 - GREY, 12, {**WINDOW, "PhotometricInterpretation": "MONOCHROME1"}),
    (GREY, 12, {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 3072,
                "WindowWidth": 8192}),
    (GREY, 12, {**WINDOW, "PixelPaddingValue": 0}),
    (np.int16(GREY * 4095 - 2048), 16, {"WindowCenter": 0, "WindowWidth": 4096}),
    (GREY, 12, {"WindowCenter": [2048, 100], "WindowWidth": [4096, 1]}),
    (GREY * 0.1, 16, {}), (1 - GREY, 16, {"PhotometricInterpretation": "MONOCHROME1"})])
def test_dicom_is_windowed(tmp_path, grey, bits, fields):
    """Rescale, the file's first window, MONOCHROME1, signed values; percentiles without a window,
    by suffix, or by the magic word in a name without one."""
    want = torch.from_numpy(GREY * 2 - 1)
    limit = 0.002 if fields.get("WindowWidth") else 0.03
    for name in ("x.dcm", "1.2.840.113", "IM0001"):
        x = load_image(dicom(tmp_path / name, grey, bits, **fields), 32)
        assert x.shape == (3, 32, 32) and (x[0] - want).abs().max() < limit
    assert len(scan_folder(tmp_path)[0]) == 3


def test_dicom_that_is_refused(tmp_path, monkeypatch):
    """Several frames, a cut file, and a missing package: one line that says so."""
    frames = dicom(tmp_path / "many.dcm", np.zeros((2, 8, 8), np.uint16), NumberOfFrames=2)
    cut = dicom(tmp_path / "cut.dcm", GREY)
    cut.write_bytes(cut.read_bytes()[:-500])
    with pytest.raises(UserError, match="many.dcm .*2 frames"):
        load_image(frames, 8)
    with pytest.raises(UserError, match="cut.dcm"):
        load_image(cut, 8)
    assert image_shape(frames) == (8, 8)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match="pip install pydicom"):
        load_image(cut, 8)


def test_a_table_of_grey_values(tmp_path):
    """VOI LUT: a table of 12 bits that inverts the grey values."""
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    table.add_new("LUTData", "US", [4095 - i for i in range(4096)])
    x = load_image(dicom(tmp_path / "x.dcm", GREY, VOILUTSequence=[table]), 32)[0]
    assert (x - torch.from_numpy(1 - GREY * 2)).abs().max() < 0.01


# ---- folders

def test_what_a_folder_holds(tmp_path):
    """Images at any depth, sorted; masks beside them; no hidden files, masks folders or runs."""
    folder_of(tmp_path, ["b.png", "a/z.JPG", "a_mask.png", "b_mask.png", ".hidden.png", ".x/x.png",
                         "masks/b.png", "masks_manual/b.png", "run/curves.png", "run/cache/x.png"])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "run/split.csv").write_text("file,split\n")
    images, masks, _ = scan_folder(tmp_path)
    assert [path.name for path in images] == ["z.JPG", "a_mask.png", "b.png"]
    assert [path.name for path in masks] == ["b_mask.png"]
    assert [path.name for path in scan_folder(tmp_path / "run")[0]] == ["x.png", "curves.png"]
