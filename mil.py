"""Multiple-instance learning on slides: train, compare and explain the models of regional.py.

    python mil.py                                # slides made of phantoms, minutes on a laptop
    python mil.py --patches-of FOLDER            # slides made of real labelled patches
    python mil.py --data FOLDER                  # images, whole slides, or features and coords
    python mil.py --data FOLDER --explain SLIDE  # heat map of one slide, by the finished run

Mean pooling, ABMIL and regional transformers are trained on random bags of patch embeddings, and
tested on random bags, on two passes, of which the second is focused, and on whole bags.

Our choices, because the paper (arXiv 2308.12634) gives no details: training bags are as large as
both passes, and their halves count too; for stacked windows every second batch is of 2x2 windows.
"""
import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dino import VISION_TRANSFORMERS, VisionTransformer, conditioning_tokens, load_dino
from evaluate import bootstrap_interval, roc_auc
from regional import MILConfig, RegionalMIL, draw_regions, predict
from support.cache import fingerprint
from support.command import Help, UserError, number, print_table, run_script, user_errors
from support.files import load_checkpoint, write_json
from support.pictures import save_grid
from support.ranks import pick_device
from support.run import Run
from support.seeds import step_seed
from support.slides import (mosaic_slides, open_patches, open_slides, paint_patches,
                            phantom_patches, split_slides)
from support.tiles import Tiling
from train import fit

WHOLE_BAG = 10 ** 9   # patches of a pass: all
VISITS = 32           # how often training sees a slide, at most ...
LEAST_STEPS = 150     # ... but minimum steps


@dataclass(frozen=True)
class Recipe:
    """A model and its training."""
    windows: tuple
    pool: str
    lr: float      # peak
    steps: int     # upper limit: fewer on small sets


MODELS = {
    "mean": Recipe((), "mean", 2e-3, 700),
    "abmil": Recipe((), "attention", 4e-3, 1500),
    "2x2": Recipe((2,), "attention", 2e-3, 700),
    "8x8": Recipe((2, 2, 2), "attention", 2e-3, 1400),
}


# ---- training ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Trial:
    """One model to train and to test."""
    name: str      # of MODELS
    seed: int
    fold: int
    train: list = ()  # of slides
    test: list = ()

    @property
    def stage(self):
        """Its name in state.pt and log.jsonl."""
        return f"{self.name}, seed {self.seed}, fold {self.fold}"


