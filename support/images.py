"""The only reader of pixels: image files to tensors."""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from support.command import UserError, one_line

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # of others, EPS runs a program
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}


def _open_image(path):
    """The Pillow image, its pixels not read yet; ValueError for one that would fill the memory."""
    image = Image.open(path, formats=IMAGE_FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # from twice that, Pillow refuses it
        raise ValueError(f"{image.width:,} x {image.height:,} pixels are too many")
    return image


def _decode(path):
    """Image file -> float32 array (H, W) or (H, W, 3) in [0, 1], upright; its first frame."""
    try:
        with _open_image(path) as image:
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # grey of more than 8 bits
            deep = np.asarray(image, dtype=np.float64)
            high = deep.max()
            if not 0 <= deep.min() <= high < math.inf:
                raise ValueError("grey values below 0 or not finite")
            full = next((2 ** bits - 1 for bits in (10, 12, 14, 16) if high < 2 ** bits), high)
            return np.float32(deep if image.mode == "F" and high <= 1 else deep / full)
        if image.has_transparency_data:
            rgba = np.asarray(image.convert("RGBA")) / np.float32(255)
            return rgba[..., :3] * rgba[..., 3:]  # over black
        return np.asarray(image.convert("L" if image.mode in "1L" else "RGB")) / np.float32(255)
    except Exception as error:  # a damaged file makes Pillow raise nearly any type
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:120]})",
                        "a whole image file is needed", "replace or remove it") from error


def load_image(source, size, depth=None):
    """Image file, or its uint8 pixels -> (3, size, size) float32 in [-1, 1]; None keeps the side.

    Upright by EXIF, transparent pixels over black, the centre square, resized in float. Deep grey
    is divided by the largest value of the smallest depth (10, 12, 14, 16 bits) that holds its
    maximum, as files of "16 bits" often carry 10 or 12; floats up to 1 stay.
    """
    pixels = np.float32(source) / 255 if isinstance(source, np.ndarray) else _decode(source)
    x = torch.from_numpy(pixels)
    x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    side = min(x.shape[1:])
    top, left = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
    x = x[:, top:top + side, left:left + side]
    if size not in (None, side):
        x = F.interpolate(x[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    return (x * 2 - 1).expand(3, -1, -1).clone()


def _below(folder, *parts):
    """The path folder/parts; UserError for a link that leaves the folder."""
    path = Path(folder, *parts)
    if path.is_symlink() and not path.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{path} is a link out of its folder", "no path may leave the data folder",
                        "copy what it points to, or pass that as --data")
    return path


def list_images(folder):
    """Sorted paths of the images below a folder, or its images/; not hidden ones, not masks*/."""
    root = _below(folder, "images") if Path(folder, "images").is_dir() else Path(folder)
    paths = [path for path in sorted(root.rglob("*"))
             if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
             and not any(part.startswith((".", "masks")) for part in path.relative_to(root).parts)]
    if not paths:
        raise UserError(f"{folder} holds no image", f"files {' '.join(sorted(IMAGE_SUFFIXES))} are "
                        "needed", "name another folder")
    return paths


def _why_unreadable(path, folder, whole):
    """What is wrong with an image file, in a line; "" if nothing is."""
    try:
        if not _below(folder, path.relative_to(folder)).is_file():
            return "not a file"  # a pipe would be waited for
        with _open_image(path) as image:
            if whole and image.format == "PNG":
                image.verify()
            elif whole:
                _decode(path)
    except Exception as error:  # a damaged file makes Pillow raise nearly any type
        return one_line(error)[:200]
    return ""


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
