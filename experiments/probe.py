"""What can a linear model read from the embedder's tokens?

Ridge regression on the tokens of training images, tested on held-out images. Prints the AUC of each
label, next to those of the same network with random weights and of 16x16 raw pixels. A sample
cannot follow its source in anything that the tokens do not encode.

Writes probe.json into the run's folder.
"""
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from dino import TOKEN_KINDS, VisionTransformer, conditioning_tokens
from evaluate import bootstrap_interval, describe
from experiments.common import add_run_flags, open_run, read_labels, refuse_vectors
from experiments.statistics import label_aucs, mean_auc, ridge_scores
from support.command import number, print_table
from support.files import write_json


def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--tokens", choices=TOKEN_KINDS, default="global", help="kind of tokens")
    add("--label-column", nargs="+", help="of labels.csv (default: the findings)")
    add("--least", type=number(int, 1), default=20, help="leave out labels with fewer images on "
        "either side, in training or held-out images")
    add("--seeds", type=number(int), nargs="+", default=[0, 1, 2], help="of the random weights")


def main(args):
    run = open_run(args)
    refuse_vectors(run.model)
    names, train, test, labels = read_labels(run.images, args.label_column, run.train, run.test,
                                             args.least)
    device = run.model.shift.device

    # Feature extractors, each a function of images (B, 3, H, W).
    networks = {"embedder": run.model.embedder.vit}
    for seed in args.seeds:
        torch.manual_seed(seed)
        vit = VisionTransformer(run.model.config.vit).eval()
        networks[f"random weights, seed {seed}"] = vit.to(device)
    features = {name: partial(conditioning_tokens, vit, kind=args.tokens)
                for name, vit in networks.items()}
    features["16x16 grey pixels"] = lambda x: F.adaptive_avg_pool2d(x.mean(dim=1), 16)

    groups = [run.images.patients[i] for i in test]
    table = {}
    for name, extract in features.items():
        train_x, test_x = (describe(run.images.batches(part, args.batch), device, extract)[0]
                           for part in (train, test))
        scores = ridge_scores(train_x, labels[train], test_x)
        aucs = label_aucs(labels[test], scores)
        table[name] = {"mean": float(np.mean(aucs)),
                       "95 %": bootstrap_interval(mean_auc, labels[test], scores, rounds=200,
                                                  groups=groups),
                       **dict(zip(names, aucs))}

    print(f"AUC of ridge on {args.tokens} tokens: {len(train)} training, {len(test)} held-out "
          "images")
    print_table(table)
    write_json(run.folder / "probe.json", table)
