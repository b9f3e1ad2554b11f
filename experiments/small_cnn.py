"""The small classifier that `classify` and `downstream` train: network, augmentation, training.

    net = train_classifier([(Chosen(images, rows), labels, 600)], seed=0, vary=light_augment,
                           device=device)
    scores = predict(net, shown, batch=64, device=device)    # (M, L)

Images are (B, 3, H, W) float32 in [-1, 1], and uint8 where many are kept.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from support.seeds import step_seed
from train import fit


# ---------------------------------------------------------------- images and their labels

class Chosen:
    """The images of a data set with these numbers (N,): .batch(rows) -> (B, 3, H, W)."""

    def __init__(self, images, numbers):
        self.images = images
        self.numbers = numbers

    def batch(self, rows):
        return self.images.batch(self.numbers[rows].tolist())


class Bytes:
    """Images kept as one uint8 array (N, 3, H, W): .batch(rows) -> (B, 3, H, W)."""

    def __init__(self, array):
        self.array = array

    def batch(self, rows):
        return from_bytes(self.array[rows])


class Labelled(Dataset):
    """Images (Chosen or Bytes) with labels (N, L), by row, as `fit` reads them."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = torch.as_tensor(labels).float()

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, rows):
        return self.images.batch(rows), self.labels[rows]


def to_bytes(images):
    """Images in [-1, 1] -> uint8 array."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def from_bytes(array):
    """uint8 array -> images in [-1, 1], a tensor."""
    return torch.tensor(array) / 127.5 - 1


# ---------------------------------------------------------------- augmentation

def no_augment(images, generator, turns=False):
    return images


def light_augment(images, generator, turns=False):
    """Training images, varied: shifts to an eighth, brightness and contrast by 15 %, and, where
    direction means nothing (`turns`), flips and quarter turns."""
    B, _, H, W = images.shape
    draw = torch.rand(6, generator=generator, device=generator.device).tolist()
    factor = torch.rand(2, B, 1, 1, 1, generator=generator, device=images.device)
    contrast, brightness = 1 + 0.3 * (factor - 0.5)
    x = images * contrast + brightness - 1

    # One shift for the batch.
    pad = H // 8
    top = int(draw[0] * (2 * pad + 1))
    left = int(draw[1] * (2 * pad + 1))
    x = F.pad(x, (pad,) * 4, mode="reflect")[:, :, top:top + H, left:left + W]
    if turns:
        x = x.rot90(int(4 * draw[2]), (2, 3))
        x = x.flip(3) if draw[3] < 0.5 else x
    return x


def strong_augment(images, generator, turns=False):
    """Classical variants of images (B, 3, H, W), each its own: turned by up to 15 degrees, scaled
    by 15 %, shifted by 10 %, gamma 0.7 to 1.4, contrast by 30 %, brightness by 10 %, noise; with
    `turns` any angle, and flips."""
    B = len(images)
    device = images.device
    draw = 2 * torch.rand(8, B, generator=generator, device=device) - 1  # (8, B) in [-1, 1]

    # Turn, flip, scale and shift.
    angle = draw[0] * (math.pi if turns else math.pi / 12)
    scale = 1 + 0.15 * draw[1]
    flip = draw[2].sign() if turns else torch.ones_like(angle)
    turn = (flip * angle.cos(), -angle.sin(), flip * angle.sin(), angle.cos())
    matrix = torch.stack(turn, dim=1).view(B, 2, 2) * scale[:, None, None]
    matrix = torch.cat([matrix, 0.2 * draw[3:5].T[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    x = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    # Grey values and noise.
    gamma = 1.4 ** draw[5].view(B, 1, 1, 1)
    contrast = 1 + 0.3 * draw[6].view(B, 1, 1, 1)
    brightness = 0.2 * draw[7].view(B, 1, 1, 1)
    x = contrast * (2 * ((x.clamp(-1, 1) + 1) / 2) ** gamma - 1) + brightness
    noise = torch.randn(B, 1, *x.shape[2:], generator=generator, device=device)
    return (x + 0.05 * noise).clamp(-1, 1)


# ---------------------------------------------------------------- the network

class SmallCNN(nn.Sequential):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, labels): four stride-2 convolutions, a mean."""

    def __init__(self, labels, width=32):
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        layers = []
        for before, after in zip(channels, channels[1:]):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            layers.append(nn.GroupNorm(8, after))
            layers.append(nn.GELU())
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(channels[-1], labels))


def train_classifier(stages, seed, vary, device, name="classifier"):
    """A SmallCNN fitted in one or more stages (images, labels (N, L) of 0 and 1, steps), each later
    one at a third of the learning rate before; returns it in eval mode.

    vary(images, generator) is applied to each batch. The start depends on the seed alone.
    """
    torch.manual_seed(step_seed(seed, "classifier") % 2 ** 31)
    first_labels = stages[0][1]
    net = SmallCNN(np.shape(first_labels)[1]).to(device)

    def loss_fn(batch, step, generator):
        x, y = batch
        return F.binary_cross_entropy_with_logits(net(vary(x, generator)), y), {}

    for number, (images, labels, steps) in enumerate(stages):
        fit(name, net, loss_fn, Labelled(images, labels), steps=steps, batch=32,
            lr=1e-3 / 3 ** number, device=device, seed=seed, weight_decay=0.05)
    return net.eval()


def predict(net, shown, batch, device):
    """Scores (M, L), NumPy, of images (M, 3, H, W)."""
    with torch.inference_mode():
        return torch.cat([net(x.to(device)).cpu() for x in shown.split(batch)]).numpy()
