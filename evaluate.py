"""Every number of this project: small metrics that read like their equations, and the tables.

    python evaluate.py resemble                      do samples resemble their source?
    python evaluate.py probe --tokens global cls     what do the embedder's tokens know?
    python evaluate.py fidelity REAL SYNTHETIC       two folders of images
    python evaluate.py clusters                      do K-means clusters find true morphologies?
    python evaluate.py classify --train FOLDER       is a synthetic training set of use?

Features are (N, D), torch or NumPy; every metric computes in float64 on the CPU. Deliberate
choices: the trace term of the Frechet distance by eigenvalues (always real, faster than `sqrtm`); a
fixed-seed random network as the default judge, never the features that conditioned the model under
test; intervals of distances by subsampling without replacement (duplicates, which a bootstrap
makes, bias them), of AUC by bootstrap; equal counts and the real-real floor beside every figure.
"""
import argparse
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import nn
from torch.utils.data import Dataset

from data import (UserError, fraction, load_checkpoint, open_dataset, pick_device, positive_int,
                  read_split, resolve_checkpoint, run_script, save_grid, split_holdout,
                  step_seed, user_errors, write_text_atomic)
from dino import TOKEN_KINDS, VisionTransformer, conditioning_tokens
from dinodiff import DinoDiffusion
from phantoms import CHEST_LABELS
from prompts import kmeans, standardise
from train import fit


# ---------------------------------------------------------------- distances between feature sets

def as_features(*sets, least=2):
    """Each set as float64 (N, D) on the CPU; ValueError for NaN, infinity, few rows, unlike D."""
    sets = [torch.as_tensor(x).detach().to("cpu", torch.float64) for x in sets]
    for x in sets:
        bad = (~x.isfinite().all(dim=1)).sum().item()
        if bad or len(x) < least or x.shape[1] != sets[0].shape[1]:
            raise ValueError(f"got features {[tuple(x.shape) for x in sets]}, {bad} rows with NaN: "
                             f"need {least} or more finite rows a set, of one extractor: add "
                             "images, or look at them and at the extractor's weights")
    return sets


def frechet_distance(a, b):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Source: Heusel et al. 2017, equation 6.

    The last trace sums the roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2).
    """
    a, b = as_features(a, b)
    mu1, mu2 = a.mean(dim=0), b.mean(dim=0)
    s1, s2 = ((x - mu).T @ (x - mu) / (len(x) - 1) for x, mu in ((a, mu1), (b, mu2)))
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def off_diagonal_mean(k):
    """Mean of a square matrix without its diagonal."""
    return ((k.sum() - k.trace()) / (len(k) * (len(k) - 1))).item()


def kernel_distance(a, b, subsets=0, subset_size=1000, seed=0):
    """Unbiased MMD^2, kernel (x.y / D + 1)^3; may be negative. Source: Binkowski et al. 2018.

    Over all rows, or the mean over `subsets` draws without replacement of `subset_size` rows.
    """
    a, b = as_features(a, b)
    if subsets:
        draw, m = torch.Generator().manual_seed(seed), min(subset_size, len(a), len(b))
        parts = ([x[torch.randperm(len(x), generator=draw)[:m]] for x in (a, b)]
                 for _ in range(subsets))
        return float(np.mean([kernel_distance(*part) for part in parts]))
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    return off_diagonal_mean(aa) + off_diagonal_mean(bb) - 2 * ab.mean().item()


def prdc(real, fake, k=5):
    """Precision, recall, density, coverage: dict of floats; balls reach to the k-th neighbour.

    Source: Kynkaanniemi et al. 2019, equation 2; Naeem et al. 2020, equations 5 and 6.
    """
    real, fake = as_features(real, fake, least=k + 1)
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


# ---------------------------------------------------------------- labels, masks, readers, intervals

def roc_auc(labels, scores):
    """P(score of a positive > of a negative), ties a half (Mann & Whitney 1947): (N,) and (N,)."""
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not (positives and negatives and np.isfinite(scores).all()):
        raise ValueError(f"got {positives} positive and {negatives} negative labels, or NaN: "
                         "an AUC needs both classes and numbers: check label, split and model")
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
    """(observed - expected agreement) / (1 - expected) of answers (N,), (N,); Cohen 1960."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"got {a.size} and {b.size} answers: kappa needs the same images, and one "
                         "at least, from both readers")
    observed = np.mean(a == b)
    expected = sum(np.mean(a == c) * np.mean(b == c) for c in np.union1d(a, b))
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def cluster_agreement(truth, clusters):
    """How well clusters (N,) find known classes (N,): a dict, 1 is perfect.

    homogeneity = 1 - H(truth | clusters) / H(truth): is each cluster of one class? completeness:
    the other way round. V-measure: their harmonic mean (Rosenberg & Hirschberg 2007). adjusted
    Rand: pairs that both keep together, 0 by chance (Hubert & Arabie 1985). More clusters than
    classes cannot hurt homogeneity, but hurt the others.
    Source: the formulas of scikit-learn's functions of these names, natural logarithms.
    """
    truth, clusters = (np.unique(values, return_inverse=True)[1] for values in (truth, clusters))
    table = np.zeros((truth.max() + 1, clusters.max() + 1))
    np.add.at(table, (truth, clusters), 1)
    n, rows, columns = len(truth), table.sum(1), table.sum(0)

    def entropy(counts):
        share = counts[counts > 0] / n
        return -(share * np.log(share)).sum()

    def pairs(counts):
        return (counts * (counts - 1) / 2).sum()

    shared = entropy(rows) + entropy(columns) - entropy(table)  # mutual information
    homogeneity, completeness = (shared / entropy(x) if entropy(x) > 0 else 1.0
                                 for x in (rows, columns))
    both = homogeneity + completeness
    chance = pairs(rows) * pairs(columns) / pairs(np.array([n]))
    best = (pairs(rows) + pairs(columns)) / 2
    return {"homogeneity": homogeneity, "completeness": completeness,
            "V-measure": 2 * homogeneity * completeness / both if both else 0.0,
            "adjusted Rand": (pairs(table) - chance) / (best - chance) if best > chance else 1.0}


