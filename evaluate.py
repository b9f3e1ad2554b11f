"""Every number of this project: small metrics that read like their equations, and the tables.

Frechet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018), precision and recall
(Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), AUC, Dice (1945), kappa
(Cohen 1960). Features are (N, D), torch or NumPy; every metric computes in float64 on the CPU.

    python evaluate.py resemble                  do samples resemble their source? (newest run)
    python evaluate.py probe --tokens global cls     what do the embedder's tokens know?
    python evaluate.py fidelity REAL SYNTHETIC   two folders of images

Deliberate choices: the trace term of the Frechet distance by eigenvalues (always real, faster than
`sqrtm`); a fixed-seed random network as the default judge, never the features that conditioned the
model under test; intervals of distances by subsampling without replacement (duplicates, which a
bootstrap makes, bias them), of AUC and Dice by bootstrap; equal counts on both sides and the
real-real floor beside every figure.
"""
import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import nn

from data import (UserError, load_checkpoint, open_dataset, pick_device, positive_int, read_split,
                  resolve_checkpoint, run_script, save_grid, split_holdout, user_errors,
                  write_text_atomic)
from dino import TOKEN_KINDS, VisionTransformer, conditioning_tokens
from dinodiff import DinoDiffusion
from phantoms import CHEST_LABELS


# ---------------------------------------------------------------- distances between feature sets

def as_features(x):
    """Features as float64 (N, D) on the CPU. Raises ValueError for NaN and infinity."""
    x = torch.as_tensor(x).detach().to("cpu", torch.float64)
    bad = (~x.isfinite().all(dim=1)).sum().item()
    if bad:
        raise ValueError(f"{bad} of {len(x)} feature rows hold NaN or infinity: need finite "
                         "numbers; look at the images and at the weights of the extractor")
    return x


def gaussian_statistics(features):
    """Mean (D,) and unbiased covariance (D, D) of (N, D) features or of an iterator of batches.

    Batches are merged one by one (Chan et al. 1979), so memory does not grow with N.
    """
    count, mean, scatter = 0, 0.0, 0.0
    for batch in [features] if hasattr(features, "shape") else features:
        batch = as_features(batch)
        n, batch_mean = len(batch), batch.mean(dim=0)
        shift, within = batch_mean - mean, batch - batch_mean
        scatter = scatter + within.T @ within + torch.outer(shift, shift) * count * n / (count + n)
        mean, count = mean + shift * n / (count + n), count + n
    if count < 2:
        raise ValueError(f"got {count} image(s): a covariance needs at least 2, add images")
    return mean, scatter / (count - 1)


def frechet_from_statistics(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Source: Heusel et al. 2017, equation 6.

    The last trace sums the roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2).
    """
    if mu1.shape != mu2.shape:
        raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} dimensions: need the same "
                         "feature extractor on both sides")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to (N, D) and (M, D); identical sets give ~0."""
    return frechet_from_statistics(*gaussian_statistics(a), *gaussian_statistics(b))


def off_diagonal_mean(k):
    """Mean of a square matrix without its diagonal."""
    return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))


def kernel_distance(a, b, subsets=None, subset_size=1000, seed=0):
    """Unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3; may be negative where the sets are alike.

    Over all rows: a float. With `subsets`: (mean, standard deviation) over that many draws of
    `subset_size` rows without replacement. Source: Binkowski et al. 2018, equation 4.
    """
    a, b = as_features(a), as_features(b)
    if subsets is not None:
        size, generator = min(subset_size, len(a), len(b)), torch.Generator().manual_seed(seed)
        draws = [kernel_distance(a[torch.randperm(len(a), generator=generator)[:size]],
                                 b[torch.randperm(len(b), generator=generator)[:size]])
                 for _ in range(subsets)]
        return float(np.mean(draws)), float(np.std(draws))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"got {len(a)} and {len(b)} images: the kernel distance needs 2 and more")

    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    return (off_diagonal_mean(aa) + off_diagonal_mean(bb) - 2 * ab.mean()).item()


