"""Slides: hierarchical regional-transformer MIL and two baselines, on bags of patch embeddings.

A slide is a bag of patch features (N, D) with places (N, 2) and one label for all of them:

    patches -> windows of neighbours -> class token of each -> windows of those -> ... -> logit

Inference is focused: pass 1 sees random regions, pass 2 as many around those it attended to most.

    python mil.py --data slides                  # generated slides, minutes on a laptop
    python mil.py --data FOLDER                  # images, whole slides, or features and coords
    python mil.py --data mosaic --patches-of FOLDER    # slides made of real labelled patches
    python mil.py --data FOLDER --explain SLIDE  # heat map of one slide, by the finished run

Shapes: B slides, R regions of a slide, T patches of a region, D numbers of a patch, d inside, n
tokens of any level, M regions of all slides in a row.

Sources: arXiv 2308.12634, of which only ideas are known (self-attention inside regions, stacked;
focused inference; 256 patches: random ones, 64 regions of 2x2 or 4 of 8x8). ABMIL: Ilse et al.
2018, equation 9.

Our choices, as the paper's are not known: learned relative biases, two blocks a level, gated
attention over regions (one query: cost grows linearly with the bag), the same attention as the
start of each class token, a loss at every level, and the focus: pass 2 goes where what pass 1
attended to as a sign of tumour, smoothed over its places, is highest; the logit is of both passes.
Stacked windows (8x8) scan in pass 1 by 64 windows of 2x2, for four large regions miss most of a
slide. Training sees random bags as large as both passes, and their halves; of stacked windows every
second batch is of 2x2 windows alone.
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
from torch import nn

from dino import build_vit, conditioning_tokens, load_dino
from evaluate import bootstrap_interval, roc_auc
from support.cache import fingerprint
from support.command import (Help, UserError, not_negative_int, pick_device, positive_float,
                             positive_int, print_table, run_script, user_errors)
from support.files import write_json
from support.mosaic import mosaic_slides, open_patches
from support.pictures import line_chart, save_grid
from support.run import Run
from support.seeds import step_seed
from support.slides import generated_slides, open_slides, paint_patches, split_slides
from support.tiles import Tiling
from train import fit

ALL = 10 ** 9         # patches that a pass may see: the whole bag
CHUNK = 16384         # patches encoded at once, which bounds the memory of whole bags
VISITS = 32           # how often training sees a slide, at most ...
LEAST_STEPS = 150     # ... but for so many steps at least


@dataclass(frozen=True)
class MILConfig:
    in_dim: int                # D, width of the features
    windows: tuple = (2,)      # sides of the windows, patches first; () is a baseline
    pool: str = "attention"    # or "mean"
    dim: int = 64              # d, width inside
    num_heads: int = 4
    depth: int = 2             # blocks of each level


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


# ---- regions and focus -------------------------------------------------------------------------

def region_table(grid, windows, shift=(0, 0)):
    """Patches (R, T) of each region, -1 where one is missing, and places (R, 2) of the regions.

    grid (N, 2) int64. The T cells are in such an order that each window of each level lies in one
    stretch.
    """
    # the cells of a region: windows of the first level one after the other, and so on
    cells = [(0, 0)]
    side = 1
    for window in windows:
        corners = [(side * i, side * j) for i in range(window) for j in range(window)]
        cells = [(row + a, column + b) for row, column in corners for a, b in cells]
        side *= window
    slot = torch.empty(side, side, dtype=torch.int64)
    slot[tuple(torch.tensor(cells).T)] = torch.arange(side ** 2)

    # places as single numbers are told apart much faster than as pairs, and in the same order
    moved = grid + torch.as_tensor(shift)
    rows, columns = (moved // side).T
    width = int(columns.max()) + 1 if len(grid) else 1
    numbers, region = torch.unique(rows * width + columns, return_inverse=True)
    places = torch.stack([numbers // width, numbers % width], dim=1)

    table = torch.full((len(places), side ** 2), -1)
    table[region, slot[tuple((moved % side).T)]] = torch.arange(len(grid))
    return table, places


def draw_regions(slide, windows, generator):
    """(table (R, T), centres (R, 2), in patches) of a slide's regions in random order, at a random
    offset."""
    side = math.prod(windows)
    shift = torch.randint(side, (2,), generator=generator)
    table, places = region_table(slide.grid, windows, shift)
    order = torch.randperm(len(table), generator=generator)
    return table[order], (places[order] + 0.5) * side - shift


def focus(seen, evidence, unseen, count, reach):
    """The `count` unseen regions of highest expected evidence, as rows of `unseen` (R, 2).

    seen (S, 2), evidence (S,): regions of pass 1; centres and reach in patches. Expected is the
    mean over seen regions, each weighted by a Gaussian of its distance (deviation: reach), and,
    with weight 0.3, the mean of all."""
    near = (-(torch.cdist(unseen, seen) / reach).square() / 2).exp()
    expected = (near @ evidence + 0.3 * evidence.mean()) / (near.sum(dim=1) + 0.3)
    return expected.topk(min(count, len(expected))).indices


# ---- the model ---------------------------------------------------------------------------------

class RegionBlock(nn.Module):
    """ViT block on windows of side x side cells: x (M, 1 + T, d), absent (M, 1 + T) bool -> the
    first `wanted` tokens (None: all). A missing neighbour is never attended to. Starts as the
    identity (see RegionalMIL)."""

    def __init__(self, config, side):
        super().__init__()
        d = config.dim
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        for last in (self.proj, self.mlp[2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

        # one bias a head and offset; 0 to 2 are of the class token, which has no place
        cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        offset = cells[:, None] - cells + side - 1                       # (T, T, 2), from 0 on
        index = offset[..., 0] * (2 * side - 1) + offset[..., 1] + 3
        index = F.pad(index, (1, 0, 1, 0))
        index[0, 1:] = 1
        index[1:, 0] = 2
        self.register_buffer("index", index, persistent=False)
        self.bias = nn.Parameter(torch.zeros(config.num_heads, (2 * side - 1) ** 2 + 3))

    def forward(self, x, absent, wanted=None):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # 3 x (M, heads, 1 + T, d')
        bias = self.bias[:, self.index].masked_fill(absent[:, None, None], -math.inf)
        h = F.scaled_dot_product_attention(q[:, :, :wanted], k, v, attn_mask=bias[:, :, :wanted])
        x = x[:, :wanted] + self.proj(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class RegionLevel(nn.Module):
    """Tokens (M, T, d), present (M, T), attention (M, T) -> class token of each window (M, d).
    The class token starts at what the attention gathers, for from a start of its own it learns
    too slowly to find a few patches among thousands."""

    def __init__(self, config, side):
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(config.dim))
        self.blocks = nn.ModuleList(RegionBlock(config, side) for _ in range(config.depth))

    def forward(self, x, present, attention):
        x = torch.cat([self.cls_token + attention[:, None] @ x, x], dim=1)  # (M, 1 + T, d)
        absent = ~F.pad(present, (1, 0), value=True)
        for block in self.blocks[:-1]:
            x = block(x, absent)
        return self.blocks[-1](x, absent, wanted=1)[:, 0]  # nobody reads the other tokens


class RegionalMIL(nn.Module):
    """Regions of a bag -> logit. Without windows a region is a patch: ABMIL, or mean pooling.

    One gated attention and one head serve all levels: blocks start as the identity, so tokens of
    all levels live in one space. Training asks every level for the label (deep supervision): the
    patches, of which there are many, find the tumour first, and the regions take over from them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config.dim
        self.register_buffer("shift", torch.zeros(config.in_dim))  # mean of training features
        self.register_buffer("scale", torch.ones(config.in_dim))   # and their deviation
        self.embed = nn.Linear(config.in_dim, d)
        self.levels = nn.ModuleList(RegionLevel(config, side) for side in config.windows)

        # gated attention, equation 9 of Ilse et al., and the slide's classifier
        self.value = nn.Linear(d, d)
        self.gate = nn.Linear(d, d)
        self.score = nn.Linear(d, 1)
        self.head = nn.Linear(d, 1)

    def attention(self, x, present):
        """Tokens (B, n, d), present (B, n) -> (B, n), which sums to 1, or to 0 where all miss."""
        score = self.score(self.value(x).tanh() * self.gate(x).sigmoid())[..., 0]
        if self.config.pool == "mean":
            score = torch.zeros_like(score)
        return score.masked_fill(~present, -1e9).softmax(dim=1) * present

    def encode(self, x, present):
        """Regions (M, T, D), present (M, T) -> tokens (M, d), attention to each patch (M, T), and
        what the levels joined: a list of tokens (M, n, d), present (M, n), patches first. Regions
        may be smaller ones, of the first levels alone."""
        M = len(x)
        weight = self.embed.weight / self.scale  # standardises the features
        x = F.gelu(F.linear(x, weight, self.embed.bias - weight @ self.shift))

        share = present.float()
        below = []
        for level, side in zip(self.levels, self.config.windows):
            if below and len(x) == M:
                break  # one token a region: the levels above have nothing to join
            x = x.reshape(-1, side ** 2, x.shape[-1])                    # a row a window
            present = present.reshape(-1, side ** 2)
            below.append((x.view(M, -1, x.shape[-1]), present.view(M, -1)))

            attention = self.attention(x, present)
            x = level(x, present, attention)
            present = present.any(dim=1)
            # a patch gets its share of its window, times that of its window in the next, and so on
            share = share.view(attention.numel(), -1) * attention.reshape(-1, 1)
        return x.view(M, -1), share.view(M, -1), below

    def pool(self, tokens, present):
        """Tokens (B, R, d), present (B, R) -> logits (B,), attention (B, R), which sums to 1."""
        attention = self.attention(tokens, present)
        return self.head((attention[:, None] @ tokens)[:, 0])[:, 0], attention

    def forward(self, x, present):
        """x (B, R, T, D), present (B, R, T) bool -> logits (B,)."""
        tokens = self.encode(x.flatten(0, 1), present.flatten(0, 1))[0]
        return self.pool(tokens.unflatten(0, x.shape[:2]), present.any(dim=2))[0]

    def loss(self, x, present, labels):
        """x (B, R, T, D), present (B, R, T) bool, labels (B,) of 0 and 1 -> cross-entropy, the mean
        over levels, and over the bag and its halves, for one pass sees half of what two see."""
        regions, _, below = self.encode(x.flatten(0, 1), present.flatten(0, 1))
        levels = [*below, (regions[:, None], present.any(dim=2).view(-1, 1))]

        logits = []
        targets = []
        for tokens, there in levels:
            tokens = tokens.reshape(len(x), -1, tokens.shape[-1])  # (B * R, n, d) -> (B, R * n, d)
            there = there.reshape(len(x), -1)
            for half in (slice(None), slice(0, None, 2), slice(1, None, 2)):
                filled = there[:, half].any(dim=1)  # a bag of one patch has one half
                logits.append(self.pool(tokens[filled, half], there[filled, half])[0])
                targets.append(labels[filled])
        return F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(targets))


