"""Can a small network tell the synthetic images from real ones?

A small CNN is trained to separate equal numbers of both, and tested on images of other patients.
An AUC of 0.5 means that it cannot tell them apart, 1 that it always can. REAL is a folder, or a run
(its held-out images).

All images are resized to the run's side, or to that of the first real image. A synthetic image
belongs to the patients of its sources, if samples.csv names them. It is left out if its sources are
in both halves. Each seed draws new halves and initial weights. Writes SYNTHETIC/twosample.json.
"""
from pathlib import Path

import numpy as np

from evaluate import roc_auc
from experiments.common import add_run_flags, choose, match_sources, open_run
from experiments.small_cnn import load_bytes, predict, train_classifier
from support.command import UserError, number, print_table
from support.datasets import open_dataset
from support.files import write_json
from support.ranks import pick_device

LEAST = 6  # real, and synthetic, images in each half


def halves_of(patients, seed):
    """Half (0 or 1) of each image, or -1 if its patients are in both; patients: a set per image."""
    names = sorted(set().union(*patients))
    order = np.random.default_rng(seed).permutation(len(names))
    half = {names[j]: rank % 2 for rank, j in enumerate(order)}
    sides = [{half[name] for name in of_image} for of_image in patients]
    return np.array([min(side) if len(side) == 1 else -1 for side in sides])


def add_flags(parser):
    add = parser.add_argument
    add("real", help="a run (its held-out images), or a folder")
    add("synthetic", help="a folder, e.g. of a run's samples")
    add_run_flags(parser)
    add("--seeds", type=number(int), nargs="+", default=[0, 1, 2], help="of halves and networks")
    add("--cnn-steps", type=number(int, 1), default=600, help="steps of the small CNN")


def main(args):
    device = pick_device(args.device)
    if Path(args.real, "model.pt").is_file():
        run = open_run(args, args.real)
        real, real_indices = run.images, run.test
    else:
        real = open_dataset(args.real, None)
        real.size = real[0].shape[-1]
        real_indices = choose(range(len(real)), args.count)
    synthetic = open_dataset(args.synthetic, real.size)
    indices = choose(range(len(synthetic)), args.count)
    count = min(len(real_indices), len(indices))
    real_indices = real_indices[:count].tolist()
    indices = indices[:count].tolist()

    # The patients of each image; a synthetic one without known sources is its own patient.
    groups = real.patients
    sources = match_sources(args.synthetic, synthetic, real)
    patients = [{groups[i]} for i in real_indices]
    patients += [{groups[j] for j in sources[i] or ()} or {f"sample {i}"} for i in indices]

    # Synthetic images have label 1.
    pixels = np.concatenate([load_bytes(real, real_indices), load_bytes(synthetic, indices)])
    labels = np.repeat([0.0, 1.0], count)
    aucs = {}
    for seed in args.seeds:
        half = halves_of(patients, seed)
        train, test = half == 0, half == 1
        fewest = min(np.sum(labels[part] == y) for part in (train, test) for y in (0, 1))
        if fewest < LEAST:
            raise UserError(f"a half got {fewest} real or synthetic images", f"{LEAST} of each, "
                            "of patients of its own, are needed", "add images or patients")
        stages = [(pixels[train], labels[train, None], args.cnn_steps)]
        net = train_classifier(stages, seed, device)
        scores = predict(net, pixels[test], device, args.batch)[:, 0]
        aucs[f"seed {seed}"] = roc_auc(labels[test], scores)

    mean = float(np.mean(list(aucs.values())))
    print_table({name: {"AUC": auc} for name, auc in aucs.items()})
    write_json(Path(args.synthetic, "twosample.json"),
               {"images of each": count, "AUC": mean, "seeds": aucs})
    print(f"{count} real and {count} synthetic images, split by patient: mean AUC {mean:.3f}")