def prdc(real, fake, k=5):
    """Precision, recall, density and coverage: dict of floats; distance to the k-th neighbour.

    Source: Kynkaanniemi et al. 2019, equation 2; Naeem et al. 2020, equations 5 and 6.
    """
    real, fake = as_features(real), as_features(fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"got {len(real)} real and {len(fake)} synthetic images: {k} neighbours "
                         f"need at least {k + 1} of each, add images or lower k")
    # exact differences: the faster matrix-product form loses small distances
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    # the smallest distance is that to the image itself, so its k-th neighbour is number k + 1
    real_radius = distances(real, real).kthvalue(k + 1, dim=1, keepdim=True).values  # (N, 1)
    fake_radius = distances(fake, fake).kthvalue(k + 1, dim=1).values  # (M,)
    across = distances(real, fake)  # (N, M)
    in_real_ball = across < real_radius
    return {"precision": in_real_ball.any(dim=0).double().mean().item(),
            "recall": (across < fake_radius).any(dim=1).double().mean().item(),
            "density": in_real_ball.double().sum(dim=0).mean().item() / k,
            "coverage": in_real_ball.any(dim=1).double().mean().item()}


# ---------------------------------------------------------------- labels, masks and readers

def roc_auc(labels, scores):
    """P(score of a positive > of a negative), ties a half: labels (N,) of 0 and 1, scores (N,).

    Source: the rank form of Mann & Whitney 1947. Raises ValueError for one class only.
    """
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if positives == 0 or negatives == 0:
        raise ValueError(f"got {positives} positive and {negatives} negative labels: an AUC needs "
                         "both classes, choose another label or split")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity: an AUC needs finite scores, check the model")
    rank_sum = rankdata(scores)[labels].sum()  # tied scores share their mean rank
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def dice(a, b):
    """2 |A and B| / (|A| + |B|) of two masks of one shape (nonzero is inside); 1 if both empty."""
    a, b = torch.as_tensor(a).bool(), torch.as_tensor(b).bool()
    if a.shape != b.shape:
        raise ValueError(f"masks of shape {tuple(a.shape)} and {tuple(b.shape)}: need the same")
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else (2 * (a & b).sum() / total).item()


