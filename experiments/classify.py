"""How well does a classifier trained on synthetic images do on real ones?

A small CNN is trained on the run's own training images, and on each set that --train names, e.g. of
`sample.py --each-prompt 100`. All take equally many steps and meet the same held-out real images.

A referee, the same CNN trained on the held-out images, tells whether the labels of each set are
right: it has seen none of the patients that the sets or their generator come from.

Prints the AUC of each set, mean and deviation over seeds, and of its labels by the referee; writes
classify.json into the run's folder. For pools of few real images with synthetic ones beside them:
`downstream`.
"""
from functools import partial

import numpy as np
import torch

from evaluate import bootstrap_interval
from experiments.common import add_run_flags, open_run
from experiments.small_cnn import Chosen, light_augment, predict, train_classifier
from experiments.statistics import mean_auc
from support.command import UserError, positive_int, print_table, seed_int
from support.datasets import open_dataset
from support.files import write_json


def label_values(cells, column):
    """The labels that are told apart, a list of str: of two only the first, as 1 - p is the other.

    cells: those of the held-out images. Raises UserError for an empty cell or one label alone.
    """
    values = sorted(set(cells))
    if len(values) < 2 or "" in values:
        raise UserError(f"column {column!r} of the held-out images holds {set(cells)}",
                        "two labels or more, and no empty cell, are needed", "pass --label-column")
    return values[:1] if len(values) == 2 else values


def cells_of(name, images, numbers, column):
    """The column's cells of these images, a list of str."""
    if column not in images.columns:
        raise UserError(f"{name} has no column {column!r}", "the same labels are needed on "
                        "every side", "pass --label-column, or another set")
    return [images.columns[column][i] for i in numbers.tolist()]


def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--train", nargs="+", metavar="FOLDER", help="labelled sets, e.g. of sample.py "
        "--each-prompt; the run's own training images come first")
    add("--label-column", default="label", help="of labels.csv and samples.csv")
    add("--seeds", type=seed_int, nargs="+", default=[0, 1, 2], help="of the networks")
    add("--cnn-steps", type=positive_int, default=600, help="steps of the small CNN")
    add("--turns", action="store_true", help="augment by flips and turns: for histology only")


def main(args):
    run = open_run(args)
    device = next(run.model.buffers()).device

    # The sets: (images, their numbers, labels (N, L) of 0 and 1).
    sets = {"real": (run.images, run.train)}
    for path in args.train or []:
        images = open_dataset(path, run.model.config.image_size)
        sets[str(path)] = (images, torch.arange(len(images)))
    cells = {name: cells_of(name, images, numbers, args.label_column)
             for name, (images, numbers) in sets.items()}
    test_cells = cells_of("test", run.images, run.test, args.label_column)
    values = label_values(test_cells, args.label_column)

    def truth_of(cells):
        return np.array([[cell == value for value in values] for cell in cells], float)

    # The referee.
    test_y = truth_of(test_cells)
    vary = partial(light_augment, turns=args.turns)
    stage = (Chosen(run.images, run.test), test_y, args.cnn_steps)
    referee = train_classifier([stage], args.seeds[0], vary, device, "referee")

    # A network for each set and seed.
    shown = run.images.batch(run.test.tolist())
    table = {}
    for name, (images, numbers) in sets.items():
        aucs = []
        for seed in args.seeds:
            stage = (Chosen(images, numbers), truth_of(cells[name]), args.cnn_steps)
            net = train_classifier([stage], seed, vary, device)
            scores = predict(net, shown, args.batch, device)
            aucs.append(mean_auc(test_y, scores))

        # What the referee says of the set's labels, of those that not all or none of it have.
        truth = truth_of(cells[name])
        both = truth.min(axis=0) < truth.max(axis=0)
        judged = np.concatenate([predict(referee, images.batch(part.tolist()), args.batch, device)
                                 for part in numbers.split(256)])
        table[name] = {"images": len(numbers),
                       "AUC": float(np.mean(aucs)),
                       "sd": float(np.std(aucs, ddof=1)) if len(aucs) > 1 else None,
                       "95 % of the last": bootstrap_interval(mean_auc, test_y, scores),
                       "labels, by the referee": mean_auc(truth[:, both], judged[:, both])
                       if both.any() else None}

    print(f"AUC of {', '.join(values)} on {len(run.test)} held-out real images; CNN of "
          f"{args.cnn_steps} steps, seeds {args.seeds}")
    print_table(table)
    write_json(run.folder / "classify.json", table)
