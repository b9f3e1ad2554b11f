"""Tiles of images and whole slides: tissue is found, read tile by tile and embedded.

    tiling = Tiling(embed, made_by="a hash of the embedder", folder=Path("features"), side=224)
    blank = tile_image(Path("slide.svs"), Path("features/slide.npz"), tiling)

The .npz holds features (N, D), coords (N, 2) x and y of the tiles in full-resolution pixels, step
(their distance), pictures (N, 3, THUMB, THUMB). Whole slides are read in blocks, so memory does not
grow with them. They need the packages openslide-python and openslide-bin; plain images do not, but
are decoded whole.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from support.command import UserError
from support.files import atomic_file
from support.images import open_image, otsu_level

THUMB = 8        # pixels of a tile in pictures
BLOCK = 2048     # pixels of the side of what is read at once
OVERVIEW = 2048  # pixels of the longer side of the picture in which tissue is looked for
SLIDE_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu"}


@dataclass(frozen=True)
class Tiling:
    """How pixels become features: square tiles, embedded once and kept in `folder`."""
    embed: object       # images (n, 3, side, side) -> features (n, D)
    made_by: str        # what `embed` is: features made by another are not used again
    folder: Path
    side: int = 96      # pixels of a tile
    level: int = 0      # of the file's pyramid, 0 is the finest
    mpp: float = None   # microns a pixel, in place of the level


# ---- pixels ------------------------------------------------------------------------------------

class FlatImage:
    """A plain image behind the few names of openslide.OpenSlide that are used here."""

    level_downsamples = (1.0,)
    properties = {}

    def __init__(self, path):
        self.image = open_image(path).convert("RGB")
        self.dimensions = self.image.size

    def read_region(self, corner, level, size):
        x, y = corner
        return self.image.crop((x, y, x + size[0], y + size[1]))


def open_pixels(path):
    """An openslide.OpenSlide, or a FlatImage for a file that is no whole slide.

    Raises UserError for damaged or too large files, and where openslide is needed and missing.
    """
    do = "replace it, or bring features"
    try:
        import openslide
    except ImportError as error:
        openslide = None
        do += "; tiled TIFF files need: pip install openslide-python openslide-bin"
        if path.suffix.lower() in SLIDE_SUFFIXES:
            raise UserError(f"{path} needs the package openslide-python", "it reads whole slides",
                            "pip install openslide-python openslide-bin") from error
    try:
        if openslide and openslide.OpenSlide.detect_format(str(path)):
            return openslide.OpenSlide(str(path))
        return FlatImage(path)
    except Exception as error:  # a damaged or too large file makes both raise nearly any type
        raise UserError(f"{path} cannot be read ({error})", "a whole slide or an image below 180 "
                        "megapixels is needed", do) from error


def choose_downsample(pixels, path, tiling):
    """Full-resolution pixels a pixel of a tile, by --mpp or --level."""
    if tiling.mpp is None:
        if tiling.level >= len(pixels.level_downsamples):
            raise UserError(f"{path} has no level {tiling.level}",
                            f"levels 0 to {len(pixels.level_downsamples) - 1} are there",
                            "pass another --level")
        return float(pixels.level_downsamples[tiling.level])
    finest = pixels.properties.get("openslide.mpp-x")
    if finest is None:
        raise UserError(f"{path} does not say how many microns a pixel has", "--mpp needs that",
                        "pass --level in its place")
    return tiling.mpp / float(finest)


def read_pixels(pixels, corner, downsample, size):
    """RGB image of `size` (w, h) at a downsample, from the full-resolution corner (x, y).

    Read from the next finer level; what a scanner left out is white.
    """
    level = max((n for n, known in enumerate(pixels.level_downsamples)
                 if known <= 1.01 * downsample), default=0)
    scale = downsample / pixels.level_downsamples[level]
    read_size = tuple(max(1, round(n * scale)) for n in size)
    region = pixels.read_region(corner, level, read_size)
    if region.mode == "RGBA":
        white = Image.new("RGB", read_size, "white")
        white.paste(region, mask=region.getchannel("A"))
        region = white
    return region if read_size == size else region.resize(size, Image.Resampling.BICUBIC)


def saturation_of(pixels):
    """Saturation (h, w) uint8 of the whole slide in small, and its downsample.

    Read in blocks of about BLOCK x BLOCK pixels at most, for a slide without a coarse level too.
    """
    width, height = pixels.dimensions
    downsample = max(1.0, max(width, height) / OVERVIEW)
    small_width = max(1, int(width / downsample))
    small_height = max(1, int(height / downsample))
    finer = max(known for known in pixels.level_downsamples if known <= downsample)
    block = max(1, int(BLOCK * finer / downsample))

    saturation = np.zeros((small_height, small_width), np.uint8)
    for top in range(0, small_height, block):
        for left in range(0, small_width, block):
            size = (min(block, small_width - left), min(block, small_height - top))
            corner = (round(left * downsample), round(top * downsample))
            region = read_pixels(pixels, corner, downsample, size).convert("HSV")
            saturation[top:top + size[1], left:left + size[0]] = np.asarray(region)[..., 1]
    return saturation, downsample


def find_tissue(pixels, step):
    """Tiles of `step` full-resolution pixels that show tissue, (n, 2) rows and columns, and the
    number of blank ones. Tissue: 5 % of the pixels above Otsu's threshold of saturation."""
    saturation, downsample = saturation_of(pixels)
    level = max(12, otsu_level(saturation.copy()))  # of 255: white paper has less
    columns = int(pixels.dimensions[0] / step + 1e-6)  # a rest at the edge is left out
    rows = int(pixels.dimensions[1] / step + 1e-6)

    # sums of all tiles at once: four corners of a table of sums
    sums = np.zeros((saturation.shape[0] + 1, saturation.shape[1] + 1), np.int32)
    sums[1:, 1:] = (saturation > level).cumsum(axis=0, dtype=np.int32).cumsum(axis=1)
    top, bottom = _edges(rows, step / downsample, saturation.shape[0])
    left, right = _edges(columns, step / downsample, saturation.shape[1])
    total = (sums[bottom][:, right] - sums[top][:, right]
             - sums[bottom][:, left] + sums[top][:, left])
    area = (bottom - top)[:, None] * (right - left)
    tissue = np.argwhere(total >= 0.05 * area)
    return tissue, rows * columns - len(tissue)


