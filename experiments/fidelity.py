"""How far apart are two sets of images, with intervals?

Prints the table of `python evaluate.py REAL SYNTHETIC`, with more options. REAL may be a run; its
training and held-out images then give the floor. The judge may be Inception or a ViT. Each distance
between all images gets a 95 % interval by subsampling.

Writes SYNTHETIC/fidelity.json.
"""
from pathlib import Path

import numpy as np
import torch

import evaluate
from evaluate import METRICS, compare
from experiments.common import add_run_flags, choose, load_model, open_run
from experiments.judges import JUDGES, feature_extractor
from experiments.statistics import subsample_interval
from support.command import UserError, number, pick_device, print_table
from support.datasets import open_dataset
from support.files import resolve_checkpoint, write_json
from support.splits import split_holdout


def open_parts(args):
    """(ImageSet, indices) of real, other real and synthetic images, at most --count of each."""
    if Path(args.synthetic, "model.pt").is_file():
        raise UserError(f"{args.synthetic} is a run", "its samples are needed",
                        "pass a folder of them")
    if Path(args.real, "model.pt").is_file():
        run = open_run(args, args.real)
        real = run.images
        halves = [run.train, run.test]
    else:
        real = open_dataset(args.real, args.size)
        halves = split_holdout(real, 0.5, args.seed)
    synthetic = open_dataset(args.synthetic, args.size)
    every = torch.arange(len(synthetic))
    return [(real, choose(halves[0], args.count)), (real, choose(halves[1], args.count)),
            (synthetic, choose(every, args.count))]


def add_flags(parser):
    evaluate.add_flags(parser)
    add_run_flags(parser)
    add = parser.add_argument
    add("--features", choices=JUDGES, default="random",
        help="a random network, FID's Inception, or a ViT (not the one that conditioned)")
    add("--weights", help="inception: a file; dino: a published ViT's name or a file (default: the "
        "embedder of --checkpoint)")
    add("--rounds", type=number(int, 2), default=20, help="subsamples of each interval")
    add("--out", help="JSON file (default: SYNTHETIC/fidelity.json)")


def main(args):
    device = pick_device(args.device)
    model = None
    if args.features == "dino" and not args.weights:
        _, model = load_model(resolve_checkpoint(args.checkpoint), args.device)
    name, judge = feature_extractor(args.features, args.weights, device, model)
    results, features = evaluate.fidelity(open_parts(args), name, judge, device, args.batch)

    # Intervals of the distances between all images; shares stay in [0, 1].
    half, other, fake = features
    if min(len(half), len(other), len(fake)) >= 12:  # halves with five neighbours each
        low, high = subsample_interval(compare, torch.cat([half, other]), fake, args.rounds,
                                       args.seed)
        for i, metric in enumerate(METRICS):
            interval = np.array([low[i], high[i]])
            if metric in ("precision", "recall", "coverage"):
                interval = interval.clip(0, 1)
            results[metric]["interval"] = interval.tolist()
        print_table({metric: {"95 % interval of all": results[metric]["interval"]}
                     for metric in METRICS})

    out = Path(args.synthetic)
    out = out / "fidelity.json" if out.is_dir() else out.with_suffix(".json")
    write_json(Path(args.out or out), results)
