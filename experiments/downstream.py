"""Do synthetic images help a classifier that has few real ones?

Several pools of N labelled images are drawn, patient by patient. The run's model makes R
reconstructions of each image of a pool, which inherit the labels of their source. A small CNN is
trained on each arm and tested on real images of other patients:

    real              the pool
    duplicates        the pool, and R N plain copies of it
    classical         the pool, and R N augmented copies
    synthetic         the pool, and R N synthetic images
    synthetic first   3/4 of the steps on synthetic images, then the pool at a third of the rate

All arms of a pool start from the same weights and take the same number of steps. The baseline is
ridge regression on the tokens of the pool, which needs neither generator nor CNN.

Intervals come from the paired t test over pools. Without --folds all pools are tested on the same
held-out images. With --folds K, pool p is tested on fold p % K of all labelled images, so that the
interval includes the choice of test images; the model may then have seen test images, unlabelled.

Sources: DiNO-Diffusion (2024) for pools and ratios; RoentGen-v2 for "synthetic first". The network,
the duplicates and the baseline are ours. Writes downstream.json and downstream.png (images of pools
above their reconstructions) into the run's folder.
"""
import numpy as np
import torch
from scipy.stats import t as student

from experiments.common import (add_run_flags, binary_labels, finding_columns, open_run,
                                with_known_labels)
from experiments.small_cnn import (from_bytes, load_bytes, predict, strong_augment, to_bytes,
                                   train_classifier)
from experiments.statistics import linear_probe, mean_auc
from support.command import StatusLine, UserError, autocast_dtype, number, print_table
from support.files import write_json
from support.pictures import save_grid
from support.seeds import step_seed


# ---------------------------------------------------------------- pools

def shuffled_patients(indices, groups, seed):
    """The patients of these images in a seeded order, a list."""
    patients = sorted({groups[i] for i in indices})
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed))
    return [patients[j] for j in order.tolist()]


def draw_pool(indices, groups, size, seed):
    """`size` of these images, whole patients in a seeded order; the last patient may be cut."""
    rank = {patient: k for k, patient in enumerate(shuffled_patients(indices, groups, seed))}
    return sorted(indices, key=lambda i: rank[groups[i]])[:size]


def split_pools(train, test, groups, folds):
    """[(indices to draw a pool from, indices to test on)]: pool p uses entry p % len.

    folds 0: the run's own split; else all images in that many folds by patient.
    """
    if not folds:
        return [(train, test)]
    fold_of = {patient: k % folds
               for k, patient in enumerate(shuffled_patients(train + test, groups, seed=0))}
    return [([i for i in train + test if fold_of[groups[i]] != fold],
             [i for i in train + test if fold_of[groups[i]] == fold]) for fold in range(folds)]


# ---------------------------------------------------------------- images and arms

def reconstruct(model, tokens, count, seed, steps, batch):
    """uint8 images (count, 3, H, W); image j is made from row j % N of the tokens (N, G, D)."""
    parts = []
    status = StatusLine(count, f"synthetic images of pool {seed}")
    for rows in torch.arange(count).split(batch):
        seeds = [step_seed("downstream", seed, row) for row in rows.tolist()]
        x = model.sample(tokens[rows % len(tokens)], seeds, steps=steps, eta=0.5, batch=batch,
                         dtype=autocast_dtype(model.shift.device))
        parts.append(to_bytes(x))
        status.update(rows[-1].item() + 1, images=len(rows))
    status.close()
    return np.concatenate(parts)


def augmented_copies(pool, count, seed):
    """uint8 images (count, 3, H, W); image j is a variant of pool[j % N]."""
    generator = torch.Generator().manual_seed(step_seed("classical", seed))
    parts = torch.arange(count).split(256)
    images = from_bytes(pool)
    return np.concatenate([to_bytes(strong_augment(images[rows % len(pool)], generator))
                           for rows in parts])


