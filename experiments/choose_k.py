"""Which number of clusters K suits the tokens of a run? S_Dbw of every K, lower is better.

    python -m experiments choose_k runs/histology --range 5:60

K-means on RUN/cache/tokens.npy, which train.py makes, for each K: a table, and the chart
RUN/choose_k.png. The answer is what `train.py --condition prompts --clusters K` takes.

Source: Halkidi & Vazirgiannis 2001. Difference from it: the radius of sdbw, see there.
"""
import re
from pathlib import Path

import numpy as np
import torch

from prompts import kmeans, squared_distances, standardise
from support.command import UserError, not_negative_int, pick_device, positive_int, user_errors
from support.pictures import line_chart


@torch.no_grad()
def sdbw(x, centers, assignment, radius="paper"):
    """S_Dbw validity index (float, lower is better) = Scat + Dens_bw of x (N, D) in k clusters.

    s_i: the variances (a vector) of cluster i about its center v_i; s: those of all points.
    Scat = mean_i |s_i| / |s|: how wide the clusters are.
    Dens_bw = mean over i != j of density(u_ij) / max(density(v_i), density(v_j), 1), u_ij midway
    from v_i to v_j, density(u) = number of points of clusters i and j within r of u: how full the
    space between clusters is.
    radius "paper": r = sqrt(sum_i |s_i|) / k. It hardly grows with D while distances do, so from
    about 8 columns on Dens_bw is 0, and Scat alone always prefers more clusters.
    radius "rms", our remedy: r = root of mean_i of the sum of s_i, the usual distance to a center.
    Raises: ValueError for fewer than 2 clusters or another radius.
    """
    k = len(centers)
    if k < 2 or radius not in ("paper", "rms"):
        raise ValueError(f'{k} clusters and radius "{radius}", S_Dbw compares at least 2 within '
                         "paper or rms: pass such values")

    # Scat, and the radius.
    mean = x.mean(0)
    centers = (centers - mean).double()
    clusters = [(x[assignment == i] - mean).double() for i in range(k)]
    variances = torch.stack([(points - v).square().sum(0) / max(len(points), 1)
                             for points, v in zip(clusters, centers)])  # (k, D), row i: s_i
    norms = variances.norm(dim=1)
    scat = norms.mean() / x.double().var(0, correction=0).norm()
    squared_r = norms.sum() / k**2 if radius == "paper" else variances.sum(1).mean()

    # Points of cluster i within r of v_j (row i, column j), and within r of u_ij.
    apart = torch.cdist(centers, centers).square()
    at_center = torch.zeros_like(apart)
    at_middle = torch.zeros_like(apart)
    for i, points in enumerate(clusters):
        distance = squared_distances(points, points.square().sum(1), centers)  # (k, n)
        at_center[i] = (distance <= squared_r).sum(1)
        # The distance to a midpoint is the median of a triangle whose three sides are known.
        median = (distance + distance[i]) / 2 - apart[i, :, None] / 4
        at_middle[i] = (median <= squared_r).sum(1)

    # Dens_bw; row i, column j of density: that of v_i for the pair i, j.
    density = at_center.diagonal()[:, None] + at_center.T
    ratio = (at_middle + at_middle.T) / density.maximum(density.T).clamp(min=1)
    between = (ratio.sum() - ratio.diagonal().sum()) / (k * (k - 1))
    return (scat + between).item()


def choose_k(x, ks, seed=0, n_init=10, radius="rms"):
    """S_Dbw of the K-means fit for each k -> (list of (k, score) with k rising, k of least score).

    x: (N, D), standardised here: each fit is that of kmeans(standardise(x), k, seed, n_init).
    """
    x = standardise(x)
    table = []
    for k in sorted(ks, reverse=True):  # a k that is too large is refused before the long work
        centers, assignment = kmeans(x, k, seed, n_init)
        table.insert(0, (k, sdbw(x, centers, assignment, radius)))
    if not table:
        raise ValueError("no k to choose from, the range needs at least one: widen it")
    best, _ = min(table, key=lambda row: row[1])
    return table, best


def read_tokens(run):
    """Global tokens of a run's training images, flattened: (N, G*D) float32."""
    path = run / "cache" / "tokens.npy"
    if not path.is_file():
        raise UserError(f"{path} is missing", "the choice needs a run's cached tokens",
                        f"run python train.py --out {run} first")
    with user_errors(f"{path} must be whole", "make it again with train.py"):
        return torch.tensor(np.load(path, mmap_mode="r", allow_pickle=False)).flatten(1)


def add_flags(parser):
    add = parser.add_argument
    add("run", type=Path, help="run folder that holds cache/tokens.npy")
    add("--range", default="5:60", metavar="FIRST:LAST", help="range of K")
    add("--step", type=positive_int, default=1, help="step of the range")
    add("--seed", type=not_negative_int, default=0, help="seed of K-means")
    add("--device", default="auto", help="auto, cuda, mps or cpu")


def main(args):
    ends = re.fullmatch(r"(\d{1,4}):(\d{1,4})", args.range)
    if not ends or not 2 <= int(ends[1]) <= int(ends[2]):
        raise UserError(f"got --range {args.range}", "it must be 2 <= FIRST <= LAST",
                        "try --range 5:60")
    ks = range(int(ends[1]), int(ends[2]) + 1, args.step)

    features = read_tokens(args.run).to(pick_device(args.device))
    print(f"{len(features)} images; features: their {features.shape[1]} global token values, "
          "flattened and standardised", flush=True)
    with user_errors():
        table, best = choose_k(features, ks, args.seed)
    for k, score in table:
        mark = "   <- least" if k == best else ""
        print(f"K {k:4d}   S_Dbw {score:.4f}{mark}")

    chart = args.run / "choose_k.png"
    line_chart(chart, {"S_Dbw": tuple(zip(*table))},
               title=f"S_Dbw over clusters K, lower is better: K = {best}", xlabel="clusters K",
               ylabel="S_Dbw")
    print(f"least S_Dbw at K = {best}; drawn: {chart}")