def ridge_weights(x, y, strength):
    """argmin |x w - y|^2 + strength N |w|^2, solved in the smaller of N and D dimensions."""
    n, d = x.shape
    penalty = strength * n * torch.eye(min(n, d), dtype=x.dtype)
    if d <= n:
        return torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + penalty, y)


def linear_probe(train_x, train_y, test_x, test_y, strengths=(0.001, 0.01, 0.1, 1.0, 10.0), seed=0):
    """(AUC of each label, scores (M, L)) of a ridge regression on frozen features.

    train_x (N, D), train_y (N, L) of 0 and 1. Features are standardised with training statistics;
    each label's strength is the one with the least squared error on a fifth of the training set.
    """
    train_x, test_x = as_features(train_x, test_x)
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


def subsample_interval(metric, a, b, rounds=50, seed=0):
    """95 % interval (low, high) of metric(a, b), which may be an array (Politis & Romano 1994).

    Halves are drawn without replacement. A mean spreads over them as its standard error over the
    whole set (1/m - 1/n = 1/n at m = n/2), so their deviations are laid around the full value.
    """
    generator = torch.Generator().manual_seed(seed)

    def half(x):
        return x[torch.randperm(len(x), generator=generator)[:len(x) // 2]]

    draws = np.stack([metric(half(a), half(b)) for _ in range(rounds)])
    low, high = np.quantile(draws - draws.mean(axis=0), [0.025, 0.975], axis=0)
    full = metric(a, b)
    return full + low, full + high


def bootstrap_interval(metric, *arrays, rounds=1000, seed=0):
    """95 % percentile interval (low, high) of metric(*arrays), rows drawn together (Efron 1979).

    Draws for which the metric is not defined (ValueError: of one class only) are left out.
    """
    rng, n, draws = np.random.default_rng(seed), len(arrays[0]), []
    for rows in (rng.integers(n, size=n) for _ in range(rounds)):
        with suppress(ValueError):
            draws.append(metric(*(x[rows] for x in arrays)))
    return np.quantile(draws, [0.025, 0.975]).tolist()


# ---------------------------------------------------------------- pictures into numbers

class RandomFeatures(nn.Module):
    """Fixed-seed random network: images (B, 3, H, W) in [-1, 1], side >= 32 -> (B, 217) features.

    Texture: the log deviation of each of 104 channels of four convolutions, and apart from it their
    mean, contrast, which would else count 104 times. Layout: 4x4 grids of the picture and the last
    stage. Source: Naeem et al. 2020, section 5: random embeddings for images unlike ImageNet.
    """

    def __init__(self, seed=0):
        super().__init__()
        generator, width = torch.Generator().manual_seed(seed), 3  # a CPU generator: same anywhere
        for i, channels in enumerate((16, 24, 32, 32)):
            w = torch.randn(channels, width, 3, 3, generator=generator)
            w = w - w.mean(dim=(2, 3), keepdim=True)  # sees edges; brightness is for the grid
            w = w * (2 / w.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
            self.register_buffer(f"filters{i}", w)
            width = channels

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


def pixel_rows(images):
    """Grey values (N, P) in [0, 1] of images (N, 3, H, W); sides above 64 are averaged to 64."""
    grey = (images.mean(dim=1) + 1) / 2
    return F.adaptive_avg_pool2d(grey, min(64, grey.shape[-1])).flatten(1)


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


def psnr(a, b):
    """Peak signal-to-noise ratio, decibels, mean over images (N, 3, H, W) in [-1, 1] (peak 2)."""
    error = (a - b).square().flatten(1).mean(dim=1).clamp(min=1e-12)
    return (10 * (4 / error).log10()).mean().item()


def brightness(pixels):
    """Mean grey over images, its spread between images and the mean spread within, in [0, 1]."""
    means = pixels.mean(dim=1)
    return {"mean": means.mean().item(), "between": means.std().item(),
            "within": pixels.std(dim=1).mean().item()}


def describe(batches, extractor, device="cpu"):
    """Features (N, D) and pixel rows (N, P) on the CPU of an iterator of image batches."""
    parts = [(extractor(x.to(device)).flatten(1).cpu(), pixel_rows(x).cpu()) for x in batches]
    return tuple(torch.cat(part) for part in zip(*parts))


METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")


def compare(real, fake):
    """All METRICS of two feature sets, array (6,)."""
    return np.array([frechet_distance(real, fake), kernel_distance(real, fake),
                     *prdc(real, fake).values()])


# ---------------------------------------------------------------- sub-commands

def print_table(rows):
    """Rows {name: {column: value}} as text; a value is a number, a list (an interval) or None."""
    def text(value):
        if isinstance(value, list):
            return " to ".join(map(text, value))
        return "" if value is None else f"{value:.4g}"

    heads = dict.fromkeys(column for row in rows.values() for column in row)
    table = [["", *heads]]
    table += [[name, *(text(row.get(head)) for head in heads)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def write_json(path, result):
    write_text_atomic(path, json.dumps(result, indent=2))
    print(f"wrote {path}")


def choose(indices, count):
    """At most `count` of the indices, shuffled, always in the same way."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(indices)[order[:count]]


def batches_of(dataset, indices, batch):
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
    if min(len(test), len(train)) < 2:
        raise UserError(f"{path.parent} has {len(train)} training and {len(test)} held-out images",
                        "2 of each are needed", "train with a larger --holdout")
    print(f"{path}: {images.note}; held-out images are sources, {model.config.tokens} tokens, "
          f"condition {model.config.condition}")
    train, test = choose(train, args.train_limit), choose(test, args.count)
    return path.parent, model, flags, images, train, test


def resemblance(model, sources, training, seeds, judge, steps=50, guidance=1.0, eta=0.5,
                batch=64):
    """The main job's figures: (reference dict, list of one dict a seed, rows of pictures).

    sources (N, 3, H, W) held out; training: iterator of image batches. One sample a source and
    seed. Distances are of the judge's features to the training images, N images on each line.
    """
    device = next(model.buffers()).device

    def run(function, images):
        return torch.cat([function(x.to(device)).cpu() for x in images.split(batch)])

    reconstructed = run(lambda x: model.decode(model.encode(x)), sources)
    tokens = run(model.embed, sources)
    train_features, train_pixels = describe(training, judge, device)

    def look(images):
        features, pixels = describe(images.split(batch), judge, device)
        best = best_correlations(pixels, train_pixels).mean().item()
        return pixels, {"Frechet to training": frechet_distance(features, train_features),
                        "best correlation with a training image": best,
                        **{f"brightness {k}": v for k, v in brightness(pixels).items()}}

    source_pixels, reference = look(sources)
    floor = reference["Frechet to training"]
    blurred = F.avg_pool2d(F.pad(sources, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    between = correlations(source_pixels, source_pixels)
    reference |= {"correlation with other sources": off_diagonal_mean(between),
                  "VAE PSNR, dB": psnr(sources, reconstructed),
                  "Frechet of VAE reconstructions": look(reconstructed)[1]["Frechet to training"],
                  "Frechet of 3x3-blurred real": look(blurred)[1]["Frechet to training"]}
    results, pictures = [], [sources[:8], reconstructed[:8]]
    condition = None if model.config.condition == "none" else tokens
    for seed in seeds:
        numbers = [seed * 1_000_003 + i for i in range(len(sources))]
        samples = model.sample(condition, numbers, steps, guidance, eta, batch=batch).cpu()
        pixels, figures = look(samples)
        across = correlations(pixels, source_pixels)  # (N, N)
        again, own = (F.normalize(t.flatten(1), dim=1) for t in (run(model.embed, samples), tokens))
        results.append({
            "correlation with own source": across.diagonal().mean().item(),
            "correlation with other sources": off_diagonal_mean(across),
            "own source first, by pixels": first_share(across),
            "own source first, by the model's own tokens": first_share(again @ own.T),
            **figures, "Frechet, times the real floor": figures["Frechet to training"] / floor})
        pictures.append(samples[:8])
        print(f"seed {seed} done", flush=True)
    return reference, results, pictures


def resemble(args):
    """do samples resemble their source, and as a set the data?"""
    run, model, flags, images, train, test = open_run(args)
    if model.prompts:
        raise UserError("this model follows prompts", "resemble needs one that follows images",
                        "compare sample.py --random by: evaluate.py fidelity")
    judge = RandomFeatures().to(next(model.buffers()).device)
    with user_errors():
        reference, results, pictures = resemblance(
            model, images.batch(test.tolist()), batches_of(images, train, args.batch), args.seeds,
            judge, args.steps, args.guidance, args.eta, args.batch)
    print(f"{len(test)} held-out sources, one sample each and seed; {len(train)} training images; "
          f"DDIM {args.steps} steps, eta {args.eta:g}, guidance {args.guidance:g}; "
          "features: random network, seed 0")
    seeds = dict(zip(map(str, args.seeds), results))
    values = {name: [result[name] for result in results] for name in results[0]}
    summary = {name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)) if v[1:] else None}
               for name, v in values.items()}
    columns = {"real": reference, **{f"seed {seed}": result for seed, result in seeds.items()}}
    print_table({name: {**{column: figures.get(name) for column, figures in columns.items()},
                        **summary.get(name, {})} for name in [*summary, *reference]})
    save_grid(run / "resemble.png", pictures, captions=[
        "held-out source", "VAE reconstruction", *(f"sample, seed {seed}" for seed in seeds)])
    print(f"wrote {run / 'resemble.png'}")
    write_json(run / "resemble.json", {
        "sources": len(test), "training_images": len(train), "steps": args.steps,
        "guidance": args.guidance, "eta": args.eta, "tokens": model.config.tokens,
        "data": flags["data"],
        "real": reference, "summary": summary, "seeds": seeds})


def binary_labels(columns, names, train, test, least=20):
    """Columns of str -> (list of label names, train (N, L), test (M, L)) of 0.0 and 1.0.

    A column of "0" and "1" is one label; any other is cut at "|" into one label a value. Labels
    need `least` images on either side in both parts.
    """
    labels = {}
    for name in names:
        if name not in columns:
            raise UserError(f"there is no column {name!r}", f"labels.csv has "
                            f"{', '.join(columns) or 'no columns'}", "pass --label-column")
        cells = [set(cell.split("|")) for cell in columns[name]]
        values = set().union(*cells) - {""}
        wanted = {name: "1"} if values <= {"0", "1"} else {v: v for v in sorted(values)}
        for label, value in wanted.items():
            shown = np.array([value in cell for cell in cells], float)
            labels[label] = shown[train], shown[test]
    kept = {label: parts for label, parts in labels.items()
            if all(least <= part.sum() <= len(part) - least for part in parts)}
    if not kept:
        raise UserError(f"no label of {', '.join(names)} is in {least} images, and not in {least}, "
                        "of both parts", "an AUC needs both", "pass another --label-column")
    if len(kept) < len(labels):
        print(f"left out, too rare or too common: {', '.join(sorted(labels.keys() - kept))}")
    return list(kept), *(np.stack(part, axis=1) for part in zip(*kept.values()))


def probe(args):
    """what does a linear read-out find in the tokens: trained, random weights, raw pixels?"""
    run, model, flags, images, train, test = open_run(args)
    default = CHEST_LABELS if set(CHEST_LABELS) <= set(images.columns) else ["finding"]
    columns = args.label_column or default
    names, train_y, test_y = binary_labels(images.columns, columns, train, test)
    device = next(model.buffers()).device
    nets = {f"embedder ({flags['embedder']})": model.embedder}
    for seed in args.seeds:
        torch.manual_seed(seed)
        nets[f"random weights, seed {seed}"] = VisionTransformer(model.config.vit).eval().to(device)
    plans = {f"{kind} tokens, {name}": partial(conditioning_tokens, net, kind=kind)
             for kind in args.tokens for name, net in nets.items()}
    plans["16x16 grey pixels"] = lambda x: F.adaptive_avg_pool2d(x.mean(dim=1), 16)
    table = {}
    for name, extract in plans.items():
        with torch.no_grad():
            train_x, test_x = (describe(batches_of(images, part, args.batch), extract, device)[0]
                               for part in (train, test))
        aucs, scores = linear_probe(train_x, train_y, test_x, test_y)
        interval = bootstrap_interval(lambda y, s: np.mean([roc_auc(*c) for c in zip(y.T, s.T)]),
                                      test_y, scores, rounds=200)
        table[name] = {"mean": float(np.mean(aucs)), "interval": interval,
                       "labels": dict(zip(names, aucs))}
    print(f"AUC of ridge on {len(train)} training images, tested on {len(test)} held-out images")
    print_table({name: {"mean": row["mean"], "95 %": row["interval"], **row["labels"]}
                 for name, row in table.items()})
    write_json(run / "probe.json", table)


def fidelity(args):
    """how far are two folders of images apart, as sets?"""
    real, synthetic = (open_dataset(path, args.size) for path in (args.real, args.synthetic))
    halves = [choose(half, args.count) for half in split_holdout(real, 0.5, args.seed)]
    sets = ((real, torch.cat(halves)), (synthetic, choose(range(len(synthetic)), args.count)))
    if min(len(real), len(synthetic)) < 12:
        raise UserError(f"got {len(real)} real and {len(synthetic)} synthetic images",
                        "12 a side are needed, for five neighbours in each half", "add images")
    sides = {args.size} if args.size else {dataset[i].shape[-1] for dataset, rows in sets
                                           for i in rows}
    side = min(sides)
    if side < 32:
        raise UserError(f"images of {side} pixels a side", "the random network needs 32",
                        "pass --size 32 or more")
    if len(sides) > 1:
        raise UserError(f"got images of {sorted(sides)} pixels a side",
                        "one side is needed, for resizing changes figures", f"pass --size {side}")
    device, judge = pick_device(args.device), RandomFeatures()
    if args.features == "dino":
        print("note: never judge samples by the tokens that conditioned them")
        checkpoint = load_checkpoint(resolve_checkpoint(args.checkpoint))
        with user_errors():
            judge = DinoDiffusion.from_checkpoint(checkpoint)
    extractor = getattr(judge.to(device), "embed", judge)  # of DinoDiffusion: its tokens
    (a, a_grey), (b, b_grey) = (describe(batches_of(dataset, rows, args.batch), extractor, device)
                                for dataset, rows in sets)
    half, other, n = a[:len(halves[0])], a[len(halves[0]):], min(*map(len, halves), len(b))
    with user_errors():
        floor, equal, full = compare(half[:n], other[:n]), compare(half[:n], b[:n]), compare(a, b)
        low, high = subsample_interval(compare, a, b, rounds=20, seed=args.seed)
    print(f"features: {args.features}, {a.shape[1]} dimensions; {side} px, centre square, bicubic "
          f"with antialias where resized; {len(a)} real, {len(b)} synthetic images")
    if min(len(a), len(b)) <= a.shape[1]:
        print(f"warning: fewer images than the {a.shape[1]} dimensions: the covariance has no full "
              "rank, which raises the Frechet distance; read it beside its floor only")
    print(f"floor: real/real, {n} each; equal: real/synthetic, {n} each; all: with 95 % interval")
    names = "floor", "equal", "all", "interval"
    table = {metric: dict(zip(names, values)) for metric, *values in zip(
        METRICS, floor, equal, full, np.stack([low, high], axis=1).tolist())}
    print_table(table)
    grey = {"real": brightness(a_grey), "synthetic": brightness(b_grey)}
    print_table({f"brightness, {name}": figures for name, figures in grey.items()})
    write_json(Path(args.out or Path(args.synthetic) / "fidelity.json"), {
        "features": args.features, "size": side, "real": len(a), "synthetic": len(b), "equal": n,
        **table, "brightness": grey})


def clusters(args):
    """do clusters of the training tokens find what a column of the labels knows?"""
    run, model, flags, images, *_ = open_run(args)
    train, _ = read_split(run / "split.csv", images)
    name = (args.label_column or ["morphology"])[0]
    if name not in images.columns:
        raise UserError(f"there is no column {name!r}", f"the data have "
                        f"{', '.join(images.columns) or 'no columns'}", "pass --label-column")
    truth = [images.columns[name][i] for i in train.tolist()]
    tokens = torch.from_numpy(np.load(run / "cache" / "tokens.npy", allow_pickle=False))
    features = {f"{model.config.tokens} tokens ({flags['embedder']})": tokens.flatten(1),
                "16x16 RGB pixels": torch.cat([F.adaptive_avg_pool2d(x, 16).flatten(1) for x in
                                               batches_of(images, train, args.batch)])}
    table = {}
    for what, x in features.items():
        for k in args.clusters or sorted({len(set(truth)), model.config.clusters or 33}):
            with user_errors():
                fits = [cluster_agreement(truth, kmeans(standardise(x), k, seed)[1].numpy())
                        for seed in args.seeds]
            table[f"{what}, K = {k}"] = {score: float(np.mean([fit[score] for fit in fits]))
                                         for score in fits[0]}
    print(f"{len(train)} training images, {len(set(truth))} values of {name}; K-means on "
          f"standardised features, mean of seeds {args.seeds}")
    print_table(table)
    write_json(run / "clusters.json", table)


class SmallCNN(nn.Sequential):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, labels): five stride-2 convolutions, a mean."""

    def __init__(self, labels, width=32):
        sides = [3, width, 2 * width, 4 * width, 4 * width]
        blocks = [layer for a, b in zip(sides, sides[1:]) for layer in (
            nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.GELU())]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(sides[-1], labels))


class Labelled(Dataset):
    """Images and their labels (N, L), by row, for `fit`."""

    def __init__(self, images, rows, labels):
        self.images, self.rows, self.labels = images, rows, torch.as_tensor(labels).float()

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, rows):
        return self.images.batch(self.rows[rows].tolist()), self.labels[rows]


def augment(images, generator, turns):
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


def train_classifier(images, rows, labels, steps, batch, seed, turns, device):
    """A SmallCNN fitted to labels (N, L) of 0 and 1; returns it in eval mode."""
    torch.manual_seed(step_seed(seed, "classifier") % 2 ** 31)
    net = SmallCNN(np.shape(labels)[1]).to(device)

    def loss_fn(part, step, generator):
        x, y = part
        return F.binary_cross_entropy_with_logits(net(augment(x, generator, turns)), y), {}

    for _ in fit("classifier", net, loss_fn, Labelled(images, rows, labels), steps=steps,
                 batch=batch, lr=1e-3, device=device, seed=seed, weight_decay=0.05):
        pass
    return net


def classify(args):
    """train a small CNN on each labelled set of images, test it on the run's held-out images"""
    run, model, flags, images, train, test = open_run(args)
    column = (args.label_column or ["label"])[0]
    device, sets = pick_device(args.device), {"real": (images, train)}
    for path in args.train or []:
        other = open_dataset(path, model.config.image_size)
        sets[str(path)] = other, torch.arange(len(other))
    cells = {}
    for name, (dataset, rows) in {**sets, "test": (images, test)}.items():
        if column not in dataset.columns:
            raise UserError(f"{name} has no column {column!r}", "the same labels are needed on "
                            "every side", "pass --label-column, or another set")
        cells[name] = [dataset.columns[column][i] for i in rows.tolist()]
    values = sorted(set(cells["test"]))
    values = values[:1] if len(values) == 2 else values
    if len(set(cells["test"])) < 2 or "" in cells["test"]:
        raise UserError(f"column {column!r} of the held-out images holds {set(cells['test'])}",
                        "two labels or more, and no empty cell, are needed", "pass --label-column")
    truth = {name: np.array([[cell == value for value in values] for cell in own], float)
             for name, own in cells.items()}

    def mean_auc(y, score):
        return float(np.mean([roc_auc(*column) for column in zip(y.T, score.T)]))

    table, shown = {}, images.batch(test.tolist())
    for name, (dataset, rows) in sets.items():
        aucs = []
        for seed in args.seeds:
            net = train_classifier(dataset, rows, truth[name], args.cnn_steps, 32, seed,
                                   args.turns, device)
            with torch.inference_mode():
                score = torch.cat([net(x.to(device)).cpu() for x in shown.split(args.batch)])
            score = score.numpy()
            aucs.append(mean_auc(truth["test"], score))
        table[name] = {"images": len(rows), "AUC": float(np.mean(aucs)),
                       "sd": float(np.std(aucs, ddof=1)) if aucs[1:] else None,
                       "95 % of the last": bootstrap_interval(mean_auc, truth["test"], score)}
    print(f"AUC of {', '.join(values)} on {len(test)} held-out real images; CNN of "
          f"{args.cnn_steps} steps, seeds {args.seeds}")
    print_table(table)
    write_json(run / "classify.json", table)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Metrics and tables; see the head of this file.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for run in (fidelity, resemble, probe, clusters, classify):
        command = commands.add_parser(run.__name__, help=run.__doc__,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        a = command.add_argument
        a("--checkpoint", help="run folder or model.pt (default: the newest run)")
        a("--batch", type=positive_int, default=64, help="images at once")
        a("--device", default="auto", help="auto, cuda, mps or cpu")
        a("--count", type=positive_int, default=256 if run is resemble else 5000,
          help="at most so many images: of each folder, or held out")
        if run is fidelity:
            a("real", help="folder of real images")
            a("synthetic", help="folder of synthetic images")
            a("--features", choices=("random", "dino"), default="random", help="random network, "
              "or the embedder of --checkpoint (not for samples it conditioned)")
            a("--size", type=positive_int, help="resize to this side (default: as they are)")
            a("--seed", type=int, default=0, help="of the halves and the intervals")
            a("--out", help="JSON file (default: SYNTHETIC/fidelity.json)")
            continue
        a("--data", help="where the run's images are now (default: as trained)")
        a("--train-limit", type=positive_int, default=2000, help="at most so many training images")
        a("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of samples, or random weights")
        if run is resemble:
            a("--steps", type=positive_int, default=50, help="DDIM steps")
            a("--guidance", type=float, default=1.0, help="guidance scale, 1.0 = off")
            a("--eta", type=fraction, default=0.5, help="DDIM: 0 deterministic, 1 noisy as DDPM")
            continue
        a("--label-column", nargs="+", help="of labels.csv (default: findings of probe, morphology "
          "of clusters, label of classify)")
        if run is clusters:
            a("--clusters", type=positive_int, nargs="+", help="K (default: the true number, and "
              "the run's)")
        elif run is classify:
            a("--train", nargs="+", metavar="FOLDER", help="labelled sets, e.g. of sample.py "
              "--each-prompt; the run's own training images come first")
            a("--cnn-steps", type=positive_int, default=600, help="steps of the small CNN")
            a("--turns", action="store_true", help="augment by flips and turns: for histology only")
        else:
            a("--tokens", choices=TOKEN_KINDS, nargs="+", default=["global", "cls", "patch"])
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # figures of a GPU equal those of a CPU
    args.run(args)


if __name__ == "__main__":
    run_script(main)
