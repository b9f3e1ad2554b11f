"""support/tiles.py: tissue and tiles of plain images and whole slides."""
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_slides import mean_colour, tiling_of

from support.command import UserError
from support.tiles import otsu_level, tile_image


# ---- whole slides ----

def write_pyramid(path, pixels, levels=3, tile=64):
    """A tiled pyramid TIFF of RGB pixels (H, W, 3) uint8, each level half of the one before."""
    def entry(tag, kind, values):
        size = {3: 2, 4: 4}[kind]
        data = struct.pack(f"<{len(values)}{' HI'[size // 2]}", *values)
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
        entries = [entry(254, 4, [int(level > 0)]), entry(256, 4, [width]),
                   entry(257, 4, [height]), entry(258, 3, [8, 8, 8]), entry(259, 3, [1]),
                   entry(262, 3, [2]), entry(277, 3, [3]), entry(284, 3, [1]),
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


def tissue_pixels():
    """1024 x 768 pixels of paper with two squares of tissue."""
    noise = np.random.default_rng(0).integers(0, 60, (768, 1024, 3), dtype=np.uint8)
    pixels = np.full((768, 1024, 3), 240, np.uint8)
    pixels[128:384, 256:512] = noise[128:384, 256:512] + np.uint8([180, 80, 150])
    pixels[512:640, 768:1024] = noise[512:640, 768:1024] + np.uint8([120, 60, 190])
    return pixels


CORNERS = [[256, 128], [384, 128], [256, 256], [384, 256], [768, 512], [896, 512]]


def check_tiles(path, target, **settings):
    """The feature file of a slide of tissue_pixels(): six tiles in the right places."""
    assert tile_image(path, target, tiling_of(**settings)) == 48 - 6
    content = np.load(target)
    assert content["coords"].tolist() == CORNERS and content["step"] == 128
    return torch.from_numpy(content["features"])


def test_plain_images(tmp_path):
    """Tiles of tissue are found and hold their pixels; a damaged file, a level that does not exist
    and a whole slide without openslide end in one line."""
    pixels = tissue_pixels()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    features = check_tiles(tmp_path / "a.png", tmp_path / "a.npz", side=128)
    tile = torch.from_numpy(pixels[128:256, 384:512]).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(features[1], mean_colour(tile)[0], atol=1e-5)
    with pytest.raises(UserError, match="--level 1 of 1 levels"):
        tile_image(tmp_path / "a.png", tmp_path / "b.npz", tiling_of(level=1))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="bad.png cannot be tiled"):
        tile_image(tmp_path / "bad.png", tmp_path / "b.npz", tiling_of())
    assert not (tmp_path / "b.npz").exists()


def test_images_smaller_than_a_tile_and_paper_have_no_tiles(tmp_path):
    for name, size in (("small", 20), ("paper", 200)):
        Image.new("RGB", (size, size), "white").save(tmp_path / f"{name}.png")
        tile_image(tmp_path / f"{name}.png", tmp_path / f"{name}.npz", tiling_of(side=32))
        assert len(np.load(tmp_path / f"{name}.npz")["features"]) == 0


def test_openslide_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "b.svs").write_bytes(b"slide")
    with pytest.raises(UserError, match="openslide-python is needed.*pip install"):
        tile_image(tmp_path / "b.svs", tmp_path / "b.npz", tiling_of())


def test_whole_slides_at_two_levels(tmp_path):
    """Levels 0 and 1 of a pyramid give the same tiles; level 3 of 3 is refused."""
    pytest.importorskip("openslide")
    path = write_pyramid(tmp_path / "a.tif", tissue_pixels())
    check_tiles(path, tmp_path / "0.npz", side=128)
    check_tiles(path, tmp_path / "1.npz", side=64, level=1)
    with pytest.raises(UserError, match="--level 3 of 3 levels"):
        tile_image(path, tmp_path / "2.npz", tiling_of(level=3))


def test_otsu_splits_two_groups():
    """The threshold lies between two modes."""
    rng = np.random.default_rng(0)
    for low, high in ((10, 60), (100, 220)):
        values = np.concatenate([rng.normal(low, 4, 900), rng.normal(high, 6, 300)])
        assert low + 8 < otsu_level(values.clip(0, 255).astype(np.uint8)) < high - 8
