"""hubconf.py: what torch.hub loads from a clone."""
import sys
import types
from pathlib import Path

import pytest
import torch

import dinodiff
import hubconf
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


def test_a_module_of_the_same_name_is_refused(monkeypatch, tmp_path):
    """A caller's own unet.py hides ours: the error says which, and what to do."""
    module = types.ModuleType("unet")
    module.__file__ = str(tmp_path / "unet.py")
    monkeypatch.setitem(sys.modules, "unet", module)
    with pytest.raises(ImportError, match="your module unet .*rename yours"):
        hubconf.cxr128()