def cohen_kappa(a, b):
    """(observed - expected agreement) / (1 - expected) of two readers' answers (N,) and (N,).

    NaN where both always give one same answer. Source: Cohen 1960.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"got {a.size} and {b.size} answers: kappa needs the same images, and one "
                         "at least, from both readers")
    observed = np.mean(a == b)
    expected = sum(np.mean(a == c) * np.mean(b == c) for c in np.union1d(a, b))
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def ridge_weights(x, y, strength):
    """argmin |x w - y|^2 + strength N |w|^2, solved in the smaller of N and D dimensions."""
    n, d = x.shape
    if d <= n:
        return torch.linalg.solve(x.T @ x + strength * n * torch.eye(d, dtype=x.dtype), x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + strength * n * torch.eye(n, dtype=x.dtype), y)


def linear_probe(train_x, train_y, test_x, test_y, strengths=(0.001, 0.01, 0.1, 1.0, 10.0), seed=0):
    """(AUC of each label, scores (M, L)) of a ridge regression on frozen features.

    train_x (N, D), train_y (N, L) of 0 and 1. Features are standardised with training statistics;
    each label's strength is the one with the least squared error on a fifth of the training set.
    """
    train_x, test_x = as_features(train_x), as_features(test_x)
    train_y, test_y = torch.as_tensor(train_y).double(), torch.as_tensor(test_y)
    mean, std = train_x.mean(dim=0), train_x.std(dim=0).clamp(min=1e-8)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    train_y = train_y - train_y.mean(dim=0)
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
    check, fit = order[:len(order) // 5], order[len(order) // 5:]
    errors = [(train_x[check] @ ridge_weights(train_x[fit], train_y[fit], s)
               - train_y[check]).square().mean(dim=0) for s in strengths]
    best = torch.stack(errors).argmin(dim=0).tolist()  # (strengths, L) -> (L,)
    scores = torch.stack([test_x @ ridge_weights(train_x, train_y[:, j], strengths[k])
                          for j, k in enumerate(best)], dim=1)
    return [roc_auc(y, s) for y, s in zip(test_y.T, scores.T)], scores.numpy()


# ---------------------------------------------------------------- intervals

def subsample_interval(metric, a, b, rounds=50, seed=0):
    """95 % interval (low, high) of metric(a, b), which may be an array, from random halves.

    Halves are drawn without replacement. A mean spreads over them as its standard error over the
    whole set (1/m - 1/n = 1/n at m = n/2), so their deviations are laid around the full value; the
    larger bias of a half cancels. Source: Politis & Romano 1994.
    """
    a, b = as_features(a), as_features(b)
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(rounds):
        rows_a = torch.randperm(len(a), generator=generator)[:len(a) // 2]
        rows_b = torch.randperm(len(b), generator=generator)[:len(b) // 2]
        draws.append(np.asarray(metric(a[rows_a], b[rows_b])))
    low, high = np.quantile(np.stack(draws) - np.mean(draws, axis=0), [0.025, 0.975], axis=0)
    full = np.asarray(metric(a, b))
    return full + low, full + high


def bootstrap_interval(metric, *arrays, rounds=1000, seed=0):
    """95 % percentile interval (low, high) of metric(*arrays), rows drawn together (Efron 1979)."""
    rng, arrays = np.random.default_rng(seed), [np.asarray(x) for x in arrays]
    draws, failed = [], 0
    while len(draws) < rounds:
        rows = rng.integers(len(arrays[0]), size=len(arrays[0]))
        try:
            draws.append(metric(*(x[rows] for x in arrays)))
        except ValueError:
            failed += 1  # a draw of one class only: draw again
            if failed > rounds:
                raise
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


# ---------------------------------------------------------------- a judge of no one's making

class RandomFeatures(nn.Module):
    """Fixed-seed random network: images (B, 3, H, W) in [-1, 1], side >= 32 -> (B, 217) features.

    Texture: the log deviation of every channel of four 3x3 convolutions, relative to their mean,
    which is kept apart (else contrast alone would be counted 104 times). Layout: 4x4 grids of the
    picture and of the last stage. Never trained, nothing to download, no side taken. Source:
    Naeem et al. 2020, section 5: random embeddings where images are far from ImageNet.
    """

    def __init__(self, seed=0, channels=(16, 24, 32, 32)):
        super().__init__()
        generator, width = torch.Generator().manual_seed(seed), 3  # a CPU generator: same anywhere
        for i, c in enumerate(channels):
            w = torch.randn(c, width, 3, 3, generator=generator)
            w = w - w.mean(dim=(2, 3), keepdim=True)  # sees edges; brightness is for the grid
            w = w * (2 / w.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
            self.register_buffer(f"filters{i}", w)
            width = c

    @torch.no_grad()
    def forward(self, x):
        layout, texture = [F.adaptive_avg_pool2d(x, 4).flatten(1) / 3 ** 0.5], []
        for i, filters in enumerate(self.buffers()):
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), filters, stride=1 if i == 0 else 2)
            texture.append((x.std(dim=(2, 3)) + 0.05).log())  # 0.05: flat images stay finite
            x = F.leaky_relu(x, 0.1)
        layout.append(F.adaptive_avg_pool2d(x[:, :4], 4).flatten(1))  # (B, 4, h, w) -> (B, 64)
        texture = torch.cat(texture, dim=1)
        contrast = texture.mean(dim=1, keepdim=True)
        return torch.cat([0.5 * (texture - contrast), 0.5 * contrast, *layout], dim=1)


# ---------------------------------------------------------------- pictures into numbers

def pixel_rows(images):
    """Grey values (N, P) in [0, 1] of images (N, 3, H, W); sides above 64 are averaged to 64."""
    grey = (images.mean(dim=1) + 1) / 2
    side = min(64, grey.shape[-1])
    return F.adaptive_avg_pool2d(grey, side).flatten(1)  # (N, H, W) -> (N, side*side)


def correlations(a, b):
    """Pearson correlation over P of each row of (N, P) with each of (M, P): (N, M)."""
    a, b = (F.normalize(x - x.mean(dim=1, keepdim=True), dim=1) for x in (a, b))
    return a @ b.T


def best_correlations(a, b, chunk=1024):
    """Highest correlation of each row of a with any row of b: (N,), b in chunks to spare memory."""
    return torch.stack([correlations(a, part).amax(dim=1) for part in b.split(chunk)]).amax(dim=0)


def first_share(similarity):
    """Share of the rows of (N, N) whose own column is the strict maximum; chance is 1 / N."""
    others = similarity.clone().fill_diagonal_(-torch.inf).amax(dim=1)
    return (similarity.diagonal() > others).double().mean().item()


def describe(batches, extractor, device="cpu"):
    """Features (N, D) and pixel rows (N, P) on the CPU of an iterator of image batches."""
    parts = [(extractor(x.to(device)).flatten(1).cpu(), pixel_rows(x).cpu()) for x in batches]
    return tuple(torch.cat(part) for part in zip(*parts))


def psnr(a, b):
    """Peak signal-to-noise ratio, decibels, mean over images (N, 3, H, W) in [-1, 1] (peak 2)."""
    error = (a - b).square().flatten(1).mean(dim=1).clamp(min=1e-12)
    return (10 * (4 / error).log10()).mean().item()


METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")


def compare(real, fake):
    """All METRICS of two feature sets, array (6,)."""
    return np.array([frechet_distance(real, fake), kernel_distance(real, fake),
                     *prdc(real, fake).values()])


def brightness(pixels):
    """Mean grey over images, its spread between images and the mean spread within, in [0, 1]."""
    means = pixels.mean(dim=1)
    return {"mean": means.mean().item(), "between": means.std().item(),
            "within": pixels.std(dim=1).mean().item()}


# ---------------------------------------------------------------- sub-commands

def print_table(rows):
    """Rows of cells, the first row being the heads, in columns."""
    rows = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())


def choose(indices, count, seed=0):
    """At most `count` of the indices, shuffled by seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(indices)[torch.randperm(len(indices), generator=generator)[:count]]