@torch.no_grad()
def predict(model, slide, patches, focused=False, seed=0):
    """A slide's (logit, patches (R, T) that were seen, their attention (R, T), regions of pass 1).

    patches: how many one pass sees. focused: a second pass of as many (see `focus`); the first one
    then looks at windows of the first level, for a few large regions would miss most of a slide.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, slide.name))
    windows = model.config.windows
    focused = focused and patches < len(slide.grid)
    scan = windows[:1] if focused else windows

    def encode(regions):
        """Tokens and attention of regions (R, T), a chunk at a time."""
        encoded = []
        for chunk in regions.split(max(1, CHUNK // regions.shape[1])):
            x = slide.take(chunk).to(model.scale.device)
            encoded.append(model.encode(x, (chunk >= 0).to(x.device))[:2])
        tokens, shares = zip(*encoded)
        return torch.cat(tokens), torch.cat(shares)

    # pass 1: random regions
    table, centres = draw_regions(slide, scan, generator)
    first = min(len(table), max(1, patches // table.shape[1]))
    seen = table[:first]
    tokens, share = encode(seen)
    present = tokens.new_ones(1, len(tokens), dtype=torch.bool)
    logit, attention = model.pool(tokens[None], present)

    # pass 2: attention goes to what speaks against a tumour too: only what speaks for one leads on
    if focused and first < len(table):
        evidence = (attention[0] * model.head(tokens)[:, 0].clamp(min=0)).sqrt().cpu()
        unseen, places = table[first:], centres[first:]
        if scan != windows:
            unseen, places = draw_regions(slide, windows, generator)
        count = max(1, patches // unseen.shape[1])
        reach = max(1.5 * math.prod(scan), 0.5 * math.prod(windows))
        unseen = unseen[focus(centres[:first], evidence, places, count, reach)]
        more_tokens, more_share = encode(unseen)

        # Tokens of all levels live in one space, so both passes are pooled together.
        missing = unseen.shape[1] - seen.shape[1]
        seen = torch.cat([F.pad(seen, (0, missing), value=-1), unseen])
        share = torch.cat([F.pad(share, (0, missing)), more_share])
        tokens = torch.cat([tokens, more_tokens])
        present = tokens.new_ones(1, len(tokens), dtype=torch.bool)
        logit, attention = model.pool(tokens[None], present)
    return logit.item(), seen, (attention[0][:, None] * share).cpu(), first


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
    return args


def load_embedder(args, device):
    """The Tiling that --embedder, --tile, --level and --mpp ask for: a frozen ViT's tokens."""
    with user_errors():
        vit = build_vit("random") if args.embedder == "random" else load_dino(args.embedder)
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
        slides_of = partial(mosaic_slides, bank, count=args.count)
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
