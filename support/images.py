"""The only reader of pixels: image files, and DICOM through pydicom, to tensors in [-1, 1].

    paths, masks, links = scan_folder("xrays")
    depth = choose_depth(paths)                 # {"white": 4095.0}, once per data set
    x = load_image(paths[0], 64, depth)         # (3, 64, 64) float32 in [-1, 1]

A file of more than 8 bits ("deep grey") does not say which value is white: 16 bits often carry 8,
10, 12 or 14. So a data set has one white for all files, the lowest of these levels that holds the
values of a sample. A file far above or below has another depth: its own maximum decides.
"""
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from support.command import UserError, one_line

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow runs a program for EPS
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
DICOM_SUFFIXES = {".dcm", ".dicom"}
EIGHT_BITS = {"white": 255.0}
LEVELS = [1, *(2 ** bits - 1 for bits in (8, 10, 12, 14, 16))]
OVERSHOOT = 1.05   # processed pictures may exceed their white by this factor
DEPTH_SAMPLE = 32  # files that decide the depth of a data set


def is_dicom(path):
    """By the suffix, or if there is none (or digits), by the magic word."""
    suffix = Path(path).suffix.lower()
    if suffix.strip(".0123456789") or not os.path.isfile(path):  # a pipe would block
        return suffix in DICOM_SUFFIXES
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


