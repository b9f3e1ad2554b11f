"""experiments/segment.py: planted segments come back, the border step and floors do as said."""
import json

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from dino import ViTConfig
from dinodiff import DinoDiffusion, DinoDiffusionConfig
from evaluate import dice
from experiments import segment
from experiments.__main__ import main as experiments
from experiments.common import OpenedRun
from experiments.segment import (decoder_features, diffseg, edge_strength, finest_attention,
                                 guided_filter, known_masks, largest_pieces, lung_score,
                                 patch_tokens, pixel_features, symmetric_kl)
from support.command import UserError
from support.datasets import open_dataset
from unet import UNetConfig
from vae import VAEConfig

CONFIG = DinoDiffusionConfig(
    image_size=32, vae=VAEConfig(base_channels=8, channel_multipliers=(1, 2), layers_per_block=1),
    unet=UNetConfig(base_channels=16, channel_multipliers=(1, 2), layers_per_block=1,
                    attention_levels=(False, True), context_dim=12, num_heads=2),
    vit=ViTConfig(8, 16, 4, 2, 32, normalise="per_image"), token_shape=(5, 16))
SIDE = 8
QUARTERS = torch.arange(4).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)  # (8, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DinoDiffusion(CONFIG).eval()


@pytest.fixture(scope="module")
def chests():
    return open_dataset("phantoms", 32, seed=0, count=18)


def discs(*centres, radius=0.3, size=64):
    """(1, size, size) bool: discs at (x, y) in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    return torch.stack([(x - a).square() + (y - b).square() < radius ** 2
                        for a, b in centres]).any(0, keepdim=True)


def planted_attention(contrast):
    """Maps (64, 64): each position looks `contrast` times more at its own quarter."""
    own = QUARTERS.flatten()
    scores = 1 + (contrast - 1) * (own[:, None] == own).float()
    return scores / scores.sum(1, keepdim=True)


def test_symmetric_kl_equals_scipy():
    """Half the sum of both directions is SciPy's; a distribution is 0 from itself."""
    rng = np.random.default_rng(0)
    a, b = rng.dirichlet(np.ones(16), 3), rng.dirichlet(np.ones(16), 5)
    want = [[(entropy(p, q) + entropy(q, p)) / 2 for q in b] for p in a]
    assert np.allclose(symmetric_kl(torch.tensor(a), torch.tensor(b)), want, rtol=1e-6)
    assert symmetric_kl(torch.tensor(a), torch.tensor(a)).diagonal().max() < 1e-12


def test_diffseg_finds_planted_segments():
    """Four quarters that look at themselves are four segments; without contrast there is one."""
    sharp = planted_attention(1000)
    labels = diffseg(sharp, SIDE, 0.9)
    pairs = set(zip(labels.flatten().tolist(), QUARTERS.flatten().tolist()))
    assert labels.shape == (SIDE, SIDE) and len(pairs) == len(labels.unique()) == 4
    assert len(diffseg(sharp, SIDE, 0.9, grid=1).unique()) == 1  # one anchor, one proposal
    flat = planted_attention(1.1)
    assert len(diffseg(flat, SIDE, 0.9).unique()) == 1
    assert len(diffseg(flat, SIDE, 1e-4).unique()) == 4


def test_features_and_maps_of_the_model(model, chests):
    """Shapes, unit norm by block and step, centring; no image depends on its batch."""
    images = chests.batch(range(3))
    features = decoder_features(model, images)
    assert features.shape == (3, 2 * 32 + 2 * 16, 16, 16)  # two levels; latents of 16
    assert features.mean((2, 3)).abs().max() < 1e-5
    last = features[:, -16:]                                    # one block: unit vectors - mean
    means = 1 - last.square().sum(1).mean((1, 2))               # E|x - m|^2 = 1 - |m|^2
    assert (means > 0).all() and (means < 1).all()
    assert torch.allclose(decoder_features(model, images[1:2]), features[1:2], atol=1e-5)
    assert not torch.allclose(decoder_features(model, images, seed=1), features, atol=1e-3)
    for other in (patch_tokens, pixel_features):
        x = other(model, images)
        assert x.shape[2:] == (4, 4) and x.mean((2, 3)).abs().max() < 1e-5
    attention = finest_attention(model, images)
    assert attention.shape == (3, 64, 64)  # at the lower level only, of 8 x 8
    assert torch.allclose(attention.sum(-1), torch.ones(3, 64), atol=1e-5)
    assert not any(module._forward_hooks for module in model.unet.modules())  # taken off again


