"""Do synthetic images help a classifier that has few real ones?

For each pool of N labelled real images (and each seed, which draws pool and network) a small CNN is
trained on: the pool alone; the pool and r N strongly augmented copies of it ("classical"); the pool
and r N images that the generator made from it; those alone; and those first, the pool after. All
arms take equally many optimiser steps and meet the same held-out real images; each is compared with
the pool alone and with the classical arm of its ratio by DeLong's test, adjusted by Holm's rule.
Beside them stands a ridge regression on the pool's tokens: what self-supervision alone gives.

    aucs, survival = downstream(model, data, settings, folder)
    rows = compare_arms(data.names, aucs)

Source: pools, ratios and reconstruct / interpolate / img2img of DiNO-Diffusion (2024); synthetic
images first is RoentGen-v2's recipe. Ours: the network, the steps, the classical and "alone" arms
at each ratio, the tests. The tests know the chance of the test images, not that of drawing a pool
or starting a network: for that look at the deviation over seeds.

Writes downstream.json, a chart for each pool and strategy, and downstream/ with the images made,
into the run's folder.
"""
import hashlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dinodiff import prototypes, slerp
from evaluate import roc_auc
from experiments.common import (add_run_flags, batches_of, binary_labels, finding_columns, open_run,
                                with_known_labels)
from experiments.small_cnn import (Bytes, Chosen, from_bytes, light_augment, no_augment, predict,
                                   strong_augment, to_bytes, train_classifier)
from experiments.statistics import auc_influence, delong_test, holm, linear_probe
from support.command import (StatusLine, UserError, autocast_dtype, fraction, not_negative,
                             positive_int, print_table, seed_int, share_above_zero, user_errors)
from support.datasets import ImageSet
from support.files import atomic_file, write_json
from support.pictures import line_chart
from support.seeds import step_seed
from support.splits import image_groups

STRATEGIES = ("reconstruct", "interpolate", "img2img", "prototypes")
AUGMENTATIONS = {"none": no_augment, "light": light_augment, "strong": strong_augment}


@dataclass(frozen=True)
class Settings:
    pools: tuple = (50,)            # N, real images
    ratios: tuple = (1, 10, 50)     # r, synthetic images for each real one
    strategies: tuple = STRATEGIES[:1]
    seeds: tuple = (0, 1, 2)        # of pool, samples, augmentation and network together
    cnn_steps: int = 600            # optimiser steps of each arm, batch 32
    sample_steps: int = 10          # DDIM
    guidance: float = 1.0
    eta: float = 0.5                # DDIM: 0 deterministic, 1 noisy as DDPM
    strength: float = 0.6           # img2img: share of the noise put on the source image
    augment: str = "none"           # each batch of every arm: none, light, strong
    turns: bool = False             # flips and turns when augmenting: for histology only
    batch: int = 64                 # images at once when sampling and scoring


@dataclass(frozen=True)
class LabelledData:
    """The labelled images of a run, in its two parts."""
    images: ImageSet
    groups: list            # the patient of each image
    names: list             # L labels
    train: torch.Tensor     # numbers of images (N,)
    test: torch.Tensor      # numbers of images (M,)
    train_y: np.ndarray     # (N, L) of 0 and 1
    test_y: np.ndarray      # (M, L) of 0 and 1

    def labels_of(self, numbers):
        """Labels (K, L) of training images, a list of K numbers."""
        place = {number: row for row, number in enumerate(self.train.tolist())}
        return self.train_y[[place[number] for number in numbers]]


# ---------------------------------------------------------------- pools, and what is made of them

def draw_pool(numbers, groups, size, seed):
    """`size` of these numbers of images, patient after patient in a seeded order, so that smaller
    pools are parts of larger ones; the last patient may be cut."""
    names = sorted({groups[i] for i in numbers})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    place = {names[k]: n for n, k in enumerate(order)}
    return sorted(numbers, key=lambda i: place[groups[i]])[:size]


