"""Is our ABMIL the published one? Accuracy on the five classic sets of bags.

    python -m experiments bags musk1.npz                 # ten folds, five times

FILE.npz holds `x` (N, D), the instances of all bags, `bag` (N,), whose instance each is, and
`bag_label` (N,), 0 or 1, equal in a bag. The network is the published one: 256, 128 and 64 units
with dropout, then the gated attention and the head of regional.py; one bag a step, Adam at 5e-4
with an L2 weight of 0.005 (other sets had others: --lr, --weight-decay), 100 epochs, of which the
one with the least loss + error on a tenth of the training bags counts.

Source: Ilse, Tomczak & Welling 2018 (arXiv 1802.04712), equation 9 and table 1; the architecture is
that of MI-Net (Wang et al. 2016).
"""
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from evaluate import roc_auc
from regional import MILConfig, RegionalMIL
from support.command import (StatusLine, UserError, not_negative, not_negative_int,
                             positive_float, positive_int, print_table)
from support.files import write_json
from support.seeds import step_seed


class ClassicABMIL(nn.Module):
    """A bag x (n, D), present (n,) bool -> logit. Features are standardised by `instances`."""

    def __init__(self, instances):
        super().__init__()
        self.register_buffer("shift", instances.mean(dim=0))
        self.register_buffer("scale", instances.std(dim=0).clamp(min=1e-6))
        widths = (instances.shape[1], 256, 128, 64)
        layers = [(nn.Linear(*pair), nn.ReLU(), nn.Dropout()) for pair in zip(widths, widths[1:])]
        self.encoder = nn.Sequential(*(part for layer in layers for part in layer))
        self.mil = RegionalMIL(MILConfig(in_dim=64, windows=(), dim=64))
        self.mil.embed = nn.Identity()  # its tokens are made here

    def forward(self, x, present):
        tokens = self.encoder((x - self.shift) / self.scale)
        logits, _ = self.mil.pool(tokens[None], present[None])
        return logits[0]


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
            raise ValueError("bag_label is not 0 or 1, or differs in a bag")
    except Exception as error:  # a damaged file makes NumPy raise nearly any type
        raise UserError(f"{path} holds no bags ({error})", "x (N, D) finite, bag (N,) and "
                        "bag_label (N,) of 0 and 1 are needed", "pass another file") from error
    return [(instances, labels.pop()) for instances, labels in bags]


def draw_folds(labels, count, seed):
    """The fold of each bag, drawn so that labels are shared evenly."""
    generator = np.random.default_rng(seed)
    fold = np.empty(len(labels), dtype=int)
    for label in (0, 1):
        rows = generator.permutation(np.flatnonzero(np.array(labels) == label))
        fold[rows] = (np.arange(len(rows)) + generator.integers(count)) % count
    return fold


def pad_bags(bags):
    """[(x (n, D), label)] -> x (K, longest, D), present (K, longest), labels (K,)."""
    x = nn.utils.rnn.pad_sequence([instances for instances, _ in bags], batch_first=True)
    lengths = torch.tensor([len(instances) for instances, _ in bags])
    present = torch.arange(x.shape[1]) < lengths[:, None]
    return x, present, torch.tensor([float(label) for _, label in bags])


def train_together(models, bags, rows, checks, epochs, lr, weight_decay, seed,
                   epoch_done=lambda epoch: None):
    """Train K networks side by side, each as it would be alone, one bag a step.

    rows, checks: for each network its training bags, and equally many for all to choose the epoch
    by. A network with fewer rows than the most meets its first bag of an epoch twice.
    """
    params, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    judge = copy.deepcopy(skeleton).eval()

    def loss(params, buffers, x, present, label):
        logit = functional_call(skeleton, (params, buffers), (x, present))
        return F.binary_cross_entropy_with_logits(logit, label)

    def loss_and_error(params, buffers, x, present, labels):
        logits = vmap(lambda *bag: functional_call(judge, (params, buffers), bag))(x, present)
        error = ((logits > 0) != (labels > 0)).float().mean()
        return F.binary_cross_entropy_with_logits(logits, labels) + error

    gradients = vmap(grad(loss), randomness="different")  # dropout differs from one to the next
    x, present, labels = pad_bags([bags[i] for mine in checks for i in mine])
    shown = [part.unflatten(0, (len(models), -1)) for part in (x, present, labels)]
    best = {name: value.detach().clone() for name, value in params.items()}
    least = torch.full((len(models),), float("inf"))
    optimizer = torch.optim.Adam(params.values(), lr=lr, weight_decay=weight_decay, fused=True)
    torch.manual_seed(step_seed(seed, "bags") % 2 ** 31)
    for epoch in range(epochs):
        orders = [np.array(mine)[torch.randperm(len(mine)).numpy()] for mine in rows]
        for step in range(max(map(len, rows))):
            batch = pad_bags([bags[order[step % len(order)]] for order in orders])
            for name, gradient in gradients(params, buffers, *batch).items():
                params[name].grad = gradient
            optimizer.step()

        # Keep the networks that were never as good as now.
        with torch.no_grad():
            now = vmap(loss_and_error)(params, buffers, *shown)
            for name, value in params.items():
                best[name][now < least] = value[now < least]
            least = torch.minimum(now, least)
        epoch_done(epoch)

    for i, model in enumerate(models):
        model.load_state_dict({name: value[i] for name, value in best.items()}, strict=False)
        model.eval()


