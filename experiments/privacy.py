"""Are samples nearer to training images than unseen real images are?

For every sample and every held-out real image the nearest training image is found, twice: by the
model's tokens and by correlation of pixels. A sample's own source is left out. If samples are no
copies, as large a share of them as of held-out images (1 %) is nearer than the held-out images'
1st percentile.

Writes privacy.json, and privacy.png with the closest pairs, into the run's folder.
"""
from pathlib import Path

import numpy as np
import torch

from evaluate import correlations, describe
from experiments.common import add_run_flags, batches_of, open_run
from support.command import UserError, print_table
from support.datasets import open_dataset
from support.files import read_csv, write_json
from support.pictures import save_grid


def token_distances(a, b):
    """Root of the mean squared difference of each row of (N, D) and each of (M, D): (N, M)."""
    exact = "donot_use_mm_for_euclid_dist"  # the matrix product loses small distances
    return torch.cdist(a, b, compute_mode=exact) / a.shape[1] ** 0.5


def pixel_distances(a, b):
    """1 - correlation of each row of (N, P) and each of (M, P): (N, M)."""
    return 1 - correlations(a, b)


def share_below(held_out, x):
    """Share of distances x (M,) below the 1st percentile of held_out (N,): 0.01 if alike."""
    return (x < np.quantile(held_out, 0.01)).mean().item()


def summarise(x, held_out, rng):
    """A row of the table: distances x (M,) beside those of held-out images (N,)."""
    draws = [share_below(rng.choice(held_out, len(held_out)), rng.choice(x, len(x)))
             for _ in range(1000)]
    return {"images": len(x), "least": x.min().item(), "median": np.median(x).item(),
            "share below": share_below(held_out, x),
            "95 %": np.quantile(draws, [0.025, 0.975]).tolist()}


def read_samples(folder, images):
    """(samples, indices of the run's images that each was made from) of a folder of sample.py.

    A source is known by the stem of its file; where several images share it, by all of them.
    """
    samples = open_dataset(Path(folder, "images"), images.size)
    path = Path(folder, "samples.csv")
    table = read_csv(path) if path.is_file() else []
    rows = {row["file"].removeprefix("images/"): row for row in table}
    lost = [file for file in samples.files if "sources" not in rows.get(file, ())]
    if lost:
        raise UserError(f"{path} names no source for {len(lost)} images ({lost[0]})",
                        "all are needed", "pass a folder that sample.py wrote")
    by_stem = {}
    for i, file in enumerate(images.files):
        by_stem.setdefault(Path(file).stem, []).append(i)
    sources = []
    for file in samples.files:
        stems = [Path(name).stem for name in rows[file]["sources"].split("|")]
        sources.append(sum((by_stem.get(stem, []) for stem in stems), []))
    return samples, sources


def add_flags(parser):
    parser.add_argument("samples", nargs="+", help="folders that sample.py wrote")
    add_run_flags(parser)


def main(args):
    run = open_run(args)
    device = run.model.shift.device

    def embed(x):
        return run.model.embed(x).flatten(1)

    # The training images, and the sets whose neighbours are looked up.
    training = describe(batches_of(run.images, run.train, args.batch), embed, device)
    sets = {"held-out real": (run.images, run.test, [[] for _ in run.test])}
    for folder in args.samples:
        samples, sources = read_samples(folder, run.images)
        sets[str(folder)] = samples, torch.arange(len(samples)), sources
    print(f"nearest of {len(run.train)} training images, the own source left out; tokens: root "
          "mean squared difference; pixels: 1 - correlation at 64 px or less; share below the 1st "
          f"percentile of {len(run.test)} held-out real images, 95 % by bootstrap")

    tables = {"tokens": {}, "pixels": {}}
    pictures = {}
    held_out = {}
    rng = np.random.default_rng(0)
    for name, (images, indices, sources) in sets.items():
        queries = describe(batches_of(images, indices, args.batch), embed, device)
        is_source = torch.stack([torch.isin(run.train, torch.tensor(row, dtype=torch.int64))
                                 for row in sources])  # (M, N)
        measures = {"tokens": token_distances, "pixels": pixel_distances}
        for (space, distances), a, b in zip(measures.items(), queries, training):
            nearest = distances(a, b).masked_fill(is_source, torch.inf).min(dim=1)
            values = nearest.values.numpy()
            tables[space][name] = summarise(values, held_out.setdefault(space, values), rng)

            # The eight closest pairs, for people to look at.
            closest = values.argsort()[:8]
            title = f"{Path(name).name}, by {space}"
            pictures[title] = images.batch(indices[closest].tolist())
            neighbours = run.train[nearest.indices[closest]]
            pictures[f"{title}: nearest"] = run.images.batch(neighbours.tolist())

    for space, table in tables.items():
        print(f"\n{space}:")
        print_table(table)
    save_grid(run.folder / "privacy.png", list(pictures.values()), captions=list(pictures))
    print(f"wrote {run.folder / 'privacy.png'}")
    write_json(run.folder / "privacy.json", {
        "training_images": len(run.train), "held_out_images": len(run.test),
        "samples": args.samples, "distances": tables})
