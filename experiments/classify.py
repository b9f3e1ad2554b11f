"""How well does a classifier trained on synthetic images do on real ones?

A small CNN is trained on the run's own training images, and on each dataset that --train names,
e.g. the output of `sample.py --each-prompt 100`. All trainings take the same number of steps and
are tested on the same held-out real images.

A referee checks the labels of each dataset. It is the same CNN, trained on the held-out images, so
it shares no patient with the datasets or their generator.

Prints each dataset's AUC, mean and deviation over seeds, and the referee's AUC on its labels;
writes classify.json into the run's folder. For few real images with synthetic ones: `downstream`.
"""
from functools import partial

import numpy as np

from experiments.common import add_run_flags, choose, open_run
from experiments.small_cnn import load_bytes, predict, strong_augment, train_classifier
from experiments.statistics import mean_auc
from support.command import UserError, number, pick_device, print_table
from support.datasets import open_dataset
from support.files import write_json


def cells_of(name, images, indices, column):
    """The column's cells of these images, a list of str."""
    if column not in images.columns:
        raise UserError(f"{name} has no column {column!r}", "every set needs the same labels",
                        "pass --label-column, or another set")
    return [images.columns[column][i] for i in indices.tolist()]


def label_values(cells, column):
    """The labels to score, a list of str: of two only the first, as the other is its complement.

    cells: those of the held-out images. Raises UserError for an empty cell or one label alone.
    """
    values = sorted(set(cells))
    if len(values) < 2 or "" in values:
        raise UserError(f"column {column!r} of the held-out images holds {set(cells)}",
                        "two labels or more, and no empty cell, are needed", "pass --label-column")
    return values[:1] if len(values) == 2 else values


def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--train", nargs="+", metavar="FOLDER", default=[], help="labelled sets, e.g. of sample.py "
        "--each-prompt, beside the run's own training images")
    add("--label-column", default="label", help="of labels.csv and samples.csv")
    add("--seeds", type=number(int), nargs="+", default=[0, 1, 2], help="of the networks")
    add("--cnn-steps", type=number(int, 1), default=600, help="steps of the small CNN")
    add("--turns", action="store_true", help="augment by flips and turns: for histology only")


def main(args):
    run = open_run(args)
    device = pick_device(args.device)
    column = args.label_column

    # All columns are checked before the first training.
    test_cells = cells_of("the run", run.images, run.test, column)
    values = label_values(test_cells, column)
    sets = {"real": (run.images, run.train)}
    for path in args.train:
        images = open_dataset(path, run.model.config.image_size)
        sets[str(path)] = (images, choose(range(len(images)), args.count))
    cells = {name: cells_of(name, *of_set, column) for name, of_set in sets.items()}

    def truth_of(cells):
        """Labels (N, L) of 0 and 1."""
        return np.array([[cell == value for value in values] for cell in cells], float)

    test_images = load_bytes(run.images, run.test)
    test_y = truth_of(test_cells)
    augment = partial(strong_augment, turns=args.turns)
    stages = [(test_images, test_y, args.cnn_steps)]
    referee = train_classifier(stages, args.seeds[0], device, augment, "referee")

    table = {}
    for name, (images, indices) in sets.items():
        pixels = load_bytes(images, indices)
        truth = truth_of(cells[name])
        aucs = []
        for seed in args.seeds:
            net = train_classifier([(pixels, truth, args.cnn_steps)], seed, device, augment)
            aucs.append(mean_auc(test_y, predict(net, test_images, device, args.batch)))

        # The referee's opinion, on labels that some images of the set have and some do not.
        mixed = truth.min(axis=0) < truth.max(axis=0)
        judged = predict(referee, pixels, device, args.batch)
        table[name] = {"images": len(indices),
                       "AUC": float(np.mean(aucs)),
                       "sd": float(np.std(aucs, ddof=1)) if len(aucs) > 1 else None,
                       "labels, by the referee": mean_auc(truth[:, mixed], judged[:, mixed])
                       if mixed.any() else None}

    print(f"AUC of {', '.join(values)} on {len(run.test)} held-out real images; {args.cnn_steps} "
          f"CNN steps, seeds {args.seeds}")
    print_table(table)
    write_json(run.folder / "classify.json", table)
