"""Proofs about support/tiles.py: whole slides at any resolution, blocks, refusals."""
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_slides import mean_colour, tiling_of

import support.tiles
from support.command import UserError
from support.images import otsu_level
from support.slides import read_features


def test_otsu_parts_two_groups():
    """The threshold lies between two humps, wherever they are."""
    rng = np.random.default_rng(0)
    for low, high in ((10, 60), (100, 220)):
        values = np.concatenate([rng.normal(low, 4, 900), rng.normal(high, 6, 300)])
        level = otsu_level(values.clip(0, 255).astype(np.uint8))
        assert low + 8 < level < high - 8


def test_damaged_image_is_refused(tmp_path):
    """A file that is no image ends in one line."""
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="a.png cannot be read"):
        support.tiles.tile_image(tmp_path / "a.png", tmp_path / "a.npz", tiling_of())


def test_damaged_slide_is_refused(tmp_path):
    """A file that is no slide, where the package is there: one line."""
    pytest.importorskip("openslide")
    (tmp_path / "b.svs").write_bytes(b"no slide")
    with pytest.raises(UserError, match="b.svs cannot be read"):
        support.tiles.tile_image(tmp_path / "b.svs", tmp_path / "a.npz", tiling_of())


# ---- whole slides ----

def write_pyramid(path, pixels, levels=3, tile=64, mpp=0.5):
    """A tiled pyramid TIFF of RGB pixels (H, W, 3) uint8, each level half of the one before."""
    def entry(tag, kind, values):
        size = {3: 2, 4: 4, 5: 8}[kind]
        code = {3: "H", 4: "I", 5: "II"}[kind]
        data = b"".join(struct.pack("<" + code, *np.atleast_1d(value)) for value in values)
        if len(data) <= 4:
            return struct.pack("<HHI", tag, kind, len(data) // size) + data.ljust(4, b"\0")
        body.extend(data)
        return struct.pack("<HHII", tag, kind, len(data) // size, 8 + len(body) - len(data))

    body = bytearray()
    directories = []
    for level in range(levels):
        height, width = pixels.shape[:2]
        offsets = []
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                block = np.zeros((tile, tile, 3), np.uint8)
                part = pixels[top:top + tile, left:left + tile]
                block[:part.shape[0], :part.shape[1]] = part
                offsets.append(8 + len(body))
                body.extend(block.tobytes())
        resolution = [(10 ** 6, round(100 * mpp * 2 ** level))]  # pixels a centimetre
        entries = [entry(254, 4, [int(level > 0)]), entry(256, 4, [width]),
                   entry(257, 4, [height]), entry(258, 3, [8, 8, 8]), entry(259, 3, [1]),
                   entry(262, 3, [2]), entry(277, 3, [3]), entry(282, 5, resolution),
                   entry(283, 5, resolution), entry(284, 3, [1]), entry(296, 3, [3]),
                   entry(322, 4, [tile]), entry(323, 4, [tile]), entry(324, 4, offsets),
                   entry(325, 4, [tile * tile * 3] * len(offsets))]
        directories.append(struct.pack("<H", len(entries)) + b"".join(entries))
        pixels = np.asarray(Image.fromarray(pixels).reduce(2))

    # a directory points to the next one
    start = first = 8 + len(body)
    for number, directory in enumerate(directories):
        start += len(directory) + 4
        body.extend(directory + struct.pack("<I", start if number + 1 < levels else 0))
    path.write_bytes(b"II*\0" + struct.pack("<I", first) + bytes(body))
    return path


@pytest.fixture
def pyramid(tmp_path):
    """1024 x 768 pixels of paper with two squares of tissue, as a pyramid of three levels."""
    pytest.importorskip("openslide")
    noise = np.random.default_rng(0).integers(0, 60, (768, 1024, 3), dtype=np.uint8)
    pixels = np.full((768, 1024, 3), 240, np.uint8)
    pixels[128:384, 256:512] = noise[128:384, 256:512] + np.uint8([180, 80, 150])
    pixels[512:640, 768:1024] = noise[512:640, 768:1024] + np.uint8([120, 60, 190])
    return write_pyramid(tmp_path / "a.tif", pixels), pixels


def tiles_of(path, target, **settings):
    """Content of the feature file of a whole slide, and the number of blank tiles."""
    blank = support.tiles.tile_image(path, target, tiling_of(**settings))
    read_features.cache_clear()
    return read_features(target), blank


def test_whole_slides_are_tiled_at_a_level_or_a_resolution(pyramid, tmp_path):
    """Level 0, level 1 and 1.0 microns a pixel of a scan of 0.5: tiles in the right places, with
    the right pixels; a level that is not there is refused."""
    path, pixels = pyramid
    content, blank = tiles_of(path, tmp_path / "0.npz", side=128)
    assert len(content["features"]) == 4 + 2 and blank == 48 - 6
    assert content["coords"].tolist() == [[256, 128], [384, 128], [256, 256], [384, 256],
                                          [768, 512], [896, 512]]
    tile = torch.from_numpy(pixels[128:256, 384:512]).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(content["features"][1], mean_colour(tile)[0], atol=1e-5)
    half, _ = tiles_of(path, tmp_path / "1.npz", side=64, level=1)
    same, _ = tiles_of(path, tmp_path / "2.npz", side=64, mpp=1.0)
    assert torch.equal(half["coords"], content["coords"])
    assert torch.equal(half["features"], same["features"])
    between, _ = tiles_of(path, tmp_path / "3.npz", side=64, mpp=0.75)  # tiles of 96 pixels
    assert between["step"] == 96 and not (between["coords"] % 96).any()
    with pytest.raises(UserError, match="no level 3: levels 0 to 2 are there"):
        tiles_of(path, tmp_path / "4.npz", level=3)


def test_whole_slides_are_read_in_blocks(pyramid, tmp_path, monkeypatch):
    """No read is larger than a tile or a block, whatever the slide's size."""
    path, _ = pyramid
    sizes = []
    read_region = support.tiles.read_pixels

    def watch(pixels, corner, downsample, size):
        sizes.append(size)
        return read_region(pixels, corner, downsample, size)

    monkeypatch.setattr(support.tiles, "read_pixels", watch)
    monkeypatch.setattr(support.tiles, "OVERVIEW", 256)
    monkeypatch.setattr(support.tiles, "BLOCK", 100)
    content, _ = tiles_of(path, tmp_path / "0.npz", side=64)
    assert len(content["features"]) == 16 + 8
    assert max(max(size) for size in sizes) <= 100 and len(sizes) > 24 + 4


def test_openslide_is_named_where_it_is_needed(pyramid, tmp_path, monkeypatch):
    """Without the package a .svs ends in one line that names it; plain images do without."""
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "b.svs").write_bytes(pyramid[0].read_bytes())
    with pytest.raises(UserError, match="b.svs needs the package openslide-python.*pip install"):
        tiles_of(tmp_path / "b.svs", tmp_path / "b.npz")
    Image.fromarray(pyramid[1]).save(tmp_path / "b.png")
    content, _ = tiles_of(tmp_path / "b.png", tmp_path / "b.npz", side=128)
    assert len(content["features"]) == 6
    with pytest.raises(UserError, match="b.png does not say how many microns.*--level"):
        tiles_of(tmp_path / "b.png", tmp_path / "c.npz", mpp=0.5)
