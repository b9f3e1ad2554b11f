"""Is our ABMIL the published one? Accuracy on the five classic sets of bags.

    python -m experiments bags musk1.npz                 # ten folds, five times

FILE.npz holds `x` (N, D), the instances of all bags, `bag` (N,), the bag of each instance, and
`bag_label` (N,), 0 or 1. The network is the published one: 256, 128 and 64 units with dropout,
then the gated attention and the head of regional.py; one bag per step, Adam, 100 epochs, of which
the last counts. Rate and L2 weight (--lr, --weight-decay) are those of MI-Net's authors:
MUSK1 5e-4, 0.005; MUSK2 5e-4, 0.03; Fox 1e-4, 0.01; Tiger 5e-4, 0.005; Elephant 1e-4, 0.005.

Beside it stands what two habits would add: the best epoch on the test fold, and --whole-set,
features standardised by all bags. A set kernel shows how hard these bags are for a known method.

Sources: Ilse, Tomczak & Welling 2018 (arXiv 1802.04712), equation 9 and table 1; layers and rates
of MI-Net (Wang et al., arXiv 1610.02501, and its code); set kernel of Gaertner et al. 2002.
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
    """A bag (n, D), standardised -> logit."""

    def __init__(self, in_dim):
        super().__init__()
        widths = (in_dim, 256, 128, 64)
        layers = [(nn.Linear(*pair), nn.ReLU(), nn.Dropout()) for pair in zip(widths, widths[1:])]
        self.encoder = nn.Sequential(*(part for layer in layers for part in layer))
        self.mil = RegionalMIL(MILConfig(in_dim=64, windows=(), dim=64))
        self.mil.embed = nn.Identity()  # the encoder makes the tokens

    def forward(self, x):
        present = torch.ones(1, len(x), dtype=torch.bool)
        return self.mil.pool(self.encoder(x)[None], present)[0][0]


def read_bags(path):
    """Bags [(n, D) float32] of a file in the order of their names, labels (B,) of 0 and 1."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x, bag, label = (file[name] for name in ("x", "bag", "bag_label"))
        x = torch.from_numpy(x.astype(np.float32))
        names, first, member = np.unique(bag, return_index=True, return_inverse=True)
        labels = label[first].astype(int)
        if x.ndim != 2 or not x.isfinite().all() or len(x) != len(bag):
            raise ValueError(f"x of shape {tuple(x.shape)}, {len(bag)} bag")
        if (labels[member] != label).any() or set(labels) != {0, 1}:
            raise ValueError("bag_label is not 0 or 1, or differs within a bag")
    except Exception as error:  # a malformed file can raise anything
        raise UserError(f"{path} holds no bags ({error})", "x (N, D) finite, bag (N,) and "
                        "bag_label (N,) of 0 and 1 are needed", "pass another file") from error
    return [x[member == i] for i in range(len(names))], labels


