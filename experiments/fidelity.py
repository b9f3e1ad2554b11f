"""How far apart are two sets of images, with intervals?

Prints the table of `python evaluate.py REAL SYNTHETIC`, with more options. REAL may be a run; its
training and held-out images then give the floor. The judge may be Inception, a ViT, or radiomics,
z-scored by REAL's first half. Distances between all images get 95 % intervals by subsampling.

Writes SYNTHETIC/fidelity.json.
"""
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

import evaluate
from dino import conditioning_tokens, load_dino
from evaluate import METRICS, FIDInception, RandomFeatures, compare
from experiments.common import add_run_flags, choose, open_run
from experiments.ladder import damages, ladder
from experiments.radiomics import radiomic_features, z_score
from experiments.statistics import subsample_interval
from support.cache import fingerprint
from support.command import UserError, number, print_table, user_errors
from support.datasets import open_dataset
from support.files import write_json
from support.ranks import pick_device
from support.training_set import split_halves


JUDGES = ("random", "inception", "dino", "radiomics")
FID_WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")


def load_judge(net, source):
    """Load a network's weights from a file, or from a URL whose file name ends in its hash."""
    options = {"map_location": "cpu", "weights_only": True}  # execute nothing in the file
    try:
        if source.startswith("https:"):
            state = torch.hub.load_state_dict_from_url(source, check_hash=True, **options)
        else:
            state = torch.load(source, **options)
        net.load_state_dict(state)
    except Exception as error:  # a malformed file can raise anything
        raise UserError(f"cannot load {source} ({' '.join(str(error).split())[:160]})", "a state "
                        f"dict of {type(net).__name__} is needed", "pass --weights FILE, or delete "
                        f"a damaged download in {torch.hub.get_dir()}/checkpoints") from None
    return net


def feature_extractor(kind, weights, device):
    """(name, function: images (B, 3, H, W) in [-1, 1] -> features) of a judge.

    The name tells the weights and the resizing: distances of different names do not compare.

    kind: one of JUDGES. weights: a file, for dino also a published name, or None.
    """
    if kind == "random":
        return RandomFeatures.NAME, RandomFeatures().to(device)

    if kind == "radiomics":
        return "radiomics, 32 levels, no resize", radiomic_features

    if kind == "inception":
        net = load_judge(FIDInception(), weights or FID_WEIGHTS)
        rule = "plain bilinear to 299 px"

        def extract(x):
            return net((x + 1) / 2)

    else:
        with user_errors():
            net = load_dino(weights)
        rule = f"CLS, antialiased bicubic to {net.input_side} px"
        extract = partial(conditioning_tokens, net, kind="cls")

    digest = fingerprint(net.state_dict().values())[:8]
    net.eval().to(device)
    return f"{kind} {digest}, {rule}", extract


def open_parts(args):
    """(ImageSet, indices) of real, other real and synthetic images; the model if REAL is a run."""
    if Path(args.synthetic, "model.pt").is_file():
        raise UserError(f"{args.synthetic} is a run", "its samples are needed",
                        "pass a folder of them")
    model = None
    if Path(args.real, "model.pt").is_file():
        run = open_run(args, args.real)
        model = run.model
        real = run.images
        halves = [run.train, run.test]
    else:
        real = open_dataset(args.real, args.size)
        halves = split_halves(real, args.seed)
    synthetic = open_dataset(args.synthetic, args.size)
    every = torch.arange(len(synthetic))
    return [(real, choose(halves[0], args.count)), (real, choose(halves[1], args.count)),
            (synthetic, choose(every, args.count))], model


def add_flags(parser):
    evaluate.add_flags(parser)
    add_run_flags(parser)
    add = parser.add_argument
    add("--features", choices=JUDGES, default="random",
        help="a random network, FID's Inception, a ViT (not the one that conditioned), radiomics")
    add("--weights", help="inception: a file; dino: a published ViT's name or a file")
    add("--ladder", action="store_true", help="also JPEG, blur and, of a run, reconstructions")
    add("--rounds", type=number(int, 2), default=20, help="subsamples of each interval")
    add("--out", help="JSON file (default: SYNTHETIC/fidelity.json)")


def main(args):
    device = pick_device(args.device)
    if args.features == "dino" and not args.weights:
        raise UserError("--features dino", "a judge that did not condition the samples is needed",
                        "name it: --weights dino_vitb8, or a file")
    name, judge = feature_extractor(args.features, args.weights, device)
    parts, reconstructor = open_parts(args)
    if args.features == "radiomics":  # one scale for all parts, measured when sizes are checked
        images, indices = parts[0]
        reference = cache(partial(evaluate.describe, images.batches(indices, args.batch), device,
                                  judge))

        def judge(x):
            return z_score(reference()[0], radiomic_features(x))

    results, features = evaluate.fidelity(parts, name, judge, device, args.batch)
    if args.ladder or args.features == "radiomics":
        rungs = damages(reconstructor) if args.ladder else {}
        results["ladder"] = ladder(rungs, parts[1], features, judge, device, args.batch)
        print_table(results["ladder"])

    # Intervals of the distances between all images; shares stay in [0, 1].
    half, other, fake = features
    if min(len(half), len(other), len(fake)) >= 12:  # halves with five neighbours each
        low, high = subsample_interval(compare, torch.cat([half, other]), fake, args.rounds,
                                       args.seed)
        for i, metric in enumerate(METRICS):
            interval = np.array([low[i], high[i]])
            if metric in ("precision", "recall", "coverage"):
                interval = interval.clip(0, 1)
            results[metric]["interval"] = interval.tolist()
        print_table({metric: {"95 % interval of all": results[metric]["interval"]}
                     for metric in METRICS})

    out = Path(args.synthetic)
    out = out / "fidelity.json" if out.is_dir() else out.with_suffix(".json")
    write_json(Path(args.out or out), results)
