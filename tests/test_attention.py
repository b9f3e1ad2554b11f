"""Tests of experiments/attention.py: maps, the number beside them, and the picture."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino import ViTConfig, VisionTransformer
from experiments import __main__ as experiments
from experiments.attention import attention_maps, effective_patches, heat
from support.command import UserError

SMALL = ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2, image_size=16)


@torch.no_grad()
def test_attention_maps():
    """One positive map a head; with CLS and registers they would sum to one. Odd sides: error."""
    vit = VisionTransformer(replace(SMALL, registers=3))
    x = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = attention_maps(vit, x)
    assert maps.shape == (2, 2, 5, 5) and maps.min() > 0 and maps.sum(dim=(2, 3)).max() < 1
    with pytest.raises(ValueError, match="patch 4 are needed: resize to 16x20"):
        attention_maps(vit, torch.zeros(1, 3, 18, 20))


def test_heat_and_effective_patches():
    """The maximum is white, zero is black; one patch counts 1, equal patches all of them."""
    maps = torch.zeros(2, 3, 4)
    maps[0, 1, 2] = 0.2
    maps[1] = 0.05
    colours = heat(maps)
    assert colours.shape == (2, 3, 3, 4) and (colours[1] == 1).all()
    assert (colours[0, :, 1, 2] == 1).all() and colours[0].eq(-1).sum() == 33
    half = heat(torch.tensor([[[0.5, 1.0]]]))[0, :, 0, 0]
    assert torch.allclose(half, torch.tensor([1.0, 0.0, -1.0]))  # 1.5 of 3: between red and yellow
    torch.testing.assert_close(effective_patches(maps), torch.tensor([1.0, 12.0]))


@pytest.mark.parametrize("arguments, match", [
    (["deep.png", "--embedder", "runs/a/model.pt"], None),
    (["deep.png", "--embedder", "tiny"], "python train.py")])
def test_command(monkeypatch, capsys, tmp_path, arguments, match):
    """One panel for the image and one a head; bad weights: one line."""
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    weights = VisionTransformer(SMALL).state_dict()
    torch.save({"config": {"vit": asdict(SMALL)}, "embedder": {
        f"vit.{name}": value for name, value in weights.items()}}, "runs/a/model.pt")
    Image.fromarray((np.arange(900).reshape(30, 30) * 70).astype(np.uint16)).save("deep.png")
    if match:
        with pytest.raises(UserError, match=match):
            experiments.main(["attention", "--image", *arguments])
        assert not Path("attention.png").exists()
    else:
        experiments.main(["attention", "--image", *arguments])
        # 224 pixels and a border of 2
        assert Image.open("attention.png").size == (3 * 226 + 2, 226 + 2)
        assert "head 2: looks at" in capsys.readouterr().out
