"""Can a small network tell the synthetic images from real ones?

A small CNN is trained to part the two sets, equally many of each, and meets images of other
patients: its AUC is 0.5 where nothing tells them apart, and 1 where all are found out. A synthetic
image belongs to the patients of its sources, if samples.csv names them, else to none but itself;
one whose sources fall on both sides is left out. REAL is a folder, or a run (its held-out images).

Each seed draws its own halves and its own start. Writes SYNTHETIC/twosample.json.
"""
from pathlib import Path

import numpy as np

from evaluate import bootstrap_interval, only_side, roc_auc
from experiments.common import add_run_flags, choose, open_run
from experiments.privacy import read_samples
from experiments.small_cnn import Bytes, no_augment, predict, to_bytes, train_classifier
from support.command import UserError, pick_device, positive_int, print_table, seed_int
from support.datasets import open_dataset
from support.files import write_json
from support.splits import image_groups

LEAST = 6  # images of each set in each half


def open_sets(args):
    """[(images, numbers, set of patients of each number)] of the real and the synthetic images."""
    if Path(args.real, "model.pt").is_file():
        run = open_run(args, args.real)
        real = run.images
        numbers = run.test
        patients = image_groups(real)
    else:
        real = open_dataset(args.real, args.size)
        numbers = choose(range(len(real)), args.count)
        patients = image_groups(real)

    synthetic = open_dataset(args.synthetic, args.size or real.size)
    sources = [[] for _ in synthetic.files]
    if Path(args.synthetic, "samples.csv").is_file():
        _, sources, _ = read_samples(args.synthetic, real, numbers)
    samples = choose(range(len(synthetic)), args.count)
    return [(real, numbers, [{patients[i]} for i in numbers.tolist()]),
            (synthetic, samples, [{patients[j] for j in sources[i]} or {f"sample {i}"}
                                  for i in samples.tolist()])]


def halves_of(patients, seed):
    """For each image's set of patients its half: 0, 1, or -1 if its patients are in both."""
    names = sorted(set().union(*patients))
    order = np.random.default_rng(seed).permutation(len(names))
    half = {names[j]: place % 2 for place, j in enumerate(order)}
    found = [{half[name] for name in of_image} for of_image in patients]
    return np.array([min(sides) if len(sides) == 1 else -1 for sides in found])


def interval_by_patient(labels, scores, patients, seed):
    """95 % interval (low, high) of the AUC, whole patients drawn."""
    keys = [min(of_image) for of_image in patients]
    members = [np.flatnonzero(np.array(keys) == key) for key in sorted(set(keys))]

    def auc(drawn):
        rows = np.concatenate([members[j] for j in drawn])
        return roc_auc(labels[rows], scores[rows])

    return bootstrap_interval(auc, np.arange(len(members)), rounds=500, seed=seed)


def add_flags(parser):
    add = parser.add_argument
    add("real", help="a run (its held-out images), or a folder")
    add("synthetic", help="a folder, e.g. of a run's samples")
    add_run_flags(parser)
    add("--size", type=positive_int, help="resize to this side (default: as they are)")
    add("--seeds", type=seed_int, nargs="+", default=[0, 1, 2], help="of halves and networks")
    add("--cnn-steps", type=positive_int, default=600, help="steps of the small CNN")


def main(args):
    device = pick_device(args.device)
    sets = open_sets(args)
    count = min(len(numbers) for _, numbers, _ in sets)
    only_side({images[i].shape[-1] for images, numbers, _ in sets for i in numbers.tolist()})

    # Equally many of both, synthetic ones labelled 1.
    pixels = np.concatenate([to_bytes(images.batch(numbers[:count].tolist()))
                             for images, numbers, _ in sets])
    patients = sum((owners[:count] for *_, owners in sets), [])
    labels = np.repeat([0.0, 1.0], count)

    table = {}
    for seed in args.seeds:
        half = halves_of(patients, seed)
        train = np.flatnonzero(half == 0)
        test = np.flatnonzero(half == 1)
        fewest = min(np.sum(labels[part] == y) for part in (train, test) for y in (0, 1))
        if fewest < LEAST:
            raise UserError(f"a half got {fewest} real or synthetic images", f"{LEAST} of each, "
                            "of patients of its own, are needed", "add images or patients")
        net = train_classifier([(Bytes(pixels[train]), labels[train, None], args.cnn_steps)], seed,
                               no_augment, device)
        shown = Bytes(pixels).batch(test)
        scores = predict(net, shown, args.batch, device)[:, 0]
        owners = [patients[i] for i in test]
        table[f"seed {seed}"] = {"AUC": roc_auc(labels[test], scores),
                                 "95 %": interval_by_patient(labels[test], scores, owners, seed),
                                 "images": len(test)}

    aucs = [row["AUC"] for row in table.values()]
    table["mean"] = {"AUC": float(np.mean(aucs))}
    print(f"{count} real and {count} synthetic images in two halves, patients apart; CNN of "
          f"{args.cnn_steps} steps; AUC 0.5: not told apart, 1: all told apart")
    print_table(table)
    write_json(Path(args.synthetic, "twosample.json"), table)