class Bags(torch.utils.data.Dataset):
    """Random bags: x (B, R, T, D), present (B, R, T), labels (B,). For stacked windows half of the
    batches hold windows of the first level only: many small regions find the tumour sooner."""

    def __init__(self, slides, windows, patches, seed):
        self.slides = slides
        self.windows = windows
        self.patches = patches
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        return len(self.slides)

    def __getitems__(self, indices):
        windows = self.windows
        if len(windows) > 1 and torch.rand((), generator=self.generator) < 0.5:
            windows = windows[:1]
        return self.draw(indices, windows)

    def draw(self, indices, windows):
        """One bag of each of these slides."""
        slides = [self.slides[i] for i in indices]
        regions = max(1, self.patches // math.prod(windows) ** 2)
        tables = [draw_regions(slide, windows, self.generator)[0][:regions] for slide in slides]
        most = max(map(len, tables))
        tables = [F.pad(table, (0, 0, 0, most - len(table)), value=-1) for table in tables]

        x = torch.stack([slide.take(table) for slide, table in zip(slides, tables)])
        labels = torch.tensor([float(slide.label) for slide in slides])
        return x, torch.stack(tables) >= 0, labels


def new_model(name, width):
    """An untrained RegionalMIL of a recipe."""
    return RegionalMIL(MILConfig(width, MODELS[name].windows, MODELS[name].pool))


def train_model(trial, args, run, device):
    """The trained RegionalMIL of a trial: of all starts the one with the least training loss."""
    recipe = MODELS[trial.name]
    batch = args.batch or min(16, max(4, len(trial.train) // 12))
    few = max(LEAST_STEPS, VISITS * len(trial.train) // batch)  # small sets take fewer steps
    steps = args.steps or min(recipe.steps, few)
    trained = []
    for start in range(args.starts):
        stage = f"{trial.stage}, start {start}" if start else trial.stage
        seed = step_seed(trial.seed, stage)
        bags = Bags(trial.train, recipe.windows, 2 * args.patches, seed)
        sample = torch.cat([
            slide.take(torch.randperm(len(slide.grid), generator=bags.generator)[:64])
            for slide in trial.train[:400]])
        torch.manual_seed(seed % 2 ** 31)
        model = new_model(trial.name, sample.shape[1]).to(device)
        model.shift.copy_(sample.mean(dim=0))
        deviation = sample.std(dim=0, correction=0)
        model.scale.copy_(torch.where(deviation < 1e-3, 1, deviation))

        def loss_fn(batch, step, generator, model=model):
            return model.loss(*batch)

        fit(stage, model, loss_fn, bags, steps=steps, batch=batch, lr=args.lr or recipe.lr,
            device=device, seed=trial.seed, run=run, betas=(0.9, 0.999))
        trained.append(model)

    bags = Bags(trial.train, recipe.windows, 2 * args.patches, seed=0)
    some = torch.randperm(len(trial.train), generator=bags.generator)[:128].tolist()
    bag = [x.to(device) for x in bags.draw(some, recipe.windows)]
    with torch.no_grad():
        best = min(trained, key=lambda model: model.loss(*bag).item())
    run.finish(trial.stage, best.state_dict())
    return best


# ---- results -----------------------------------------------------------------------------------

def test_model(model, trial, args):
    """A row per slide and sampling: logit, and whether attention peaks in a true focus."""
    samplings = {str(args.patches): (args.patches, False),
                 str(2 * args.patches): (2 * args.patches, False)}
    if model.config.pool == "attention":
        samplings[f"{args.patches} + {args.patches} focused"] = (args.patches, True)
    samplings["all"] = (WHOLE_BAG, False)

    rows = []
    for sampling, (patches, focused) in samplings.items():
        for slide in trial.test:
            logit, seen, attention, _ = predict(model, slide, patches, focused, trial.seed)
            hit = None
            if slide.label and slide.foci is not None:
                hit = bool(slide.foci[seen.flatten()[attention.argmax()]])
            rows.append({"model": trial.name, "patches": sampling, "seed": trial.seed,
                         "fold": trial.fold, "slide": slide.name, "patient": slide.patient,
                         "label": slide.label, "logit": logit, "hit": hit})
    return rows


def auc_within_folds(labels, logits, folds):
    """AUC over the pairs of slides of one fold: logits of two folds are of two models.

    Each array has one entry per slide. Raises ValueError if no fold has both labels.
    """
    aucs = []
    pairs = []
    for fold in np.unique(folds):
        y = labels[folds == fold]
        if 0 < y.sum() < len(y):
            aucs.append(roc_auc(y, logits[folds == fold]))
            pairs.append(y.sum() * (len(y) - y.sum()))
    if not pairs:
        raise ValueError("no fold has slides of both labels")
    return float(np.average(aucs, weights=pairs))


def write_results(out, scores):
    """Print and write the AUC of each model and sampling, mean over seeds; scores: rows of
    test_model."""
    by_model = {}
    for row in scores:
        by_model.setdefault(f"{row['model']}, {row['patches']}", []).append(row)

    table = {}
    for key, rows in by_model.items():
        aucs = []
        for seed in dict.fromkeys(row["seed"] for row in rows):
            *columns, patients = [np.array([row[name] for row in rows if row["seed"] == seed])
                                  for name in ("label", "logit", "fold", "patient")]
            aucs.append(auc_within_folds(*columns))
        several = len(aucs) > 1
        hits = [row["hit"] for row in rows if row["hit"] is not None]
        table[key] = {"AUC": float(np.mean(aucs)),
                      "sd": float(np.std(aucs, ddof=1)) if several else None,
                      "95 %": None if several else bootstrap_interval(
                          auc_within_folds, *columns, groups=patients),
                      "hits a focus": float(np.mean(hits)) if hits else None}
    print_table(table)
    write_json(out / "metrics.json", {"table": table, "scores": scores})


def heat_maps(path, model, slides, args, seed):
    """PNG, a column per slide: picture, attention, regions of both passes; true foci outlined."""
    shape = [1 + max(int(slide.grid[:, axis].max()) for slide in slides) for axis in (0, 1)]
    columns = []
    for slide in slides:
        _, seen, attention, _ = predict(model, slide, WHOLE_BAG, seed=seed)
        heat = torch.zeros(len(slide.grid))
        heat[seen[seen >= 0]] = (attention / attention.max()).sqrt()[seen >= 0]

        _, seen, _, first = predict(model, slide, args.patches, True, seed)
        passes = torch.zeros(2, len(slide.grid))
        for row, regions in zip(passes, (seen[:first], seen[first:])):
            row[regions[regions >= 0]] = 0.7
        columns.append(paint_patches(slide, shape, heat, passes))
    save_grid(path, [torch.stack(row) for row in zip(*columns)], captions=[
        "slide, true foci green", "attention, all regions", "pass 1 blue, 2 orange"])
    print(f"wrote {path}: {', '.join(slide.name for slide in slides)}")


# ---- the command -------------------------------------------------------------------------------

def parse(argv=None):
    parser = argparse.ArgumentParser(description="Multiple-instance learning on slides.",
                                     formatter_class=Help)
    add = parser.add_argument

    # Slides, and how their pixels become features.
    add("--data", default="mosaic", help="mosaic (made of patches), or a folder of images, whole "
        "slides or features, with labels.csv")
    add("--patches-of", metavar="FOLDER", help="for mosaic: labelled patches with patients "
        "(default: phantoms)")
    add("--positive", metavar="LABEL", help="of --patches-of: the label of a focus (default: the "
        "second value in sorted order)")
    add("--embedder", default="random", help="for images: random, a published DINO, or a path")
    add("--tile", type=number(int, 8), default=96, help="side of a tile in pixels")
    add("--level", type=number(int), default=0, help="of a whole slide's pyramid, 0 is the finest")
    add("--label-column", default="label", help="the second value in sorted order is positive")

    # Models and evaluation.
    add("--folds", type=number(int, 2), default=5, help="of cross-validation, without a split")
    add("--count", type=number(int, 10), default=600, help="number of mosaics")
    add("--models", nargs="+", choices=MODELS, default=["mean", "abmil", "2x2"])
    add("--patches", type=number(int, 1), default=256, help="per pass")

    # Training and the run.
    add("--steps", type=number(int, 1), help="(default: by model, fewer on small sets)")
    add("--batch", type=number(int, 1), help="slides per step (default: 4 to 16)")
    add("--lr", type=number(float, 1e-9), help="peak learning rate (default: by model)")
    add("--starts", type=number(int, 1), default=1, help="random starts of each model; the one "
        "with the least training loss counts")
    add("--seeds", type=number(int), nargs="+", default=[0], help="of slides, folds and training")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", help="the run's folder (default: runs/mil_NAME)")
    add("--explain", metavar="SLIDE", help="draw this slide by the finished run")
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/mil_{Path(args.data).resolve().stem}"
    if args.explain:
        return args
    if args.patches_of and args.data != "mosaic":
        raise UserError(f"--data {args.data}, --patches-of {args.patches_of}", "slides come from "
                        "one of them", "leave the other out")
    if any(Path(args.out, name).exists() for name in ("metrics.json", "split.csv")):
        raise UserError(f"{args.out} already contains a finished run, or one of train.py",
                        "a new folder is needed", "pass another --out, or --explain SLIDE")
    return args


def load_embedder(args, device):
    """The Tiling of --embedder, --tile and --level: features are a frozen ViT's global tokens."""
    if args.embedder == "random":
        torch.manual_seed(0)
        vit = VisionTransformer(VISION_TRANSFORMERS["tiny"])
    else:
        with user_errors():
            vit = load_dino(args.embedder)
    vit = vit.to(device).eval()

    @torch.no_grad()
    def embed(images):
        return conditioning_tokens(vit, images.to(device)).flatten(1).cpu()

    return Tiling(embed, fingerprint(vit.parameters()), Path(args.out, "features"),
                  side=args.tile, level=args.level)


def slide_source(args, device):
    """The function seed -> slides."""
    tiling = load_embedder(args, device)
    if args.data == "mosaic":
        if args.patches_of:
            bank = open_patches(args.patches_of, tiling.embed, args.label_column, args.positive)
        else:
            bank = phantom_patches(tiling.embed)
        return partial(mosaic_slides, bank, count=args.count)
    slides = open_slides(args.data, tiling, args.label_column)
    return lambda seed: slides


def explain(args):
    """Draw heat maps of one slide by each model of the finished run that was tested on it."""
    out = Path(args.out)
    name = args.explain
    with user_errors(f"{out} holds no finished run", "run mil.py without --explain first"):
        config = json.loads((out / "config.json").read_text("utf-8"))
        scores = json.loads((out / "metrics.json").read_text("utf-8"))["scores"]
    tested = {(row["model"], row["seed"], row["fold"]) for row in scores if row["slide"] == name}
    if not tested:
        raise UserError(f"{name} is no tested slide of {out}", "a name in metrics.json is needed",
                        f"pass one, e.g. --explain {scores[0]['slide']}")

    args = argparse.Namespace(**{**config, "device": args.device, "out": args.out})
    device = pick_device(args.device)
    slides_of = slide_source(args, device)
    finished = load_checkpoint(out / "state.pt", ("finished",), "train again")["finished"]
    for trial in (Trial(*key) for key in sorted(tested)):
        slides = [slide for slide in slides_of(trial.seed) if slide.name == name]
        state = finished[trial.stage]
        model = new_model(trial.name, len(state["shift"])).to(device).eval()
        model.load_state_dict(state)
        heat_maps(out / f"{name}_{trial.stage}.png", model, slides, args, trial.seed)


def main(argv=None):
    args = parse(argv)
    if args.explain:
        return explain(args)

    # All checks come before the run's files.
    device = pick_device(args.device)
    slides_of = slide_source(args, device)
    splits = {seed: split_slides(slides_of(seed), args.folds, seed) for seed in args.seeds}
    run = Run(args.out, vars(args), resume=False)

    scores = []
    for seed, split in splits.items():
        for fold, (train, test) in enumerate(split):
            for name in args.models:
                trial = Trial(name, seed, fold, train, test)
                model = train_model(trial, args, run, device)
                scores += test_model(model, trial, args)

                if fold == 0:
                    sides = [[s for s in test if s.label == label] for label in (1, 0)]
                    heat_maps(Path(args.out, f"heat_{name}.png"), model,
                              sides[0][:2] + sides[1][:2], args, seed)
    write_results(Path(args.out), scores)
    run.close()


if __name__ == "__main__":
    run_script(main)
