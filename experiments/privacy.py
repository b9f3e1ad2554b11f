"""Are samples nearer to training images than unseen real images are?

Of every sample and every held-out real image the nearest training image is found, twice: by the
tokens of an embedder and by correlation of pixels. If samples are no copies, as large a share of
them as of held-out images (1 %) lies below the held-out images' 1st percentile. A sample's own
source is left out of the neighbours at first, and then counted as one of them.

Writes privacy.json, and privacy.png with the closest pairs, into the run's folder.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluate import correlations, describe
from experiments.common import add_run_flags, batches_of, open_run
from experiments.judges import feature_extractor
from support.command import UserError, print_table
from support.datasets import open_dataset
from support.files import read_csv, write_json
from support.pictures import save_grid


# ---------------------------------------------------------------- distances

def token_distances(a, b):
    """Root of the mean squared difference of each row of (N, D) and each of (M, D): (N, M)."""
    exact = "donot_use_mm_for_euclid_dist"  # the matrix product loses small distances
    return torch.cdist(a, b, compute_mode=exact) / a.shape[1] ** 0.5


def pixel_distances(a, b):
    """1 - correlation of each row of (N, P) and each of (M, P): (N, M)."""
    return 1 - correlations(a, b)


def nearest(distances, queries, others, allowed, chunk=256):
    """(distance, column) (M,) of the nearest allowed (M, N) row of others (N, D) to queries."""
    values = []
    columns = []
    for rows, mask in zip(queries.split(chunk), allowed.split(chunk)):
        found = distances(rows, others).masked_fill(~mask, torch.inf).min(dim=1)
        values.append(found.values)
        columns.append(found.indices)
    return torch.cat(values), torch.cat(columns)


def share_below(held, x):
    """Share of distances x (M,) below the 1st percentile of held (N,): 0.01 if alike."""
    return (x < np.quantile(held, 0.01)).mean().item()


def describe_distances(x, held, rng):
    """A row of the table: distances x (M,) of a group beside those of held-out images (N,)."""
    draws = [share_below(rng.choice(held, len(held)), rng.choice(x, len(x))) for _ in range(1000)]
    return {"images": len(x),
            "least": x.min().item(),
            "median": np.median(x).item(),
            "share below": share_below(held, x),
            "95 %": np.quantile(draws, [0.025, 0.975]).tolist()}


# ---------------------------------------------------------------- samples and their sources

@dataclass
class Queries:
    """Images whose neighbours are looked for, held-out real ones first."""
    images: list    # (ImageSet, number) of each
    sources: list   # numbers of the run's images that each was made from
    groups: list    # "held-out real", "training source", "held-out source", "no source", ...


def group_of(named, found, trained):
    """What a sample was made from: the names in samples.csv, and the numbers found for each."""
    if not named:
        return "no source"
    if trained & set(sum(found, [])):
        return "training source"
    return "held-out source" if all(found) else "source from elsewhere"


def read_samples(folder, images, train):
    """(samples, numbers of the images that each was made from, name of its group) of sample.py.

    A source is known by the stem of its file; where several images share it, by all of them.
    """
    samples = open_dataset(folder, images.size)
    path = Path(folder, "samples.csv")
    table = read_csv(path) if path.is_file() else []
    rows = {row["file"].removeprefix("images/"): row for row in table}
    lost = [file for file in samples.files if "sources" not in rows.get(file, ())]
    if lost:
        raise UserError(f"{path} tells no source of {len(lost)} images ({lost[0]})",
                        "all are needed", "pass a folder that sample.py wrote")
    made_by = sorted({row.get("checkpoint", "?") for row in table})
    print(f"{folder}: {len(samples)} samples of {', '.join(made_by)}")

    numbers = {}
    for i, file in enumerate(images.files):
        numbers.setdefault(Path(file).stem, []).append(i)
    trained = set(train.tolist())
    sources = []
    groups = []
    for file in samples.files:
        row = rows[file]
        has_none = row.get("strategy") in ("random", "prototype")
        named = [] if has_none else row["sources"].split("|")
        found = [numbers.get(Path(name).stem, []) for name in named]
        sources.append(sum(found, []))
        groups.append(group_of(named, found, trained))
    return samples, sources, groups


def collect(run, folders):
    """Queries of the run's held-out images and of folders of samples."""
    queries = Queries([(run.images, i) for i in run.test.tolist()], [[] for _ in run.test],
                      ["held-out real"] * len(run.test))
    for folder in folders:
        samples, sources, groups = read_samples(folder, run.images, run.train)
        queries.images += [(samples, i) for i in range(len(samples))]
        queries.sources += sources
        queries.groups += groups
    return queries


