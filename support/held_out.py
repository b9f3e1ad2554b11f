"""The diffusion loss on held-out images, and how near samples come to training images.

Noise and timesteps are the same at every preview, so the curve is smooth. If it rises while the
training loss falls, the run overfits.
"""
import math

import numpy as np
import torch

from support.pictures import line_chart
from support.seeds import step_seed


def token_distances(a, b):
    """Root of the mean squared difference of each row of (N, D) and each of (M, D): (N, M)."""
    exact = "donot_use_mm_for_euclid_dist"  # the matrix product loses small distances
    return torch.cdist(a, b, compute_mode=exact) / a.shape[1] ** 0.5


def share_below(held_out, x):
    """Share of distances x (M,) below the 1st percentile of held_out (N,): 0.01 if alike."""
    return (x < np.quantile(held_out, 0.01)).mean().item()


class HeldOut:
    """Held-out images, whose loss tells whether a run overfits.

    real: (N, 3, H, W) in [-1, 1]. tokens: (N, G, D), standardised. condition: as model.loss takes.
    """

    def __init__(self, model, real, tokens, condition, seed):
        self.seed = step_seed(seed, "held out")
        self.tokens = tokens
        self.condition = condition
        self.mean, self.std = model.posterior(real)

    @torch.no_grad()
    def loss(self, model, low, high):
        """The training loss at timesteps evenly from low to high, with noise of a fixed seed."""
        generator = torch.Generator(self.mean.device).manual_seed(self.seed)
        t = torch.linspace(low, high, len(self.mean), device=self.mean.device).long()
        total = 0.0
        for rows in torch.arange(len(t)).split(16):
            condition = None if self.condition is None else self.condition[rows]
            loss = model.loss(self.mean[rows], self.std[rows], condition, generator, t[rows])
            total += loss.item() * len(rows) / len(t)
        return total

    def share_near(self, model, cache, samples):
        """Share of the sampled images that are nearer to a training image, by their tokens, than
        99 % of the held-out images are: about 0.01 if they are no copies."""
        queries = torch.cat([model.embed(samples), self.tokens]).flatten(1)
        nearest = queries.new_full((len(queries),), math.inf)
        for rows in np.array_split(cache.tokens, math.ceil(len(cache.tokens) / 1024)):
            tokens = torch.from_numpy(np.array(rows)).to(queries.device)
            distances = token_distances(queries, model.standardise(tokens).flatten(1))
            nearest = torch.minimum(nearest, distances.amin(1))
        nearest = nearest.cpu().numpy()
        return share_below(nearest[len(samples):], nearest[:len(samples)])

    def measure(self, run, model, cache, samples, step, is_last):
        """Print and log the loss and the share; at the end, the loss by noise level too."""
        last = model.schedule.num_train_timesteps - 1
        row = {"stage": "unet, held out", "step": step, "loss": self.loss(model, 0, last)}
        text = f"held-out loss {row['loss']:.4f} at step {step}"
        if model.config.vit:  # else samples have no tokens
            row["near"] = self.share_near(model, cache, samples)
            text += f"; samples nearer to a training image than held-out ones: {row['near']:.0%}"
        if is_last:
            width = (last + 1) // 10
            row["levels"] = [self.loss(model, low, low + width - 1)
                             for low in range(0, 10 * width, width)]
            middles = [low + width / 2 for low in range(0, 10 * width, width)]
            line_chart(run.folder / "noise_levels.png", {row["stage"]: (middles, row["levels"])},
                       "loss by noise level", "timestep", "loss")
        run.log(**row)
        print(text)