def test_lung_score():
    """In [0, 1], and above 0.5 exactly where a lung cluster is the nearest one."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 8, 8, generator=generator)
    centers = torch.randn(4, 5, generator=generator)
    lungs = torch.tensor([False, True, True, False])
    score = lung_score(features, centers, lungs, 8)
    distances = (features[:, None] - centers[None, :, :, None, None]).square().sum(2)
    assert score.min() >= 0 and score.max() <= 1
    assert torch.equal(score > 0.5, lungs[distances.argmin(1)])


def test_guided_filter_snaps_to_edges():
    """A constant and, in the limit, the guide itself come back; a coarse mask gets fine borders."""
    disc = discs((0, 0), radius=0.6).float()
    assert torch.allclose(guided_filter(torch.full_like(disc, 0.3), disc), torch.tensor(0.3))
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64)
    assert torch.allclose(guided_filter(0.5 * ramp, ramp, epsilon=1e-9), 0.5 * ramp, atol=1e-4)
    coarse = torch.nn.functional.avg_pool2d(disc, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    before = dice(coarse > 0.5, disc > 0.5)
    assert dice(guided_filter(coarse, 1 - disc) > 0.5, disc > 0.5) > 0.98 > before


def test_largest_pieces():
    """Each side keeps its largest piece, without holes; a side without any stays empty."""
    lungs = discs((-0.5, 0), (0.5, 0))
    spoiled = (lungs & ~discs((0.5, 0), radius=0.1)) | discs((-0.8, 0.9), (0.8, -0.9), radius=0.1)
    assert torch.equal(largest_pieces(spoiled), lungs)
    left = discs((-0.5, 0))
    assert torch.equal(largest_pieces(torch.cat([left, left & False])),
                       torch.cat([left, left & False]))


def test_edges_are_strongest_on_the_true_contour():
    """Of discs of all radii, the one whose contour has the strongest edges is the true one."""
    image = discs((0, 0), radius=0.5).float()
    strengths = {radius: edge_strength(discs((0, 0), radius=radius), image)
                 for radius in (0.3, 0.4, 0.5, 0.6, 0.7)}
    assert max(strengths, key=strengths.get) == 0.5 and strengths[0.3] == 0
    assert edge_strength(image > 2, image) == 0  # no contour


@pytest.fixture
def command(model, chests, tmp_path, monkeypatch):
    """Runs the experiment on phantoms: 10 to train, 8 held out, no mask for number 17."""
    chests.masks["masks"] = list(chests.masks["masks"])
    chests.masks["masks"][17] = None
    opened = OpenedRun(tmp_path, model, chests, torch.arange(10), torch.arange(10, 18))
    monkeypatch.setattr(segment, "open_run", lambda args: opened)

    def run(*arguments):
        experiments(["segment", "--clusters", "3", *arguments])
        return json.loads((tmp_path / "segment.json").read_text())

    return run


def test_command(command, chests, tmp_path, capsys):
    """Held-out images with a mask are judged, others counted; floors are what they should be."""
    result = command()
    said = capsys.readouterr().out
    assert result["images"] == 7 and ", 1 without a mask left out" in said
    truth = torch.cat([chests.mask(i) for i in range(10, 17)]).bool()
    mean = torch.cat([chests.mask(i) for i in range(10)]).float().mean(0) >= 0.5
    rows = result["dice"]
    assert rows["floor, mean of training masks"]["Dice"] == pytest.approx(
        np.mean([dice(mean, mask) for mask in truth]))
    threshold = result["edges"]["3"]["threshold"]
    assert rows[f"K-means 3 + threshold {threshold}"] == rows["K by edges and agreement: 3"]
    for row in rows.values():
        assert row["95 %"][0] <= row["Dice"] <= row["95 %"][1]
    assert {"K-means 3", "DiffSeg"} <= set(rows)
    assert (tmp_path / "segment.png").stat().st_size > 10_000


def test_masks_that_cannot_serve(command, chests):
    """No masks, and masks that show nothing, are refused; the phantoms' own serve."""
    assert known_masks(open_dataset("phantoms", 32, count=4), torch.arange(4))[0] == [0, 1, 2, 3]
    for masks in None, [torch.zeros(1, 32, 32)] * 18:
        chests.masks["masks"] = masks
        with pytest.raises(UserError, match="0 of 8 images have a mask that is not empty"):
            command()