def conditions(strategy, tokens, others, count, seed):
    """(tokens (count, G, D), number of the pool image that gives label and start image (count,)).

    tokens (N, G, D) of the pool, others of all training images. Image j comes from pool image
    j % N, when interpolating mixed with another by up to a half, so that j % N is the nearer;
    or from centre j % K of as many K-means centres, where the nearest pool image gives the label.
    """
    N = len(tokens)
    if strategy == "prototypes":
        centers = prototypes(others, min(N, len(others.unique(dim=0))), seed)
        nearest = torch.cdist(centers.flatten(1), tokens.flatten(1)).argmin(dim=1)
        center = torch.arange(count) % len(centers)
        return centers[center], nearest[center]

    source = torch.arange(count) % N
    if strategy == "interpolate" and N > 1:
        generator = torch.Generator().manual_seed(step_seed("interpolate", seed))
        partner = (source + torch.randint(1, N, (count,), generator=generator)) % N
        weights = torch.rand(count, generator=generator) / 2
        mixed = [slerp(tokens[i], tokens[j], weight) for i, j, weight in
                 zip(source.tolist(), partner.tolist(), weights.tolist())]
        return torch.stack(mixed), source
    return tokens[source], source


def augmented_copies(pool, count, seed, turns):
    """(uint8 images (count, 3, H, W), pool image of each (count,)): the classical arm."""
    generator = torch.Generator().manual_seed(step_seed("classical", seed))
    source = torch.arange(count) % len(pool)
    images = from_bytes(pool)
    made = [to_bytes(strong_augment(images[rows], generator, turns)) for rows in source.split(256)]
    return np.concatenate(made), source.numpy()


def tokens_of(model, batches):
    """Tokens (N, G, D), on the CPU, of batches of images."""
    device = model.shift.device
    return torch.cat([model.embed(x.to(device)).cpu() for x in batches])


def synthesise(model, strategy, pool, others, count, seed, settings, folder):
    """(uint8 images (count, 3, H, W), pool image of each (count,)) by one strategy.

    pool: uint8 images (N, 3, H, W); others: tokens of all training images. What the generator makes
    is kept in the folder under a name that changes with the model, the pool and the settings.
    """
    device = model.shift.device
    images = from_bytes(pool)
    condition = None
    source = torch.arange(count) % len(pool)
    if model.config.condition == "dino":
        tokens = tokens_of(model, images.split(64))
        condition, source = conditions(strategy, tokens, others, count, seed)
    options = {"steps": settings.sample_steps, "guidance_scale": settings.guidance,
               "eta": settings.eta, "batch": settings.batch,
               "strength": settings.strength if strategy == "img2img" else 1.0,
               "dtype": autocast_dtype(device)}  # half the time where the chip computes in bfloat16

    # The name of the file: all that its content depends on.
    digest = hashlib.sha256(repr((strategy, count, seed, options)).encode())
    for x in (*model.state_dict().values(), torch.from_numpy(pool), source):
        digest.update(x.cpu().numpy().tobytes())
    path = Path(folder, f"{strategy}_{len(pool)}_{seed}_{digest.hexdigest()[:12]}.npy")

    if not path.is_file():
        made = []
        status = StatusLine(count, f"{strategy} of {len(pool)} images, seed {seed}")
        for rows in torch.arange(count).split(settings.batch):
            seeds = (seed * 1_000_003 + rows).tolist()
            x = model.sample(None if condition is None else condition[rows], seeds,
                             start=images[source[rows]], **options)
            made.append(to_bytes(x))
            status.update(rows[-1].item() + 1, images=len(rows))
        status.close()
        with atomic_file(path) as file:
            np.save(file, np.concatenate(made))
    return read_images(path, (count, *pool.shape[1:])), source.numpy()


def read_images(path, shape):
    """The uint8 array of that shape in a .npy file, left on the disk."""
    try:
        images = np.load(path, allow_pickle=False, mmap_mode="r")
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError(f"{images.dtype} of shape {images.shape}")
    except Exception as error:  # a damaged file makes NumPy raise nearly any type
        raise UserError(f"{path} cannot be read ({error})", f"{shape[0]} uint8 images are needed",
                        "delete it, it will be made again") from error
    return images


# ---------------------------------------------------------------- arms

