"""experiments/small_cnn.py: augmentation keeps what it should, and the network learns."""
import numpy as np
import torch

from evaluate import correlations, pixel_rows, roc_auc
from experiments.small_cnn import (Bytes, light_augment, no_augment, predict, strong_augment,
                                   to_bytes, train_classifier)
from support.phantoms import chest_phantoms


def test_strong_augmentation():
    """Each image varies in its own way, by seed, in range; the picture stays recognisable; flips
    and any angle only with turns."""
    image = chest_phantoms(1, 64, 0)[0].expand(20, 3, -1, -1)
    x, again = (strong_augment(image, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(x, again) and x.shape == image.shape and x.abs().max() <= 1
    assert not torch.allclose(x[0], x[1], atol=0.1)
    like = [correlations(pixel_rows(y), pixel_rows(image[:1])).min()
            for y in (x, strong_augment(image, torch.Generator().manual_seed(0), turns=True))]
    assert like[0] > 0.25 > like[1]
    half = torch.cat([torch.full((20, 3, 64, 32), -1.0), torch.ones(20, 3, 64, 32)], dim=3)
    right = strong_augment(half, torch.Generator().manual_seed(0))[..., 48:].mean(dim=(1, 2, 3))
    assert (right > 0).all()  # never mirrored


def test_light_augmentation_keeps_directions():
    """A bright right half stays at the right; the same seed gives the same batch."""
    half = torch.cat([torch.full((4, 3, 32, 16), -0.5), torch.full((4, 3, 32, 16), 0.5)], dim=3)
    x, again = (light_augment(half, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(x, again) and x.shape == half.shape
    assert (x[..., 24:].mean(dim=(1, 2, 3)) > x[..., :8].mean(dim=(1, 2, 3))).all()


def test_the_network_learns():
    """Dark and bright images are told apart after 20 steps, in two stages; seeds are starts."""
    grey = torch.linspace(-0.8, 0.8, 16).view(16, 1, 1, 1).expand(16, 3, 16, 16)
    labels = (np.arange(16) >= 8)[:, None].astype(float)
    stages = [(Bytes(to_bytes(grey)), labels, 20), (Bytes(to_bytes(grey)), labels, 5)]
    nets = [train_classifier(stages, seed, no_augment, torch.device("cpu")) for seed in (0, 0, 1)]
    scores = [predict(net, grey, 5, "cpu") for net in nets]
    assert scores[0].shape == (16, 1) and roc_auc(labels[:, 0], scores[0][:, 0]) > 0.95
    assert np.array_equal(scores[0], scores[1]) and not np.allclose(scores[0], scores[2])
