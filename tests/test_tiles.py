"""support/tiles.py: tissue and tiles of plain images and whole slides."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_slides import mean_colour, tiling_of

from support.command import UserError
from support.slides import open_slides, read_features
from support.tiles import Tiling, read_tile, tile_image


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
    tile_image(path, target, tiling_of(**settings))
    content = np.load(target)
    assert content["coords"].tolist() == CORNERS and content["step"] == 128
    return torch.from_numpy(content["features"])


def test_plain_images(tmp_path, monkeypatch):
    """Tiles of tissue are found and hold their pixels; a damaged file, a level that does not exist
    and a whole slide without openslide end in one line; small images have no tiles."""
    monkeypatch.setitem(sys.modules, "openslide", None)
    pixels = tissue_pixels()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    features = check_tiles(tmp_path / "a.png", tmp_path / "a.npz", side=128)
    tile = torch.from_numpy(pixels[128:256, 384:512]).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(features[1], mean_colour(tile)[0], atol=1e-5)
    with pytest.raises(UserError, match="--level 1 of 1 levels"):
        tile_image(tmp_path / "a.png", tmp_path / "b.npz", tiling_of(level=1))
    for name in ("bad.png", "b.svs"):
        (tmp_path / name).write_bytes(b"no image")
        with pytest.raises(UserError, match=f"{name} cannot be tiled .*openslide-python"):
            tile_image(tmp_path / name, tmp_path / "b.npz", tiling_of())
    assert not (tmp_path / "b.npz").exists()
    Image.new("RGB", (20, 20), "white").save(tmp_path / "small.png")
    tile_image(tmp_path / "small.png", tmp_path / "small.npz", tiling_of(side=32))
    assert len(np.load(tmp_path / "small.npz")["features"]) == 0


def test_folders_of_images_are_tiled_once(tmp_path, capsys):
    """Slides of a folder get features, places and pictures; a second run reads the stored ones;
    another tile side does not, and none takes them for data; an image of paper only is named."""
    (tmp_path / "x").mkdir()
    for name in "ab":
        Image.fromarray(tissue_pixels()).save(tmp_path / f"x/{name}.png")
    Image.new("RGB", (200, 200), "white").save(tmp_path / "x/paper.png")
    (tmp_path / "labels.csv").write_text("file,label,patient\nx/a.png,0,p\nx/b.png,1,q\n"
                                         "x/paper.png,1,r\n")
    calls = []

    def embed(images):
        calls.append(len(images))
        return mean_colour(images)

    def patches(side):
        read_features.cache_clear()
        slides = open_slides(tmp_path / "x", Tiling(embed, "colour", tmp_path / "x/features", side))
        assert [slide.patient for slide in slides] == ["p", "q"]
        assert slides[0].read()[1].shape == (len(slides[0].grid), 3, 8, 8)
        return len(slides[0].grid)

    assert patches(128) == patches(128) == 6 and calls == [6, 6]
    assert "left out, without a label or tissue: 1 (paper)" in capsys.readouterr().out
    assert patches(64) == 24 and calls == [6, 6, 24, 24]


class Pyramid:
    """The interface of openslide.OpenSlide over an image of three levels, RGBA as openslide's."""

    level_downsamples = (1.0, 2.0, 4.0)
    dimensions = (1024, 768)

    def __init__(self, path):
        self.image = Image.open(path).convert("RGBA")

    @staticmethod
    def detect_format(path):
        return "generic-tiff" if path.endswith(".tif") else None

    def get_thumbnail(self, size):
        return self.image.convert("RGB").resize((256, 192))

    def read_region(self, corner, level, size):
        scale = 2 ** level
        return self.image.reduce(scale).crop((corner[0] // scale, corner[1] // scale,
                                              corner[0] // scale + size[0],
                                              corner[1] // scale + size[1]))


def test_whole_slides_at_two_levels(tmp_path, monkeypatch):
    """Levels 0 and 1 of a pyramid give the same tiles; what the scanner skipped (transparent) is
    white."""
    monkeypatch.setitem(sys.modules, "openslide", SimpleNamespace(OpenSlide=Pyramid))
    path = tmp_path / "a.tif"
    Image.fromarray(tissue_pixels()).save(path)
    check_tiles(path, tmp_path / "0.npz", side=128)
    check_tiles(path, tmp_path / "1.npz", side=64, level=1)
    pixels = Pyramid(path)
    pixels.image.putalpha(0)
    assert (read_tile(pixels, (256, 128), tiling_of()) == 1).all()
