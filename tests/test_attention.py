"""Tests of experiments/attention.py: maps and their colours."""
from dataclasses import replace

import pytest
import torch

from dino import ViTConfig, VisionTransformer
from experiments.attention import attention_maps, heat

SMALL = ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2, image_size=16)


def test_attention_maps():
    """One positive map a head; with CLS and registers they would sum to one. Odd sides: error."""
    vit = VisionTransformer(replace(SMALL, registers=3))
    x = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = attention_maps(vit, x)
    assert maps.shape == (2, 2, 5, 5) and maps.min() > 0 and maps.sum(dim=(2, 3)).max() < 1
    with pytest.raises(ValueError, match="patch 4 are needed: resize to 16x20"):
        attention_maps(vit, torch.zeros(1, 3, 18, 20))


def test_heat():
    """The maximum is white, zero is black, whatever the scale."""
    maps = torch.zeros(2, 3, 4)
    maps[0, 1, 2] = 0.2
    maps[1] = 0.05
    colours = heat(maps)
    assert colours.shape == (2, 3, 3, 4) and (colours[1] == 1).all()
    assert (colours[0, :, 1, 2] == 1).all() and colours[0].eq(-1).sum() == 33
    half = heat(torch.tensor([[[0.5, 1.0]]]))[0, :, 0, 0]
    assert torch.allclose(half, torch.tensor([1.0, 0.0, -1.0]))  # 1.5 of 3: between red and yellow
