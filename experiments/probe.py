"""What does a linear read-out find in the embedder's tokens?

Ridge regression on the tokens of training images, tested on held-out images: the AUC of each
label, beside the same network with random weights and beside 16x16 raw pixels. What the tokens do
not know, no sample that follows them can show.

Writes probe.json into the run's folder.
"""
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from dino import TOKEN_KINDS, VisionTransformer, conditioning_tokens
from evaluate import bootstrap_interval, describe
from experiments.common import (add_run_flags, batches_of, binary_labels, finding_columns, open_run,
                                with_known_labels)
from experiments.statistics import linear_probe, mean_auc
from support.command import print_table, seed_int
from support.files import write_json


def extractors(model, embedder_name, kinds, seeds):
    """{what is read out: function of images (B, 3, H, W)}: tokens of each kind, and pixels."""
    device = next(model.buffers()).device
    nets = {f"embedder ({embedder_name})": model.embedder}
    for seed in seeds:
        torch.manual_seed(seed)
        net = VisionTransformer(model.config.vit).eval().to(device)
        nets[f"random weights, seed {seed}"] = net
    plans = {f"{kind} tokens, {name}": partial(conditioning_tokens, net, kind=kind)
             for kind in kinds for name, net in nets.items()}
    plans["16x16 grey pixels"] = lambda x: F.adaptive_avg_pool2d(x.mean(dim=1), 16)
    return plans


def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--tokens", choices=TOKEN_KINDS, nargs="+", default=["global", "cls", "patch"],
        help="which tokens are read out")
    add("--label-column", nargs="+", help="of labels.csv (default: the findings)")
    add("--seeds", type=seed_int, nargs="+", default=[0, 1, 2], help="of the random weights")


def main(args):
    run = open_run(args)
    columns = args.label_column or finding_columns(run.images)
    train, test = with_known_labels(run.images, columns, run.train, run.test)
    names, train_y, test_y = binary_labels(run.images.columns, columns, train, test)
    device = next(run.model.buffers()).device

    table = {}
    plans = extractors(run.model, run.flags["embedder"], args.tokens, args.seeds)
    for name, extract in plans.items():
        train_x, _ = describe(batches_of(run.images, train, args.batch), extract, device)
        test_x, _ = describe(batches_of(run.images, test, args.batch), extract, device)
        aucs, scores = linear_probe(train_x, train_y, test_x, test_y)
        table[name] = {"mean": float(np.mean(aucs)),
                       "interval": bootstrap_interval(mean_auc, test_y, scores, rounds=200),
                       "labels": dict(zip(names, aucs))}

    print(f"AUC of ridge on {len(train)} training images, tested on {len(test)} held-out images")
    print_table({name: {"mean": row["mean"], "95 %": row["interval"], **row["labels"]}
                 for name, row in table.items()})
    write_json(run.folder / "probe.json", table)
