"""Do synthetic images help a classifier that has few real ones?

Several pools of N labelled images are drawn, patient by patient; the other training images count as
unlabelled. The run's model makes R reconstructions of an image, which inherit its label. A small
CNN (or the run's ViT) is trained on each arm and tested on real images of other patients:

    real                        the pool
    augmented                   the pool, augmented differently in each batch
    blurred                     the pool, blurred 3 x 3: what softness alone would cost
    duplicates                  the pool, and plain copies of its images, R times as many
    synthetic                   the pool, and R reconstructions of each image
    synthetic first             3/4 of the steps on reconstructions, then the pool at a third of
                                the learning rate
    pseudo-labels               the pool, and the third of the unlabelled images that a ridge
                                regression on the pool's tokens is surest of, as it labels them
                                (too often as positive where few images are positive)
    pseudo-labels, synthetic    the same, and R reconstructions of each of these images

All arms of a pool start from the same weights and take the same number of steps. The baseline is
that ridge regression, without a CNN; with all training labels it shows what is left to gain.

Intervals come from the paired t test over pools. Without --folds all pools are tested on the same
held-out images. With --folds K, pool p is tested on fold p % K of all labelled images; the model
may then have seen test images, without labels.

Sources: DiNO-Diffusion (2024) for pools and ratios; RoentGen-v2 for "synthetic first". The rest is
ours. Writes downstream.json and downstream.png (images above their reconstructions) into the run's
folder.
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student

from experiments.common import add_run_flags, open_run, read_labels, refuse_vectors
from experiments.ladder import blur
from experiments.small_cnn import from_bytes, predict, strong_augment, to_bytes, train_classifier
from experiments.statistics import mean_auc, ridge_scores
from support.command import StatusLine, UserError, number, print_table
from support.files import write_json
from support.pictures import save_grid
from support.ranks import autocast_dtype
from support.seeds import step_seed


# ---------------------------------------------------------------- pools

def shuffled_patients(groups, seed):
    """The patients in a seeded order, a list."""
    patients = sorted(set(groups))
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed))
    return [patients[j] for j in order.tolist()]


def draw_pool(rows, groups, size, seed):
    """`size` of these rows, whole patients in a seeded order; the last patient may be cut."""
    rank = {patient: k for k, patient in enumerate(shuffled_patients(groups, seed))}
    return sorted(rows, key=lambda i: rank[groups[i]])[:size]


def split_pools(groups, train_count, folds):
    """[(rows to draw a pool from, rows to test on)]: pool p uses entry p % len.

    groups: the patient of each row. folds 0: the first train_count rows are for training; else all
    rows are split by patient into that many folds.
    """
    rows = range(len(groups))
    if not folds:
        return [([*rows[:train_count]], [*rows[train_count:]])]
    fold_of = {patient: k % folds for k, patient in enumerate(shuffled_patients(groups, seed=0))}
    return [([i for i in rows if fold_of[groups[i]] != fold],
             [i for i in rows if fold_of[groups[i]] == fold]) for fold in range(folds)]


# ---------------------------------------------------------------- arms

def surest_third(scores):
    """Scores (N, L) of ridge_scores -> (rows of the third farthest from 0, their labels)."""
    rows = np.argsort(-np.abs(scores).mean(axis=1), kind="stable")[:len(scores) // 3]
    return rows, (scores[rows] > 0).astype(float)


def arms_of(pool, made, named, made_of_named, steps):
    """{arm: stages [(images, labels, steps), ...]}, as train_classifier takes them.

    Each argument is a pair: images (N, 3, H, W) uint8 and labels (N, L). made, made_of_named:
    reconstructions of the images of pool and named, which take turns.
    """
    def together(*sets):
        images, labels = map(np.concatenate, zip(*sets))
        return [(images, labels, steps)]

    copies = tuple(x[np.arange(len(made[0])) % len(x)] for x in pool)
    return {"real": together(pool),
            "augmented": together(pool),
            "blurred": together((to_bytes(blur(from_bytes(pool[0]))), pool[1])),
            "duplicates": together(pool, copies),
            "synthetic": together(pool, made),
            "synthetic first": [(*made, steps - steps // 4), (*pool, steps // 4)],
            "pseudo-labels": together(pool, named),
            "pseudo-labels, synthetic": together(pool, named, made_of_named)}


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
    add_run_flags(parser)
    add = parser.add_argument
    add("--n", type=number(int, 5), default=50, help="real images in a pool")
    add("--pools", type=number(int, 2), default=5, help="how many pools to draw")
    add("--ratio", type=number(float, 0.01), default=10, help="reconstructions per image; 0.25: of "
        "every fourth image")
    add("--folds", type=number(int), default=0, help="split all labelled images by patient into "
        "this many folds; each pool is tested on one, in turn (0: on the run's held-out images)")
    add("--label-column", nargs="+", help="of labels.csv (default: the findings)")
    add("--least", type=number(int, 1), default=20, help="leave out labels with fewer images on "
        "either side, in training or held-out images")
    add("--classifier", choices=("cnn", "vit"), default="cnn",
        help="a small CNN, or the run's ViT, fine-tuned at a tenth of the CNN's learning rate")
    add("--cnn-size", type=number(int, 8), default=64, help="pixels a side that the CNN sees")
    add("--cnn-steps", type=number(int, 4), default=300, help="steps of each arm, batch 32")
    add("--sample-steps", type=number(int, 1), default=10, help="of the sampler")


def main(args):
    run = open_run(args)
    model, images = run.model, run.images
    device = model.shift.device
    if model.config.condition != "dino":
        raise UserError(f"this model was trained with --condition {model.config.condition}",
                        "one that follows images is needed", "pass another --checkpoint")
    refuse_vectors(model)
    vit = model.embedder.vit if args.classifier == "vit" else None

    # All labelled images, by row: the run's training part, then its held-out part.
    names, train, test, labels = read_labels(images, args.label_column, run.train, run.test,
                                             args.least)
    indices = torch.cat([train, test])
    labels = labels[indices]
    groups = [images.patients[i] for i in indices]
    splits = split_pools(groups, len(train), args.folds)
    smallest = min(len(candidates) for candidates, _ in splits)
    if args.n > smallest - 3:  # the rest counts as unlabelled
        raise UserError(f"--n {args.n}", f"there are {smallest} labelled images to draw from",
                        "pass a smaller --n, or a larger --train-limit")
    for _, rows in splits:
        if not rows or (labels[rows].min(axis=0) == labels[rows].max(axis=0)).any():
            raise UserError(f"--folds {args.folds}", "a fold has no images, or of one class only",
                            "pass fewer folds")

    def shrink(x):
        size = min(args.cnn_size, x.shape[-1])
        return to_bytes(F.interpolate(x, size, mode="area"))

    # Pixels and tokens of each row; reconstructions are made when a pool first needs them.
    pixels = np.concatenate([shrink(x) for x in images.batches(indices, args.batch)])
    tokens = torch.cat([
        model.embed(images.batch(part.tolist()).to(device), [images.files[i] for i in part]).cpu()
        for part in indices.split(args.batch)])
    features = tokens.flatten(1)
    made = {}  # (row, k) -> its k-th reconstruction

    def reconstruct(rows, rows_labels):
        """R reconstructions per row, rows taking turns, with their labels: (images, labels)."""
        k, turn = np.divmod(np.arange(max(1, round(args.ratio * len(rows)))), len(rows))
        keys = list(zip(np.asarray(rows)[turn].tolist(), k.tolist()))
        missing = [key for key in keys if key not in made]
        status = StatusLine(len(made) + len(missing), "images reconstructed", len(made))
        for first in range(0, len(missing), args.batch):
            part = missing[first:first + args.batch]
            x = model.sample(tokens[[row for row, _ in part]],
                             [step_seed("downstream", row, k) for row, k in part],
                             args.sample_steps, batch=args.batch, dtype=autocast_dtype(device))
            made.update(zip(part, shrink(x)))
            status.update(len(made), images=len(x))
        status.close()
        return np.stack([made[key] for key in keys]), rows_labels[turn]

    aucs = {}
    for pool_seed in range(args.pools):
        candidates, test = splits[pool_seed % len(splits)]
        pool = draw_pool(candidates, groups, args.n, pool_seed)
        others = np.setdiff1d(candidates, pool)
        counts = ", ".join(f"{n:.0f} {name}" for name, n in zip(names, labels[pool].sum(axis=0)))
        print(f"pool {pool_seed}: {len(pool)} images of {len({groups[i] for i in pool})} "
              f"patients; {counts}")

        # The linear baseline, and the labels that it gives the unlabelled images.
        aucs.setdefault("ridge on tokens", []).append(mean_auc(
            labels[test], ridge_scores(features[pool], labels[pool], features[test])))
        aucs.setdefault("ridge, all labels", []).append(mean_auc(
            labels[test], ridge_scores(features[candidates], labels[candidates], features[test])))
        surest, named_labels = surest_third(
            ridge_scores(features[pool], labels[pool], features[others]))
        named = others[surest]
        print(f"pseudo-labels of {len(named)} images, "
              f"{np.mean(named_labels == labels[named]):.0%} right")

        # The arms.
        arms = arms_of((pixels[pool], labels[pool]), reconstruct(pool, labels[pool]),
                       (pixels[named], named_labels), reconstruct(named, named_labels),
                       args.cnn_steps)
        for arm, stages in arms.items():
            augment = strong_augment if arm == "augmented" else None
            net = train_classifier(stages, pool_seed, device, augment, f"pool {pool_seed}, {arm}",
                                   vit)
            scores = predict(net, pixels[test], device, args.batch)
            aucs.setdefault(arm, []).append(mean_auc(labels[test], scores))
        print("AUC: " + ", ".join(f"{arm} {values[-1]:.3f}" for arm, values in aucs.items()))

    rows = summarise(aucs)
    print(f"AUC of {', '.join(names)}: mean and sd over {args.pools} pools of {args.n}; "
          f"1:{args.ratio:g}, {args.cnn_steps} CNN steps; differences with 95 % over pools")
    print_table(rows)
    shown = list(made)[:8]
    save_grid(run.folder / "downstream.png", [
        from_bytes(pixels[[row for row, _ in shown]]),
        from_bytes(np.stack([made[key] for key in shown]))])
    write_json(run.folder / "downstream.json",
               {"n": args.n, "pools": args.pools, "ratio": args.ratio, "folds": args.folds,
                "classifier": args.classifier,
                "labels": names, "pool by pool": aucs, "arms": rows})