def arms_of(pool, y, classical, synthetic, steps):
    """{arm: stages [(images, labels, steps), ...]}, as train_classifier takes them.

    pool, classical, synthetic: uint8 images; image j of the latter two is made from pool[j % N];
    y (N, L): labels of the pool.
    """
    source = np.arange(len(synthetic)) % len(pool)

    def with_pool(images):
        return [(np.concatenate([pool, images]), np.concatenate([y, y[source]]), steps)]

    return {"real": [(pool, y, steps)],
            "duplicates": with_pool(pool[source]),
            "classical": with_pool(classical),
            "synthetic": with_pool(synthetic),
            "synthetic first": [(synthetic, y[source], steps - steps // 4), (pool, y, steps // 4)]}


# ---------------------------------------------------------------- statistics

def difference(a, b):
    """(mean of a - b over pools, half of its 95 % interval by the paired t test)."""
    paired = np.subtract(a, b)
    error = paired.std(ddof=1) / np.sqrt(len(paired))
    return float(paired.mean()), float(student.ppf(0.975, len(paired) - 1) * error)


def summarise(aucs):
    """{arm: AUC of each pool} -> {arm: row of figures}: mean, sd, differences with intervals."""
    rows = {}
    for arm, values in aucs.items():
        rows[arm] = {"AUC": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        for rival in ("real", "duplicates"):
            if arm not in ("real", rival):
                gain, half = difference(values, aucs[rival])
                rows[arm] |= {f"vs {rival}": gain, f"+- ({rival})": half}
    return rows


# ---------------------------------------------------------------- the experiment

def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--n", type=number(int, 2), default=50, help="real images in a pool")
    add("--pools", type=number(int, 2), default=5, help="how many pools to draw")
    add("--ratio", type=number(float, 0.01), default=10, help="synthetic images for each real one")
    add("--folds", type=number(int), default=0, help="test on folds by patient of all labelled "
        "images, one a pool in turn (0: on the run's held-out images)")
    add("--label-column", nargs="+", help="of labels.csv (default: the findings)")
    add("--least", type=number(int, 1), default=20, help="leave out labels with fewer images on "
        "either side, in training or held-out images")
    add("--cnn-steps", type=number(int, 4), default=600, help="steps of each arm, batch 32")
    add("--sample-steps", type=number(int, 1), default=10, help="DDIM steps")


def main(args):
    run = open_run(args)
    model, images = run.model, run.images
    device = model.shift.device
    if model.config.condition != "dino":
        raise UserError(f"this model was trained with --condition {model.config.condition}",
                        "one that follows images is needed", "pass another --checkpoint")

    # Labels of all images, and the candidates for pools and for tests.
    columns = args.label_column or finding_columns(images)
    train, test = with_known_labels(images, columns, run.train, run.test)
    names, train_y, test_y = binary_labels(images.columns, columns, train, test, args.least)
    labels = np.zeros((len(images), len(names)))
    labels[train], labels[test] = train_y, test_y
    groups = images.groups or list(images.files)
    splits = split_pools(train.tolist(), test.tolist(), groups, args.folds)
    smallest = min(len(candidates) for candidates, _ in splits)
    if args.n > smallest:
        raise UserError(f"--n {args.n}", f"there are {smallest} labelled images to draw from",
                        "pass a smaller --n, or a larger --train-limit")
    for _, test in splits:
        if not (0 < labels[test].sum(axis=0)).all() or (labels[test].min(axis=0) == 1).any():
            raise UserError(f"--folds {args.folds}", "a fold has images of one class only",
                            "pass fewer folds")

    def tokens_of(indices):
        """Standardised tokens (N, G, D) on the CPU."""
        return torch.cat([model.embed(images.batch(rows.tolist()).to(device),
                                      [images.files[i] for i in rows.tolist()]).cpu()
                          for rows in torch.tensor(indices).split(args.batch)])

    aucs = {}
    rows_of_grid = []
    count = max(1, round(args.ratio * args.n))
    for pool_seed in range(args.pools):
        candidates, test = splits[pool_seed % len(splits)]
        indices = draw_pool(candidates, groups, args.n, pool_seed)
        pool, y = load_bytes(images, indices), labels[indices]
        counts = ", ".join(f"{n:.0f} {name}" for name, n in zip(names, y.sum(axis=0)))
        print(f"pool {pool_seed}: {len(indices)} images of "
              f"{len({groups[i] for i in indices})} patients; {counts}")

        tokens = tokens_of(indices)
        classical = augmented_copies(pool, count, pool_seed)
        synthetic = reconstruct(model, tokens, count, pool_seed, args.sample_steps, args.batch)
        rows_of_grid += [from_bytes(pool[:8]), from_bytes(synthetic[:8])]

        # The arms, and the baseline.
        test_images = load_bytes(images, test)
        for arm, stages in arms_of(pool, y, classical, synthetic, args.cnn_steps).items():
            net = train_classifier(stages, pool_seed, device,
                                   name=f"pool {pool_seed}, {arm}")
            scores = predict(net, test_images, device, args.batch)
            aucs.setdefault(arm, []).append(mean_auc(labels[test], scores))
        ridge, _ = linear_probe(tokens.flatten(1), y, tokens_of(test).flatten(1), labels[test])
        aucs.setdefault("ridge on tokens", []).append(float(np.mean(ridge)))

    rows = summarise(aucs)
    print(f"AUC of {', '.join(names)}: mean and sd over {args.pools} pools of {args.n}; "
          f"1:{args.ratio:g}, {args.cnn_steps} CNN steps; differences with 95 % over pools")
    print_table(rows)
    save_grid(run.folder / "downstream.png", rows_of_grid[:4])
    write_json(run.folder / "downstream.json",
               {"n": args.n, "pools": args.pools, "ratio": args.ratio, "folds": args.folds,
                "labels": names, "pool by pool": aucs, "arms": rows})
    gain, half = difference(aucs["synthetic"], aucs["duplicates"])
    print(f"synthetic images instead of duplicates: {gain:+.3f} AUC +- {half:.3f}")
