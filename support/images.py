"""The only reader of pixels: image files, and DICOM behind pydicom, to tensors in [-1, 1].

    x = load_image("x.png", 64)                       # (3, 64, 64) float32 in [-1, 1]
    depth, warning = choose_depth(list_images("xrays"))
    x = load_image("x.tif", 64, depth)                # by the rule of that data set

Grey of more than 8 bits ("deep") does not say what is white: files of "16 bits" often carry 8, 10
or 12, and some an offset. So a data set has one rule for all of its files, the dict `depth`:

    grey = (value - depth["black"]) / (depth["white"] - depth["black"])    cut to [0, 1]

A file whose values cannot be of that rule, being far above or below, goes by itself alone, as every
file does if depth is None. 8-bit files need no rule. DICOM files bring a window of their own.
"""
import math
import os
import re
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from support.command import UserError, one_line
from support.dicom import (DICOM_SUFFIXES, check_size, decode_dicom, has_pydicom, is_dicom,
                           open_dicom)

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # of others, EPS runs a program
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
OTHER_SUFFIXES = {".jp2", ".j2k", ".jpx", ".jpf", ".jfif", ".jpe", ".heic", ".heif", ".avif",
                  ".nii", ".mha", ".nrrd", ".pgm", ".ppm", ".tga", ".psd", ".img"}
MASK_FOLDER = re.compile(r"masks?|masks?[ _-].*|.*masks?", re.IGNORECASE)

EIGHT_BITS = {"black": 0.0, "white": 255.0}
LEVELS = [2 ** bits - 1 for bits in (8, 10, 12, 14, 16)]  # white of what cameras deliver
OVERSHOOT = 1.05       # so much above white, processed pictures still have that white
DEPTH_SAMPLE = 32      # files that a data set's rule is made from


# ---- what is white -----------------------------------------------------------------------------

def grey_range(low, high, is_float=False):
    """The depth {"black", "white"} of deep grey values from low to high.

    White is the least level of 8, 10, 12, 14 or 16 bits that holds them; for floats also 1. Where
    all values are high, black is the power of two just below them, else the lowest of them.
    """
    black = 0.0
    if high / 2 < low < high:
        black = float(low)
        power = 2.0 ** math.floor(math.log2(low)) if low >= 1 else 0.0
        if low - power < 0.1 * (high - power):
            black = power

    levels = [1, *LEVELS] if is_float else LEVELS
    span = high - black
    white = next((level for level in levels if span <= OVERSHOOT * level), span)
    return {"black": black, "white": float(black + white)}


def choose_depth(paths):
    """(depth, warning or "") of a data set, from the least and largest value of a few files."""
    paths = [path for path in paths if not is_dicom(path)]
    paths = paths[::math.ceil(len(paths) / DEPTH_SAMPLE) or 1]
    with ThreadPool(4) as pool:
        ranges = [found for found in pool.map(_deep_range, paths) if found]
    if not ranges:
        return dict(EIGHT_BITS), ""

    low = min(found[0] for found in ranges)
    high = max(found[1] for found in ranges)
    depth = grey_range(low, high, all(is_float for _, _, is_float in ranges))
    if not depth["black"]:
        return depth, ""
    return depth, (f"all grey values lie from {low:g} to {high:g}, which is an offset: "
                   f"{depth['black']:g} is taken for black, {depth['white']:g} for white")


def _deep_range(path):
    """(least, largest value, whether they are floats) of a file of deep grey, else None."""
    try:
        with open_image(path) as image:
            if image.mode[0] not in "IF":
                return None
            deep = np.asarray(image)
            return float(deep.min()), float(deep.max()), image.mode == "F"
    except Exception:  # damaged files make Pillow raise nearly any type; they are named elsewhere
        return None


def describe_depth(depth):
    """The rule in a few words, for the first lines of a run."""
    if depth == EIGHT_BITS:
        return "8 bits a channel"
    return f"deep grey, black {depth['black']:g}, white {depth['white']:g}"


def _scale_deep(deep, depth, is_float):
    """Deep grey (H, W) float64 -> [0, 1]."""
    low = deep.min()
    high = deep.max()
    if not 0 <= low <= high < math.inf:
        raise ValueError("grey values below 0 or not finite")
    if depth is not None:
        span = depth["white"] - depth["black"]
        if not span / 15 <= high - depth["black"] <= 2 * span:  # none of that set's files
            depth = None
    depth = depth or grey_range(low, high, is_float)
    return ((deep - depth["black"]) / (depth["white"] - depth["black"])).clip(0, 1)


# ---- one file ----------------------------------------------------------------------------------

def open_image(path):
    """The Pillow image, its pixels not read yet; ValueError for one that would fill the memory."""
    image = Image.open(path, formats=IMAGE_FORMATS)
    check_size(image.width, image.height)
    return image


def _decode_picture(path, depth):
    """Image file -> (H, W) or (H, W, 3) in [0, 1], upright; its first frame."""
    with open_image(path) as image:
        is_inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # white is zero
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        grey = _scale_deep(np.asarray(image, np.float64), depth, image.mode == "F")
        return 1 - grey if is_inverted else grey  # Pillow does that for 8 bits

    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA")) / np.float32(255)
        alpha = rgba[..., 3:] if rgba[..., 3:].any() else 1  # all clear: nobody meant that
        return rgba[..., :3] * alpha  # over black
    return np.asarray(image.convert("L" if image.mode in "1L" else "RGB")) / np.float32(255)