def _edges(count, step, length):
    """Where each of `count` tiles begins and ends along a side of so many pixels; never empty."""
    starts = np.minimum((np.arange(count) * step).round().astype(int), length - 1)
    ends = ((np.arange(count) + 1) * step).round().astype(int)
    return starts, np.clip(ends, starts + 1, length)


def tile_image(path, target, tiling):
    """Write features, coords and pictures of a slide's tissue tiles to `target`, once.

    Tiles are read and embedded 64 at a time. Returns the number of blank ones.
    Raises UserError for files that cannot be read.
    """
    pixels = open_pixels(path)
    downsample = choose_downsample(pixels, path, tiling)
    stat = path.stat()
    made_by = f"{tiling.made_by} {tiling.side} {downsample} {stat.st_size} {stat.st_mtime_ns}"
    if target.exists():
        with np.load(target, allow_pickle=False) as archive:
            if str(archive["made_by"]) == made_by:
                return int(archive["blank"])

    step = tiling.side * downsample
    features = []
    pictures = []
    try:
        tissue, blank = find_tissue(pixels, step)
        corners = (tissue[:, ::-1] * step).round().astype(int)  # (n, 2): x and y
        for start in range(0, len(corners), 64):
            tiles = [np.asarray(read_pixels(pixels, corner, downsample, (tiling.side,) * 2))
                     for corner in map(tuple, corners[start:start + 64].tolist())]
            images = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2) / 127.5 - 1
            features.append(tiling.embed(images))
            pictures.append(F.adaptive_avg_pool2d(images, THUMB))
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "openslide":
            raise
        raise UserError(f"{path} cannot be read ({error})", "a whole file is needed",
                        "copy it again, or remove it") from error

    with atomic_file(target) as file:
        np.savez(file, features=torch.cat(features or [torch.zeros(0, 1)]),
                 pictures=torch.cat(pictures or [torch.zeros(0, 3, THUMB, THUMB)]),
                 coords=corners, step=step, made_by=made_by, blank=blank)
    return blank