def batches_of_queries(queries, batch):
    """Iterator of their images in batches (B, 3, H, W)."""
    for start in range(0, len(queries.images), batch):
        yield torch.stack([images[i] for images, i in queries.images[start:start + batch]])


# ---------------------------------------------------------------- the question

def closest_pairs(title, distance, column, mask, queries, images, numbers):
    """Of the queries in `mask` the eight that lie closest to an image: (rows for the JSON file,
    queries (8, 3, H, W), their neighbours (8, 3, H, W))."""
    rows = np.where(mask, distance, np.inf).argsort()[:min(8, mask.sum())]
    closest = []
    ours = []
    neighbours = []
    for row in rows:
        samples, i = queries.images[row]
        j = numbers[column[row]].item()
        closest.append({"row": title, "image": f"{samples.name}/{samples.files[i]}",
                        "nearest": images.files[j], "is source": j in queries.sources[row],
                        "distance": distance[row].item()})
        ours.append(samples[i])
        neighbours.append(images[j])
    return closest, torch.stack(ours), torch.stack(neighbours)


def add_flags(parser):
    parser.add_argument("samples", nargs="+", help="folders that sample.py wrote")
    add_run_flags(parser)
    parser.add_argument("--weights", help="tokens of this ViT, a published name or a file "
                        "(default: the embedder of --checkpoint)")


def main(args):
    run = open_run(args)
    device = next(run.model.buffers()).device
    extractor, extract = feature_extractor("dino", args.weights, device, run.model)

    # Whose neighbours, and who may be one: training images, and sources of the samples.
    queries = collect(run, args.samples)
    groups = np.array(queries.groups)
    is_real = groups == "held-out real"
    sources = torch.tensor(sum(queries.sources, []), dtype=torch.int64)
    numbers = torch.unique(torch.cat([run.train, sources]))
    is_source = torch.stack([torch.isin(numbers, torch.tensor(row, dtype=torch.int64))
                             for row in queries.sources])  # (M, N)
    is_trained = torch.isin(numbers, run.train)
    rules = {"left out": is_trained & ~is_source, "counted": is_trained | is_source}

    ours = describe(batches_of_queries(queries, args.batch), extract, device)
    others = describe(batches_of(run.images, numbers, args.batch), extract, device)
    print(f"nearest of {len(run.train)} training images; tokens: {extractor}, root mean squared "
          "difference; pixels: 1 - correlation at 64 px or less; share below the 1st percentile of "
          f"{len(run.test)} held-out real images (their {-(-len(run.test) // 100)} nearest), 95 % "
          "by bootstrap; the own source is left out of the neighbours, or one of them")

    tables = {}
    pictures = {}
    closest = []
    rng = np.random.default_rng(0)
    measures = {"tokens": token_distances, "pixels": pixel_distances}
    for (space, distances), a, b in zip(measures.items(), ours, others):
        tables[space] = {}
        for rule, allowed in rules.items():
            distance, column = (x.numpy() for x in nearest(distances, a, b, allowed))

            # A row for each group of samples.
            for group in dict.fromkeys(queries.groups):
                members = groups == group
                name = f"{group}, {rule}" if is_source[members].any() else group
                tables[space][name] = describe_distances(distance[members], distance[is_real], rng)

            # The pairs that people should look at.
            for who, mask in (("held-out real", is_real), (f"samples, source {rule}", ~is_real)):
                title = f"{who}, by {space}"
                pairs, shown, neighbours = closest_pairs(title, distance, column, mask, queries,
                                                         run.images, numbers)
                closest += pairs
                pictures[title] = shown
                pictures[f"{title}: nearest"] = neighbours
        print(f"\n{space}:")
        print_table(tables[space])

    save_grid(run.folder / "privacy.png", list(pictures.values()), captions=list(pictures))
    print(f"wrote {run.folder / 'privacy.png'}")
    write_json(run.folder / "privacy.json", {
        "tokens": extractor, "training_images": len(run.train), "held_out_images": len(run.test),
        "samples": args.samples, "distances": tables, "closest": closest})
