"""Which number of clusters K fits the tokens of a run? S_Dbw of each K, lower is better.

    python -m experiments choose_k runs/histology --range 5:60

Runs K-means on RUN/cache/tokens.npy for each K, prints a table and draws RUN/choose_k.png. Then
train with `train.py --condition prompts --set clusters=K`.

Source: Halkidi & Vazirgiannis 2001, with another radius (see sdbw).
"""
import re
from pathlib import Path

import numpy as np
import torch

from prompts import kmeans, standardise
from support.command import UserError, number, user_errors
from support.pictures import line_chart


@torch.no_grad()
def sdbw(x, centers, assignment):
    """S_Dbw validity index (float, lower is better) = Scat + Dens_bw of x (N, D), k > 1 clusters.

    s_i: the variances (a vector) of cluster i about its center v_i; s: those of all points.
    Scat = mean_i |s_i| / |s|: how wide the clusters are.
    Dens_bw = mean over i != j of density(u_ij) / max(density(v_i), density(v_j), 1): how full the
    space between clusters is. u_ij is midway between v_i and v_j; density(u) is the number of
    points of clusters i and j within r of u.
    r = sqrt(mean_i sum(s_i)), the typical distance to a center. The paper's radius,
    sqrt(sum_i |s_i|) / k, hardly grows with D, so that Dens_bw is 0 from 8 columns on.
    """
    x = x.double()
    centers = centers.double()
    k = len(centers)
    clusters = [x[assignment == i] for i in range(k)]
    variances = torch.stack([(points - v).square().sum(0) / max(len(points), 1)
                             for points, v in zip(clusters, centers)])  # (k, D), row i: s_i
    scat = variances.norm(dim=1).mean() / x.var(0, correction=0).norm()
    r = variances.sum(1).mean().sqrt()

    def density(points, positions):
        return (torch.cdist(points, positions) <= r).sum(0)  # (n, D), (m, D) -> (m,)

    # Points of cluster i within r of v_j (row i, column j), and within r of u_ij.
    at_center = torch.stack([density(points, centers) for points in clusters])
    at_middle = torch.stack([density(points, (centers + v) / 2)
                             for points, v in zip(clusters, centers)])

    # Row i, column j: the density at v_i of clusters i and j.
    of_pair = at_center.diagonal()[:, None] + at_center.T
    ratio = (at_middle + at_middle.T) / of_pair.maximum(of_pair.T).clamp(min=1)
    between = (ratio.sum() - ratio.diagonal().sum()) / (k * (k - 1))
    return (scat + between).item()


def add_flags(parser):
    add = parser.add_argument
    add("run", type=Path, help="run folder with cache/tokens.npy")
    add("--range", default="5:60", metavar="FIRST:LAST", help="range of K")
    add("--step", type=number(int, 1), default=1, help="step of the range")
    add("--seed", type=number(int), default=0, help="seed of K-means")


def main(args):
    ends = re.fullmatch(r"(\d{1,4}):(\d{1,4})", args.range)
    if not ends or not 2 <= int(ends[1]) <= int(ends[2]):
        raise UserError(f"got --range {args.range}", "it must be 2 <= FIRST <= LAST",
                        "try --range 5:60")
    path = args.run / "cache" / "tokens.npy"
    if not path.is_file():
        raise UserError(f"{path} is missing", "the choice needs a run's cached tokens",
                        f"run python train.py --out {args.run} first")
    with user_errors(f"{path} must be whole", "make it again with train.py"):
        x = standardise(torch.tensor(np.load(path, allow_pickle=False)).flatten(1))

    # Start with the largest K, which fails at once if it is too large.
    scores = {}
    for k in sorted(range(int(ends[1]), int(ends[2]) + 1, args.step), reverse=True):
        with user_errors():
            scores[k] = sdbw(x, *kmeans(x, k, args.seed))
        print(f"K {k:4d}   S_Dbw {scores[k]:.4f}", flush=True)
    best = min(scores, key=scores.get)

    chart = args.run / "choose_k.png"
    line_chart(chart, {"S_Dbw": tuple(zip(*sorted(scores.items())))},
               title=f"S_Dbw over clusters K, lower is better: K = {best}", xlabel="clusters K",
               ylabel="S_Dbw")
    print(f"{len(x)} images; lowest S_Dbw at K = {best}; chart: {chart}")
