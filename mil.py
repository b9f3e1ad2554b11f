"""Multiple-instance learning on slides: train, compare and explain the models of regional.py.

    python mil.py --data slides                  # generated slides, minutes on a laptop
    python mil.py --data FOLDER                  # images, whole slides, or features and coords
    python mil.py --data mosaic --patches-of FOLDER    # slides made of real labelled patches
    python mil.py --data FOLDER --explain SLIDE  # heat map of one slide, by the finished run

A slide becomes a bag of embeddings of its patches, with one label. Mean pooling, ABMIL and regional
transformers are trained on random bags of it, and tested on random bags, on bags of two passes, of
which the second is focused, and on whole ones.

Our choices, as the paper's (arXiv 2308.12634) are not known: training sees random bags as large as
both passes, and their halves; of stacked windows every second batch is of 2x2 windows alone.
"""
import argparse
import json
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dino import ViTConfig, VisionTransformer, conditioning_tokens, load_dino
from evaluate import bootstrap_interval, roc_auc
from regional import MILConfig, RegionalMIL, draw_regions, predict
from support.cache import fingerprint
from support.command import (Help, UserError, not_negative_int, pick_device, positive_float,
                             positive_int, print_table, run_script, share_above_zero, user_errors)
from support.files import write_json
from support.mosaic import FOCI, mosaic_slides, open_patches
from support.pictures import line_chart, save_grid
from support.run import Run
from support.seeds import step_seed
from support.slides import generated_slides, open_slides, paint_patches, split_slides
from support.tiles import Tiling
from train import fit

ALL = 10 ** 9         # patches that a pass may see: the whole bag
VISITS = 32           # how often training sees a slide, at most ...
LEAST_STEPS = 150     # ... but for so many steps at least


@dataclass(frozen=True)
class Recipe:
    """A model of this file and how it is trained."""
    windows: tuple
    pool: str
    lr: float      # peak
    steps: int     # on 700 slides or more


MODELS = {
    "mean": Recipe((), "mean", 2e-3, 700),
    "abmil": Recipe((), "attention", 4e-3, 1500),
    "2x2": Recipe((2,), "attention", 2e-3, 700),
    "4x4": Recipe((2, 2), "attention", 2e-3, 1400),
    "8x8": Recipe((2, 2, 2), "attention", 2e-3, 1400),
    "8x8flat": Recipe((8,), "attention", 2e-3, 700),
}


# ---- training ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Trial:
    """One model to train and to test."""
    stage: str     # its name in the run's files
    name: str      # of MODELS
    seed: int
    fold: int
    train: list    # of slides
    test: list