@contextmanager
def reading(path):
    """Turn any exception into a UserError that names the file."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path} is a DICOM file", "the package pydicom is needed",
                        "pip install pydicom") from error
    except Exception as error:  # a damaged file makes both readers raise anything
        raise UserError(f"{path} cannot be read ({one_line(error)[:120].strip()})",
                        "a whole image file is needed",
                        "check the path, or replace the file") from error


def read_header(path):
    """The pydicom data set of a DICOM file, without its pixels."""
    import pydicom
    return pydicom.dcmread(path, stop_before_pixels=True)


def image_shape(path):
    """(height, width) from the header of a file; raises UserError if that is damaged."""
    with reading(path):
        if is_dicom(path):
            header = read_header(path)
            return int(header.Rows), int(header.Columns)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.height, image.width


def white_level(high):
    """The lowest level that holds the value: 1 (of floats), or 8, 10, 12, 14 or 16 bits."""
    return float(next((level for level in LEVELS if high <= OVERSHOOT * level), high))


def choose_depth(paths):
    """The depth {"white": level} of a data set, from the largest value of a sample of its files."""
    maxima = []
    for path in paths[::math.ceil(len(paths) / DEPTH_SAMPLE) or 1]:
        with suppress(Exception), Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.mode[0] in "IF":  # DICOM files and damaged ones are skipped
                maxima.append(np.asarray(image).max())
    return {"white": white_level(max(maxima))} if maxima else dict(EIGHT_BITS)


def scale_deep(deep, depth):
    """Deep grey (H, W) -> [0, 1]."""
    high = deep.max()
    if not 0 <= deep.min() <= high < math.inf:
        raise ValueError("grey values below 0 or not finite")
    white = depth["white"] if depth else 0.0
    if not white / 15 <= high <= 2 * white:  # no file of that data set
        white = white_level(high)
    return (deep / white).clip(0, 1)


# ---- one file ----------------------------------------------------------------------------------

def decode_picture(path, depth):
    """Image file -> (H, W) or (H, W, 3) in [0, 1]: its first page, upright by EXIF."""
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        zero_is_white = image.format == "TIFF" and image.tag_v2.get(262) == 0
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        grey = scale_deep(np.asarray(image, np.float64), depth)
        return 1 - grey if zero_is_white else grey  # Pillow inverts 8 bits, but not deep grey
    if image.has_transparency_data:  # over black
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.asarray(image.convert("L" if image.mode in "1L" else "RGB")) / np.float32(255)


def decode_dicom(path):
    """DICOM file -> (H, W) or (H, W, 3) in [0, 1], where dense is bright.

    The file's lookup tables or window apply, else the percentiles 0.5 and 99.5 are black and white.
    Raises ValueError for several frames. Source: DICOM PS3.3 C.11.
    """
    import pydicom
    dicom = pydicom.dcmread(path)
    raw = dicom.pixel_array
    if dicom.SamplesPerPixel == 3 and raw.ndim == 3:
        return raw / (2.0 ** dicom.BitsStored - 1)
    if raw.ndim != 2:
        raise ValueError(f"it has {len(raw)} frames, not one picture")

    values = pydicom.pixels.apply_modality_lut(raw, dicom)
    low, high = np.percentile(values[raw != dicom.get("PixelPaddingValue")], (0.5, 99.5))
    if dicom.get("VOILUTSequence"):
        values = pydicom.pixels.apply_voi_lut(values, dicom)
        low, high = 0, 2.0 ** int(dicom.VOILUTSequence[0].LUTDescriptor[2]) - 1
    elif dicom.get("WindowWidth") is not None:
        with np.errstate(over="ignore"):
            values = pydicom.pixels.apply_voi_lut(values, dicom)
            low, high = pydicom.pixels.apply_voi_lut(np.array([-1e6, 1e6]), dicom)  # its ends
    grey = ((values - low) / max(high - low, 1e-6)).clip(0, 1)
    if dicom.PhotometricInterpretation == "MONOCHROME1":  # zero is white
        grey = 1 - grey
    return np.where(raw == dicom.get("PixelPaddingValue"), 0, grey)


def load_image(source, size, depth=None):
    """Image file, or uint8 pixels (H, W[, 3]) -> (3, size, size) float32 in [-1, 1].

    The centre square is resized in float; size None keeps its side. depth: see above; None decides
    by the file alone. Raises UserError if the file cannot be read.
    """
    if isinstance(source, np.ndarray):
        pixels = np.float32(source) / 255
    else:
        with reading(source):
            decoded = decode_dicom(source) if is_dicom(source) else decode_picture(source, depth)
            pixels = np.float32(decoded)
    x = torch.from_numpy(pixels)
    x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)           # (H, W, C) -> (C, H, W)

    side = min(x.shape[1:])
    top = (x.shape[1] - side) // 2
    left = (x.shape[2] - side) // 2
    x = x[:, top:top + side, left:left + side]
    if size not in (None, side):
        x = F.interpolate(x[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    return (x * 2 - 1).expand(3, -1, -1).clone()


# ---- folders -----------------------------------------------------------------------------------

def is_inside(path, folder):
    """Whether a path stays below the folder; a link may leave it."""
    return path.resolve().is_relative_to(Path(folder).resolve())


def image_root(folder):
    """Where the images of a data folder lie: in images/, if it has that."""
    images = Path(folder, "images")
    return images if images.is_dir() and is_inside(images, folder) else Path(folder)


def is_run(names):
    """Whether a folder with files of these names is a run of this project."""
    return "config.json" in names and not {"log.jsonl", "split.csv"}.isdisjoint(names)


def scan_folder(folder):
    """(images, masks beside them as NAME_mask, links that leave the folder), sorted paths.

    Hidden files, folders of masks and folders of our own runs are skipped.
    """
    root = image_root(folder)
    images = []
    masks = []
    links = []
    for place, folders, files in os.walk(root):
        if is_run(files) and Path(place) != root:
            folders.clear()
            continue
        folders[:] = [name for name in folders
                      if not name.startswith(".") and not f"{name}_".startswith("masks_")]
        stems = {os.path.splitext(name)[0] for name in files}
        for path in (Path(place, name) for name in [*folders, *files]):
            if path.is_symlink() and not is_inside(path, folder):
                links.append(path)
            elif path.name in folders or path.name.startswith("."):
                continue
            elif path.suffix.lower() in IMAGE_SUFFIXES or is_dicom(path):
                is_mask = path.stem.endswith("_mask") and path.stem.removesuffix("_mask") in stems
                (masks if is_mask else images).append(path)
    return sorted(images), sorted(masks), sorted(links)


def otsu_level(values):
    """The last level of the lower side if values, whole numbers from 0 to 255, are split so that
    the variance between both sides is largest (Otsu 1979)."""
    values = torch.as_tensor(values).flatten()
    share = torch.bincount(values, minlength=256).double() / values.numel()
    below = share.cumsum(0)
    mean_below = (share * torch.arange(256, device=share.device)).cumsum(0)
    difference = mean_below[-1] * below - mean_below
    return int((difference.square() / (below * (1 - below)).clamp_min(1e-9)).argmax())
