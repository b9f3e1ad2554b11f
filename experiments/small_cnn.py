"""The small classifier that `classify`, `downstream` and `twosample` train.

    net = train_classifier([(images, labels, 600)], seed=0, device=device, augment=strong_augment)
    scores = predict(net, test_images, device)    # (M, L)

Images are uint8 arrays (N, 3, H, W), which take a quarter of the memory. Labels are (N, L), 0 or 1.
"""
import math
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.seeds import step_seed
from train import fit


def to_bytes(images):
    """Images in [-1, 1] -> uint8 array."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def from_bytes(array):
    """uint8 array -> images in [-1, 1], a tensor."""
    return torch.tensor(array) / 127.5 - 1


def load_bytes(images, indices):
    """The images of an ImageSet at these indices, as a uint8 array (N, 3, H, W)."""
    return np.concatenate([to_bytes(x) for x in images.batches(indices, 256)])


class Labelled:
    """uint8 images (N, 3, H, W) with labels (N, L), read by `fit`."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = torch.as_tensor(labels).float()

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, rows):
        return from_bytes(self.images[rows]), self.labels[rows]


def strong_augment(images, generator):
    """Augment images (B, 3, H, W) in [-1, 1]: rotation up to 15 degrees, scale 15 %, shift 10 %,
    gamma 0.7 to 1.4, contrast 30 %, brightness 10 %."""
    B = len(images)
    draw = 2 * torch.rand(7, B, generator=generator, device=images.device) - 1  # in [-1, 1]

    # Rotate, scale and shift.
    angle = draw[0] * math.pi / 12
    scale = 1 + 0.15 * draw[1]
    rotation = (angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    matrix = torch.stack(rotation, dim=1).view(B, 2, 2) * scale[:, None, None]
    matrix = torch.cat([matrix, 0.2 * draw[2:4].T[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    x = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    # Grey values.
    gamma = 1.4 ** draw[4].view(B, 1, 1, 1)
    contrast = 1 + 0.3 * draw[5].view(B, 1, 1, 1)
    brightness = 0.2 * draw[6].view(B, 1, 1, 1)
    x = contrast * (2 * ((x.clamp(-1, 1) + 1) / 2) ** gamma - 1) + brightness
    return x.clamp(-1, 1)


class SmallCNN(nn.Sequential):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, labels): four strided convolutions, mean."""

    def __init__(self, labels, width=32):
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        layers = []
        for before, after in zip(channels, channels[1:]):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            layers.append(nn.GroupNorm(8, after))
            layers.append(nn.GELU())
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(channels[-1], labels))


def train_classifier(stages, seed, device, augment=None, name="classifier", vit=None):
    """Train a SmallCNN in stages (images, labels, steps), batch 32 -> the network in eval mode.

    Each stage has a third of the learning rate of the previous one. augment(images, generator) is
    applied to each batch. vit: a VisionTransformer, of which a copy with a linear layer on its
    global tokens is fine-tuned instead. The initial weights depend only on the seed (and vit).
    """
    torch.manual_seed(step_seed(seed, "classifier") % 2 ** 31)
    labels = np.shape(stages[0][1])[1]
    if vit:
        width = (1 + vit.config.registers) * vit.config.embed_dim
        net = nn.Sequential(deepcopy(vit), nn.Flatten(), nn.Linear(width, labels))
        net.requires_grad_(True)
        lr = 1e-4
    else:
        net = SmallCNN(labels)
        lr = 1e-3
    net = net.to(device)

    def loss_fn(batch, step, generator):
        x, y = batch
        x = augment(x, generator) if augment else x
        return F.binary_cross_entropy_with_logits(net(x), y)

    for stage, (images, labels, steps) in enumerate(stages):
        fit(name, net, loss_fn, Labelled(images, labels), steps=steps, batch=32,
            lr=lr / 3 ** stage, device=device, seed=seed, weight_decay=0.05)
    return net.eval()


def predict(net, images, device, batch=64):
    """Scores (M, L), NumPy, of uint8 images (M, 3, H, W)."""
    with torch.inference_mode():
        return torch.cat([net(from_bytes(images[first:first + batch]).to(device)).cpu()
                          for first in range(0, len(images), batch)]).numpy()
