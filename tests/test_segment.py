"""experiments/segment.py: planted segments come back, the border step and the floor do as said."""
import json

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from small_run import SMALL

from dinodiff import DinoDiffusion, DinoDiffusionConfig
from evaluate import dice
from experiments import segment
from experiments.__main__ import main as experiments
from experiments.common import OpenedRun
from experiments.segment import diffseg, guided_filter, masks_by_self_training, symmetric_kl
from support.command import UserError
from support.datasets import open_dataset

SIDE = 8
QUARTERS = torch.arange(4).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)  # (8, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DinoDiffusion(DinoDiffusionConfig(**SMALL)).eval()


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


@pytest.mark.parametrize("extract", segment.FEATURES.values())
def test_features_are_centred(model, chests, extract):
    """Their mean over each image is zero; no image depends on its batch."""
    images = chests.batch(range(3))
    features = extract(model, images)
    assert features.mean((2, 3)).abs().max() < 1e-5
    assert torch.allclose(extract(model, images[1:2]), features[1:2], atol=1e-5)


def test_guided_filter_snaps_to_edges():
    """A constant and, in the limit, the guide itself come back; a coarse mask gets fine borders."""
    disc = discs((0, 0), radius=0.6).float()
    assert torch.allclose(guided_filter(torch.full_like(disc, 0.3), disc), torch.tensor(0.3))
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64)
    assert torch.allclose(guided_filter(0.5 * ramp, ramp, epsilon=1e-9), 0.5 * ramp, atol=1e-4)
    coarse = torch.nn.functional.avg_pool2d(disc, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    before = dice(coarse > 0.5, disc > 0.5)
    assert dice(guided_filter(coarse, 1 - disc) > 0.5, disc > 0.5) > 0.98 > before


@pytest.fixture
def command(model, chests, tmp_path, monkeypatch):
    """Runs the experiment on phantoms: 10 to train, 8 held out, no mask for number 17."""
    chests.masks["masks"] = list(chests.masks["masks"])
    chests.masks["masks"][17] = None
    opened = OpenedRun(tmp_path, model, chests, torch.arange(10), torch.arange(10, 18))
    monkeypatch.setattr(segment, "open_run", lambda args: opened)

    def run(*arguments):
        experiments(["segment", "--clusters", "6", *arguments])
        return json.loads((tmp_path / "segment.json").read_text())

    return run


def test_command(command, chests):
    """Held-out images with a mask are judged, the others left out; the floor is what it should be.
    """
    result = command()
    assert result["images"] == 7
    truth = torch.cat([chests.mask(i) for i in range(10, 17)]).bool()
    mean = torch.cat([chests.mask(i) for i in range(10)]).float().mean(0) >= 0.5
    rows = result["dice"]
    assert rows["floor, mean of training masks"]["Dice"] == pytest.approx(
        np.mean([dice(mean, mask) for mask in truth]))
    threshold = result["edges"]["6"]["threshold"]
    assert rows[f"K-means 6 + threshold {threshold}"] == rows["K by edges: 6"]
    for row in rows.values():
        assert row["95 %"][0] <= row["Dice"] <= row["95 %"][1]
    assert {"K-means 6", "DiffSeg"} <= set(rows)


def test_masks_that_cannot_serve(command, chests):
    """No masks, and masks that show nothing, are refused."""
    for masks in None, [torch.zeros(1, 32, 32)] * 18:
        chests.masks["masks"] = masks
        with pytest.raises(UserError, match="0 of 8 images have a mask that is not empty"):
            command()


def test_self_training_learns_from_imperfect_masks(monkeypatch):
    """Bright discs whose masks are shifted at random: the network's own masks are better."""
    monkeypatch.setattr(segment, "SELF_TRAINING_STEPS", 60)
    generator = torch.Generator().manual_seed(0)
    places = 0.3 * torch.rand(40, 2, generator=generator) - 0.15
    truth = torch.cat([discs((-0.5 + x, y), (0.5 + x, y), radius=0.35, size=32)
                       for x, y in places.tolist()])
    images = truth[:, None].float() - 0.5 + 0.2 * torch.randn(40, 1, 32, 32, generator=generator)
    images = images.clamp(-1, 1).expand(-1, 3, -1, -1)
    shifted = torch.stack([mask.roll(int(x), 1) for mask, x in
                           zip(truth, torch.randint(-5, 6, (40,), generator=generator))])
    masks = masks_by_self_training(images[:30], shifted[:30], images[30:], 0, torch.device("cpu"))
    scores = [dice(*pair) for pair in zip(masks, truth[30:])]
    assert np.mean(scores) > 0.1 + np.mean([dice(*pair) for pair in zip(shifted, truth)])
