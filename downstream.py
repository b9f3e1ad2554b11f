"""The downstream experiment: do synthetic images help a classifier that has few real ones?

For each pool of N labelled real images (and each seed, which draws pool and network) a small CNN is
trained on: the pool alone; the pool and r N strongly augmented copies of it ("classical"); the pool
and r N images that the generator made from it; those alone; and those first, the pool after. All
arms take equally many optimiser steps and meet the same held-out real images; each is compared with
the pool alone and with the classical arm of its ratio by DeLong's test, adjusted by Holm's rule.

    aucs, survival = downstream(model, images, ...)
    rows = compare_arms(names, aucs)      # python evaluate.py classify --pools 50 does both

Source: pools, ratios and reconstruct / interpolate / img2img of DiNO-Diffusion (2024); synthetic
images first is RoentGen-v2's recipe. Ours: the network, the steps, the classical and "alone" arms
at each ratio, the tests. The tests know the chance of the test images, not that of drawing a pool
or starting a network: for that look at the deviation over seeds.
Images are (B, 3, H, W) float32 in [-1, 1], and uint8 where many are kept.
"""
import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from data import StatusLine, UserError, atomic_file, autocast_dtype, step_seed
from dinodiff import prototypes, slerp
from evaluate import roc_auc
from experiments.statistics import auc_influence, delong_test, holm
from train import fit

STRATEGIES = ("reconstruct", "interpolate", "img2img", "prototypes")


@dataclass(frozen=True)
class Settings:
    pools: tuple = (50,)            # N, real images
    ratios: tuple = (1, 10, 50)     # r, synthetic images for each real one
    strategies: tuple = STRATEGIES[:1]
    seeds: tuple = (0, 1, 2)        # of pool, samples, augmentation and network together
    cnn_steps: int = 600            # optimiser steps of each arm, batch 32
    sample_steps: int = 10          # DDIM
    guidance: float = 1.0
    eta: float = 0.5                # DDIM: 0 deterministic, 1 noisy as DDPM
    strength: float = 0.6           # img2img: share of the noise put on the source image
    augment: str = "none"           # each batch of every arm: none, light, strong
    turns: bool = False             # flips and turns when augmenting: for histology only
    batch: int = 64                 # images at once when sampling and scoring


