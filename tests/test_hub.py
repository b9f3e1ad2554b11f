"""hubconf.py: what torch.hub loads from a clone."""
from pathlib import Path

import pytest
import torch

import dinodiff
import hubconf
from dino import VisionTransformer
from test_sample import write_run

ROOT = str(Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tokens")


def test_entry_points_give_working_models(run):
    """The bundle samples, its ViT is frozen; both have a text, and take a run's folder or file."""
    for name in ("dino_vit", "dinodiff"):
        assert getattr(hubconf, name).__doc__
    model = torch.hub.load(ROOT, "dinodiff", source="local", checkpoint=str(run))
    assert isinstance(model, dinodiff.DinoDiffusion) and not model.training
    images = model.sample(model.embed(torch.zeros(2, 3, 32, 32)), [0, 1], steps=2, sampler="dpm")
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    vit = torch.hub.load(ROOT, "dino_vit", source="local", name_or_path=str(run / "model.pt"))
    assert isinstance(vit, VisionTransformer) and not vit.training
    assert not any(p.requires_grad for p in vit.parameters())
