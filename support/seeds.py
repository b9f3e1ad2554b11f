"""Random seeds, the order of the training data, and evenly spaced rows of it."""
import hashlib
from functools import lru_cache

import torch


def step_seed(*parts):
    """A 63-bit seed that depends on every part, e.g. step_seed(seed, stage, step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


@lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    """The rows 0..n-1 in the random order of one epoch, (n,) int64."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch))
    return torch.randperm(n, generator=generator)


def spaced_rows(n, most):
    """At most `most` of the rows 0..n-1, evenly spaced, int64."""
    return torch.linspace(0, n - 1, min(most, n)).long()


def batch_rows(step, batch, n, seed):
    """The rows of one step's batch. Every epoch shuffles 0..n-1 differently."""
    rows = []
    while len(rows) < batch:
        epoch, offset = divmod(step * batch + len(rows), n)
        rows += epoch_order(n, seed, epoch)[offset:offset + batch - len(rows)].tolist()
    return rows