def batches_of(dataset, indices, batch=64):
    return (dataset.batch(rows.tolist()) for rows in torch.as_tensor(indices).split(batch))


def open_run(args):
    """(folder, model, the flags of its training, data set, training and held-out numbers)."""
    path = resolve_checkpoint(args.checkpoint)
    checkpoint = load_checkpoint(path)
    with user_errors():
        model = DinoDiffusion.from_checkpoint(checkpoint).to(pick_device(args.device))
    flags = checkpoint["training"]
    images = open_dataset(args.data or flags["data"], model.config.image_size, flags["seed"],
                          flags["count"])
    train, test = read_split(path.parent / "split.csv", images)
    if len(test) < 2 or len(train) < 2:
        raise UserError(f"{path.parent} has {len(train)} training and {len(test)} held-out images",
                        "2 of each are needed", "train with a larger --holdout")
    print(f"{path}: {images.note}; held-out images are sources, {model.config.tokens} tokens, "
          f"condition {model.config.condition}")
    return path.parent, model, flags, images, train, choose(test, args.count)


def resemblance(model, sources, training, seeds, judge, steps=50, guidance=1.0, batch=64):
    """The main job's figures: (reference dict, list of one dict a seed, rows of pictures).

    sources (N, 3, H, W) held out; training: iterator of image batches. One sample a source and
    seed. Distances are of the judge's features to the training images, N images on each line.
    """
    device = next(model.buffers()).device
    reconstructed, tokens = zip(*((model.decode(model.encode(x)).cpu(), model.embed(x).cpu())
                                  for x in (part.to(device) for part in sources.split(batch))))
    reconstructed, tokens = torch.cat(reconstructed), torch.cat(tokens)
    train_features, train_pixels = describe(training, judge, device)
    train_statistics = gaussian_statistics(train_features)

    def look(images):
        features, pixels = describe(images.split(batch), judge, device)
        grey = {f"brightness {name}": value for name, value in brightness(pixels).items()}
        return pixels, {
            "Frechet to training": frechet_from_statistics(*gaussian_statistics(features),
                                                           *train_statistics),
            "best correlation with a training image":
                best_correlations(pixels, train_pixels).mean().item(), **grey}

    source_pixels, reference = look(sources)
    floor = reference["Frechet to training"]
    blurred = F.avg_pool2d(F.pad(sources, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    reference.update({
        "correlation with other sources":
            off_diagonal_mean(correlations(source_pixels, source_pixels)).item(),
        "VAE PSNR, dB": psnr(sources, reconstructed),
        "Frechet of VAE reconstructions": look(reconstructed)[1]["Frechet to training"],
        "Frechet of 3x3-blurred real": look(blurred)[1]["Frechet to training"]})
    conditional, results, pictures = model.config.condition != "none", [], [sources[:8],
                                                                            reconstructed[:8]]
    for seed in seeds:
        samples = model.sample(tokens if conditional else None,
                               [seed * 1_000_003 + i for i in range(len(sources))], steps=steps,
                               guidance_scale=guidance, batch=batch).cpu()
        pixels, figures = look(samples)
        across = correlations(pixels, source_pixels)  # (N, N)
        again = torch.cat([model.embed(x.to(device)).cpu() for x in samples.split(batch)])
        cosine = F.normalize(again.flatten(1), dim=1) @ F.normalize(tokens.flatten(1), dim=1).T
        results.append({
            "correlation with own source": across.diagonal().mean().item(),
            "correlation with other sources": off_diagonal_mean(across).item(),
            "own source first, by pixels": first_share(across),
            "own source first, by the model's own tokens": first_share(cosine),
            **figures, "Frechet, times the real floor": figures["Frechet to training"] / floor})
        pictures.append(samples[:8])
        print(f"seed {seed} done", flush=True)
    return reference, results, pictures


def resemble(args):
    """Do samples resemble their source, and as a set the data?"""
    run, model, flags, images, train, test = open_run(args)
    chosen = choose(train, args.train_limit)
    judge = RandomFeatures().to(next(model.buffers()).device)
    with user_errors():
        reference, results, pictures = resemblance(
            model, images.batch(test.tolist()), batches_of(images, chosen, args.batch), args.seeds,
            judge, args.steps, args.guidance, args.batch)
    print(f"\n{len(test)} held-out sources, one sample each and seed; DDIM {args.steps} steps, "
          f"guidance {args.guidance:g};\n{len(chosen)} of {len(train)} training images; features: "
          f"random network, seed 0; correlations of grey pixels at {min(64, images.size)} px")
    rows, summary = [["", "real", *(f"seed {s}" for s in args.seeds), "mean +- sd"]], {}
    for name in results[0]:
        values = [r[name] for r in results]
        summary[name] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))
                         if len(values) > 1 else None}
        rows.append([name, reference.get(name, ""), *values, f"{summary[name]['mean']:.4g} +- "
                     f"{np.std(values, ddof=len(values) > 1):.2g}"])
    rows += [[name, value] + [""] * (len(results) + 1) for name, value in reference.items()
             if name not in results[0]]
    print_table(rows)
    save_grid(run / "resemble.png", pictures, captions=["held-out source", "VAE reconstruction",
                                                        *(f"sample, seed {s}" for s in args.seeds)])
    write_text_atomic(run / "resemble.json", json.dumps({
        "sources": len(test), "training_images": len(chosen), "steps": args.steps,
        "guidance": args.guidance, "tokens": model.config.tokens, "data": flags["data"],
        "real": reference, "summary": summary,
        "seeds": dict(zip(map(str, args.seeds), results))}, indent=2))
    print(f"wrote {run}/resemble.json and resemble.png")


