"""Do K-means clusters of the training tokens agree with a column of the labels?

Prompts name these clusters as morphology types. This compares them with a column that training did
not use, and with clusters of raw pixels. Writes clusters.json into the run's folder.
"""
import numpy as np
import torch
import torch.nn.functional as F

from experiments.common import add_run_flags, batches_of, open_run
from experiments.statistics import cluster_agreement
from prompts import kmeans, standardise
from support.command import UserError, number, print_table, user_errors
from support.files import write_json
from support.splits import read_split


def add_flags(parser):
    add_run_flags(parser)
    add = parser.add_argument
    add("--label-column", default="morphology", help="column of labels.csv with the classes")
    add("--clusters", type=number(int, 1), nargs="+",
        help="values of K (default: the number of classes, and the run's K)")
    add("--seeds", type=number(int), nargs="+", default=[0, 1, 2], help="seeds of K-means")


def main(args):
    run = open_run(args)
    images = run.images
    name = args.label_column
    if name not in images.columns:
        raise UserError(f"there is no column {name!r}", f"the data have "
                        f"{', '.join(images.columns) or 'no columns'}", "pass --label-column")

    # Take all training images, in the order of the cached tokens.
    train, _ = read_split(run.folder / "split.csv", images)
    truth = [images.columns[name][i] for i in train.tolist()]
    tokens = torch.from_numpy(np.load(run.folder / "cache" / "tokens.npy", allow_pickle=False))
    pixels = [F.adaptive_avg_pool2d(x, 16).flatten(1)
              for x in batches_of(images, train, args.batch)]
    features = {"tokens": tokens.flatten(1),
                "16x16 RGB pixels": torch.cat(pixels)}

    table = {}
    counts = args.clusters or sorted({len(set(truth)), run.model.config.clusters or 33})
    for kind, x in features.items():
        for k in counts:
            with user_errors():
                fits = [cluster_agreement(truth, kmeans(standardise(x), k, seed)[1].numpy())
                        for seed in args.seeds]
            table[f"{kind}, K = {k}"] = {score: float(np.mean([fit[score] for fit in fits]))
                                         for score in fits[0]}

    print(f"{len(train)} training images, {len(set(truth))} values of {name}; K-means on "
          f"standardised features, mean of seeds {args.seeds}")
    print_table(table)
    write_json(run.folder / "clusters.json", table)
