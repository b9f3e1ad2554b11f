"""Do samples resemble the image they were made from, and as a set the data?

Held-out images are the sources; one sample is made of each and every seed. A sample should
correlate with its source more than with other images, and a search over all sources should find the
source first (chance: 1 / N); as a set, samples should lie as near to the training images as unseen
real images do (the floor). Distances are of a random network's features, never of those that
condition. Beside them stand what the autoencoder alone loses, and what a slight blur does.

Writes resemble.json and resemble.png into the run's folder.
"""
import numpy as np
import torch
import torch.nn.functional as F

from evaluate import (RandomFeatures, brightness, correlations, describe, frechet_distance,
                      grey_values, off_diagonal_mean, psnr)
from experiments.common import add_run_flags, batches_of, open_run
from support.command import (UserError, fraction, not_negative, positive_int, print_table, seed_int,
                             user_errors)
from support.files import write_json
from support.pictures import save_grid


def best_correlations(a, b, chunk=1024):
    """Highest correlation of each row of a with any row of b: (N,), b in chunks to spare memory."""
    return torch.stack([correlations(a, part).amax(dim=1) for part in b.split(chunk)]).amax(dim=0)


def first_share(similarity):
    """Share of the rows of (N, N) whose own column is the strict maximum; chance is 1 / N."""
    others = similarity.clone().fill_diagonal_(-torch.inf).amax(dim=1)
    return (similarity.diagonal() > others).double().mean().item()


def set_figures(images, train_features, train_pixels, judge, batch):
    """How a set of images (N, 3, H, W) lies to the training images: (pixel rows, dict)."""
    device = next(judge.buffers()).device
    features, pixels = describe(images.split(batch), judge, device)
    best = best_correlations(pixels, train_pixels).mean().item()
    figures = {"Frechet to training": frechet_distance(features, train_features),
               "best correlation with a training image": best}
    for name, value in brightness(grey_values(images)).items():
        figures[f"brightness {name}"] = value
    return pixels, figures


def resemblance(model, sources, training, seeds, judge, steps=50, guidance=1.0, eta=0.5, batch=64):
    """The main job's figures: (reference dict, list of one dict a seed, rows of pictures).

    sources (N, 3, H, W) held out; training: iterator of image batches. One sample a source and
    seed. Distances are of the judge's features to the training images, N images on each line.
    """
    device = next(model.buffers()).device
    train_features, train_pixels = describe(training, judge, device)

    def in_batches(function, images):
        return torch.cat([function(x.to(device)).cpu() for x in images.split(batch)])

    def distance_to_training(images):
        return set_figures(images, train_features, train_pixels, judge, batch)

    # What real images, the autoencoder and a blur come to.
    tokens = in_batches(model.embed, sources)
    reconstructed = in_batches(lambda x: model.decode(model.encode(x)), sources)
    blurred = F.avg_pool2d(F.pad(sources, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    source_pixels, reference = distance_to_training(sources)
    floor = reference["Frechet to training"]
    between = correlations(source_pixels, source_pixels)
    reference["correlation with other sources"] = off_diagonal_mean(between)
    reference["VAE PSNR, dB"] = psnr(sources, reconstructed)
    for name, images in (("VAE reconstructions", reconstructed), ("3x3-blurred real", blurred)):
        reference[f"Frechet of {name}"] = distance_to_training(images)[1]["Frechet to training"]

    # What samples come to.
    results = []
    pictures = [sources[:8], reconstructed[:8]]
    condition = None if model.config.condition == "none" else tokens
    for seed in seeds:
        numbers = [seed * 1_000_003 + i for i in range(len(sources))]
        samples = model.sample(condition, numbers, steps=steps, guidance_scale=guidance, eta=eta,
                               batch=batch).cpu()
        pixels, figures = distance_to_training(samples)
        by_pixels = correlations(pixels, source_pixels)  # (N, N)
        again = F.normalize(in_batches(model.embed, samples).flatten(1), dim=1)
        by_tokens = again @ F.normalize(tokens.flatten(1), dim=1).T  # (N, N)
        results.append({
            "correlation with own source": by_pixels.diagonal().mean().item(),
            "correlation with other sources": off_diagonal_mean(by_pixels),
            "own source first, by pixels": first_share(by_pixels),
            "own source first, by the model's own tokens": first_share(by_tokens),
            **figures,
            "Frechet, times the real floor": figures["Frechet to training"] / floor})
        pictures.append(samples[:8])
        print(f"seed {seed} done", flush=True)
    return reference, results, pictures


def summarise(results):
    """{figure: {"mean", "sd" over seeds, None of a single seed}} of one dict a seed."""
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary[name] = {"mean": float(np.mean(values)), "sd": sd}
    return summary


def add_flags(parser):
    add_run_flags(parser, count=256, train_limit=2000)
    add = parser.add_argument
    add("--seeds", type=seed_int, nargs="+", default=[0, 1, 2], help="of the samples")
    add("--steps", type=positive_int, default=50, help="DDIM steps")
    add("--guidance", type=not_negative, default=1.0, help="guidance scale, 1.0 = off")
    add("--eta", type=fraction, default=0.5, help="DDIM: 0 deterministic, 1 noisy as DDPM")


def main(args):
    run = open_run(args)
    model = run.model
    if model.prompts:
        raise UserError("this model follows prompts", "resemble needs one that follows images",
                        "compare sample.py --random by: python -m experiments fidelity")
    judge = RandomFeatures().to(next(model.buffers()).device)
    with user_errors():
        sources = run.images.batch(run.test.tolist())
        training = batches_of(run.images, run.train, args.batch)
        reference, results, pictures = resemblance(model, sources, training, args.seeds, judge,
                                                   args.steps, args.guidance, args.eta, args.batch)

    # A column for real images, one for each seed, and what the seeds have in common.
    print(f"{len(sources)} held-out sources, one sample each and seed; {len(run.train)} training "
          f"images; DDIM {args.steps} steps, eta {args.eta:g}, guidance {args.guidance:g}; "
          "features: random network, seed 0")
    seeds = dict(zip(map(str, args.seeds), results))
    summary = summarise(results)
    table = {}
    for name in [*summary, *reference]:
        row = {"real": reference.get(name)}
        for seed, result in seeds.items():
            row[f"seed {seed}"] = result.get(name)
        table[name] = {**row, **summary.get(name, {})}
    print_table(table)

    captions = ["held-out source", "VAE reconstruction"]
    captions += [f"sample, seed {seed}" for seed in seeds]
    save_grid(run.folder / "resemble.png", pictures, captions)
    print(f"wrote {run.folder / 'resemble.png'}")
    write_json(run.folder / "resemble.json", {
        "sources": len(sources), "training_images": len(run.train), "steps": args.steps,
        "guidance": args.guidance, "eta": args.eta, "tokens": model.config.tokens,
        "data": run.flags["data"], "real": reference, "summary": summary, "seeds": seeds})
