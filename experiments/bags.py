"""Is our ABMIL the published one? Accuracy on the five classic sets of bags.

    python -m experiments bags musk1.npz                 # ten folds, five times

FILE.npz holds `x` (N, D), the instances of all bags, `bag` (N,), the bag of each instance, and
`bag_label` (N,), 0 or 1, equal within a bag. The network is the published one: 256, 128 and 64
units with dropout, then the gated attention and the head of regional.py; one bag per step, Adam,
100 epochs, of which the last counts. Rate and L2 weight (--lr, --weight-decay): MUSK1 5e-4, 0.005;
MUSK2 5e-4, 0.03; Fox 1e-4, 0.01; Tiger 5e-4, 0.005; Elephant 1e-4, 0.005.

Source: Ilse, Tomczak & Welling 2018 (arXiv 1802.04712), equation 9 and table 1; the layers are
those of MI-Net (Wang et al. 2016).
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evaluate import roc_auc
from regional import MILConfig, RegionalMIL
from support.command import StatusLine, UserError, number, print_table
from support.files import write_json
from support.seeds import step_seed


class ClassicABMIL(nn.Module):
    """A bag (n, D) -> logit. Features are standardised by `instances`; where these hardly vary they
    are only centred, and all are clipped at 10 deviations, so that none can explode."""

    def __init__(self, instances):
        super().__init__()
        deviation = instances.std(dim=0)
        self.register_buffer("shift", instances.mean(dim=0))
        self.register_buffer("scale", torch.where(deviation < 1e-3, 1, deviation))
        widths = (instances.shape[1], 256, 128, 64)
        layers = [(nn.Linear(*pair), nn.ReLU(), nn.Dropout()) for pair in zip(widths, widths[1:])]
        self.encoder = nn.Sequential(*(part for layer in layers for part in layer))
        self.mil = RegionalMIL(MILConfig(in_dim=64, windows=(), dim=64))
        self.mil.embed = nn.Identity()  # the encoder makes the tokens

    def forward(self, x):
        tokens = self.encoder(((x - self.shift) / self.scale).clamp(-10, 10))
        present = torch.ones(1, len(x), dtype=torch.bool)
        return self.mil.pool(tokens[None], present)[0][0]


def read_bags(path):
    """[(x (n, D) float32, label 0 or 1)] of a file, bags in the order of their names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x, bag, label = (file[name] for name in ("x", "bag", "bag_label"))
        x = torch.from_numpy(x.astype(np.float32))
        names, member = np.unique(bag, return_inverse=True)
        if x.ndim != 2 or not len(x) == len(bag) == len(label) or not x.isfinite().all():
            raise ValueError(f"x of shape {tuple(x.shape)}, {len(bag)} bag, {len(label)} bag_label")
        bags = [(x[member == i], set(label[member == i].tolist())) for i in range(len(names))]
        if any(labels not in ({0}, {1}) for _, labels in bags):
            raise ValueError("bag_label is not 0 or 1, or differs within a bag")
    except Exception as error:  # a malformed file can raise anything
        raise UserError(f"{path} holds no bags ({error})", "x (N, D) finite, bag (N,) and "
                        "bag_label (N,) of 0 and 1 are needed", "pass another file") from error
    return [(instances, labels.pop()) for instances, labels in bags]


def draw_folds(labels, count, seed):
    """The fold of each bag, stratified by label."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(np.array(labels)[order], kind="stable")]
    fold = np.empty(len(labels), dtype=int)
    fold[order] = np.arange(len(labels)) % count
    return fold


def train(bags, epochs, lr, weight_decay, seed):
    """A ClassicABMIL after the last epoch, in eval mode."""
    torch.manual_seed(seed % 2 ** 31)
    model = ClassicABMIL(torch.cat([x for x, _ in bags]))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    for _ in range(epochs):
        for i in torch.randperm(len(bags)).tolist():
            x, label = bags[i]
            loss = F.binary_cross_entropy_with_logits(model(x), torch.tensor(float(label)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def add_flags(parser):
    add = parser.add_argument
    add("file", help=".npz of bags")
    add("--folds", type=number(int, 2), default=10, help="of cross-validation")
    add("--repeats", type=number(int, 2), default=5, help="each with new folds")
    add("--epochs", type=number(int, 1), default=100, help="of training")
    add("--lr", type=number(float, 1e-9), default=5e-4, help="of Adam")
    add("--weight-decay", type=number(float), default=0.005, help="L2 weight in Adam's gradient")
    add("--seed", type=number(int), default=0, help="of everything random")


def main(args):
    bags = read_bags(args.file)
    labels = np.array([label for _, label in bags])
    positive = int(labels.sum())
    if args.folds > min(positive, len(bags) - positive):
        raise UserError(f"--folds {args.folds}, {positive} positive bags of {len(bags)}",
                        "each fold needs a bag of each label", "lower --folds")
    print(f"{len(bags)} bags ({positive} positive), {bags[0][0].shape[1]} features")

    logits = np.empty((args.repeats, len(bags)))
    status = StatusLine(args.repeats * args.folds, "networks")
    for repeat in range(args.repeats):
        folds = draw_folds(labels, args.folds, step_seed(args.seed, repeat))
        for fold in range(args.folds):
            model = train([bags[i] for i in np.flatnonzero(folds != fold)], args.epochs, args.lr,
                          args.weight_decay, step_seed(args.seed, repeat, fold))
            with torch.no_grad():
                for i in np.flatnonzero(folds == fold):
                    logits[repeat, i] = model(bags[i][0]).item()
            status.update(repeat * args.folds + fold + 1)
    status.close()

    results = {"accuracy": ((logits > 0) == labels).mean(axis=1),
               "AUC": np.array([roc_auc(labels, row) for row in logits])}
    table = {name: {"mean": values.mean().item(),
                    "sd over repeats": values.std(ddof=1).item()}
             for name, values in results.items()}
    print_table(table)
    write_json(f"{Path(args.file).stem}_bags.json",
               {"table": table, "labels": labels.tolist(), "logits": logits.tolist()})
