"""support/pictures.py: PNGs come back as they were; grids and charts show their input."""
import numpy as np
import torch
from PIL import Image

from support import pictures
from support.images import load_image

STEP = 1 / 255 + 1e-6  # half a grey level of 8 bits in [-1, 1], and rounding


def test_saved_png_comes_back(tmp_path):
    """save_png then load_image is exact to half a grey level, in grey and in colour."""
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures.save_png(tmp_path / "new" / "x.png", x)
    assert (load_image(tmp_path / "new" / "x.png", 8) - x).abs().max() <= STEP
    pictures.save_png(tmp_path / "g.png", x[:1])
    assert Image.open(tmp_path / "g.png").mode == "L"


def test_grid(tmp_path):
    """Tiny images are doubled to whole multiples, rows may differ in length and be grey."""
    rows = [torch.ones(3, 3, 64, 64), -torch.ones(2, 1, 64, 64)]
    pictures.save_grid(tmp_path / "grid.png", rows)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 + 2 * 130, 2 + 3 * 130, 3)
    assert (pixels[2:130, 2:130] == 255).all() and (pixels[132:260, 132:260] == 0).all()
    pictures.save_grid(tmp_path / "grid.png", rows, captions=["real", "generated"])
    assert Image.open(tmp_path / "grid.png").width > pixels.shape[1] + 40


def test_chart(tmp_path):
    """Lines are drawn, of degenerate series too."""
    path = tmp_path / "chart.png"
    for series in ({}, {"a": ([3], [5])}, {"a": ([0, 1], [0.0, 0.0])}, {"a": ([1, 2], [1, 1e9])}):
        pictures.line_chart(path, series, "t", "x", "y", log_y=True)
        Image.open(path).verify()