def draw_folds(labels, count, seed):
    """The fold of each bag, stratified by label."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), dtype=int)
    fold[order] = np.arange(len(labels)) % count
    return fold


def standardise(bags, known):
    """Bags in deviations of the instances of `known` bags. Features that hardly vary there are only
    centred, and all are clipped at 10 deviations, so that none can explode."""
    instances = torch.cat(known)
    deviation = instances.std(dim=0)
    deviation = torch.where(deviation < 1e-3, 1, deviation)
    return [((bag - instances.mean(dim=0)) / deviation).clamp(-10, 10) for bag in bags]


def train(bags, labels, test, epochs, lr, weight_decay, seed):
    """Logits (epochs, len(test)) of the bags of `test` after each epoch of training on the rest."""
    torch.manual_seed(seed % 2 ** 31)
    model = ClassicABMIL(bags[0].shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    targets = torch.tensor(labels).float()
    training = torch.from_numpy(np.setdiff1d(np.arange(len(bags)), test))
    logits = torch.empty(epochs, len(test))
    for epoch in range(epochs):
        model.train()
        for i in training[torch.randperm(len(training))].tolist():
            loss = F.binary_cross_entropy_with_logits(model(bags[i]), targets[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            model.eval()
            logits[epoch] = torch.stack([model(bags[i]) for i in test])
    return logits.numpy()


def set_kernel(bags, labels, test):
    """Scores (len(test),) of ridge regression (weight 0.1) on the other bags, by the normalised
    mean over pairs of instances of a Gaussian kernel, exp(-distance^2 / D)."""
    x = torch.cat(bags)
    member = torch.repeat_interleave(torch.arange(len(bags)), torch.tensor([*map(len, bags)]))
    share = F.one_hot(member).float()
    share /= share.sum(dim=0)
    kernel = share.T @ torch.exp(-torch.cdist(x, x).square() / x.shape[1]) @ share
    scale = kernel.diag().rsqrt()
    kernel = kernel * scale * scale[:, None]

    rest = np.setdiff1d(np.arange(len(labels)), test)
    targets = torch.tensor(labels[rest] - 0.5).float()
    inner = kernel[rest][:, rest] + 0.1 * torch.eye(len(rest))
    weights = torch.linalg.solve(inner, targets - targets.mean())
    return kernel[test][:, rest] @ weights + targets.mean()


def add_flags(parser):
    add = parser.add_argument
    add("file", help=".npz of bags")
    add("--folds", type=number(int, 2), default=10, help="of cross-validation")
    add("--repeats", type=number(int, 1), default=5, help="each with new folds")
    add("--epochs", type=number(int, 1), default=100, help="of training")
    add("--lr", type=number(float, 1e-9), default=5e-4, help="of Adam")
    add("--weight-decay", type=number(float), default=0.005, help="L2 weight in Adam's gradient")
    add("--whole-set", action="store_true", help="standardise by all bags, test bags included")
    add("--seed", type=number(int), default=0, help="of everything random")


def main(args):
    bags, labels = read_bags(args.file)
    positive = int(labels.sum())
    if args.folds > min(positive, len(bags) - positive):
        raise UserError(f"--folds {args.folds}, {positive} positive bags of {len(bags)}",
                        "each fold needs a bag of each label", "lower --folds")
    print(f"{len(bags)} bags ({positive} positive), {bags[0].shape[1]} features")

    methods = ("last epoch", "best epoch on the test fold", "set kernel")
    logits = {name: np.empty((args.repeats, len(bags))) for name in methods}
    status = StatusLine(args.repeats * args.folds, "networks")
    for repeat in range(args.repeats):
        folds = draw_folds(labels, args.folds, step_seed(args.seed, repeat))
        for fold in range(args.folds):
            test = np.flatnonzero(folds == fold)
            known = bags if args.whole_set else [bags[i] for i in np.flatnonzero(folds != fold)]
            standard = standardise(bags, known)
            epochs = train(standard, labels, test, args.epochs, args.lr, args.weight_decay,
                           step_seed(args.seed, repeat, fold))
            best = ((epochs > 0) == labels[test]).sum(axis=1).argmax()
            logits["last epoch"][repeat, test] = epochs[-1]
            logits["best epoch on the test fold"][repeat, test] = epochs[best]
            logits["set kernel"][repeat, test] = set_kernel(standard, labels, test)
            status.update(repeat * args.folds + fold + 1)
    status.close()

    # Repeats share their bags, so the standard error is that of one repeat.
    table = {}
    for name, values in logits.items():
        accuracy = ((values > 0) == labels).mean()
        table[name] = {"accuracy": accuracy.item(),
                       "standard error": (accuracy * (1 - accuracy) / len(bags)).item() ** 0.5,
                       "AUC": np.mean([roc_auc(labels, row) for row in values]).item()}
    print_table(table)
    write_json(f"{Path(args.file).stem}_bags.json",
               {"table": table, "labels": labels.tolist(),
                "logits": {name: values.tolist() for name, values in logits.items()}})
