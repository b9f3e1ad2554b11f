"""Slides: hierarchical regional-transformer MIL and two baselines, on bags of patch embeddings.

A slide is a bag of patch features (N, D) with places (N, 2) and one label for all of them:

    patches -> windows of neighbours -> class token of each -> windows of those -> ... -> logit

Inference is focused: pass 1 sees random regions, pass 2 as many around those it attended to most.

    python mil.py --data slides                  # generated slides, minutes on a laptop
    python mil.py --data FOLDER                  # images, or .npz / .pt of features and coords
    python mil.py --data FOLDER --explain SLIDE  # heat map of one slide, by the finished run

Sources: arXiv 2308.12634, of which only ideas are known (self-attention inside regions, stacked;
focused inference; 256 patches: random ones, 64 regions of 2x2 or 4 of 8x8). ABMIL: Ilse et al.
2018, equation 9. Our choices: learned relative biases, two blocks a level, gated attention over
regions (one query: cost grows linearly with the bag), the same attention as the start of each class
token, a loss at every level, and the focus: pass 2 goes where what pass 1 attended to as a sign of
tumour, smoothed over its places, is highest; the logit is of both passes. Training sees random bags
as large as both passes, and their halves.
"""
import argparse
import csv
import io
import json
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from data import UserError, positive_int, run_script, step_seed, user_errors
from dino import build_vit, conditioning_tokens, load_dino
from evaluate import bootstrap_interval, roc_auc
from support.command import print_table
from support.files import write_json
from support.phantoms import histology_phantoms, paint_slide, slide_phantoms
from segment import otsu_level
from train import Run, fingerprint, fit

MODELS = {  # sides of the windows, patches first; pooling on top; peak learning rate and steps
    "mean": ((), "mean", 2e-3, 700), "abmil": ((), "attention", 4e-3, 1500),
    "2x2": ((2,), "attention", 2e-3, 700), "4x4": ((2, 2), "attention", 2e-3, 700),
    "8x8": ((2, 2, 2), "attention", 2e-3, 700), "8x8flat": ((8,), "attention", 2e-3, 700)}
CHUNK = 16384  # patches encoded at once, which bounds the memory of whole bags
THUMB = 8      # pixels of a patch in pictures
BANK = 2000    # patches that the slides of one part are made of


# ---- the model ----

@dataclass(frozen=True)
class MILConfig:
    in_dim: int                # D, width of the features
    windows: tuple = (2,)      # sides of the windows, patches first; () is a baseline
    pool: str = "attention"    # or "mean"
    dim: int = 64              # d, width inside
    num_heads: int = 4
    depth: int = 2             # blocks of each level


class RegionBlock(nn.Module):
    """ViT block on windows of side x side cells: x (M, 1 + T, d), absent (M, T) bool -> the same.
    A missing neighbour is never attended to. Starts as the identity (see RegionalMIL)."""

    def __init__(self, config, side):
        super().__init__()
        d, self.num_heads = config.dim, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        for last in (self.proj, self.mlp[2]):
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        cells = torch.cartesian_prod(*[torch.arange(side)] * 2)
        delta = cells[:, None] - cells + side - 1                        # (T, T, 2), from 0 on
        index = F.pad(delta[..., 0] * (2 * side - 1) + delta[..., 1] + 3, (1, 0, 1, 0))
        index[0, 1:], index[1:, 0] = 1, 2  # 0 to 2 are of the class token, which has no place
        self.register_buffer("index", index, persistent=False)
        self.bias = nn.Parameter(torch.zeros(config.num_heads, (2 * side - 1) ** 2 + 3))

    def forward(self, x, absent):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(
            2, 0, 3, 1, 4)                                               # 3 x (M, heads, 1 + T, d')
        bias = self.bias[:, self.index].masked_fill(absent[:, None, None], -math.inf)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.proj(h.transpose(1, 2).flatten(2))
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
        for block in self.blocks:
            x = block(x, ~F.pad(present, (1, 0), value=True))
        return x[:, 0]