def binary_labels(columns, names, train, test, least=20):
    """Columns of str -> (list of label names, train (N, L), test (M, L)) of 0.0 and 1.0.

    A column of "0" and "1" is one label; any other is cut at "|" into one label a value. Labels
    with fewer than `least` images on either side, in either part, are left out.
    """
    labels = {}
    for name in names:
        if name not in columns:
            raise UserError(f"there is no column {name!r}", f"labels.csv has {', '.join(columns)}",
                            "pass one of these as --label-column")
        cells = [set(cell.split("|")) for cell in columns[name]]
        values = set().union(*cells) - {""}
        if values <= {"0", "1"}:
            labels[name] = ["1" in cell for cell in cells]
        else:
            labels.update((value, [value in cell for cell in cells]) for value in sorted(values))
    y = {name: (np.array(v, float)[train], np.array(v, float)[test]) for name, v in labels.items()}
    kept = {name: parts for name, parts in y.items()
            if all(least <= part.sum() <= len(part) - least for part in parts)}
    if not kept:
        raise UserError(f"no label of {', '.join(names)} is in {least} images, and not in {least}, "
                        "of both parts", "an AUC needs both", "pass another --label-column")
    if len(kept) < len(y):
        print(f"left out, too rare or too common: {', '.join(sorted(set(y) - set(kept)))}")
    return list(kept), *(np.stack(part, axis=1) for part in zip(*kept.values()))


