"""experiments/small_cnn.py: augmentation keeps what it should, and the network learns."""
import numpy as np
import torch

from dino import ViTConfig, VisionTransformer
from evaluate import correlations, pixel_rows, roc_auc
from experiments.small_cnn import predict, strong_augment, to_bytes, train_classifier
from support.phantoms import chest_phantoms


def test_strong_augmentation():
    """Each image varies in its own way, by seed, in range; the picture stays recognisable and is
    never mirrored."""
    image = chest_phantoms(1, 64, 0)[0].expand(20, 3, -1, -1)
    x, again = (strong_augment(image, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(x, again) and x.shape == image.shape and x.abs().max() <= 1
    assert not torch.allclose(x[0], x[1], atol=0.1)
    assert correlations(pixel_rows(x), pixel_rows(image[:1])).min() > 0.25
    half = torch.cat([torch.full((20, 3, 64, 32), -1.0), torch.ones(20, 3, 64, 32)], dim=3)
    right = strong_augment(half, torch.Generator().manual_seed(0))[..., 48:].mean(dim=(1, 2, 3))
    assert (right > 0).all()


def test_the_network_learns():
    """Dark and bright images are separated after two short stages; seeds decide the start."""
    grey = torch.linspace(-0.8, 0.8, 16).view(16, 1, 1, 1).expand(16, 3, 16, 16)
    labels = (np.arange(16) >= 8)[:, None].astype(float)
    pixels = to_bytes(grey)
    stages = [(pixels, labels, 20), (pixels, labels, 5)]
    nets = [train_classifier(stages, seed, torch.device("cpu")) for seed in (0, 0, 1)]
    scores = [predict(net, pixels, "cpu", batch=5) for net in nets]
    assert scores[0].shape == (16, 1) and roc_auc(labels[:, 0], scores[0][:, 0]) > 0.95
    assert np.array_equal(scores[0], scores[1]) and not np.allclose(scores[0], scores[2])


def test_a_vit_is_fine_tuned_as_a_copy():
    """The copy learns in all its layers; the run's own network stays as it is."""
    vit = VisionTransformer(ViTConfig(image_size=16, embed_dim=32, depth=1, num_heads=2))
    vit.requires_grad_(False)
    before = [p.clone() for p in vit.parameters()]
    stages = [(np.zeros((4, 3, 16, 16), np.uint8), np.ones((4, 1)), 2)]
    net = train_classifier(stages, 0, torch.device("cpu"), vit=vit)
    assert predict(net, stages[0][0], "cpu").shape == (4, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, vit.parameters()))
    moved = [not torch.equal(a, b) for a, b in zip(before, net[0].parameters())]
    assert np.mean(moved) > 0.8