class RegionalMIL(nn.Module):
    """Regions of a bag -> logit. Without windows a region is a patch: ABMIL, or mean pooling.

    One gated attention and one head serve all levels: blocks start as the identity, so tokens of
    all levels live in one space. Training asks every level for the label (deep supervision): the
    patches, of which there are many, find the tumour first, and the regions take over from them.
    """

    def __init__(self, config):
        super().__init__()
        self.config, d = config, config.dim
        self.register_buffer("shift", torch.zeros(config.in_dim))  # mean of training features
        self.register_buffer("scale", torch.ones(config.in_dim))   # and their deviation
        self.embed = nn.Linear(config.in_dim, d)
        self.levels = nn.ModuleList(RegionLevel(config, side) for side in config.windows)
        self.value, self.gate, self.score = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 1)
        self.head = nn.Linear(d, 1)

    def attention(self, x, present):
        """Tokens (B, n, d), present (B, n) -> (B, n), which sums to 1, or to 0 where all miss."""
        score = self.score(self.value(x).tanh() * self.gate(x).sigmoid())[..., 0]
        score = score * (self.config.pool == "attention")
        return score.masked_fill(~present, -1e9).softmax(dim=1) * present

    def encode(self, x, present):
        """Regions (M, T, D), present (M, T) -> tokens (M, d), attention to each patch (M, T), and
        what the levels joined: a list of tokens (M, n, d), present (M, n), patches first."""
        M, weight, below = len(x), self.embed.weight / self.scale, []
        x = F.gelu(F.linear(x, weight, self.embed.bias - weight @ self.shift))  # standardised
        share = present.float()
        for level, side in zip(self.levels, self.config.windows):
            x, present = x.reshape(-1, side ** 2, x.shape[-1]), present.reshape(-1, side ** 2)
            below.append((x.view(M, -1, x.shape[-1]), present.view(M, -1)))
            attention = self.attention(x, present)
            x, present = level(x, present, attention), present.any(dim=1)
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
        tokens, _, below = self.encode(x.flatten(0, 1), present.flatten(0, 1))
        logits, targets = [], []
        for tokens, there in [*below, (tokens[:, None], present.any(dim=2).view(-1, 1))]:
            tokens = tokens.reshape(len(x), -1, tokens.shape[-1])  # (B * R, n, d) -> (B, R * n, d)
            there = there.reshape(len(x), -1)
            for part in (slice(None), slice(0, None, 2), slice(1, None, 2)):
                some = there[:, part].any(dim=1)  # a bag of one patch has one half
                logits.append(self.pool(tokens[some, part], there[some, part])[0])
                targets.append(labels[some])
        return F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(targets))


# ---- regions ----