def probe(args):
    """What a linear read-out finds in the tokens: trained, random weights, and raw pixels."""
    run, model, flags, images, train, test = open_run(args)
    train = choose(train, args.train_limit)
    default = CHEST_LABELS if set(CHEST_LABELS) <= set(images.columns) else ["finding"]
    names, train_y, test_y = binary_labels(images.columns, args.label_column or default, train,
                                           test)
    device = next(model.buffers()).device

    def vit(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return VisionTransformer(model.config.vit).eval().to(device)

    nets = {f"embedder ({flags['embedder']})": model.embedder,
            **{f"random weights, seed {seed}": vit(seed) for seed in args.seeds}}
    plans = {f"{kind} tokens, {name}": partial(conditioning_tokens, net, kind=kind)
             for kind in args.tokens for name, net in nets.items()}
    plans["16x16 grey pixels"] = lambda x: F.adaptive_avg_pool2d(x.mean(dim=1), 16)
    rows, table = [["", "mean AUC", "95 %", *names]], {}
    for name, extract in plans.items():
        with torch.no_grad():
            train_x, test_x = (describe(batches_of(images, part, args.batch), extract, device)[0]
                               for part in (train, test))
        aucs, scores = linear_probe(train_x, train_y, test_x, test_y)
        low, high = bootstrap_interval(lambda y, s: np.mean([roc_auc(*c) for c in zip(y.T, s.T)]),
                                       test_y, scores, rounds=200)
        rows.append([name, float(np.mean(aucs)), f"{low:.3f} to {high:.3f}", *aucs])
        table[name] = {"mean": float(np.mean(aucs)), "interval": [low, high],
                       "labels": dict(zip(names, aucs))}
    print(f"ridge on {len(train)} training images, tested on {len(test)} held-out images")
    print_table(rows)
    write_text_atomic(run / "probe.json", json.dumps(table, indent=2))
    print(f"wrote {run}/probe.json")


def fidelity(args):
    """Two folders of images, compared as sets."""
    real, synthetic = (open_dataset(path, args.size) for path in (args.real, args.synthetic))
    halves = [choose(half, args.count) for half in split_holdout(real, 0.5, args.seed)]
    sets = ((real, torch.cat(halves)), (synthetic, choose(range(len(synthetic)), args.count)))
    side = args.size or real[0].shape[-1]
    for dataset, rows in sets:
        for i in rows.tolist():
            own = dataset[i].shape[-1]
            if own != side:
                raise UserError(f"{dataset.files[i]} has {own} pixels a side, the first real image "
                                f"{side}", "one side is needed, for resizing changes every figure",
                                f"pass --size {min(side, own)}")
    device, extractor = pick_device(args.device), RandomFeatures()
    if args.features == "dino":
        with user_errors():
            extractor = DinoDiffusion.from_checkpoint(
                load_checkpoint(resolve_checkpoint(args.checkpoint))).to(device).embed
    else:
        extractor.to(device)
    (a, a_grey), (b, b_grey) = (describe(batches_of(dataset, rows, args.batch), extractor, device)
                                for dataset, rows in sets)
    half, other, n = a[:len(halves[0])], a[len(halves[0]):], min(*map(len, halves), len(b))
    with user_errors():
        floor, equal = compare(half[:n], other[:n]), compare(half[:n], b[:n])
        low, high = subsample_interval(compare, a, b, rounds=20, seed=args.seed)
        full = compare(a, b)
    print(f"features: {args.features}, {a.shape[1]} dimensions; {side} px, centre square, bicubic "
          f"with antialias where resized; {len(a)} real, {len(b)} synthetic images")
    if min(len(a), len(b)) <= a.shape[1]:
        print(f"warning: fewer images than the {a.shape[1]} dimensions: the covariance has no full "
              "rank, which raises the Frechet distance; read it beside its floor only")
    print_table([["", f"real/real ({n} each)", f"real/synthetic ({n} each)", "real/synthetic (all)",
                  "95 %"]] + [[m, floor[i], equal[i], full[i], f"{low[i]:.4g} to {high[i]:.4g}"]
                              for i, m in enumerate(METRICS)])
    grey = {"real": brightness(a_grey), "synthetic": brightness(b_grey)}
    print_table([["brightness", *grey]] + [[k, grey["real"][k], grey["synthetic"][k]]
                                           for k in grey["real"]])
    shift = (grey["synthetic"]["mean"] - grey["real"]["mean"]) / max(grey["real"]["between"], 1e-9)
    print(f"mean brightness, synthetic - real: {shift:+.2f} deviations between real images")
    out = Path(args.out or Path(args.synthetic) / "fidelity.json")
    write_text_atomic(out, json.dumps({
        "features": args.features, "size": side, "real": len(a), "synthetic": len(b), "equal": n,
        **{m: {"floor": floor[i], "equal": equal[i], "all": full[i], "interval": [low[i], high[i]]}
           for i, m in enumerate(METRICS)}, "brightness": grey}, indent=2))
    print(f"wrote {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Metrics and tables; see the head of this file.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    a = shared.add_argument
    a("--checkpoint", help="run folder or model.pt (default: the newest run)")
    a("--batch", type=positive_int, default=64, help="images at once")
    a("--device", default="auto", help="auto, cuda, mps or cpu")

    def command(run, help):
        p = commands.add_parser(run.__name__, parents=[shared], help=help,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(run=run)
        return p.add_argument

    a = command(fidelity, "two folders of images, compared as sets")
    a("real", help="folder of real images")
    a("synthetic", help="folder of synthetic images")
    a("--features", choices=("random", "dino"), default="random", help="random network, or the "
      "embedder of --checkpoint (not for samples it conditioned)")
    a("--size", type=positive_int, help="resize to this side (default: as they are)")
    a("--count", type=positive_int, default=5000, help="at most so many of each")
    a("--seed", type=int, default=0, help="of the halves and the intervals")
    a("--out", help="JSON file (default: SYNTHETIC/fidelity.json)")
    for run, count, help in ((resemble, 256, "do samples resemble their source?"),
                             (probe, 5000, "linear probe of the embedder's tokens")):
        a = command(run, help)
        a("--data", help="where the run's images are now (default: as trained)")
        a("--count", type=positive_int, default=count, help="at most so many held-out images")
        a("--train-limit", type=positive_int, default=2000, help="at most so many training images")
        a("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of samples, or random weights")
        if run is resemble:
            a("--steps", type=positive_int, default=50, help="DDIM steps")
            a("--guidance", type=float, default=1.0, help="guidance scale, 1.0 = off")
        else:
            a("--label-column", nargs="+", help="columns of labels.csv (default: the phantoms' "
              "labels, or finding)")
            a("--tokens", choices=TOKEN_KINDS, nargs="+", default=["global", "cls", "patch"])
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_script(main)
