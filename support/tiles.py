"""Tiles of images and whole slides: tissue is detected, read tile by tile and embedded.

    tiling = Tiling(embed, made_by="a hash of the embedder", folder=Path("features"), side=224)
    tile_image(Path("slide.svs"), Path("features/slide.npz"), tiling)

The .npz holds features (N, D), coords (N, 2) x and y of the tiles in full-resolution pixels, step
(the distance between neighbours), pictures (N, 3, THUMB, THUMB). Whole slides need the package
openslide-python; plain images do not, but are decoded whole.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from support.command import UserError
from support.files import atomic_file
from support.images import IMAGE_FORMATS, otsu_level

THUMB = 8        # pixels of a tile in pictures
OVERVIEW = 2048  # pixels of the longer side of the thumbnail in which tissue is detected
SLIDE_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu"}


@dataclass(frozen=True)
class Tiling:
    """How pixels become features: square tiles, embedded once and stored in `folder`."""
    embed: object       # images (n, 3, side, side) -> features (n, D)
    made_by: str        # identifies `embed`: features made by another one are not reused
    folder: Path
    side: int = 96      # pixels of a tile
    level: int = 0      # of the file's pyramid, 0 is the finest


class FlatImage:
    """A plain image with the part of openslide.OpenSlide's interface that is used here."""

    level_downsamples = (1.0,)

    def __init__(self, path):
        self.image = Image.open(path, formats=IMAGE_FORMATS).convert("RGB")
        self.dimensions = self.image.size

    def get_thumbnail(self, size):
        thumbnail = self.image.copy()
        thumbnail.thumbnail(size)
        return thumbnail

    def read_region(self, corner, level, size):
        x, y = corner
        return self.image.crop((x, y, x + size[0], y + size[1]))


def open_pixels(path):
    """An openslide.OpenSlide, or a FlatImage for a plain image."""
    try:
        import openslide
        if openslide.OpenSlide.detect_format(str(path)):
            return openslide.OpenSlide(str(path))
    except ImportError:
        if path.suffix.lower() in SLIDE_SUFFIXES:
            raise
    return FlatImage(path)


def find_tissue(pixels, step):
    """Tiles of `step` full-resolution pixels with tissue, (n, 2) rows and columns. Tissue: 5 % of
    the pixels above Otsu's threshold of saturation."""
    thumbnail = pixels.get_thumbnail((OVERVIEW, OVERVIEW)).convert("HSV")
    saturation = np.array(thumbnail.getchannel("S"))
    mask = saturation > max(12, otsu_level(saturation))  # white paper is below 12 of 255

    # The mean of the mask in each tile; partial tiles are dropped.
    columns, rows = (int(side / step + 1e-6) for side in pixels.dimensions)
    if not rows * columns:
        return np.zeros((0, 2), int)
    scale = step * thumbnail.width / pixels.dimensions[0]
    box = (0, 0, min(columns * scale, thumbnail.width), min(rows * scale, thumbnail.height))
    share = Image.fromarray(mask.astype(np.float32)).resize(
        (columns, rows), Image.Resampling.BOX, box)
    return np.argwhere(np.asarray(share) >= 0.05)


def read_tile(pixels, corner, tiling):
    """An image (3, side, side) in [-1, 1]; regions that the scanner skipped are white."""
    region = pixels.read_region(tuple(corner), tiling.level, (tiling.side, tiling.side))
    white = Image.new("RGB", region.size, "white")
    white.paste(region, mask=region.getchannel("A") if region.mode == "RGBA" else None)
    return torch.from_numpy(np.array(white)).permute(2, 0, 1) / 127.5 - 1


def tile_image(path, target, tiling):
    """Write features, coords and pictures of a slide's tissue tiles to `target`, unless it has
    them. UserError if the file is unreadable."""
    made_by = f"{tiling.made_by} {tiling.side} level {tiling.level} {path.stat().st_mtime_ns}"
    if target.exists():
        with np.load(target, allow_pickle=False) as archive:
            if str(archive["made_by"]) == made_by:
                return
    try:
        pixels = open_pixels(path)
        if tiling.level >= len(pixels.level_downsamples):
            raise ValueError(f"--level {tiling.level} of {len(pixels.level_downsamples)} levels")
        step = tiling.side * pixels.level_downsamples[tiling.level]
        corners = (find_tissue(pixels, step)[:, ::-1] * step).round().astype(int)  # (n, 2)
        features = []
        pictures = [torch.zeros(0, 3, THUMB, THUMB)]
        for start in range(0, len(corners), 64):
            images = torch.stack([read_tile(pixels, corner, tiling)
                                  for corner in corners[start:start + 64].tolist()])
            features.append(tiling.embed(images))
            pictures.append(F.adaptive_avg_pool2d(images, THUMB))
    except Exception as error:  # damaged files make both readers raise anything
        raise UserError(f"{path} cannot be tiled ({error})", "a whole slide (and the package "
                        "openslide-python) or an image below 180 megapixels is needed",
                        "replace it, or bring features") from error
    with atomic_file(target) as file:
        np.savez(file, features=torch.cat(features or [torch.zeros(0, 1)]), coords=corners,
                 pictures=torch.cat(pictures), step=step, made_by=made_by)