def add_flags(parser):
    add = parser.add_argument
    add("file", help=".npz of bags")
    add("--folds", type=positive_int, default=10, help="of cross-validation")
    add("--repeats", type=positive_int, default=5, help="of it, each with new folds")
    add("--epochs", type=positive_int, default=100, help="of training")
    add("--lr", type=positive_float, default=5e-4, help="of Adam")
    add("--weight-decay", type=not_negative, default=0.005, help="L2 weight in Adam's gradient")
    add("--together", type=positive_int, default=50, help="networks side by side: fewer are faster "
        "where bags differ much in length")
    add("--seed", type=not_negative_int, default=0, help="of everything random")
    add("--out", help="JSON file (default: the file's name, here)")


def main(args):
    bags = read_bags(args.file)
    labels = [label for _, label in bags]
    fewest = min(labels.count(0), labels.count(1))
    if not 2 <= args.folds <= fewest:
        raise UserError(f"--folds {args.folds}, and {fewest} bags of one label",
                        "two folds or more, and a bag of each label in each, are needed",
                        "change --folds")
    sizes = [len(x) for x, _ in bags]
    print(f"{len(bags)} bags ({labels.count(1)} positive) of {min(sizes)} to {max(sizes)} "
          f"instances, {bags[0][0].shape[1]} numbers each")

    # A network for each repeat and fold.
    folds = [draw_folds(labels, args.folds, step_seed(args.seed, repeat))
             for repeat in range(args.repeats)]
    jobs = [(repeat, fold) for repeat in range(args.repeats) for fold in range(args.folds)]
    scores = np.empty((args.repeats, len(bags)))
    status = StatusLine(len(jobs) * args.epochs, "epochs of all networks")
    for first in range(0, len(jobs), args.together):
        chunk = jobs[first:first + args.together]
        rows = [np.flatnonzero(folds[repeat] != fold) for repeat, fold in chunk]
        torch.manual_seed(step_seed(args.seed, "start", first) % 2 ** 31)
        models = [ClassicABMIL(torch.cat([bags[i][0] for i in mine])) for mine in rows]
        orders = [mine[torch.randperm(len(mine)).numpy()] for mine in rows]
        count = max(1, min(map(len, rows)) // 10)

        def epoch_done(epoch, first=first, networks=len(chunk)):
            status.update(first * args.epochs + (epoch + 1) * networks)

        train_together(models, bags, [order[count:] for order in orders],
                       [order[:count] for order in orders], args.epochs, args.lr,
                       args.weight_decay, step_seed(args.seed, first), epoch_done)
        for model, (repeat, fold) in zip(models, chunk):
            for i in np.flatnonzero(folds[repeat] == fold):
                with torch.no_grad():
                    x = bags[i][0]
                    scores[repeat, i] = model(x, torch.ones(len(x), dtype=torch.bool)).item()
    status.close()

    right = ((scores > 0) == np.array(labels)).mean(axis=1)
    aucs = [roc_auc(np.array(labels), row) for row in scores]
    larger = max(np.mean(labels), 1 - np.mean(labels))
    table = {what: {"mean": float(np.mean(values)),
                    "sd over repeats": float(np.std(values, ddof=1)) if args.repeats > 1 else None,
                    "always the larger class": float(chance)}
             for what, values, chance in (("accuracy", right, larger), ("AUC", aucs, 0.5))}
    print_table(table)
    path = Path(args.out or f"{Path(args.file).stem}_bags.json")
    write_json(path, {"table": table, "labels": labels, "logits": scores.tolist()})
    print(f"wrote {path}")
