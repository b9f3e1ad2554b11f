"""Ours beside the library that a user would pick instead: equal results first, then time.

    pip install scikit-learn
    python tests/benchmark.py kmeans              # two CPU cores, about five minutes

Not collected by pytest. Each pair is alternated in one run; the ratio is peer time / our time, the
median over repeats, above 1 means that ours is faster. A busy machine spoils times.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from dino import VISION_TRANSFORMERS, VisionTransformer, conditioning_tokens  # noqa: E402
from phantoms import histology_phantoms  # noqa: E402
from prompts import inertia, kmeans, standardise  # noqa: E402


def seconds(work):
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def compare(name, ours, peer, repeats):
    """Alternate the two; prints medians and their ratio."""
    times = [(seconds(ours)[0], seconds(peer)[0]) for _ in range(repeats)]
    mine, theirs = (statistics.median(column) for column in zip(*times))
    print(f"{name:46s} {mine:9.3f} s {theirs:9.3f} s   ratio {theirs / mine:.2f}", flush=True)


@torch.no_grad()
def phantom_features(n=2000):
    """Standardised global tokens of histology phantoms, from a tiny ViT with random weights."""
    torch.manual_seed(0)
    vit = VisionTransformer(VISION_TRANSFORMERS["tiny"]).eval()
    parts = histology_phantoms(n, 64)[0].split(100)
    tokens = torch.cat([conditioning_tokens(vit, x, "global") for x in parts])
    return standardise(tokens.flatten(1))


def blobs(n, d, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers = 1.5 * torch.randn(k, d, generator=g)
    return centers[torch.randint(k, (n,), generator=g)] + torch.randn(n, d, generator=g)


def noise(n, d):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(0))


def benchmark_kmeans(repeats):
    import sklearn
    from sklearn.cluster import KMeans
    print(f"scikit-learn {sklearn.__version__}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; K = 33, n_init 10, greedy k-means++")
    sets = {"phantom features": phantom_features(), "Gaussian blobs": blobs(2000, 64, 40),
            "uniform noise": noise(2000, 64)}
    for name, x in sets.items():
        ratios = []
        for seed in range(5):
            theirs = KMeans(33, n_init=10, random_state=seed).fit(x.numpy()).inertia_
            ratios.append(inertia(x, *kmeans(x, 33, seed)) / theirs)
        print(f"inertia, ours / theirs, {name} {tuple(x.shape)}: median of 5 seeds "
              f"{statistics.median(ratios):.4f} ({min(ratios):.4f}, {max(ratios):.4f})", flush=True)
    for name, x in (("blobs", blobs(50_000, 384, 40)), ("uniform noise", noise(50_000, 384))):
        array = np.ascontiguousarray(x.numpy())
        compare(f"{name}, N = 50,000, D = 384, n_init 10", lambda: kmeans(x, 33, 0),
                lambda: KMeans(33, n_init=10, random_state=0).fit(array), repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Times beside other libraries.")
    parser.add_argument("what", choices=("kmeans",))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    benchmark_kmeans(args.repeats)
