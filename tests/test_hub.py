"""hubconf.py: what torch.hub loads from a clone."""
from pathlib import Path

import torch

import dinodiff
from dino import VisionTransformer
ROOT = str(Path(__file__).parent.parent)


def test_entry_points_give_working_models(small_run):
    """The model samples and its ViT is frozen; both take a run's folder or file."""
    model = torch.hub.load(ROOT, "dinodiff", source="local", checkpoint=str(small_run))
    assert isinstance(model, dinodiff.DinoDiffusion) and not model.training
    images = model.sample(model.embed(torch.zeros(2, 3, 32, 32)), [0, 1], steps=2, sampler="dpm")
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    vit = torch.hub.load(ROOT, "dino_vit", source="local", name_or_path=str(small_run / "model.pt"))
    assert isinstance(vit, VisionTransformer) and not vit.training
    assert not any(p.requires_grad for p in vit.parameters())