class Bags(torch.utils.data.Dataset):
    """Random bags, new ones each time: x (B, R, T, D), present (B, R, T), labels (B,). Of stacked
    windows every second batch, by chance, holds regions of the first level alone, as pass 1 does:
    many small places find the tumour sooner than a few large ones, most of which miss it."""

    def __init__(self, slides, windows, patches, seed):
        self.slides = slides
        self.windows = windows
        self.patches = patches
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        return len(self.slides)

    def __getitems__(self, numbers):
        slides = [self.slides[i] for i in numbers]
        windows = self.windows
        if len(windows) > 1 and torch.rand((), generator=self.generator) < 0.5:
            windows = windows[:1]
        regions = max(1, self.patches // math.prod(windows) ** 2)
        tables = [draw_regions(slide, windows, self.generator)[0][:regions] for slide in slides]
        most = max(map(len, tables))
        tables = [F.pad(table, (0, 0, 0, most - len(table)), value=-1) for table in tables]

        x = torch.stack([slide.take(table) for slide, table in zip(slides, tables)])
        labels = torch.tensor([float(slide.label) for slide in slides])
        return x, torch.stack(tables) >= 0, labels


def plan_steps(name, slides, args):
    """(steps, slides a step) of training, on small sets fewer of both.

    There a slide is seen VISITS times, which else would be hundreds, and small batches make more
    steps of the same work: 60 slides need them, or regions do not learn in time.
    """
    batch = args.batch or min(16, max(4, len(slides) // 12))
    few = max(LEAST_STEPS, VISITS * len(slides) // batch)
    return args.steps or min(MODELS[name].steps, few), batch


def train_model(trial, args, run, device):
    """The RegionalMIL of a trial, trained on random bags of twice --patches patches."""
    recipe = MODELS[trial.name]
    seed = step_seed(trial.seed, trial.stage)
    bags = Bags(trial.train, recipe.windows, 2 * args.patches, seed)
    sample = torch.cat([slide.take(torch.randperm(len(slide.grid), generator=bags.generator)[:64])
                        for slide in trial.train[:400]])
    torch.manual_seed(seed % 2 ** 31)
    model = RegionalMIL(MILConfig(sample.shape[1], recipe.windows, recipe.pool)).to(device)
    model.shift.copy_(sample.mean(dim=0))
    model.scale.copy_(sample.std(dim=0, correction=0).clamp(min=1e-6))

    def loss_fn(batch, step, generator):
        return model.loss(*batch), {}

    if trial.stage not in run.finished:
        steps, batch = plan_steps(trial.name, trial.train, args)
        fit(trial.stage, model, loss_fn, bags, steps=steps, batch=batch, lr=args.lr or recipe.lr,
            device=device, seed=trial.seed, run=run, betas=(0.9, 0.999))
        run.finish(trial.stage, model.state_dict())
    model.load_state_dict(run.finished[trial.stage])
    return model.eval()


# ---- results -----------------------------------------------------------------------------------

def test_model(model, trial, args):
    """A row a slide and sampling: its logit, and whether the attention's peak hits a true focus."""
    samplings = {str(args.patches): (args.patches, False),
                 str(2 * args.patches): (2 * args.patches, False)}
    if args.focus and model.config.pool == "attention" and all(s.has_places for s in trial.test):
        samplings[f"{args.patches} + {args.patches} focused"] = (args.patches, True)
    samplings["all"] = (ALL, False)

    rows = []
    for sampling, (patches, focused) in samplings.items():
        for slide in trial.test:
            logit, seen, attention, _ = predict(model, slide, patches, focused, trial.seed)
            hit = None
            if slide.label and slide.foci is not None:
                hit = bool(slide.foci[seen.flatten()[attention.argmax()]])
            rows.append({"model": trial.name, "patches": sampling, "seed": trial.seed,
                         "fold": trial.fold, "slide": slide.name, "label": slide.label,
                         "logit": logit, "hit": hit})
    return rows


def write_results(out, scores, log):
    """Print and write the AUC of each model and sampling over the seeds, and draw the losses.

    scores: rows of test_model. log: rows of the run's log.
    """
    by_model = {}
    for row in scores:
        by_model.setdefault(f"{row['model']}, {row['patches']}", []).append(row)

    table = {}
    for key, rows in by_model.items():
        aucs = []
        for seed in dict.fromkeys(row["seed"] for row in rows):
            labels = np.array([row["label"] for row in rows if row["seed"] == seed])
            logits = np.array([row["logit"] for row in rows if row["seed"] == seed])
            aucs.append(roc_auc(labels, logits))
        table[key] = {"AUC": float(np.mean(aucs)), "sd": None, "95 %": None, "hits a focus": None}
        if len(aucs) > 1:
            table[key]["sd"] = float(np.std(aucs, ddof=1))
        else:
            table[key]["95 %"] = bootstrap_interval(roc_auc, labels, logits)
        hits = [row["hit"] for row in rows if row["hit"] is not None]
        if hits:
            table[key]["hits a focus"] = float(np.mean(hits))
    print_table(table)
    write_json(out / "metrics.json", {"table": table, "scores": scores})

    losses = {}
    for row in log:
        losses.setdefault(row["stage"], []).append(row["loss"])
    chart = {}
    for stage, values in list(losses.items())[:5]:
        starts = range(0, len(values), 20)
        chart[stage] = (starts, [np.mean(values[i:i + 20]) for i in starts])
    line_chart(out / "curves.png", chart, "training loss, mean of 20 steps", "step", "loss")


def heat_maps(path, model, slides, args, seed):
    """PNG, a column a slide: picture, attention, what both passes saw; true foci outlined."""
    shape = [1 + max(int(slide.grid[:, axis].max()) for slide in slides) for axis in (0, 1)]
    columns = []
    for slide in slides:
        _, seen, attention, _ = predict(model, slide, ALL, seed=seed)
        heat = torch.zeros(len(slide.grid))
        heat[seen[seen >= 0]] = (attention / attention.max()).sqrt()[seen >= 0]

        _, seen, _, first = predict(model, slide, args.patches, args.focus, seed)
        passes = torch.zeros(2, len(slide.grid))
        for number, regions in enumerate((seen[:first], seen[first:])):
            passes[number, regions[regions >= 0]] = 0.7
        columns.append(paint_patches(slide, shape, heat, passes))
    save_grid(path, [torch.stack(row) for row in zip(*columns)], captions=[
        "slide, true foci green", "attention, all regions", "pass 1 blue, 2 orange"])
    print(f"wrote {path}: {', '.join(slide.name for slide in slides)}")


# ---- the command -------------------------------------------------------------------------------

def parse(argv=None):
    parser = argparse.ArgumentParser(description="Multiple-instance learning on slides.",
                                     formatter_class=Help)
    add = parser.add_argument

    # slides, and how their pixels become features
    add("--data", default="slides", help="slides (generated), mosaic (made of --patches-of), or a "
        "folder of images, whole slides or features")
    add("--patches-of", metavar="FOLDER", help="of mosaic: labelled patches, whose table names "
        "patients")
    add("--positive", metavar="LABEL", help="of mosaic: a focus's (default: the later of two)")
    add("--foci", type=share_above_zero, nargs=2, default=FOCI, metavar=("LEAST", "LARGEST"),
        help="of mosaic: share of the tissue that a focus takes")
    add("--embedder", default="random", help="of images: random, a published DINO, or a file")
    add("--tile", type=positive_int, default=96, help="side in pixels of the tiles of an image")
    add("--level", type=not_negative_int, default=0, help="of a whole slide's pyramid, 0 is finest")
    add("--mpp", type=positive_float, help="microns a pixel of the tiles, in place of --level")
    add("--label-column", default="label", help="of the table; the later of two values is positive")

    # what is compared
    add("--folds", type=positive_int, default=5, help="of cross-validation, if nothing is split")
    add("--count", type=positive_int, default=1500, help="how many slides or mosaics to generate")
    add("--models", nargs="+", choices=MODELS, default=["mean", "abmil", "2x2"])
    add("--patches", type=positive_int, default=256, help="that one pass sees")
    add("--focus", action=argparse.BooleanOptionalAction, default=True, help="the second pass")

    # training and the run
    add("--steps", type=positive_int, help="of training (default: of each model its own, fewer on "
        "small sets)")
    add("--batch", type=positive_int, help="slides a step (default: 16, 4 or more on small sets)")
    add("--lr", type=positive_float, help="peak learning rate (default: of each model its own)")
    add("--seeds", type=not_negative_int, nargs="+", default=[0], help="of everything random")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", help="the run's folder (default: runs/mil_NAME); a run in it is replaced")
    add("--explain", metavar="SLIDE", help="draw this slide by the finished run")
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/mil_{Path(args.data).resolve().stem}"
    if args.explain:  # as it was run; all its models are in the run's state, so nothing is trained
        with user_errors():
            saved = json.loads(Path(args.out, "config.json").read_text("utf-8"))
        changed = {"device": args.device, "out": args.out, "explain": args.explain}
        return argparse.Namespace(**{**vars(args), **saved, **changed})
    if (args.data == "mosaic") != (args.patches_of is not None):
        raise UserError(f"--data {args.data}, --patches-of {args.patches_of}", "mosaic and a "
                        "folder of labelled patches go together", "pass both or neither")
    if args.foci[0] > args.foci[1]:
        raise UserError(f"--foci {args.foci[0]} {args.foci[1]}", "the least comes first",
                        "exchange them")
    return args


def random_vit():
    """The tiny ViT with random weights, equal in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(ViTConfig())


def load_embedder(args, device):
    """The Tiling that --embedder, --tile, --level and --mpp ask for: a frozen ViT's tokens."""
    with user_errors():
        vit = random_vit() if args.embedder == "random" else load_dino(args.embedder)
    vit = vit.to(device).eval()

    @torch.no_grad()
    def embed(images):
        """Images (n, 3, side, side) in [-1, 1] -> global tokens, a row each (n, D)."""
        return conditioning_tokens(vit, images.to(device)).flatten(1).cpu()

    return Tiling(embed, fingerprint(vit.parameters()), Path(args.out, "features"),
                  side=args.tile, level=args.level, mpp=args.mpp)


def plan_trials(args, slides_of):
    """Every trial of the run. slides_of: seed -> slides, which is where generated ones are made."""
    for seed in args.seeds:
        seed_slides = slides_of(seed)
        for fold, (train, test) in enumerate(split_slides(seed_slides, args.folds, seed)):
            for name in args.models:
                yield Trial(f"{name}, seed {seed}, fold {fold}", name, seed, fold, train, test)


def leave_out_windows(names, slides):
    """The models that can see these slides: without coordinates, only those without windows."""
    if all(slide.has_places for slide in slides):
        return names
    usable = [name for name in names if not MODELS[name].windows]
    if not usable:
        raise UserError(f"--models {' '.join(names)}", "windows of neighbours need coordinates",
                        "pass --models mean abmil, or bring the .h5 files with coords")
    return usable


class TotalTime:
    """How many fits a run makes, and the time that is left for all of them together."""

    def __init__(self, args, train, folds):
        self.work = {name: forecast_fit(name, train, args) for name in args.models}  # seconds
        rounds = folds * len(args.seeds)
        self.left = rounds * sum(self.work.values())
        self.done = 0.0
        self.count = 0
        self.total = rounds * len(args.models)
        self.began = time.monotonic()
        print(f"{self.total} fits (models: {len(args.models)}, folds: {folds}, seeds: "
              f"{len(args.seeds)}), about {timedelta(seconds=round(self.left))} in all")

    def fit_done(self, name):
        self.count += 1
        self.done += self.work[name]
        self.left -= self.work[name]
        seconds = round((time.monotonic() - self.began) / self.done * self.left)
        print(f"{self.count} of {self.total} fits done, {timedelta(seconds=seconds)} left in all",
              flush=True)


def forecast_fit(name, slides, args):
    """Seconds of one fit, by the fastest of five steps of an untrained model on the CPU."""
    recipe = MODELS[name]
    steps, batch = plan_steps(name, slides, args)
    bags = Bags(slides, recipe.windows, 2 * args.patches, seed=0)
    width = slides[0].read()[0].shape[1]
    model = RegionalMIL(MILConfig(width, recipe.windows, recipe.pool))
    rows = [i % len(slides) for i in range(batch)]
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        model.loss(*bags.__getitems__(rows)).backward()
        seconds.append(time.monotonic() - began)
    return steps * min(seconds)


def explain(args, run, trials, device):
    """Heat maps of one slide by each finished model that was tested on it."""
    drawn = False
    for trial in trials:
        shown = [slide for slide in trial.test if slide.name == args.explain and slide.has_places]
        if not shown or trial.stage not in run.finished:
            continue
        model = train_model(trial, args, run, device)
        path = Path(args.out, f"{args.explain}_{trial.name}.png")
        heat_maps(path, model, shown, args, trial.seed)
        drawn = True
    if not drawn:
        raise UserError(f"{args.explain} was not drawn", "a slide with coordinates that a finished "
                        "run tested is needed", "correct --explain, or finish the run")


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    tiling = load_embedder(args, device)
    run = Run(args.out, {**vars(args), "explain": None}, resume=bool(args.explain))

    folds = 1
    if args.data == "slides":
        slides_of = partial(generated_slides, count=args.count, embed=tiling.embed)
    elif args.data == "mosaic":
        bank = open_patches(args.patches_of, tiling.embed, args.label_column, args.positive)
        slides_of = partial(mosaic_slides, bank, count=args.count, foci=args.foci)
    else:
        slides = open_slides(args.data, tiling, args.label_column)
        args.models = leave_out_windows(args.models, slides)
        folds = len(split_slides(slides, args.folds, args.seeds[0]))

        def slides_of(seed):
            return slides
    trials = plan_trials(args, slides_of)

    if args.explain:
        explain(args, run, trials, device)
    else:
        scores = []
        for number, trial in enumerate(trials):
            if number == 0:
                clock = TotalTime(args, trial.train, folds)
            model = train_model(trial, args, run, device)
            scores += test_model(model, trial, args)

            # two tested slides of each label, by the first model of each kind
            if trial.fold == 0 and all(slide.has_places for slide in trial.test):
                shown = [slide for label in (1, 0)
                         for slide in [s for s in trial.test if s.label == label][:2]]
                heat_maps(Path(args.out, f"heat_{trial.name}.png"), model, shown, args, trial.seed)
            clock.fit_done(trial.name)
        write_results(Path(args.out), scores, run.rows())
    run.close()


if __name__ == "__main__":
    run_script(main)