class SmallCNN(nn.Sequential):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, labels): four stride-2 convolutions, a mean."""

    def __init__(self, labels, width=32):
        sides = [3, width, 2 * width, 4 * width, 4 * width]
        blocks = [layer for a, b in zip(sides, sides[1:]) for layer in (
            nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.GELU())]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(sides[-1], labels))


class Labelled(Dataset):
    """Images and their labels (N, L), by row, for `fit`: rows of a data set, or uint8 arrays."""

    def __init__(self, images, rows, labels):
        self.images, self.rows, self.labels = images, rows, torch.as_tensor(labels).float()

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, rows):
        own = self.rows[rows].tolist()
        x = (torch.from_numpy(self.images[own]) / 127.5 - 1 if isinstance(self.images, np.ndarray)
             else self.images.batch(own))
        return x, self.labels[rows]


def augment(images, generator, turns=False):
    """Training images, varied: shifts to an eighth, brightness and contrast by 15 %, and, where
    direction means nothing (`turns`), flips and quarter turns."""
    B, _, H, W = images.shape
    draw = torch.rand(6, generator=generator, device=generator.device).tolist()
    gain = 1 + 0.3 * (torch.rand(2, B, 1, 1, 1, generator=generator, device=images.device) - 0.5)
    x = images * gain[0] + gain[1] - 1
    pad = H // 8
    top, left = int(draw[0] * (2 * pad + 1)), int(draw[1] * (2 * pad + 1))
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
    on = {"generator": generator, "device": images.device}
    u = 2 * torch.rand(8, B, **on) - 1  # (8, B) in [-1, 1]
    angle, scale = u[0] * (math.pi if turns else math.pi / 12), 1 + 0.15 * u[1]
    flip = u[2].sign() if turns else torch.ones_like(u[2])
    rows = (flip * angle.cos(), -angle.sin(), flip * angle.sin(), angle.cos())
    matrix = torch.stack(rows, dim=1).view(B, 2, 2) * scale[:, None, None]
    matrix = torch.cat([matrix, 0.2 * u[3:5].T[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    x = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gamma, contrast, shift = (t[:, None, None, None] for t in (1.4 ** u[5], 1 + 0.3 * u[6],
                                                               0.2 * u[7]))
    x = contrast * (2 * ((x.clamp(-1, 1) + 1) / 2) ** gamma - 1) + shift
    noise = torch.randn(B, 1, *x.shape[2:], **on)
    return (x + 0.05 * noise).clamp(-1, 1)


def train_classifier(stages, seed, vary, device, name="classifier"):
    """A SmallCNN fitted in one or more stages (images, rows, labels (N, L) of 0 and 1, steps),
    each later one at a third of the learning rate before; returns it in eval mode.

    vary(images, generator) is applied to each batch. The start depends on the seed alone.
    """
    torch.manual_seed(step_seed(seed, "classifier") % 2 ** 31)
    net = SmallCNN(np.shape(stages[0][2])[1]).to(device)

    def loss_fn(part, step, generator):
        x, y = part
        return F.binary_cross_entropy_with_logits(net(vary(x, generator)), y), {}

    for k, (images, rows, labels, steps) in enumerate(stages):
        for _ in fit(name, net, loss_fn, Labelled(images, rows, labels), steps=steps, batch=32,
                     lr=1e-3 / 3 ** k, device=device, seed=seed, weight_decay=0.05):
            pass
    return net


def predict(net, shown, batch, device):
    """Scores (M, L), NumPy, of images (M, 3, H, W)."""
    with torch.inference_mode():
        return torch.cat([net(x.to(device)).cpu() for x in shown.split(batch)]).numpy()


def draw_pool(rows, groups, size, seed):
    """`size` of the numbers `rows`, patient after patient in a seeded order, so that smaller pools
    are parts of larger ones; the last patient may be cut."""
    names = sorted({groups[i] for i in rows})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    place = {names[k]: n for n, k in enumerate(order)}
    return sorted(rows, key=lambda i: place[groups[i]])[:size]


def conditions(strategy, tokens, others, count, seed):
    """(tokens (count, G, D), number of the pool image that gives label and start image (count,)).

    tokens (N, G, D) of the pool, others of all training images. Image j comes from pool image
    j % N, when interpolating mixed with another by up to a half, so that j % N is the nearer;
    or from centre j % K of as many K-means centres, where the nearest pool image gives the label.
    """
    n, own = len(tokens), torch.arange(count) % len(tokens)
    if strategy == "prototypes":
        centers = prototypes(others, min(n, len(others.unique(dim=0))), seed)
        nearest_one = torch.cdist(centers.flatten(1), tokens.flatten(1)).argmin(dim=1)
        own = torch.arange(count) % len(centers)
        return centers[own], nearest_one[own]
    if strategy == "interpolate" and n > 1:
        draw = torch.Generator().manual_seed(step_seed("interpolate", seed))
        partner = (own + torch.randint(1, n, (count,), generator=draw)) % n
        weights = (torch.rand(count, generator=draw) / 2).tolist()
        return torch.stack([slerp(tokens[i], tokens[j], w) for i, j, w in
                            zip(own.tolist(), partner.tolist(), weights)]), own
    return tokens[own], own


def as_bytes(images):
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def synthesise(model, strategy, pool, others, count, seed, settings, folder):
    """(uint8 images (count, 3, H, W), pool image of each (count,)) by one strategy.

    pool: uint8 images (N, 3, H, W); others: tokens of all training images. What the generator makes
    is kept in the folder under a name that changes with the model, the pool and the settings.
    """
    pictures = torch.from_numpy(pool) / 127.5 - 1
    if strategy == "classical":
        draw = torch.Generator().manual_seed(step_seed("classical", seed))
        own = torch.arange(count) % len(pool)
        return np.concatenate([as_bytes(strong_augment(pictures[rows], draw, settings.turns))
                               for rows in own.split(256)]), own.numpy()
    device, condition, own = model.shift.device, None, torch.arange(count) % len(pool)
    if model.config.condition == "dino":
        tokens = torch.cat([model.embed(x.to(device)).cpu() for x in pictures.split(64)])
        condition, own = conditions(strategy, tokens, others, count, seed)
    strength = settings.strength if strategy == "img2img" else 1.0
    options = settings.sample_steps, settings.guidance, settings.eta, "ddim", settings.batch
    dtype = autocast_dtype(device)  # half the time where the chip computes in bfloat16
    digest = hashlib.sha256(repr((strategy, count, seed, strength, dtype, options)).encode())
    for x in (*model.state_dict().values(), torch.from_numpy(pool), own):
        digest.update(x.cpu().numpy().tobytes())
    path = Path(folder, f"{strategy}_{len(pool)}_{seed}_{digest.hexdigest()[:12]}.npy")
    if not path.is_file():
        parts, status = [], StatusLine(count, f"{strategy} of {len(pool)} images, seed {seed}")
        for rows in torch.arange(count).split(settings.batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                parts.append(as_bytes(model.sample(
                    None if condition is None else condition[rows],
                    (seed * 1_000_003 + rows).tolist(), *options, pictures[own[rows]], strength)))
            status.update(rows[-1].item() + 1, images=len(rows))
        status.close()
        with atomic_file(path) as file:
            np.save(file, np.concatenate(parts))
    try:
        images = np.load(path, allow_pickle=False, mmap_mode="r")
        if images.shape != (count, *pool.shape[1:]) or images.dtype != np.uint8:
            raise ValueError(f"{images.dtype} of shape {images.shape}")
    except Exception as error:  # a damaged file makes NumPy raise nearly any type
        raise UserError(f"{path} cannot be read ({error})", f"{count} uint8 images are needed",
                        "delete it, it will be made again") from error
    return images, own.numpy()


def arms_of(name, real, y, made, made_y, steps):
    """Arms name -> stages of training (images, labels, steps); all arms have the same sum."""
    arms = {name: lambda: [(np.concatenate([real, made]), np.concatenate([y, made_y]), steps)]}
    if not name.endswith("classical"):
        arms[f"{name} alone"] = lambda: [(made, made_y, steps)]
        arms[f"{name} first"] = lambda: [(made, made_y, steps - steps // 4),
                                         (real, y, steps // 4)]
    return arms


def downstream(model, images, groups, train, test, train_y, test_y, names, settings, folder):
    """Train all arms: (pool, arm) -> for each seed a list of auc_influence, one for each label; and
    (pool, what) -> for each seed the referee's AUCs (L,), see below.

    groups: the patient of each image; train, test: numbers of images; train_y (N, L), test_y
    (M, L) of 0 and 1; names: L. Raises UserError for too large pools and a model without sources.
    The referee tells whether labels survive: a CNN trained on the training images of no pool's
    patients, so it has seen neither the pool nor what is made of it. NaN: labels of one class.
    """
    condition, size = model.config.condition, max(settings.pools)
    if model.prompts or condition == "none" and set(settings.strategies) != {"img2img"}:
        raise UserError(f"this model was trained with --condition {condition}", "one that follows "
                        "images is needed", "pass another --checkpoint"
                        + " or --strategies img2img" * (condition == "none"))
    if size > len(train):
        raise UserError(f"--pools {size}", f"the run has {len(train)} labelled training images",
                        "pass smaller pools, or a larger --train-limit")
    device, s, aucs, survival = model.shift.device, settings, {}, {}
    vary = {"none": lambda x, generator, turns: x, "light": augment, "strong": strong_augment}
    vary = partial(vary[s.augment], turns=s.turns)
    place, shown = {i: k for k, i in enumerate(train.tolist())}, images.batch(test.tolist())
    others = torch.cat([model.embed(images.batch(rows.tolist()).to(device)).cpu()
                        for rows in train.split(s.batch)]) if "prototypes" in s.strategies else None
    pools = {(size, seed): draw_pool(train.tolist(), groups, size, seed)
             for size, seed in itertools.product(s.pools, s.seeds)}
    known = {groups[i] for rows in pools.values() for i in rows}
    rest = torch.tensor([i for i in train.tolist() if groups[i] not in known], dtype=torch.int64)
    rest_y, referee = train_y[[place[i] for i in rest.tolist()]], None
    if len(rest) >= 2 * size:
        referee = train_classifier([(images, rest, rest_y, s.cnn_steps)], 0,
                                   partial(augment, turns=s.turns), device, "referee")
    for (size, seed), rows in pools.items():
        real, y = as_bytes(images.batch(rows)), train_y[[place[i] for i in rows]]
        shares = ", ".join(f"{n:.0f} {name}" for name, n in zip(names, y.sum(axis=0)))
        print(f"pool of {size}, seed {seed}: {len({groups[i] for i in rows})} groups; {shares}"
              + "; what 0 or all images show cannot be learned"
              * any(n in (0, size) for n in y.sum(axis=0)))
        arms = {"real only": lambda: [(real, y, s.cnn_steps)]}
        sets = {"held-out images": (as_bytes(shown), test_y), "the pool": (real, y)}
        for strategy in ("classical", *s.strategies):
            made, own = synthesise(model, strategy, real, others, size * max(s.ratios), seed, s,
                                   folder)
            sets[strategy] = made, y[own]
            for n in s.ratios:
                arms |= arms_of(f"1:{n} {strategy}", real, y, made[:n * size],
                                y[own[:n * size]], s.cnn_steps)
        for what, (x, labels) in sets.items() if referee is not None else ():
            score = predict(referee, torch.tensor(x[:1000]) / 127.5 - 1, s.batch, device)
            survival.setdefault((size, what), []).append(
                [roc_auc(*column) if 0 < column[0].sum() < len(score) else math.nan
                 for column in zip(labels[:1000].T, score.T)])
        for arm, stages in arms.items():
            net = train_classifier([(x, torch.arange(len(x)), labels, steps)
                                    for x, labels, steps in stages()], seed, vary, device,
                                   f"{size}, seed {seed}, {arm}")
            score = predict(net, shown, s.batch, device)
            aucs.setdefault((size, arm), []).append(
                [auc_influence(*column) for column in zip(test_y.T, score.T)])
    return aucs, survival


def compare_arms(names, aucs):
    """What downstream returns -> (pool, arm) -> row of figures.

    "vs" columns: difference in mean AUC (over labels and seeds) to the pool alone, and to the
    classical arm of the same pool and ratio; half its 95 % interval; p value of DeLong's test,
    adjusted by Holm over all rows. "tests": the same for each label, adjusted over all labels too.
    """
    rows, means = {}, {}
    for key, seeds in aucs.items():
        per_seed = [float(np.mean([auc for auc, _ in labels])) for labels in seeds]
        own = [tuple(np.mean([labels[j][k] for labels in seeds], axis=0) for k in (0, 1))
               for j in range(len(names))]
        means[key] = dict(zip(names, own))
        rows[key] = {"AUC": float(np.mean(per_seed)),
                     "sd": float(np.std(per_seed, ddof=1)) if per_seed[1:] else None,
                     **{name: float(auc) for name, (auc, _) in means[key].items()}, "tests": {}}
        means[key]["mean"] = tuple(np.mean([x[k] for x in own], axis=0) for k in (0, 1))
    for what in ("real only", "classical"):
        pairs = {(size, arm): (size, arm if arm == "real only" else
                               what if what == "real only" else f"{arm.split()[0]} classical")
                 for size, arm in rows}
        pairs = {key: other for key, other in pairs.items() if key != other}
        for labels in (["mean"], names):
            tests = {(key, name): delong_test(means[key][name], means[other][name])
                     for key, other in pairs.items() for name in labels}
            adjusted = holm([p for *_, p in tests.values()])
            for ((key, name), (difference, error, _)), p in zip(tests.items(), adjusted):
                row = {f"vs {what}": difference, "+-": 1.96 * error, "p": p}
                if name == "mean":
                    rows[key] |= {k if k.startswith("vs") else f"{k} {what}": v
                                  for k, v in row.items()}
                else:
                    rows[key]["tests"][f"{name} vs {what}"] = row
    return rows
