"""Are samples nearer to training images than unseen real images are?

The nearest training image is found for every sample and every held-out real image, twice: by the
model's tokens and by correlation of pixels. A sample's own source is left out. If samples are not
copies, as many of them as of the held-out images (1 %) are nearer than the held-out images' 1st
percentile.

Writes privacy.json, and privacy.png with the closest pairs, into the run's folder.
"""
from pathlib import Path

import numpy as np
import torch

from evaluate import correlations, describe, pixel_rows
from experiments.common import add_run_flags, match_sources, open_run, refuse_vectors
from support.command import UserError, print_table
from support.datasets import open_dataset
from support.files import write_json
from support.held_out import share_below, token_distances
from support.pictures import save_grid


def summarise(x, held_out, rng):
    """A row of the table: distances x (M,) beside those of held-out images (N,)."""
    draws = [share_below(rng.choice(held_out, len(held_out)), rng.choice(x, len(x)))
             for _ in range(1000)]
    return {"images": len(x), "least": x.min().item(), "median": np.median(x).item(),
            "share below": share_below(held_out, x),
            "95 %": np.quantile(draws, [0.025, 0.975]).tolist()}


def open_samples(folder, images):
    """(samples, for each the indices of the images it was made from) of a folder of sample.py."""
    samples = open_dataset(folder, images.size)
    sources = match_sources(folder, samples, images)
    if None in sources:
        raise UserError(f"{folder}/samples.csv does not list {samples.files[sources.index(None)]}",
                        "the sources of all images are needed", "pass a folder that sample.py "
                        "wrote")
    return samples, sources


def add_flags(parser):
    parser.add_argument("samples", nargs="+", help="folders that sample.py wrote")
    add_run_flags(parser)


def main(args):
    run = open_run(args)
    refuse_vectors(run.model)
    device = run.model.shift.device

    def features_of(images, indices):
        """Tokens and pixels of these images."""
        return describe(images.batches(indices, args.batch), device, run.model.embed, pixel_rows)

    # The training images, and the sets whose nearest neighbours are looked up.
    training = features_of(run.images, run.train)
    sets = {"held-out real": (run.images, run.test, [[]] * len(run.test))}
    for folder in args.samples:
        samples, sources = open_samples(folder, run.images)
        sets[folder] = samples, torch.arange(len(samples)), sources
    print(f"nearest of {len(run.train)} training images, the own source left out; tokens: root "
          "mean squared difference; pixels: 1 - correlation at 64 px or less; share below the 1st "
          f"percentile of {len(run.test)} held-out real images, 95 % by bootstrap")

    tables = {"tokens": {}, "pixels": {}}
    held_out = {}
    pictures = {}
    rng = np.random.default_rng(0)
    for name, (images, indices, sources) in sets.items():
        is_source = torch.stack([torch.isin(run.train, torch.tensor(row, dtype=torch.int64))
                                 for row in sources])  # (M, N)
        queries = features_of(images, indices)
        distances = {"tokens": token_distances(queries[0], training[0]),
                     "pixels": 1 - correlations(queries[1], training[1])}
        for space, x in distances.items():
            nearest = x.masked_fill(is_source, torch.inf).min(dim=1)
            x = nearest.values.numpy()
            tables[space][name] = summarise(x, held_out.setdefault(space, x), rng)

            # The eight closest pairs.
            closest = x.argsort()[:8]
            title = f"{Path(name).name}, by {space}"
            pictures[title] = images.batch(indices[closest].tolist())
            pictures[f"{title}: nearest"] = run.images.batch(
                run.train[nearest.indices[closest]].tolist())

    for space, table in tables.items():
        print(f"\n{space}:")
        print_table(table)
    save_grid(run.folder / "privacy.png", list(pictures.values()), list(pictures))
    print(f"wrote {run.folder / 'privacy.png'}")
    write_json(run.folder / "privacy.json", {
        "training_images": len(run.train), "held_out_images": len(run.test), "distances": tables})