def _decode(path, depth):
    """File -> float32 array (H, W) or (H, W, 3) in [0, 1]."""
    try:
        if not is_dicom(path):
            return np.float32(_decode_picture(path, depth))
        if not has_pydicom():
            raise UserError(f"{path} is a DICOM file", "the package pydicom is needed to read it",
                            "pip install pydicom")
        return np.float32(decode_dicom(path))
    except UserError:
        raise
    except Exception as error:  # a damaged file makes both readers raise nearly any type
        raise UserError(f"{path} cannot be read ({one_line(error)[:120].strip()})",
                        "a whole image file is needed", "replace or remove it") from error


def load_image(source, size, depth=None):
    """Image file, or its uint8 pixels -> (3, size, size) float32 in [-1, 1].

    Upright by EXIF, transparent pixels over black, the centre square, resized in float.
    size: pixels of a side; None keeps that of the square.
    depth: the rule for deep grey of the file's data set; None decides by the file alone.
    Raises UserError if the file cannot be read.
    """
    is_file = not isinstance(source, np.ndarray)
    pixels = _decode(source, depth) if is_file else np.float32(source) / 255
    x = torch.from_numpy(pixels)
    x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)           # (H, W, C) -> (C, H, W)

    side = min(x.shape[1:])
    top = (x.shape[1] - side) // 2
    left = (x.shape[2] - side) // 2
    x = x[:, top:top + side, left:left + side]
    if size not in (None, side):
        x = F.interpolate(x[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    return (x * 2 - 1).expand(3, -1, -1).clone()


def why_unreadable(path, whole):
    """What is wrong with an image file, in a line, or ""; whole reads all of it, not the head."""
    try:
        if not path.is_file():
            return "not a file"  # a pipe would be waited for
        if is_dicom(path):
            _decode(path, None) if whole else open_dicom(path, stop_before_pixels=True)
            return ""
        with open_image(path) as image:
            if whole and image.format == "PNG":
                image.verify()
            elif whole:
                _decode(path, None)
    except Exception as error:  # a damaged file makes both readers raise nearly any type
        return one_line(error)[:200]
    return ""


def count_pages(path):
    """The number of pictures in a TIFF file, of which the first is read; 1 for other files."""
    if path.suffix.lower() in (".tif", ".tiff"):
        with suppress(Exception):  # damage behind the first makes Pillow raise nearly any type
            with open_image(path) as image:
                return getattr(image, "n_frames", 1)
    return 1


# ---- folders -----------------------------------------------------------------------------------

def path_below(folder, *names):
    """The path folder/names; UserError for a link that leaves the folder."""
    path = Path(folder, *names)
    if path.is_symlink() and not path.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{path} is a link out of its folder", "no path may leave the data folder",
                        "copy what it points to, or pass that as --data")
    return path


def scan_folder(folder):
    """(images, masks, passed over) below a folder, or its images/: sorted paths, {why: paths}.

    Masks are those that lie beside their images, as NAME_mask beside NAME. Hidden files and folders
    named like masks are left out.
    """
    root = Path(folder)
    if (root / "images").is_dir():
        root = path_below(root, "images")
    images = []
    masks = []
    passed_over = {}
    can_read_dicom = has_pydicom()
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders
                      if not name.startswith(".") and not MASK_FOLDER.fullmatch(name)]
        stems = {os.path.splitext(name)[0] for name in files}
        for name in files:
            if name.startswith("."):
                continue
            # A mask, an image, a DICOM file, another format of images, or none.
            path = Path(place, name)
            stem, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            if suffix in IMAGE_SUFFIXES and stem.endswith("_mask") and stem[:-5] in stems:
                masks.append(path)
            elif suffix in IMAGE_SUFFIXES:
                images.append(path)
            elif is_dicom(path):
                needs = "DICOM files, which need the package pydicom (pip install pydicom)"
                where = images if can_read_dicom else passed_over.setdefault(needs, [])
                where.append(path)
            elif suffix in OTHER_SUFFIXES or name.lower().endswith(".nii.gz"):
                passed_over.setdefault("formats that are not read; save as PNG", []).append(path)
    return (sorted(images), sorted(masks),
            {why: sorted(paths) for why, paths in passed_over.items()})


def list_images(folder):
    """Sorted paths of the images below a folder, or its images/; see scan_folder.

    Raises UserError if there are none.
    """
    images, _, passed_over = scan_folder(folder)
    if not images:
        found = "".join(f" but {len(paths):,} {why}" for why, paths in passed_over.items())
        raise UserError(f"{folder} holds no image{found}", f"files "
                        f"{' '.join(sorted(IMAGE_SUFFIXES | DICOM_SUFFIXES))} are needed",
                        "name another folder")
    return images


def otsu_level(values):
    """The level, an int of 0 to 255, that parts whole numbers (array or tensor) best in two.

    Best: with the largest variance between both sides; values up to the level are the lower side.
    Source: Otsu 1979.
    """
    values = torch.as_tensor(values).flatten()
    share = torch.bincount(values, minlength=256).double() / values.numel()
    below = share.cumsum(0)
    mean_below = (share * torch.arange(256, device=share.device)).cumsum(0)
    difference = mean_below[-1] * below - mean_below
    between = difference.square() / (below * (1 - below)).clamp_min(1e-9)
    return int(between.argmax())
