"""How far are two sets of images apart, and how sure is that?

All distances of `python evaluate.py REAL SYNTHETIC`, with more beside them: the floor (real against
other real images) and the ceiling (noise) at equal counts, a 95 % interval of each by subsampling,
kernel distances of random subsets, and a Frechet distance of every image, whose features pass by in
a stream; how sharp and how bright they are beside the real ones. REAL may be a folder, a run (its
training images; the held-out ones are the other half of the floor) or a file of --save-stats, which
holds statistics in place of images.

Writes SYNTHETIC/fidelity.json.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluate import (METRICS, brightness, compare, describe, frechet_of_moments,
                      grey_values, moments, only_side, refuse_unlike_modes, sharpness,
                      warn_of_counts)
from experiments.common import add_run_flags, batches_of, choose, load_model, open_run
from experiments.judges import JUDGES, feature_extractor
from experiments.statistics import kernel_subsets, merge_moments, subsample_interval
from support.command import UserError, pick_device, positive_int, print_table, seed_int, user_errors
from support.datasets import open_dataset
from support.files import atomic_file, resolve_checkpoint, write_json
from support.splits import split_holdout

STORED = ("extractor", "side", "count", "mean", "scatter")  # arrays in a file of --save-stats


@dataclass
class ImageStatistics:
    """What is kept of a set of images that has passed by."""
    side: int       # pixels
    totals: tuple   # moments of three grey values and D features of every image
    features: list  # of each part of the set (N, D); no part if only the moments are stored
    sharpness: float = float("nan")  # mean over the images; not stored


def load_statistics(path, extractor):
    """ImageStatistics of a file of --save-stats; None if the file holds images (MedMNIST's).

    Raises UserError if it is damaged, or if its features are those of another judge.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(name.endswith("_images") for name in file.files):
                return None
            name, side, count, mean, scatter = (file[key] for key in STORED)
        mean = torch.from_numpy(mean)
        scatter = torch.from_numpy(scatter)
        if count < 2 or scatter.shape != 2 * mean.shape or not scatter.isfinite().all():
            raise ValueError
    except Exception as error:  # a damaged file makes NumPy raise nearly any type
        raise UserError(f"{path} is missing, damaged, or without its extractor's name",
                        "a file of --save-stats is needed", "write it anew") from error
    if str(name) != extractor:
        raise UserError(f"{path} holds features of {name}", f"those of {extractor} are needed",
                        "pass the --features and --weights of that file, or write it anew")
    return ImageStatistics(int(side), (int(count), mean, scatter), [])


def save_statistics(path, extractor, statistics):
    """Write what load_statistics reads."""
    values = (extractor, statistics.side, *statistics.totals)
    with atomic_file(path) as file:
        np.savez(file, **dict(zip(STORED, values)))


def open_parts(path, is_real, args):
    """(images, list of numbers of each part) of a folder or a run.

    The parts of a run are its training and its held-out images, of other real images two halves,
    patients apart; synthetic images are one part.
    """
    if Path(path, "model.pt").is_file():
        if not is_real:
            raise UserError(f"{path} is a run", "its samples are needed", "pass a folder of them")
        run = open_run(args, path)
        images = run.images
        parts = [run.train, run.test]
    else:
        images = open_dataset(path, args.size)
        if len(images) < 12:
            raise UserError(f"got {len(images)} images in {path}", "12 are needed, for five "
                            "neighbours in each half", "add images")
        parts = split_holdout(images, 0.5, args.seed) if is_real else [range(len(images))]
    return images, [choose(part, args.count) for part in parts]


@torch.no_grad()
def gather(path, is_real, extractor, extract, device, args):
    """ImageStatistics of a folder, a run or a file; features of --max-features images are kept."""
    if Path(path).suffix == ".npz":
        stored = load_statistics(path, extractor)
        if stored:
            return stored
    images, parts = open_parts(path, is_real, args)
    side = only_side({images[i].shape[-1] for part in parts for i in part})

    totals = None
    kept = []
    sharp = []
    for part in parts:
        room = args.max_features // len(parts)
        kept_of_part = []
        for x in batches_of(images, part, args.batch):
            features = extract(x.to(device)).flatten(1).cpu()
            kept_of_part.append(features[:room])
            room -= len(kept_of_part[-1])
            sharp.append(sharpness(x))
            of_batch = moments(torch.cat([grey_values(x), features], dim=1))
            totals = merge_moments(totals, of_batch) if totals else of_batch
        kept.append(torch.cat(kept_of_part))
    return ImageStatistics(side, totals, kept, torch.cat(sharp).mean().item())


def noise_features(count, side, extract, device, args):
    """Features (count, D) of pictures of grey noise."""
    generator = torch.Generator().manual_seed(args.seed)
    batches = (2 * torch.rand(len(rows), 1, side, side, generator=generator).expand(-1, 3, -1, -1)
               - 1 for rows in torch.arange(count).split(args.batch))
    return describe(batches, extract, device)[0]


def metrics_table(halves, synthetic, noise, seed):
    """{metric: {column: number, or interval}} of kept features.

    halves of the real images (N, D), (N', D); synthetic (M, D); noise (count, D). The first three
    columns compare `count` images with as many, the next all of them.
    """
    half, other = halves
    count = len(noise)
    columns = {}
    for name, rival in (("floor", other), ("equal", synthetic), ("noise", noise)):
        columns[name] = compare(half[:count], rival[:count])
    real = torch.cat(halves)
    columns["all"] = compare(real, synthetic)
    low, high = subsample_interval(compare, real, synthetic, rounds=20, seed=seed)
    columns["interval"] = np.stack([low, high], axis=1)
    shares = [METRICS.index(name) for name in ("precision", "recall", "coverage")]
    columns["interval"][shares] = columns["interval"][shares].clip(0, 1)
    return {metric: {name: column[i].tolist() for name, column in columns.items()}
            for i, metric in enumerate(METRICS)}


def add_flags(parser):
    add = parser.add_argument
    add("real", help="a run (its training images), a folder, or a file of --save-stats")
    add("synthetic", help="a folder, e.g. of a run's samples, or a file of --save-stats")
    add_run_flags(parser)
    add("--features", choices=JUDGES, default="random", help="whose: a random network, FID's "
        "Inception, a ViT (not the one that conditioned), TorchXRayVision's DenseNet")
    add("--weights", help="inception, xrv: a file of weights; dino: a published ViT's name or a "
        "file (default: the embedder of --checkpoint)")
    add("--size", type=positive_int, help="resize to this side (default: as they are)")
    add("--seed", type=seed_int, default=0, help="of the halves, the noise and the intervals")
    add("--max-features", type=positive_int, default=5000, help="keep features of so many images "
        "a set; the others count in the streamed Frechet distance only")
    add("--save-stats", metavar="FILE", help="write REAL's statistics, for later use as REAL")
    add("--out", help="JSON file (default: SYNTHETIC/fidelity.json)")


def main(args):
    device = pick_device(args.device)
    model = None
    if args.features == "dino" and not args.weights:
        _, model = load_model(resolve_checkpoint(args.checkpoint), args.device)
    extractor, extract = feature_extractor(args.features, args.weights, device, model)
    with user_errors():
        real = gather(args.real, True, extractor, extract, device, args)
        synthetic = gather(args.synthetic, False, extractor, extract, device, args)
    side = only_side({real.side, synthetic.side})
    grey = {"real": brightness(real.totals), "synthetic": brightness(synthetic.totals)}
    refuse_unlike_modes(**grey)
    if args.save_stats:
        save_statistics(args.save_stats, extractor, real)

    n = real.totals[0]
    m = synthetic.totals[0]
    dimensions = len(real.totals[1]) - 3  # behind three grey values
    print(f"features: {extractor}, {dimensions} dimensions; {side} px, centre square, bicubic "
          f"with antialias where resized; {n} real, {m} synthetic images")

    # Distances of kept features; of stored statistics there are none.
    table = {"frechet": {}}
    if real.features and synthetic.features:
        fake, = synthetic.features
        every = torch.cat(real.features)
        equal = min(len(fake), *map(len, real.features))
        size = min(1000, equal // 2)
        with user_errors():
            noise = noise_features(equal, side, extract, device, args)
            table = metrics_table(real.features, fake, noise, args.seed)
            subsets = kernel_subsets(every, fake, 50, size, args.seed)
        table["kernel"] |= {"subsets' mean": subsets.mean().item(), "sd": subsets.std().item()}
        print(f"{equal} real images against as many real (floor), synthetic (equal) and noise "
              f"images; all: {len(every)} against {len(fake)}, with 95 % interval; subsets: {size} "
              "of each, 50 times; streamed: every image")

    # One distance of all images.
    features_alone = [(count, mean[3:], scatter[3:, 3:])
                      for count, mean, scatter in (real.totals, synthetic.totals)]
    with user_errors():
        table["frechet"]["streamed"] = frechet_of_moments(*features_alone)
    warn_of_counts(n, m, dimensions)
    print_table(table)
    print_table({f"brightness, {name}": figures for name, figures in grey.items()})

    # What fog and a wrong exposure do; not known of stored statistics.
    looks = {"brightness difference": grey["synthetic"]["mean"] - grey["real"]["mean"]}
    if real.features and synthetic.features:
        looks["sharpness ratio"] = synthetic.sharpness / real.sharpness
    print_table({"synthetic against real": looks})

    out = Path(args.synthetic)
    out = out / "fidelity.json" if out.is_dir() else out.with_suffix(".json")
    write_json(Path(args.out or out), {"features": extractor, "size": side, "real": n,
                                       "synthetic": m, **table, "brightness": grey, **looks})
