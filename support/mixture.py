"""A Gaussian mixture over the tokens of a training set: conditions without a source image.

    sampler = EmbeddingSampler.fit(tokens)      # standardised training tokens (N, G, D)
    condition = sampler.sample(generators)      # (B, G, D), one set of tokens per generator

Not in the paper: for people who have a model but no source image.
"""
import torch
from scipy.cluster.vq import kmeans2
from torch import nn


class EmbeddingSampler(nn.Module):
    """A Gaussian for each K-means cluster of the tokens, in at most 64 principal components.

    Covariances are shrunk towards the pooled one, because few images cannot determine 64 x 64
    numbers.
    """

    def __init__(self, components, rank, tokens, dim):
        super().__init__()
        self.tokens = tokens
        self.dim = dim
        self.register_buffer("center", torch.zeros(tokens * dim))
        self.register_buffer("basis", torch.zeros(rank, tokens * dim))
        self.register_buffer("weights", torch.zeros(components))
        self.register_buffer("means", torch.zeros(components, rank))
        self.register_buffer("factors", torch.zeros(components, rank, rank))  # Cholesky factors

    @classmethod
    def fit(cls, tokens, components=8, max_rank=64, shrinkage=0.3, seed=0):
        """Standardised tokens (N, G, D), N >= 2 -> a fitted sampler."""
        N, G, D = tokens.shape
        x = tokens.flatten(1).double()

        # Principal components.
        center = x.mean(0)
        rank = min(max_rank, N - 1, G * D)
        with torch.random.fork_rng(devices=[]):  # svd_lowrank starts from random numbers
            torch.manual_seed(seed)
            _, _, basis = torch.svd_lowrank(x - center, q=min(rank + 8, N, G * D), niter=4)
        basis = basis[:, :rank].T
        scores = (x - center) @ basis.T  # (N, G*D) -> (N, rank)

        # Clusters of at least two images per dimension on average.
        distinct = scores.float().unique(dim=0).shape[0]
        k = max(1, min(components, N // (2 * rank), distinct))
        _, assignment = kmeans2(scores.numpy(), k, iter=30, minit="++",
                                seed=seed % 2 ** 32)
        groups = [scores[torch.from_numpy(assignment == j)] for j in sorted(set(assignment))]

        # A Gaussian for each.
        within = torch.cat([group - group.mean(0) for group in groups])
        pooled = within.T @ within / N + 1e-6 * torch.eye(rank, dtype=x.dtype)
        sampler = cls(len(groups), rank, G, D)
        for j, group in enumerate(groups):
            centred = group - group.mean(0)
            covariance = (1 - shrinkage) * centred.T @ centred / len(group) + shrinkage * pooled
            sampler.factors[j] = torch.linalg.cholesky(covariance).float()
            sampler.weights[j] = len(group) / N
            sampler.means[j] = group.mean(0)
        sampler.center.copy_(center)
        sampler.basis.copy_(basis)
        return sampler

    def sample(self, generators):
        """Tokens (B, G, D), one set per CPU generator, float32."""
        rows = []
        for g in generators:
            j = torch.multinomial(self.weights.cpu(), 1, generator=g).item()
            noise = torch.randn(self.means.shape[1], generator=g).to(self.means.device)
            rows.append((self.means[j] + self.factors[j] @ noise) @ self.basis + self.center)
        return torch.stack(rows).view(-1, self.tokens, self.dim)
