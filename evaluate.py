"""Every experiment of this project, as a table, a JSON file and, where it helps, a picture.

    python evaluate.py resemble                      do samples resemble their source?
    python evaluate.py probe --tokens global cls     what do the embedder's tokens know?
    python evaluate.py fidelity REAL SYNTHETIC       folders, a run's images, .npz statistics
    python evaluate.py privacy SAMPLES               are samples copies of training images?
    python evaluate.py clusters                      do K-means clusters find true morphologies?
    python evaluate.py classify --train FOLDER       is a synthetic training set of use?
    python evaluate.py classify --pools 50 200       is one made from N real images, and when?
    python evaluate.py segment                       does it find the lungs, unasked?

The metrics stand in metrics.py. The default judge is a fixed-seed random network, never the
features that conditioned the model under test; equal counts and the real-real floor stand beside
every figure. Frechet distances compare only with those of the same extractor, resize rule and
counts.
"""
import argparse
import copy
import hashlib
import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import (Help, UserError, atomic_file, batch_int, fraction, image_groups, line_chart,
                  load_checkpoint, not_negative, not_negative_int, open_dataset, pick_device,
                  positive_int, read_split, read_table, resolve_checkpoint, run_script, save_grid,
                  seed_int, share_above_zero, split_holdout, user_errors,
                  write_text_atomic)
from dino import TOKEN_KINDS, VisionTransformer, conditioning_tokens, load_dino
from dinodiff import DinoDiffusion
from downstream import (STRATEGIES, Settings, augment, compare_arms, downstream, predict,
                        train_classifier)
# Some of these are here only for those who look for them in this file.
from metrics import (METRICS, FIDInception, RandomFeatures, best_correlations, bootstrap_interval,
                     brightness, cluster_agreement, cohen_kappa, compare, correlations, dice,
                     first_share, frechet_distance, frechet_of_moments, grey_values,
                     kernel_distance, kernel_subsets, linear_probe, merge_moments, moments,
                     off_diagonal_mean, pixel_rows, prdc, psnr, roc_auc, subsample_interval)
from support.phantoms import CHEST_LABELS
from prompts import kmeans, standardise
from segment import (attention_maps, best_labels, decoder_features, diffseg, nearest_clusters, otsu,
                     outlined, points, principal_axes, under_seeds)
from unet import UNet

SETTINGS = {field.name for field in fields(Settings)}


# ---------------------------------------------------------------- judges

FID_WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")


def load_weights(net, source):
    """Fill a network from a file, or an address whose file name ends in the start of its hash."""
    options = {"map_location": "cpu", "weights_only": True}  # nothing in the file is executed
    try:
        net.load_state_dict(
            torch.hub.load_state_dict_from_url(source, check_hash=True, **options)
            if source.startswith("https:") else torch.load(source, **options))
    except Exception as error:  # zip, pickle, torch and network each raise their own
        raise UserError(f"cannot load {source} ({' '.join(str(error).split())[:160]})", "a state "
                        f"dict of {type(net).__name__} is needed", "pass --weights FILE, or delete "
                        f"a damaged download in {torch.hub.get_dir()}/checkpoints") from None
    return net


def feature_extractor(args, device, model=None):
    """(name, function: images (B, 3, H, W) in [-1, 1] -> features) of --features and --weights.

    The name tells weights and resize rule: figures of two names do not compare.
    """
    kind, weights = args.features, args.weights
    if kind == "random":
        return "random network, seed 0, no resize", RandomFeatures().to(device)
    if kind == "inception":
        net, rule = load_weights(FIDInception(), weights or FID_WEIGHTS), "plain bilinear to 299 px"

        def extract(x):
            return net((x + 1) / 2)
    elif kind == "xrv":
        try:  # without --weights the package unpickles its own download, which can run code
            from torchxrayvision.models import DenseNet
            net = DenseNet(weights=None if weights else "densenet121-res224-all")
        except (ImportError, OSError) as error:
            raise UserError(f"--features xrv cannot start ({error})", "torchxrayvision and its "
                            "weights are needed", "pip install torchxrayvision; without network "
                            "pass --weights FILE, a state dict of its DenseNet") from error
        net, rule = load_weights(net, weights) if weights else net, "antialiased bilinear to 224 px"

        def extract(x):
            x = F.interpolate(x.mean(dim=1, keepdim=True), (224, 224), mode="bilinear",
                              antialias=True)
            return net.features2(1024 * x)  # the range it was trained with
    else:
        with user_errors():
            if weights:
                net, rule = load_dino(weights), "CLS, antialiased bicubic"
                extract = partial(conditioning_tokens, net, kind="cls")
            else:
                print("note: the tokens that conditioned samples do not judge them fairly")
                model = model or DinoDiffusion.from_checkpoint(
                    load_checkpoint(resolve_checkpoint(args.checkpoint))).to(device)
                net, extract = model.embedder, model.embed
                rule = f"{model.config.tokens} tokens, antialiased bicubic"
        rule += f" to {net.input_side} px"
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    net.eval().to(device)
    return f"{kind} {digest.hexdigest()[:8]}, {rule}", extract


@torch.no_grad()
def describe(batches, extractor, device="cpu"):
    """Features (N, D) and pixel rows (N, P) on the CPU of an iterator of image batches."""
    parts = [(extractor(x.to(device)).flatten(1).cpu(), pixel_rows(x).cpu()) for x in batches]
    return tuple(torch.cat(part) for part in zip(*parts))


# ---------------------------------------------------------------- sub-commands