def region_table(grid, windows, shift=(0, 0)):
    """Patches (R, T) of each region, -1 where one is missing, and places (R, 2) of the regions.

    The T cells are in such an order that each window of each level lies in one stretch.
    """
    cells, side = [(0, 0)], 1
    for w in windows:
        cells = [(side * i + a, side * j + b) for i in range(w) for j in range(w) for a, b in cells]
        side *= w
    slot = torch.empty(side, side, dtype=torch.int64)
    slot[tuple(torch.tensor(cells).T)] = torch.arange(side ** 2)
    moved = grid + torch.as_tensor(shift)
    places, region = torch.unique(moved // side, dim=0, return_inverse=True)
    table = torch.full((len(places), side ** 2), -1)
    table[region, slot[tuple((moved % side).T)]] = torch.arange(len(grid))
    return table, places


def draw_regions(slide, windows, generator):
    """(table (R, T), places (R, 2)) of a slide's regions in random order, at a random offset."""
    shift = torch.randint(math.prod(windows), (2,), generator=generator)
    table, places = region_table(slide.grid, windows, shift)
    order = torch.randperm(len(table), generator=generator)
    return table[order], places[order]


def focus(places, evidence, count):
    """The `count` unseen regions of highest expected evidence, as rows of `places` (R, 2), whose
    first len(evidence) have been seen. Expected is the mean over seen regions, each weighted by a
    Gaussian of its distance (1.5 regions), and, with weight 0.3, the mean of all."""
    seen = len(evidence)
    near = (-(torch.cdist(places[seen:].float(), places[:seen].float()) / 1.5).square() / 2).exp()
    expected = (near @ evidence + 0.3 * evidence.mean()) / (near.sum(dim=1) + 0.3)
    return seen + expected.topk(min(count, len(expected))).indices


@torch.no_grad()
def predict(model, slide, patches, focused=False, seed=0):
    """(logit, patches (R, T) that were seen, their attention (R, T), regions of pass 1)."""
    generator = torch.Generator().manual_seed(step_seed(seed, slide.name))
    table, places = draw_regions(slide, model.config.windows, generator)
    T, device, parts = table.shape[1], model.scale.device, []
    new = seen = torch.arange(min(len(table), max(1, patches // T)))
    first = len(seen)
    for look in range(1 + (focused and first < len(table))):
        if look:
            new = focus(places, evidence, first)
            seen = torch.cat([seen, new])
        for part in table[new].split(max(1, CHUNK // T)):
            parts.append(model.encode(slide.take(part).to(device), (part >= 0).to(device))[:2])
        tokens, share = map(torch.cat, zip(*parts))
        logit, attention = model.pool(tokens[None], tokens.new_ones(1, len(seen)) > 0)
        attention = attention[0].cpu()
        # attention goes to what speaks against a tumour too: only what speaks for one leads pass 2
        evidence = (attention * model.head(tokens)[:, 0].cpu().clamp(min=0)).sqrt()
    return logit.item(), table[seen], attention[:, None] * share.cpu(), first


# ---- slides ----

@dataclass(eq=False)
class Slide:
    name: str
    label: int                  # 0 or 1
    group: str                  # slides of one group (a patient) are never parted
    is_test: bool
    grid: torch.Tensor          # (N, 2) int64: row and column of each patch
    rows: torch.Tensor          # (N,) int64: its row in what `read` returns
    read: object                # () -> features (M, D), pictures (M, 3, THUMB, THUMB) or None
    foci: torch.Tensor = None   # (N,) bool, where known

    def take(self, patches):
        """Features (..., D) float32 of patches (...); for -1 those of some patch."""
        return self.read()[0][self.rows[patches]].float()


@torch.no_grad()
def embed(vit, images, device):
    """Images (n, 3, H, W) in [-1, 1] -> global tokens, a row each (n, D), and thumbnails."""
    features = [conditioning_tokens(vit, x.to(device)).flatten(1).cpu() for x in images.split(64)]
    return torch.cat(features), F.adaptive_avg_pool2d(images, THUMB)


def generated_slides(seed, count, vit, device):
    """A fifth of the slides is for testing, made of patches from a bank of its own."""
    slides = []
    for part, n in (("train", count - count // 5), ("test", count // 5)):
        key = 2 * seed + (part == "test")
        bank = histology_phantoms(BANK, 64, key)
        read = partial(tuple, embed(vit, bank[0], device))
        for i, (tiles, foci, label) in enumerate(zip(*slide_phantoms(n, bank, seed=key))):
            name, tissue = f"{part}_{i:04d}", tiles >= 0
            slides.append(Slide(name, int(label), name, part == "test", torch.nonzero(tissue),
                                tiles[tissue], read, foci[tissue]))
    return slides


def tile_image(path, target, vit, side, device):
    """Write features, coords and pictures of an image's tissue tiles to `target`, once; returns
    the number of blank ones. Tissue: 5 % of the pixels above Otsu's threshold of saturation."""
    mark = f"{fingerprint(vit.parameters())} {side} {path.stat().st_size} {path.stat().st_mtime_ns}"
    if target.exists():
        with np.load(target, allow_pickle=False) as archive:
            if str(archive["made_by"]) == mark:
                return int(archive["blank"])
    try:
        image = Image.open(path).convert("RGB")
    except Exception as error:  # a damaged or too large file makes Pillow raise nearly any type
        raise UserError(f"{path} cannot be read ({error})", "an image below 180 megapixels is "
                        "needed", "replace it, or bring features") from error
    pixels, saturation = np.asarray(image), np.asarray(image.convert("HSV"))[..., 1:2]
    h, w = (n // side for n in pixels.shape[:2])

    def tiles(x):  # (H, W, C) -> (h * w, side, side, C); a rest at the edge is left out
        x = x[:h * side, :w * side].reshape(h, side, w, side, -1)
        return x.swapaxes(1, 2).reshape(h * w, side, side, -1)

    level = max(12, otsu_level(saturation.copy()))  # of 255: white paper has less
    tissue = tiles(saturation) > level
    kept = np.flatnonzero(tissue.mean(axis=(1, 2, 3)) >= 0.05)
    parts = [embed(vit, x.permute(0, 3, 1, 2) / 127.5 - 1, device)
             for x in torch.from_numpy(tiles(pixels)[kept]).split(64) if len(x)]
    features, pictures = map(torch.cat, zip(*parts)) if parts else torch.zeros(2, 0, 1)
    with data.atomic_file(target) as file:
        np.savez(file, features=features, pictures=pictures, made_by=mark, blank=h * w - len(kept),
                 coords=np.stack([kept % max(w, 1), kept // max(w, 1)], axis=1) * side)
    return h * w - len(kept)


@lru_cache(maxsize=64)
def read_features(path):
    """Features (N, D), pictures or None, grid (N, 2) of a .npz or .pt file; its coords (N, 2) are
    x and y in pixels or steps, the step is their greatest common divisor."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                content = {key: torch.as_tensor(archive[key])
                           for key in {"features", "coords", "pictures"} & {*archive}}
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        features, coords = content["features"], content["coords"].double()
        if features.ndim != 2 or coords.shape != (len(features), 2):
            raise ValueError(f"shapes {tuple(features.shape)} and {tuple(coords.shape)}")
        if not (features.isfinite().all() and coords.isfinite().all()):
            raise ValueError("values that are not finite")
        grid = coords.round().long().flip(1)
        grid -= grid.amin(dim=0) if len(grid) else 0
        grid //= max(1, int(np.gcd.reduce(grid.flatten().numpy())))
        if len(grid.unique(dim=0)) < len(grid):
            raise ValueError("coordinates that repeat")
    except Exception as error:  # damaged files make NumPy and torch raise nearly any type
        raise UserError(f"{path} cannot be used ({error})", "finite features (N, D) and coords "
                        "(N, 2), each place once, are needed", "make it anew") from error
    return features, content.get("pictures"), grid


def open_slides(args, vit, device):
    """The slides of a folder and its labels.csv; what cannot be used is counted and named."""
    folder, slides, lost, blank, widths = Path(args.data), [], {}, 0, {}
    tables = [place / "labels.csv" for place in (folder, folder.resolve().parent)]
    table = next((t for t in tables if t.is_file()), tables[0])
    try:
        rows = list(csv.DictReader(io.StringIO(table.read_text("utf-8-sig")), restval=""))
        names = [Path(row.get("slide") or row["file"]).name for row in rows]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{table} cannot be read ({error!r})", "a CSV of slide (or file) and label "
                        "is needed", "write one") from error
    rows = dict(zip([Path(name).stem for name in names] + names, rows * 2))
    files = sorted([*folder.rglob("*.npz"), *folder.rglob("*.pt")])
    for path in files or data.list_images(folder):
        name, row = path.stem, rows.get(path.name) or rows.get(path.stem) or {}
        if not row.get(args.label_column) or not path.resolve().is_relative_to(folder.resolve()):
            lost.setdefault("without a label, or links", []).append(name)
            continue
        if not files:
            source, path = path, Path(args.out, "features", f"{name}.npz")
            blank += tile_image(source, path, vit, args.tile, device)
        features, _, grid = read_features(path)
        if not len(grid):
            lost.setdefault("without tissue", []).append(name)
            continue
        widths[features.shape[1]] = name
        group = [row[k] for k in ("patient", "patientid", "group") if row.get(k)] + [name]
        slides.append(Slide(name, row[args.label_column], group[0], row.get("split") == "test",
                            grid, torch.arange(len(grid)), partial(read_features, path)))
    for why, some in lost.items():
        print(f"left out, {why}: {len(some)} ({', '.join(some[:3])}{', ...' * (len(some) > 3)})")
    labels, names = (sorted({getattr(s, key) for s in slides}) for key in ("label", "name"))
    if len(labels) != 2 or len(widths) > 1 or len(names) < len(slides):
        raise UserError(f"{len(slides)} slides, {len(names)} names, labels {labels[:5]}, width of "
                        f"the features {widths}", "names that differ, two labels and one width are "
                        "needed", "correct them, or pass --label-column")
    for slide in slides:
        slide.label = labels.index(slide.label)
    print(f"{len(slides)} slides, {sum(s.label for s in slides)} {labels[1]}; {blank:,} blank tiles"
          f" left out, {sum(len(s.grid) for s in slides):,} patches kept")
    return slides


def split(slides, folds, seed):
    """(train, test) lists: as given, or cross-validated; groups are never parted."""
    held = [{s.group for s in slides if s.is_test}]
    both = held[0] & {s.group for s in slides if not s.is_test}
    if not held[0]:
        groups = sorted({s.group for s in slides})
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
        held = [{groups[i] for i in order[k::folds]} for k in range(min(folds, len(groups)))]
    parts = [([s for s in slides if s.group not in h], [s for s in slides if s.group in h])
             for h in held]
    if both or any({s.label for s in train} != {0, 1} for train, _ in parts):
        raise UserError(f"in two splits: {', '.join(sorted(both)[:3]) or 'nobody'}; labels in each "
                        f"training part: {[len({s.label for s in train}) for train, _ in parts]}",
                        "nobody and 2 are needed", "correct labels.csv, or add slides")
    return parts


# ---- training and results ----

class Bags(torch.utils.data.Dataset):
    """Random bags, new ones each time: x (B, R, T, D), present (B, R, T), labels (B,)."""

    def __init__(self, slides, windows, patches, seed):
        self.slides, self.windows = slides, windows
        self.regions = max(1, patches // math.prod(windows) ** 2)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        return len(self.slides)

    def __getitems__(self, numbers):
        slides = [self.slides[i] for i in numbers]
        tables = [draw_regions(s, self.windows, self.generator)[0][:self.regions] for s in slides]
        most = max(map(len, tables))
        tables = [F.pad(t, (0, 0, 0, most - len(t)), value=-1) for t in tables]
        x = torch.stack([s.take(t) for s, t in zip(slides, tables)])
        return x, torch.stack(tables) >= 0, torch.tensor([float(s.label) for s in slides])


def train_model(stage, name, slides, args, seed, run, device):
    """RegionalMIL of MODELS[name], trained on random bags of twice --patches patches."""
    windows, pool, lr, steps = MODELS[name]
    bags = Bags(slides, windows, 2 * args.patches, step_seed(seed, stage))
    sample = torch.cat([s.take(torch.randperm(len(s.grid), generator=bags.generator)[:64])
                        for s in slides[:400]])
    torch.manual_seed(step_seed(seed, stage) % 2 ** 31)
    model = RegionalMIL(MILConfig(sample.shape[1], windows, pool)).to(device)
    model.shift.copy_(sample.mean(dim=0))
    model.scale.copy_(sample.std(dim=0, correction=0).clamp(min=1e-6))

    def loss_fn(batch, step, generator):
        return model.loss(*batch), {}

    if stage not in run.finished:
        for _ in fit(stage, model, loss_fn, bags, steps=args.steps or steps, batch=args.batch,
                     lr=args.lr or lr, device=device, seed=seed, run=run, betas=(0.9, 0.999)):
            pass
        run.finish(stage, model.state_dict())
    model.load_state_dict(run.finished[stage])
    return model.eval()


def heat_maps(path, model, slides, args, seed):
    """PNG, a column a slide: picture, attention, what both passes saw; true foci outlined."""
    h, w = (1 + max(int(s.grid[:, k].max()) for s in slides) for k in (0, 1))
    red, blue, orange, green = torch.tensor(
        [[1, -1, -1], [-1, 0, 1], [1, 0.4, -1], [-1, 0.6, -1]]).view(4, 3, 1, 1)
    rows = [], [], []
    for s in slides:
        pictures = s.read()[1]
        picture = (torch.zeros(len(s.grid), 3, THUMB, THUMB) if pictures is None
                   else pictures[s.rows])
        heat, one, two, foci = torch.zeros(4, len(s.grid), 1, 1, 1)
        _, seen, attention, _ = predict(model, s, 10 ** 9, seed=seed)
        heat[seen[seen >= 0], 0, 0, 0] = (attention / attention.max()).sqrt()[seen >= 0]
        _, seen, _, first = predict(model, s, args.patches, args.focus, seed)
        for x, part in ((one, seen[:first]), (two, seen[first:])):
            x[part[part >= 0]] = 0.7
        if s.foci is not None:
            foci[s.foci] = 1
        tiles = torch.full((h, w), -1)
        tiles[tuple(s.grid.T)] = torch.arange(len(s.grid))
        foci = paint_slide(tiles, 0.9 - 2 * foci.expand(-1, 3, THUMB, THUMB)) < 0
        edge = F.max_pool2d(foci.float(), 5, 1, 2) > foci.float()
        grey = 0.6 * picture.mean(dim=1, keepdim=True) + 0.4
        for row, x in zip(rows, (picture, grey.lerp(red, heat),
                                 grey.lerp(blue, one).lerp(orange, two))):
            row.append(torch.where(edge, green, paint_slide(tiles, x.expand(-1, 3, -1, -1))))
    data.save_grid(path, [torch.stack(row) for row in rows], captions=[
        "slide, true foci green", "attention, all regions", "pass 1 blue, 2 orange"])
    print(f"wrote {path}: {', '.join(s.name for s in slides)}")


def report(out, scores, run):
    """Print and write the AUC of each model and look over the seeds, and draw the curves."""
    table, curves = {}, {}
    for key in dict.fromkeys((row["model"], row["patches"]) for row in scores):
        rows = [row for row in scores if (row["model"], row["patches"]) == key]
        aucs = []
        for seed in dict.fromkeys(row["seed"] for row in rows):
            y, s = (np.array([r[k] for r in rows if r["seed"] == seed]) for k in ("label", "logit"))
            aucs.append(roc_auc(y, s))
        interval = bootstrap_interval(lambda y, s: roc_auc(y, s) if len({*y}) == 2 else 0.5, y, s)
        hits = [row["hit"] for row in rows if row["hit"] is not None]
        table[", ".join(key)] = {
            "AUC": float(np.mean(aucs)), "sd": float(np.std(aucs, ddof=1)) if aucs[1:] else None,
            "95 %": None if aucs[1:] else interval,
            "hits a focus": float(np.mean(hits)) if hits else None}
    print_table(table)
    write_json(out / "metrics.json", {"table": table, "scores": scores})
    for row in run.rows():
        curves.setdefault(row["stage"], []).append(row["loss"])
    chart = {stage: (range(0, len(y), 20), [np.mean(y[i:i + 20]) for i in range(0, len(y), 20)])
             for stage, y in list(curves.items())[:5]}
    data.line_chart(out / "curves.png", chart, "training loss, mean of 20 steps", "step", "loss")


def main(argv=None):
    p = argparse.ArgumentParser(description="Multiple-instance learning on slides.",
                                formatter_class=data.Help)
    a = p.add_argument
    a("--data", default="slides", help="slides (generated), or a folder of images or features")
    a("--embedder", default="random", help="of images: random, a published DINO, or a file")
    a("--tile", type=positive_int, default=96, help="side in pixels of the tiles of an image")
    a("--label-column", default="label", help="of labels.csv; the later of two values is positive")
    a("--folds", type=positive_int, default=5, help="of cross-validation, if nothing is split")
    a("--count", type=positive_int, default=1500, help="how many slides to generate")
    a("--models", nargs="+", choices=MODELS, default=["mean", "abmil", "2x2"])
    a("--patches", type=positive_int, default=256, help="that one pass sees")
    a("--focus", action=argparse.BooleanOptionalAction, default=True, help="the second pass")
    a("--steps", type=positive_int, help="of training (default: of each model its own)")
    a("--batch", type=positive_int, default=16, help="slides a step")
    a("--lr", type=data.positive_float, help="peak learning rate (default: likewise)")
    a("--seeds", type=data.not_negative_int, nargs="+", default=[0], help="of everything random")
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    a("--out", help="the run's folder (default: runs/mil_NAME); a run in it is replaced")
    a("--explain", metavar="SLIDE", help="draw this slide by the finished run")
    args = p.parse_args(argv)
    out, shown = Path(args.out or f"runs/mil_{Path(args.data).resolve().stem}"), args.explain
    if shown:  # as it was run: all its models are in the state, so nothing is trained
        with user_errors():
            saved = json.loads((out / "config.json").read_text())
        args = argparse.Namespace(**{**saved, "device": args.device})
    args.out, device, scores, n = str(out), data.pick_device(args.device), [], args.patches
    with user_errors():
        vit = build_vit("random") if args.embedder == "random" else load_dino(args.embedder)
        vit = vit.to(device).eval()
    run = Run(out, vars(args), resume=bool(shown))
    looks = {str(n): (n, False), str(2 * n): (2 * n, False), f"{n} + {n} focused": (n, True),
             "all": (10 ** 9, False)}
    opened = None if args.data == "slides" else open_slides(args, vit, device)
    for seed in args.seeds:
        slides = opened or generated_slides(seed, args.count, vit, device)
        for fold, (train, test) in enumerate(split(slides, args.folds, seed)):
            for name in args.models:
                stage = f"{name}, seed {seed}, fold {fold}"
                chosen = [s for s in test if s.name == shown] if shown else [
                    s for k in (1, 0) for s in [s for s in test if s.label == k][:2]]
                if not chosen or (shown and stage not in run.finished):
                    continue
                model = train_model(stage, name, train, args, seed, run, device)
                if fold == 0 or shown:
                    heat_maps(out / f"{shown or 'heat'}_{name}.png", model, chosen, args, seed)
                for look, (patches, focused) in ({} if shown else looks).items():
                    if focused and not (args.focus and MODELS[name][1] == "attention"):
                        continue
                    for s in test:
                        logit, seen, attention, _ = predict(model, s, patches, focused, seed)
                        top = seen.flatten()[attention.argmax()]
                        hit = bool(s.foci[top]) if s.label and s.foci is not None else None
                        scores.append({"model": name, "patches": look, "seed": seed, "fold": fold,
                                       "slide": s.name, "label": s.label, "logit": logit,
                                       "hit": hit})
    if shown and not (out / f"{shown}_{args.models[0]}.png").exists():
        raise UserError(f"{shown} was not drawn", "a slide that a finished run tested is needed",
                        "correct --explain, or finish the run")
    if scores:
        report(out, scores, run)
    (out / "lock").unlink()


if __name__ == "__main__":
    run_script(main)
