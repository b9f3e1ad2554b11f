"""How well does a classifier trained on synthetic images do on real ones?

A small CNN is trained on the run's own training images, and on each dataset that --train names,
e.g. the output of `sample.py --each-prompt 100`. All trainings take the same number of steps and
are tested on the same held-out real images.

Prints each dataset's AUC, mean and deviation over seeds; writes classify.json into the run's
folder. For few real images with synthetic ones: `downstream`.
"""
import numpy as np

from experiments.common import add_run_flags, choose, open_run
from experiments.small_cnn import load_bytes, predict, strong_augment, train_classifier
from experiments.statistics import mean_auc
from support.command import UserError, number, print_table
from support.datasets import label_matrix, open_dataset
from support.files import write_json


def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--train", nargs="+", metavar="FOLDER", default=[], help="labelled sets, e.g. of sample.py "
        "--each-prompt, beside the run's own training images")
    add("--label-column", default="label", help="of labels.csv and samples.csv")
    add("--seeds", type=number(int), nargs="+", default=[0, 1, 2], help="of the networks")
    add("--cnn-steps", type=number(int, 1), default=600, help="steps of the small CNN")


def main(args):
    run = open_run(args)
    device = run.model.shift.device
    column = args.label_column

    # The sets, and their labels: all are checked before the first training.
    sets = {"held out": (run.images, run.test), "real": (run.images, run.train)}
    for path in args.train:
        images = open_dataset(path, run.model.config.image_size)
        sets[path] = images, choose(range(len(images)), args.count)
    cells = []
    for name, (images, indices) in sets.items():
        # sample.py writes a table's column NAME as label_NAME, a prompt's label as label.
        spellings = [column] if images is run.images else [column, f"label_{column}", "label"]
        known = [spelling for spelling in spellings if spelling in images.columns]
        if not known:
            raise UserError(f"{name} has no column {column!r}", "every set needs the same labels",
                            "pass --label-column, or another set")
        cells += [images.columns[known[0]][i].lower() for i in indices]  # as prompts have them
    names, labels = label_matrix({column: cells}, [column])
    counts = [len(indices) for _, indices in sets.values()]
    labels = dict(zip(sets, np.split(labels, np.cumsum(counts)[:-1])))

    truth = labels.pop("held out")
    if np.isnan(np.concatenate([truth, *labels.values()])).any() or (
            truth.min(axis=0) == truth.max(axis=0)).any():
        raise UserError(f"column {column!r} has empty cells, or a label of all or none of the "
                        "held-out images", "each image needs a label, and an AUC both",
                        "pass another --label-column")

    table = {}
    test_images = load_bytes(*sets["held out"])
    for name, y in labels.items():
        pixels = load_bytes(*sets[name])
        aucs = []
        for seed in args.seeds:
            net = train_classifier([(pixels, y, args.cnn_steps)], seed, device, strong_augment)
            aucs.append(mean_auc(truth, predict(net, test_images, device, args.batch)))
        table[name] = {"images": len(pixels), "AUC": float(np.mean(aucs)),
                       "sd": float(np.std(aucs, ddof=1)) if len(aucs) > 1 else None}

    print(f"AUC of {', '.join(names)} on {len(test_images)} held-out real images; "
          f"{args.cnn_steps} CNN steps, seeds {args.seeds}")
    print_table(table)
    write_json(run.folder / "classify.json", table)
