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
from experiments.segment import diffseg, guided_filter, symmetric_kl
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


def test_guided_filter_snaps_to_edges():
    """A constant and, in the limit, the guide itself come back; a coarse mask gets fine borders."""
    places = torch.linspace(-1, 1, 64)
    disc = (places[:, None].square() + places.square() < 0.6 ** 2)[None].float()
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


def test_command(command, chests, tmp_path):
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