def print_table(rows):
    """Rows {name: {column: value}} as text; a value is a number, a list (an interval) or None."""
    def text(value):
        if isinstance(value, list):
            return " to ".join(map(text, value))
        return "" if value is None else f"{value:.4g}"

    heads = dict.fromkeys(column for row in rows.values() for column in row)
    table = [["", *heads]]
    table += [[name, *(text(row.get(head)) for head in heads)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def write_json(path, result):
    write_text_atomic(path, json.dumps(result, indent=2))
    print(f"wrote {path}")


def choose(indices, count):
    """At most `count` of the indices, shuffled, always in the same way."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(indices)[order[:count]]


def batches_of(dataset, indices, batch):
    return (dataset.batch(rows.tolist()) for rows in torch.as_tensor(indices).split(batch))


def open_run(args, checkpoint=None):
    """(folder, model, the flags of its training, data set, training and held-out numbers)."""
    path = resolve_checkpoint(checkpoint or args.checkpoint)
    checkpoint = load_checkpoint(path, ("training",))
    with user_errors():
        model = DinoDiffusion.from_checkpoint(checkpoint).to(pick_device(args.device))
    try:
        flags = checkpoint["training"]
        source, seed, count = flags["data"], int(flags["seed"]), int(flags["count"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say what it was trained on ({error!r})",
                        "the flags of its training are needed", "pass another --checkpoint"
                        ) from error
    images = open_dataset(args.data or source, model.config.image_size, seed, count)
    train, test = read_split(path.parent / "split.csv", images)
    if min(len(test), len(train)) < 2:
        raise UserError(f"{path.parent} has {len(train)} training and {len(test)} held-out images",
                        "2 of each are needed", "train with a larger --holdout")
    print(f"{path}: {images.note}; held-out images are sources, {model.config.tokens} tokens, "
          f"condition {model.config.condition}")
    train, test = choose(train, args.train_limit), choose(test, args.count)
    return path.parent, model, flags, images, train, test


def resemblance(model, sources, training, seeds, judge, steps=50, guidance=1.0, eta=0.5,
                batch=64):
    """The main job's figures: (reference dict, list of one dict a seed, rows of pictures).

    sources (N, 3, H, W) held out; training: iterator of image batches. One sample a source and
    seed. Distances are of the judge's features to the training images, N images on each line.
    """
    device = next(model.buffers()).device

    def run(function, images):
        return torch.cat([function(x.to(device)).cpu() for x in images.split(batch)])

    reconstructed = run(lambda x: model.decode(model.encode(x)), sources)
    tokens = run(model.embed, sources)
    train_features, train_pixels = describe(training, judge, device)

    def look(images):
        features, pixels = describe(images.split(batch), judge, device)
        best = best_correlations(pixels, train_pixels).mean().item()
        return pixels, {"Frechet to training": frechet_distance(features, train_features),
                        "best correlation with a training image": best,
                        **{f"brightness {k}": v
                           for k, v in brightness(moments(grey_values(images))).items()}}

    source_pixels, reference = look(sources)
    floor = reference["Frechet to training"]
    blurred = F.avg_pool2d(F.pad(sources, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    between = correlations(source_pixels, source_pixels)
    reference |= {"correlation with other sources": off_diagonal_mean(between),
                  "VAE PSNR, dB": psnr(sources, reconstructed),
                  "Frechet of VAE reconstructions": look(reconstructed)[1]["Frechet to training"],
                  "Frechet of 3x3-blurred real": look(blurred)[1]["Frechet to training"]}
    results, pictures = [], [sources[:8], reconstructed[:8]]
    condition = None if model.config.condition == "none" else tokens
    for seed in seeds:
        numbers = [seed * 1_000_003 + i for i in range(len(sources))]
        samples = model.sample(condition, numbers, steps, guidance, eta, batch=batch).cpu()
        pixels, figures = look(samples)
        across = correlations(pixels, source_pixels)  # (N, N)
        again, own = (F.normalize(t.flatten(1), dim=1) for t in (run(model.embed, samples), tokens))
        results.append({
            "correlation with own source": across.diagonal().mean().item(),
            "correlation with other sources": off_diagonal_mean(across),
            "own source first, by pixels": first_share(across),
            "own source first, by the model's own tokens": first_share(again @ own.T),
            **figures, "Frechet, times the real floor": figures["Frechet to training"] / floor})
        pictures.append(samples[:8])
        print(f"seed {seed} done", flush=True)
    return reference, results, pictures


def resemble(args):
    """do samples resemble their source, and as a set the data?"""
    run, model, flags, images, train, test = open_run(args)
    if model.prompts:
        raise UserError("this model follows prompts", "resemble needs one that follows images",
                        "compare sample.py --random by: evaluate.py fidelity")
    judge = RandomFeatures().to(next(model.buffers()).device)
    with user_errors():
        reference, results, pictures = resemblance(
            model, images.batch(test.tolist()), batches_of(images, train, args.batch), args.seeds,
            judge, args.steps, args.guidance, args.eta, args.batch)
    print(f"{len(test)} held-out sources, one sample each and seed; {len(train)} training images; "
          f"DDIM {args.steps} steps, eta {args.eta:g}, guidance {args.guidance:g}; "
          "features: random network, seed 0")
    seeds = dict(zip(map(str, args.seeds), results))
    values = {name: [result[name] for result in results] for name in results[0]}
    summary = {name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)) if v[1:] else None}
               for name, v in values.items()}
    columns = {"real": reference, **{f"seed {seed}": result for seed, result in seeds.items()}}
    print_table({name: {**{column: figures.get(name) for column, figures in columns.items()},
                        **summary.get(name, {})} for name in [*summary, *reference]})
    save_grid(run / "resemble.png", pictures, captions=[
        "held-out source", "VAE reconstruction", *(f"sample, seed {seed}" for seed in seeds)])
    print(f"wrote {run / 'resemble.png'}")
    write_json(run / "resemble.json", {
        "sources": len(test), "training_images": len(train), "steps": args.steps,
        "guidance": args.guidance, "eta": args.eta, "tokens": model.config.tokens,
        "data": flags["data"],
        "real": reference, "summary": summary, "seeds": seeds})


def binary_labels(columns, names, train, test, least=20):
    """Columns of str -> (list of label names, train (N, L), test (M, L)) of 0.0 and 1.0.

    A column of "0" and "1" is one label; any other is cut at "|" into one label a value. Labels
    need `least` images on either side in both parts.
    """
    labels = {}
    for name in names:
        if name not in columns:
            raise UserError(f"there is no column {name!r}", f"labels.csv has "
                            f"{', '.join(columns) or 'no columns'}", "pass --label-column")
        cells = [set(cell.split("|")) for cell in columns[name]]
        values = set().union(*cells) - {""}
        wanted = {name: "1"} if values <= {"0", "1"} else {v: v for v in sorted(values)}
        for label, value in wanted.items():
            shown = np.array([value in cell for cell in cells], float)
            labels[label] = shown[train], shown[test]
    kept = {label: parts for label, parts in labels.items()
            if all(least <= part.sum() <= len(part) - least for part in parts)}
    if not kept:
        raise UserError(f"no label of {', '.join(names)} is in {least} images, and not in {least}, "
                        "of both parts", "an AUC needs both", "pass another --label-column")
    if len(kept) < len(labels):
        print(f"left out, too rare or too common: {', '.join(sorted(labels.keys() - kept))}")
    return list(kept), *(np.stack(part, axis=1) for part in zip(*kept.values()))


def mean_auc(y, scores):
    """Mean over labels of the AUC of y (N, L) of 0 and 1 and scores (N, L)."""
    return float(np.mean([roc_auc(*column) for column in zip(y.T, scores.T)]))


def probe(args):
    """what does a linear read-out find in the tokens: trained, random weights, raw pixels?"""
    run, model, flags, images, train, test = open_run(args)
    default = CHEST_LABELS if set(CHEST_LABELS) <= set(images.columns) else ["finding"]
    columns = args.label_column or default
    names, train_y, test_y = binary_labels(images.columns, columns, train, test)
    device = next(model.buffers()).device
    nets = {f"embedder ({flags['embedder']})": model.embedder}
    for seed in args.seeds:
        torch.manual_seed(seed)
        nets[f"random weights, seed {seed}"] = VisionTransformer(model.config.vit).eval().to(device)
    plans = {f"{kind} tokens, {name}": partial(conditioning_tokens, net, kind=kind)
             for kind in args.tokens for name, net in nets.items()}
    plans["16x16 grey pixels"] = lambda x: F.adaptive_avg_pool2d(x.mean(dim=1), 16)
    table = {}
    for name, extract in plans.items():
        train_x, test_x = (describe(batches_of(images, part, args.batch), extract, device)[0]
                           for part in (train, test))
        aucs, scores = linear_probe(train_x, train_y, test_x, test_y)
        interval = bootstrap_interval(mean_auc, test_y, scores, rounds=200)
        table[name] = {"mean": float(np.mean(aucs)), "interval": interval,
                       "labels": dict(zip(names, aucs))}
    print(f"AUC of ridge on {len(train)} training images, tested on {len(test)} held-out images")
    print_table({name: {"mean": row["mean"], "95 %": row["interval"], **row["labels"]}
                 for name, row in table.items()})
    write_json(run / "probe.json", table)


STATISTICS = ("extractor", "side", "count", "mean", "scatter")


def load_statistics(path, extractor):
    """What `survey` returns, of a file of --save-stats; None of MedMNIST's images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(name.endswith("_images") for name in file.files):
                return None
            name, side, n, *arrays = (file[key] for key in STATISTICS)
        mean, scatter = map(torch.from_numpy, arrays)
        if n < 2 or scatter.shape != 2 * mean.shape or not scatter.isfinite().all():
            raise ValueError
    except Exception as error:  # a damaged file makes NumPy raise nearly any type
        raise UserError(f"{path} is missing, damaged, or without its extractor's name",
                        "a file of --save-stats is needed", "write it anew") from error
    if str(name) != extractor:
        raise UserError(f"{path} holds features of {name}", f"those of {extractor} are needed",
                        "pass the --features and --weights of that file, or write it anew")
    return int(side), (int(n), mean, scatter), []


def one_side(sides):
    """The only number of pixels in a set; UserError for several, and for less than 32."""
    if len(sides) > 1 or min(sides) < 32:
        raise UserError(f"got images of {sorted(sides)} pixels a side", "one side is needed, 32 or "
                        "more, for resizing changes figures", f"pass --size {max(32, min(sides))}")
    return min(sides)


@torch.no_grad()
def survey(path, is_real, extractor, extract, device, args):
    """(side, moments of grey_values and features, features of each part) of a set of images.

    Images pass by in a stream; features of max_features images are kept. The parts of a run are
    its training and its held-out images, of other real images two halves, patients apart.
    """
    stored = load_statistics(path, extractor) if Path(path).suffix == ".npz" else None
    if stored:
        return stored
    if Path(path, "model.pt").is_file():
        if not is_real:
            raise UserError(f"{path} is a run", "its samples are needed", "pass a folder of them")
        _, _, _, images, *parts = open_run(args, path)
    else:
        images = open_dataset(path, args.size)
        if len(images) < 12:
            raise UserError(f"got {len(images)} images in {path}", "12 are needed, for five "
                            "neighbours in each half", "add images")
        parts = split_holdout(images, 0.5, args.seed) if is_real else [range(len(images))]
    parts = [choose(part, args.count) for part in parts]
    side = one_side({images[i].shape[-1] for part in parts for i in part})
    total, kept = None, []
    for part in parts:
        rows, limit = [], args.max_features // len(parts)
        for x in batches_of(images, part, args.batch):
            features = extract(x.to(device)).flatten(1).cpu()
            rows.append(features[:max(0, limit - sum(map(len, rows)))])
            new = moments(torch.cat([grey_values(x), features], dim=1))
            total = merge_moments(total, new) if total else new
        kept.append(torch.cat(rows))
    return side, total, kept


def fidelity(args):
    """how far are two sets of images apart?"""
    device, draw = pick_device(args.device), torch.Generator().manual_seed(args.seed)
    extractor, extract = feature_extractor(args, device)
    with user_errors():
        sides, totals, kept = zip(*(survey(path, is_real, extractor, extract, device, args)
                                    for path, is_real in ((args.real, True),
                                                          (args.synthetic, False))))
        side = one_side(set(sides))
        grey = dict(zip(("real", "synthetic"), map(brightness, totals)))
        colours = [figures["colour"] for figures in grey.values()]
        if min(colours) < 0.01 and max(colours) > 0.05:  # the tint of a VAE stays far below
            raise UserError("one set is grey, the other in colour", "one mode is needed", "convert "
                            "one of them")
        if args.save_stats:
            with atomic_file(args.save_stats) as file:
                np.savez(file, **dict(zip(STATISTICS, (extractor, side, *totals[0]))))
        (n, mean, _), (m, _, _) = totals
        dimensions = len(mean) - 3  # behind three grey values
        print(f"features: {extractor}, {dimensions} dimensions; {side} px, centre square, bicubic "
              f"with antialias where resized; {n} real, {m} synthetic images")
        columns, streamed = {}, frechet_of_moments(
            *((n, mean[3:], scatter[3:, 3:]) for n, mean, scatter in totals))
        if all(kept):
            (half, other), (b,), a = *kept, torch.cat(kept[0])
            equal = min(len(half), len(other), len(b))
            noise = (2 * torch.rand(len(part), 1, side, side, generator=draw).expand(-1, 3, -1, -1)
                     - 1 for part in torch.arange(equal).split(args.batch))
            rivals = {"floor": other, "equal": b, "noise": describe(noise, extract, device)[0]}
            columns = {name: compare(half[:equal], x[:equal]) for name, x in rivals.items()}
            interval = np.stack(subsample_interval(compare, a, b, rounds=20, seed=args.seed), 1)
            interval[[2, 3, 5]] = interval[[2, 3, 5]].clip(0, 1)  # shares
            columns |= {"all": compare(a, b), "interval": interval}
            size = min(1000, equal // 2)
            draws = kernel_subsets(a, b, 50, size, args.seed)
            print(f"{equal} real images against as many real (floor), synthetic (equal) and noise "
                  f"images; all: {len(a)} against {len(b)}, with 95 % interval; subsets: {size} "
                  "of each, 50 times; streamed: every image")
    table = {metric: {name: column[i].tolist() for name, column in columns.items()}
             for i, metric in enumerate(METRICS if columns else METRICS[:1])}
    table["frechet"]["streamed"] = streamed
    if columns:
        table["kernel"] |= {"subsets' mean": draws.mean().item(), "sd": draws.std().item()}
    if min(n, m) <= dimensions:
        print(f"warning: fewer images than the {dimensions} dimensions: the covariance has no full "
              "rank, which raises the Frechet distance; read it beside its floor only")
    if n != m:
        print(f"warning: {n} against {m} images, and counts move distances: compare equal ones")
    print_table(table)
    print_table({f"brightness, {name}": figures for name, figures in grey.items()})
    out = Path(args.synthetic)
    out = out / "fidelity.json" if out.is_dir() else out.with_suffix(".json")
    write_json(Path(args.out or out), {"features": extractor, "size": side, "real": n,
                                       "synthetic": m, **table, "brightness": grey})


def token_distances(a, b):
    """Root of the mean squared difference of each row of (N, D) and each of (M, D): (N, M)."""
    exact = "donot_use_mm_for_euclid_dist"  # the matrix product loses small distances
    return torch.cdist(a, b, compute_mode=exact) / a.shape[1] ** 0.5


def nearest(distances, queries, others, allowed, chunk=256):
    """(distance, column) (M,) of the nearest allowed (M, N) row of others (N, D) to queries."""
    found = [distances(part, others).masked_fill(~ok, torch.inf).min(dim=1)
             for part, ok in zip(queries.split(chunk), allowed.split(chunk))]
    return tuple(torch.cat(values) for values in zip(*found))


def read_samples(folder, images, train):
    """(samples, numbers of the images that each was made from, name of its group) of sample.py.

    A source is known by the stem of its file; where several images share it, by all of them.
    """
    samples, numbers, trained = open_dataset(folder, images.size), {}, set(train.tolist())
    for i, file in enumerate(images.files):
        numbers.setdefault(Path(file).stem, []).append(i)
    path = Path(folder, "samples.csv")
    table = read_table(path) if path.is_file() else []
    rows = {row["file"].removeprefix("images/"): row for row in table}
    lost = [file for file in samples.files if "sources" not in rows.get(file, ())]
    if lost:
        raise UserError(f"{path} tells no source of {len(lost)} images ({lost[0]})",
                        "all are needed", "pass a folder that sample.py wrote")
    made_by = sorted({row.get("checkpoint", "?") for row in table})
    print(f"{folder}: {len(samples)} samples of {', '.join(made_by)}")
    sources, groups = [], []
    for row in (rows[file] for file in samples.files):
        named = [] if row.get("strategy") in ("random", "prototype") else row["sources"].split("|")
        found = [numbers.get(Path(name).stem, []) for name in named]
        sources.append(sum(found, []))
        groups.append("no source" if not named else
                      "training source" if trained & set(sources[-1]) else
                      "held-out source" if all(found) else "source from elsewhere")
    return samples, sources, groups


def share_below(held, x):
    """Share of distances x (M,) below the 1st percentile of held (N,): 0.01 if alike."""
    return (x < np.quantile(held, 0.01)).mean().item()


def privacy(args):
    """are samples nearer to training images than unseen real images are?"""
    run, model, _, images, train, test = open_run(args)
    device, rng = next(model.buffers()).device, np.random.default_rng(0)
    extractor, extract = feature_extractor(args, device, model)
    shown, sources = [(images, i) for i in test.tolist()], [[] for _ in test]
    groups = ["held-out real"] * len(test)
    for folder in args.samples:
        samples, *known = read_samples(folder, images, train)
        shown += [(samples, i) for i in range(len(samples))]
        sources, groups = sources + known[0], groups + known[1]
    groups = np.array(groups)
    is_real = groups == "held-out real"
    numbers = torch.unique(torch.cat([train, torch.tensor(sum(sources, []), dtype=torch.int64)]))
    own = torch.stack([torch.isin(numbers, torch.tensor(x, dtype=torch.int64)) for x in sources])
    trained = torch.isin(numbers, train)
    batches = (torch.stack([dataset[i] for dataset, i in shown[k:k + args.batch]])
               for k in range(0, len(shown), args.batch))
    ours, others = (describe(x, extract, device)
                    for x in (batches, batches_of(images, numbers, args.batch)))
    print(f"nearest of {len(train)} training images; tokens: {extractor}, root mean squared "
          "difference; pixels: 1 - correlation at 64 px or less; share below the 1st percentile of "
          f"{len(test)} held-out real images (their {-(-len(test) // 100)} nearest), 95 % by "
          "bootstrap; the own source is left out of the neighbours, or one of them")
    measures = {"tokens": token_distances, "pixels": lambda a, b: 1 - correlations(a, b)}
    tables, pictures, closest = {space: {} for space in measures}, {}, []
    for (space, distances), a, b in zip(measures.items(), ours, others):
        for rule, allowed in (("left out", trained & ~own), ("counted", trained | own)):
            distance, column = (x.numpy() for x in nearest(distances, a, b, allowed))
            held = distance[is_real]
            for group in dict.fromkeys(groups.tolist()):
                x = distance[groups == group]
                draws = [share_below(rng.choice(held, len(held)), rng.choice(x, len(x)))
                         for _ in range(1000)]
                name = f"{group}, {rule}" if own[groups == group].any() else group
                tables[space][name] = {
                    "images": len(x), "least": x.min().item(), "median": np.median(x).item(),
                    "share below": share_below(held, x),
                    "95 %": np.quantile(draws, [0.025, 0.975]).tolist()}
            for title, mask in (("held-out real", is_real), (f"samples, source {rule}", ~is_real)):
                rows = np.where(mask, distance, np.inf).argsort()[:min(8, mask.sum())]
                pairs = [(row, *shown[row], numbers[column[row]].item()) for row in rows]
                title = f"{title}, by {space}"
                pictures[title] = torch.stack([dataset[i] for _, dataset, i, _ in pairs])
                pictures[f"{title}: nearest"] = images.batch([j for *_, j in pairs])
                closest += [{
                    "row": title, "image": f"{dataset.name}/{dataset.files[i]}",
                    "nearest": images.files[j], "is source": j in sources[row],
                    "distance": distance[row].item()} for row, dataset, i, j in pairs]
        print(f"\n{space}:")
        print_table(tables[space])
    save_grid(run / "privacy.png", list(pictures.values()), captions=list(pictures))
    print(f"wrote {run / 'privacy.png'}")
    write_json(run / "privacy.json", {"tokens": extractor, "training_images": len(train),
                                      "held_out_images": len(test), "samples": args.samples,
                                      "distances": tables, "closest": closest})


def clusters(args):
    """do clusters of the training tokens find what a column of the labels knows?"""
    run, model, flags, images, *_ = open_run(args)
    train, _ = read_split(run / "split.csv", images)
    name = (args.label_column or ["morphology"])[0]
    if name not in images.columns:
        raise UserError(f"there is no column {name!r}", f"the data have "
                        f"{', '.join(images.columns) or 'no columns'}", "pass --label-column")
    truth = [images.columns[name][i] for i in train.tolist()]
    tokens = torch.from_numpy(np.load(run / "cache" / "tokens.npy", allow_pickle=False))
    features = {f"{model.config.tokens} tokens ({flags['embedder']})": tokens.flatten(1),
                "16x16 RGB pixels": torch.cat([F.adaptive_avg_pool2d(x, 16).flatten(1) for x in
                                               batches_of(images, train, args.batch)])}
    table = {}
    for what, x in features.items():
        for k in args.clusters or sorted({len(set(truth)), model.config.clusters or 33}):
            with user_errors():
                fits = [cluster_agreement(truth, kmeans(standardise(x), k, seed)[1].numpy())
                        for seed in args.seeds]
            table[f"{what}, K = {k}"] = {score: float(np.mean([fit[score] for fit in fits]))
                                         for score in fits[0]}
    print(f"{len(train)} training images, {len(set(truth))} values of {name}; K-means on "
          f"standardised features, mean of seeds {args.seeds}")
    print_table(table)
    write_json(run / "clusters.json", table)


def classify_pools(args, run, model, images, train, test):
    """The downstream experiment of downstream.py: tables, JSON and a chart for each strategy."""
    columns = args.label_column or (CHEST_LABELS if set(CHEST_LABELS) <= set(images.columns)
                                    else ["finding"])
    known = torch.tensor([not {"", "unlabelled"} & {cells[i] for name, cells in
                                                    images.columns.items() if name in columns}
                          for i in range(len(images))])
    if not known[train].all() or not known[test].all():
        print(f"left out, without a label: {(~known[train]).sum()} training and "
              f"{(~known[test]).sum()} held-out images")
    train, test = train[known[train]], test[known[test]]
    names, train_y, test_y = binary_labels(images.columns, columns, train, test, args.least)
    settings = Settings(**{name: tuple(value) if isinstance(value, list) else value
                           for name, value in vars(args).items() if name in SETTINGS})
    with user_errors():
        groups = image_groups(images, args.group_column)
        aucs, survival = downstream(model, images, groups, train, test, train_y, test_y, names,
                                    settings, run / "classify")
    rows = compare_arms(names, aucs)
    survival = {key: {name: mean if np.isfinite(mean) else None  # JSON has no NaN
                      for name, mean in zip(names, np.mean(values, axis=0).tolist())}
                for key, values in survival.items()}
    print(f"AUC on {len(test)} held-out real images, mean of seeds {args.seeds} (sd: over them); "
          f"{args.cnn_steps} CNN steps of 32 in every arm, a quarter of them on the pool after "
          f"'first'; augmentation on the fly: {args.augment}; vs: difference in "
          "mean AUC, +- its 95 %, p of DeLong's test, Holm-adjusted")
    print("labels: classical, reconstruct, img2img: of the source; interpolate: of the nearer "
          "source; prototypes: of the pool image with the nearest tokens")
    for size in settings.pools:
        own = {arm: row for (n, arm), row in rows.items() if n == size}
        print(f"\npool of {size} real images:")
        print_table({arm: {k: v for k, v in row.items() if k != "tests"}
                     for arm, row in own.items()})
        kept = {what: row for (n, what), row in survival.items() if n == size}
        print("do labels survive? AUC of a CNN trained on all training images of other patients:"
              if kept else "too few other training images to tell whether labels survive")
        print_table(kept)
        for strategy in settings.strategies:
            lines = {"real only": [(r, own["real only"]["AUC"]) for r in (0, *settings.ratios)]}
            for arm in ("classical", strategy, f"{strategy} alone", f"{strategy} first"):
                start = [] if arm.endswith("alone") else [(0, own["real only"]["AUC"])]
                lines[arm] = start + [(r, own[f"1:{r} {arm}"]["AUC"]) for r in settings.ratios]
            path = run / f"classify_{size}_{strategy}.png"
            line_chart(path, {arm: tuple(zip(*points)) for arm, points in lines.items()},
                       f"{size} real images, {strategy}", "synthetic images for each real one",
                       "mean AUC")
            print(f"wrote {path}")
    write_json(run / "classify_pools.json", {
        "settings": asdict(settings), "test_images": len(test), "labels": names,
        "arms": {str(size): {arm: row for (n, arm), row in rows.items() if n == size}
                 for size in settings.pools},
        "survival": {str(size): {what: row for (n, what), row in survival.items() if n == size}
                     for size in settings.pools}})


def classify(args):
    """train a small CNN on real and on synthetic images, test it on the run's held-out images"""
    run, model, flags, images, train, test = open_run(args)
    if args.pools:
        return classify_pools(args, run, model, images, train, test)
    column = (args.label_column or ["label"])[0]
    device, sets = pick_device(args.device), {"real": (images, train)}
    for path in args.train or []:
        other = open_dataset(path, model.config.image_size)
        sets[str(path)] = other, torch.arange(len(other))
    cells = {}
    for name, (dataset, rows) in {**sets, "test": (images, test)}.items():
        if column not in dataset.columns:
            raise UserError(f"{name} has no column {column!r}", "the same labels are needed on "
                            "every side", "pass --label-column, or another set")
        cells[name] = [dataset.columns[column][i] for i in rows.tolist()]
    values = sorted(set(cells["test"]))
    values = values[:1] if len(values) == 2 else values
    if len(set(cells["test"])) < 2 or "" in cells["test"]:
        raise UserError(f"column {column!r} of the held-out images holds {set(cells['test'])}",
                        "two labels or more, and no empty cell, are needed", "pass --label-column")
    truth = {name: np.array([[cell == value for value in values] for cell in own], float)
             for name, own in cells.items()}

    table, shown = {}, images.batch(test.tolist())
    for name, (dataset, rows) in sets.items():
        aucs = []
        for seed in args.seeds:
            net = train_classifier([(dataset, rows, truth[name], args.cnn_steps)], seed,
                                   partial(augment, turns=args.turns), device)
            score = predict(net, shown, args.batch, device)
            aucs.append(mean_auc(truth["test"], score))
        table[name] = {"images": len(rows), "AUC": float(np.mean(aucs)),
                       "sd": float(np.std(aucs, ddof=1)) if aucs[1:] else None,
                       "95 % of the last": bootstrap_interval(mean_auc, truth["test"], score)}
    print(f"AUC of {', '.join(values)} on {len(test)} held-out real images; CNN of "
          f"{args.cnn_steps} steps, seeds {args.seeds}")
    print_table(table)
    write_json(run / "classify.json", table)


def known_masks(images, kind, numbers):
    """(those of the numbers that have a mask, their masks (N, side, side) bool)."""
    if kind not in images.masks:
        raise UserError(f"{images.name} has no {kind}", f"it has {[*images.masks] or 'no masks'}",
                        "pass --mask-kind, or data with a folder masks/")
    found = [i for i in numbers.tolist() if images.masks[kind][i] is not None]
    masks = [images.mask(i, kind).bool() for i in found]
    blank = [images.files[i] for i, mask in zip(found, masks) if mask.all() or not mask.any()]
    if blank or len(found) < 2:
        raise UserError(f"{len(found)} of {len(numbers)} images have {kind}, {len(blank)} of them "
                        f"all black or all white {blank[:3]}", "2 that show lungs are needed in "
                        "training and held out", "correct the masks, or pass --mask-kind")
    return torch.tensor(found), torch.cat(masks)


def lung_masks(model, args, unlabelled, known, known_y, shown):
    """{method and rule: (masks (N, H, W) bool, labels (N, H, W))} of the images `shown`.

    unlabelled: training images for K-means; known, known_y: training images with masks.
    """
    def run(function, images):
        return torch.cat([function(x.to(model.shift)).cpu() for x in images.split(args.batch)])

    look = partial(decoder_features, model, timesteps=args.timesteps, seed=args.seed)
    axes, side, found = principal_axes(run(look, unlabelled[:100]), 48), shown.shape[-1], {}
    sets = [run(lambda x: torch.einsum("bdhw,dc->bchw", look(x), axes.to(x)), images)
            for images in (unlabelled, known, shown)]
    for k in args.clusters:
        centers, _ = kmeans(points(sets[0]), k, args.seed, n_init=3, max_iter=100)
        unnamed, named, labels = (nearest_clusters(x, centers, side) for x in sets)
        if under_seeds(unnamed, k).any():
            found[f"K-means {k}, seeds"] = under_seeds(unnamed, k)[labels], labels
        found[f"K-means {k}, masks"] = best_labels(named, known_y, k)[labels], labels
    labels = run(lambda x: diffseg(attention_maps(model, x, seed=args.seed), side, args.threshold),
                 shown)
    k, usual = int(labels.max()) + 1, known_y.float().mean(0) >= 0.5
    by_seeds = torch.stack([under_seeds(x[None], k)[x] for x in labels])
    by_place = torch.stack([best_labels(x, usual, k)[x] for x in labels])
    return found | {"DiffSeg, seeds": (by_seeds, labels), "DiffSeg, masks": (by_place, labels)}


def segment(args):
    """lung masks by DiffSeg on attention and by K-means on decoder features: Dice, floors"""
    run, model, _, images, train, test = open_run(args)
    asked = torch.cat([test, train]) if args.allow_leakage else test
    numbers, truth = known_masks(images, args.mask_kind, asked)
    teachers, known_y = known_masks(images, args.mask_kind, train)
    leaked, usual = len(teachers) * args.allow_leakage, known_y.float().mean(0) >= 0.5
    shown, known, unlabelled = (images.batch(part.tolist())
                                for part in (numbers, teachers[:args.fit], train[:args.fit]))
    print(f"Dice with {args.mask_kind} of {len(shown)} images at {shown.shape[-1]} px (without a "
          f"mask, left out: {len(asked) - len(shown)}); clusters of {len(unlabelled)} training "
          f"images, named by {len(known)} training masks; seed {args.seed}; 95 % by bootstrap"
          + f"; LEAKAGE: {leaked} of them were trained on" * args.allow_leakage)
    paths = {f"{file.parent.name}/{file.stem}: ": file for path in map(Path, args.sweep)
             for file in (sorted(path.glob("model*.pt")) if path.is_dir() else [path])}
    paths |= {"floor, unconditional, ": path for path in [args.unconditional] if path}
    nets, table, pictures = {"": model}, {}, {}
    for title, path in paths.items():
        _, nets[title], _, same, _, unseen = open_run(args, path)
        if same.note != images.note or not set(test.tolist()) <= set(unseen.tolist()):
            raise UserError(f"{path} was trained on other images, or on some of these", "the same "
                            "data, held out alike, are needed", "train it with that --seed")

    def add(name, masks, labels=None):
        scores = np.array([dice(*pair) for pair in zip(masks, truth)])
        table[name] = {"Dice": scores.mean().item(), "95 %": bootstrap_interval(np.mean, scores)}
        if labels is not None:
            best = [best_labels(x, y, int(x.max()) + 1)[x] for x, y in zip(labels, truth)]
            table[name]["ORACLE"] = float(np.mean([dice(*pair) for pair in zip(best, truth)]))

    torch.manual_seed(args.seed)
    nets["floor, untrained U-Net, "] = bare = copy.deepcopy(model)
    bare.unet = UNet(model.config.unet).to(model.shift.device).eval()
    for title, net in nets.items():
        with user_errors():
            found = lung_masks(net, args, unlabelled, known, known_y[:args.fit], shown)
        for method, (masks, labels) in found.items():
            add(title + method, masks, labels)
            pictures.setdefault(method, masks)
    add("floor, constant mean of training masks", usual.expand_as(truth))
    add("floor, Otsu's threshold", otsu(shown))
    add("floor, whole image", torch.ones_like(truth))
    print_table(table)
    print("seeds: labels at two fixed points are lung (no row: no label fills a quarter there);\n"
          "masks: training masks name them, not zero-shot; ORACLE: the best labels by the own mask")
    rows = [shown, *(outlined(shown, masks) for masks in (truth, *pictures.values()))]
    save_grid(run / "segment.png", [row[:8] for row in rows], ["image", "true edge", *pictures])
    print(f"wrote {run / 'segment.png'}")
    write_json(run / "segment.json", {
        "images": len(shown), "training_masks": len(known), "leaked": leaked, "dice": table,
        "settings": {key: value for key, value in vars(args).items() if key != "run"}})


def main(argv=None):
    parser = argparse.ArgumentParser(description="Metrics and tables; see the head of this file.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for run in (fidelity, privacy, resemble, probe, clusters, classify, segment):
        command = commands.add_parser(run.__name__, help=run.__doc__, formatter_class=Help)
        command.set_defaults(run=run, features="dino", train_limit=None)
        a = command.add_argument
        a("--checkpoint", help="run folder or model.pt (default: the newest run)")
        a("--data", help="where the run's images are now (default: as trained)")
        a("--batch", type=batch_int, default=64, help="images at once")
        a("--device", default="auto", help="auto, cuda, mps or cpu")
        a("--count", type=positive_int, default=256 if run is resemble else 5000,
          help="at most so many images: of each set, or held out")
        if run in (fidelity, privacy):
            a("--weights", help="inception, xrv: a file of weights; dino: a published ViT's name "
              "or a file (default: the embedder of --checkpoint)")
        if run is privacy:
            a("samples", nargs="+", help="folders that sample.py wrote")
            continue
        if run is fidelity:
            a("real", help="a run (its training images), a folder, or a file of --save-stats")
            a("synthetic", help="a folder, e.g. of a run's samples, or a file of --save-stats")
            a("--features", choices=("random", "inception", "dino", "xrv"), default="random",
              help="random network, FID's, a ViT (not the one that conditioned), TorchXRayVision's")
            a("--max-features", type=positive_int, default=5000, help="keep features of so many "
              "images a set; the others count in the streamed Frechet distance only")
            a("--save-stats", metavar="FILE", help="write REAL's statistics, for later use as REAL")
            a("--size", type=positive_int, help="resize to this side (default: as they are)")
            a("--seed", type=seed_int, default=0, help="of the halves and the intervals")
            a("--out", help="JSON file (default: SYNTHETIC/fidelity.json)")
            continue
        a("--train-limit", type=positive_int, default=2000, help="at most so many training images")
        if run is segment:
            a("--mask-kind", default="masks", help="folder of the masks in the data")
            a("--allow-leakage", action="store_true", help="judge training images too, and say so")
            a("--fit", type=positive_int, default=150, help="training images at most")
            a("--clusters", type=positive_int, nargs="+", default=[6, 256], help="K, each tried")
            a("--timesteps", type=not_negative_int, nargs="+", default=[50, 150, 300],
              help="of the features")
            a("--threshold", type=not_negative, default=0.01,
              help="KL of DiffSeg, nats (paper: 0.9)")
            a("--sweep", nargs="+", default=[], metavar="FILE", help="more model.pt, or folders")
            a("--unconditional", metavar="RUN", help="a control of train.py --condition none")
            a("--seed", type=seed_int, default=0, help="of noise, K-means, the untrained U-Net")
            continue
        a("--seeds", type=seed_int, nargs="+", default=[0, 1, 2],
          help="of samples, or random weights")
        if run is resemble:
            a("--steps", type=positive_int, default=50, help="DDIM steps")
            a("--guidance", type=not_negative, default=1.0, help="guidance scale, 1.0 = off")
            a("--eta", type=fraction, default=0.5, help="DDIM: 0 deterministic, 1 noisy as DDPM")
            continue
        a("--label-column", nargs="+", help="of labels.csv (default: findings of probe, morphology "
          "of clusters, label of classify)")
        if run is clusters:
            a("--clusters", type=positive_int, nargs="+", help="K (default: the true number, and "
              "the run's)")
        elif run is classify:
            a("--train", nargs="+", metavar="FOLDER", help="labelled sets, e.g. of sample.py "
              "--each-prompt; the run's own training images come first")
            a("--cnn-steps", type=positive_int, default=600, help="steps of the small CNN")
            a("--turns", action="store_true", help="augment by flips and turns: for histology only")
            a("--pools", type=positive_int, nargs="+", metavar="N", help="the downstream "
              "experiment: pools of N real images, a synthetic set made from each")
            a("--ratios", type=positive_int, nargs="+", default=[1, 10, 50], metavar="R",
              help="with --pools: synthetic images for each real one")
            a("--strategies", choices=STRATEGIES, nargs="+", default=["reconstruct", "interpolate"],
              help="with --pools: how they are made")
            a("--augment", choices=("none", "light", "strong"), default="none", help="with "
              "--pools: each batch of every arm, anew each time; strong is the classical arm's")
            a("--least", type=positive_int, default=20, help="with --pools: leave out labels with "
              "fewer images on either side, in training or held-out images")
            a("--group-column", help="with --pools: who is drawn as a whole (default: a patient "
              "column, if there is one)")
            a("--sample-steps", type=positive_int, default=10, help="DDIM steps")
            a("--guidance", type=not_negative, default=1.0, help="guidance scale, 1.0 = off")
            a("--eta", type=fraction, default=0.5, help="DDIM: 0 deterministic, 1 noisy as DDPM")
            a("--strength", type=share_above_zero, default=0.6, help="img2img: share of the noise")
        else:
            a("--tokens", choices=TOKEN_KINDS, nargs="+", default=["global", "cls", "patch"],
              help="which tokens are read out")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # figures of a GPU equal those of a CPU
    args.run(args)


if __name__ == "__main__":
    run_script(main)