def arms_of(name, pool, synthetic, steps):
    """Arms name -> stages of training ([(uint8 images, labels), ...], steps), all of equal sums.

    pool, synthetic: (images, labels (N, L)).
    """
    arms = {name: [([pool, synthetic], steps)]}
    if not name.endswith("classical"):
        arms[f"{name} alone"] = [([synthetic], steps)]
        arms[f"{name} first"] = [([synthetic], steps - steps // 4), ([pool], steps // 4)]
    return arms


def train_arm(stages, seed, vary, device, name="classifier"):
    """The classifier of one arm, from its stages as arms_of has them."""
    joined = []
    for sets, steps in stages:
        images, labels = (np.concatenate(parts) for parts in zip(*sets))
        joined.append((Bytes(images), labels, steps))
    return train_classifier(joined, seed, vary, device, name)


def train_referee(data, pools, settings, device):
    """A CNN that tells whether labels survive, trained on the training images of no pool's
    patients: it has seen neither the pool nor what is made of it. None if too few are left."""
    known = {data.groups[i] for pool in pools.values() for i in pool}
    rest = [i for i in data.train.tolist() if data.groups[i] not in known]
    if len(rest) < 2 * max(settings.pools):
        return None
    stage = (Chosen(data.images, torch.tensor(rest)), data.labels_of(rest), settings.cnn_steps)
    vary = partial(light_augment, turns=settings.turns)
    return train_classifier([stage], 0, vary, device, "referee")


def referee_aucs(referee, images, labels, settings, device):
    """AUC of each label (L,) on at most 1000 uint8 images; NaN for labels of one class."""
    labels = labels[:1000]
    scores = predict(referee, from_bytes(images[:1000]), settings.batch, device)
    return [roc_auc(y, score) if 0 < y.sum() < len(y) else np.nan
            for y, score in zip(labels.T, scores.T)]


def print_pool(data, pool, y, seed):
    """A line about a pool: who and what is in it."""
    counts = y.sum(axis=0)
    shares = ", ".join(f"{n:.0f} {name}" for name, n in zip(data.names, counts))
    groups = {data.groups[i] for i in pool}
    line = f"pool of {len(pool)}, seed {seed}: {len(groups)} groups; {shares}"
    if any(n in (0, len(pool)) for n in counts):
        line += "; what 0 or all images show cannot be learned"
    print(line)


def refuse_settings(model, data, settings):
    """Raise UserError for a model without sources and for too large pools."""
    condition = model.config.condition
    remedy = None
    if model.prompts:
        remedy = "pass another --checkpoint"
    elif condition == "none" and set(settings.strategies) != {"img2img"}:
        remedy = "pass another --checkpoint or --strategies img2img"
    if remedy:
        raise UserError(f"this model was trained with --condition {condition}",
                        "one that follows images is needed", remedy)
    if max(settings.pools) > len(data.train):
        raise UserError(f"--pools {max(settings.pools)}", f"the run has {len(data.train)} labelled "
                        "training images", "pass smaller pools, or a larger --train-limit")


def downstream(model, data, settings, folder):
    """Train all arms: (pool, arm) -> for each seed a list of auc_influence, one for each label; and
    (pool, what) -> for each seed the referee's AUCs (L,), see train_referee.

    data: LabelledData; folder: where samples are kept. Raises UserError as refuse_settings does.
    """
    refuse_settings(model, data, settings)
    device = model.shift.device
    pools = {(size, seed): draw_pool(data.train.tolist(), data.groups, size, seed)
             for size in settings.pools for seed in settings.seeds}
    referee = train_referee(data, pools, settings, device)
    shown = data.images.batch(data.test.tolist())
    vary = partial(AUGMENTATIONS[settings.augment], turns=settings.turns)
    others = None
    if "prototypes" in settings.strategies:
        others = tokens_of(model, batches_of(data.images, data.train, settings.batch))
    follows_images = model.config.condition == "dino"
    shown_tokens = tokens_of(model, shown.split(settings.batch)) if follows_images else None

    aucs = {}
    survival = {}
    for (size, seed), pool in pools.items():
        real = to_bytes(data.images.batch(pool))
        y = data.labels_of(pool)
        print_pool(data, pool, y, seed)

        # Sets of images with labels, and what each arm is trained on.
        sets = {"held-out images": (to_bytes(shown), data.test_y), "the pool": (real, y)}
        arms = {"real only": [([(real, y)], settings.cnn_steps)]}
        for strategy in ("classical", *settings.strategies):
            count = size * max(settings.ratios)
            if strategy == "classical":
                made, source = augmented_copies(real, count, seed, settings.turns)
            else:
                made, source = synthesise(model, strategy, real, others, count, seed, settings,
                                          folder)
            sets[strategy] = (made, y[source])
            for ratio in settings.ratios:
                n = ratio * size
                arms |= arms_of(f"1:{ratio} {strategy}", (real, y), (made[:n], y[source[:n]]),
                                settings.cnn_steps)

        # Train, and test on the held-out images.
        if referee is not None:
            for what, (images, labels) in sets.items():
                survival.setdefault((size, what), []).append(
                    referee_aucs(referee, images, labels, settings, device))
        for arm, stages in arms.items():
            net = train_arm(stages, seed, vary, device, f"{size}, seed {seed}, {arm}")
            scores = predict(net, shown, settings.batch, device)
            aucs.setdefault((size, arm), []).append(
                [auc_influence(*column) for column in zip(data.test_y.T, scores.T)])

        # The pool's tokens without any network of the question's own.
        if follows_images:
            tokens = tokens_of(model, from_bytes(real).split(settings.batch))
            _, scores = linear_probe(tokens.flatten(1), y, shown_tokens.flatten(1), data.test_y)
            aucs.setdefault((size, "ridge on tokens"), []).append(
                [auc_influence(*column) for column in zip(data.test_y.T, scores.T)])
    return aucs, survival


# ---------------------------------------------------------------- tests

def mean_influence(influences):
    """Mean of several (AUC, influence (M,)), which is one again."""
    return (np.mean([auc for auc, _ in influences]),
            np.mean([influence for _, influence in influences], axis=0))


def compare_arms(names, aucs):
    """What downstream returns -> (pool, arm) -> row of figures.

    "vs" columns: difference in mean AUC (over labels and seeds) to the pool alone, and to the
    classical arm of the same pool and ratio; half its 95 % interval; p value of DeLong's test,
    adjusted by Holm over all rows. "tests": the same for each label, adjusted over all labels too.
    """
    # AUCs, and for each label and their mean what the tests need.
    rows = {}
    means = {}
    for key, seeds in aucs.items():
        of_label = {name: mean_influence([labels[j] for labels in seeds])
                    for j, name in enumerate(names)}
        per_seed = [np.mean([auc for auc, _ in labels]) for labels in seeds]
        means[key] = {**of_label, "mean": mean_influence(list(of_label.values()))}
        rows[key] = {"AUC": float(np.mean(per_seed)),
                     "sd": float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
                     **{name: float(auc) for name, (auc, _) in of_label.items()},
                     "tests": {}}

    # Two families of tests against each rival: of mean AUCs, and of all labels.
    for rival in ("real only", "classical"):
        pairs = rivals_of(rows, rival)
        for _, key, figures in adjusted_tests(means, pairs, ["mean"]):
            rows[key] |= {f"{what} {rival}": figures[what] for what in ("vs", "+-", "p")}
        for name, key, figures in adjusted_tests(means, pairs, names):
            rows[key]["tests"][f"{name} vs {rival}"] = {
                f"vs {rival}": figures["vs"], "+-": figures["+-"], "p": figures["p"]}
    return rows


def rivals_of(keys, rival):
    """{(pool, arm): (pool, rival arm)}: the pool alone, or the classical arm of the same ratio."""
    pairs = {}
    for size, arm in keys:
        other = rival if rival == "real only" else f"{arm.split()[0]} {rival}"
        if arm not in ("real only", other) and (size, other) in keys:
            pairs[size, arm] = (size, other)
    return pairs


def adjusted_tests(means, pairs, names):
    """A list of (label, (pool, arm), {"vs", "+-", "p"}): all pairs and labels, one Holm family."""
    tests = [(name, key, delong_test(means[key][name], means[other][name]))
             for key, other in pairs.items() for name in names]
    adjusted = holm([p for *_, (_, _, p) in tests])
    return [(name, key, {"vs": difference, "+-": 1.96 * error, "p": p})
            for (name, key, (difference, error, _)), p in zip(tests, adjusted)]


# ---------------------------------------------------------------- the question

def labelled_data(run, args):
    """LabelledData of a run: its labels, without images that have none."""
    images = run.images
    columns = args.label_column or finding_columns(images)
    train, test = with_known_labels(images, columns, run.train, run.test)
    names, train_y, test_y = binary_labels(images.columns, columns, train, test, args.least)
    with user_errors():
        groups = image_groups(images)
    return LabelledData(images, groups, names, train, test, train_y, test_y)


def draw_strategy(path, size, strategy, arms, ratios):
    """A chart of mean AUC against the ratio, with the rival arms."""
    alone = arms["real only"]["AUC"]
    series = {"real only": ((0, *ratios), [alone] * (len(ratios) + 1))}
    for arm in ("classical", strategy, f"{strategy} alone", f"{strategy} first"):
        x = list(ratios)
        y = [arms[f"1:{ratio} {arm}"]["AUC"] for ratio in ratios]
        if not arm.endswith("alone"):
            x = [0, *x]
            y = [alone, *y]
        series[arm] = (x, y)
    line_chart(path, series, f"{size} real images, {strategy}", "synthetic images for each real "
               "one", "mean AUC")
    print(f"wrote {path}")


def without_nan(values):
    """JSON has no NaN: None in its place."""
    return [value if np.isfinite(value) else None for value in values]


def of_pool(size, table):
    """{arm: row} of {(pool, arm): row}."""
    return {arm: row for (pool, arm), row in table.items() if pool == size}


def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--pools", type=positive_int, nargs="+", default=[50], metavar="N",
        help="pools of N real images, a synthetic set made from each")
    add("--ratios", type=positive_int, nargs="+", default=[1, 10, 50], metavar="R",
        help="synthetic images for each real one")
    add("--strategies", choices=STRATEGIES, nargs="+", default=["reconstruct", "interpolate"],
        help="how they are made")
    add("--label-column", nargs="+", help="of labels.csv (default: the findings)")
    add("--group-column", help="who is drawn as a whole (default: a patient column, if there is "
        "one)")
    add("--least", type=positive_int, default=20, help="leave out labels with fewer images on "
        "either side, in training or held-out images")
    add("--seeds", type=seed_int, nargs="+", default=[0, 1, 2],
        help="of pools, samples and networks")
    add("--cnn-steps", type=positive_int, default=600, help="steps of the small CNN")
    add("--augment", choices=list(AUGMENTATIONS), default="none", help="each batch of every arm, "
        "anew each time; strong is the classical arm's")
    add("--turns", action="store_true", help="augment by flips and turns: for histology only")
    add("--sample-steps", type=positive_int, default=10, help="DDIM steps")
    add("--guidance", type=not_negative, default=1.0, help="guidance scale, 1.0 = off")
    add("--eta", type=fraction, default=0.5, help="DDIM: 0 deterministic, 1 noisy as DDPM")
    add("--strength", type=share_above_zero, default=0.6, help="img2img: share of the noise")


def main(args):
    run = open_run(args)
    data = labelled_data(run, args)
    settings = Settings(
        pools=tuple(args.pools), ratios=tuple(args.ratios), strategies=tuple(args.strategies),
        seeds=tuple(args.seeds), cnn_steps=args.cnn_steps, sample_steps=args.sample_steps,
        guidance=args.guidance, eta=args.eta, strength=args.strength, augment=args.augment,
        turns=args.turns, batch=args.batch)
    with user_errors():
        aucs, survival = downstream(run.model, data, settings, run.folder / "downstream")

    # Figures.
    rows = compare_arms(data.names, aucs)
    survival = {key: dict(zip(data.names, without_nan(np.mean(values, axis=0).tolist())))
                for key, values in survival.items()}
    print(f"AUC on {len(data.test)} held-out real images, mean of seeds {args.seeds} (sd: over "
          f"them); {args.cnn_steps} CNN steps of 32 in every arm, a quarter of them on the pool "
          f"after 'first'; augmentation on the fly: {args.augment}; vs: difference in mean AUC, "
          "+- its 95 %, p of DeLong's test, Holm-adjusted")
    print("labels: classical, reconstruct, img2img: of the source; interpolate: of the nearer "
          "source; prototypes: of the pool image with the nearest tokens")

    # A table and charts for each pool.
    for size in settings.pools:
        arms = of_pool(size, rows)
        print(f"\npool of {size} real images:")
        print_table({arm: {name: value for name, value in row.items() if name != "tests"}
                     for arm, row in arms.items()})
        kept = of_pool(size, survival)
        print("do labels survive? AUC of a CNN trained on all training images of other patients:"
              if kept else "too few other training images to tell whether labels survive")
        print_table(kept)
        for strategy in settings.strategies:
            path = run.folder / f"downstream_{size}_{strategy}.png"
            draw_strategy(path, size, strategy, arms, settings.ratios)

    write_json(run.folder / "downstream.json", {
        "settings": asdict(settings), "test_images": len(data.test), "labels": data.names,
        "arms": {str(size): of_pool(size, rows) for size in settings.pools},
        "survival": {str(size): of_pool(size, survival) for size in settings.pools}})
