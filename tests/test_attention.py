"""Tests of experiments/attention.py: the maps."""
from dataclasses import replace

import pytest
import torch

from dino import ViTConfig, VisionTransformer
from experiments.attention import attention_maps

SMALL = ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2, image_size=16)


def test_attention_maps():
    """One positive map a head; with CLS and registers they would sum to one. Odd sides: error."""
    vit = VisionTransformer(replace(SMALL, registers=3))
    x = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = attention_maps(vit, x)
    assert maps.shape == (2, 2, 5, 5) and maps.min() > 0 and maps.sum(dim=(2, 3)).max() < 1
    with pytest.raises(ValueError, match="patch 4 are needed: resize to 16x20"):
        attention_maps(vit, torch.zeros(1, 3, 18, 20))
