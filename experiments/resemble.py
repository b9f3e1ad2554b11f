"""Do samples resemble the image they were made from, and as a set the data?

Held-out images are the sources; one sample is made from each with every seed. A sample should
correlate with its source more than with other images, and a search over all sources should find the
source first (chance: 1 / N). As a set, samples should be as near to the training images as unseen
real images are (the floor). Distances use a random network's features, never those that condition.
Beside them stand reconstructions of the autoencoder, and a slight blur. Sharpness is the variance
of the Laplacian, relative to real images.

Writes resemble.json and resemble.png into the run's folder.
"""
import numpy as np
import torch
import torch.nn.functional as F

from evaluate import (RandomFeatures, brightness, correlations, describe, frechet_distance,
                      off_diagonal_mean, pixel_rows, psnr, sharpness)
from experiments.common import add_run_flags, open_run
from support.command import UserError, number, print_table, user_errors
from support.files import write_json
from support.pictures import save_grid


def first_share(similarity):
    """Share of the rows of (N, N) whose own column is the strict maximum; chance is 1 / N."""
    others = similarity.clone().fill_diagonal_(-torch.inf).amax(dim=1)
    return (similarity.diagonal() > others).double().mean().item()


def resemblance(model, sources, training, seeds, judge, refine=True, batch=64,
                guidance_scale=None):
    """The figures: (dict of references, list of one dict per seed, rows of pictures).

    sources (N, 3, H, W) held out; training: iterator of image batches. One sample per source and
    seed. Distances are of the judge's features to the training images.
    """
    device = next(model.buffers()).device
    train_features, = describe(training, device, judge)

    def in_batches(function, images):
        return torch.cat([function(x.to(device)).cpu() for x in images.split(batch)])

    def describe_set(images):
        """Pixel rows of a set of images, and their distance to the training images."""
        features, pixels = describe(images.split(batch), device, judge, pixel_rows)
        return pixels, frechet_distance(features, train_features)

    # References: real images, the autoencoder, a blur.
    tokens = in_batches(model.embed, sources)
    reconstructed = in_batches(lambda x: model.decode(model.encode(x)), sources)
    blurred = F.avg_pool2d(F.pad(sources, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    source_pixels, floor = describe_set(sources)
    reference = {
        "Frechet to training": floor,
        "Frechet of VAE reconstructions": describe_set(reconstructed)[1],
        "Frechet of 3x3-blurred real": describe_set(blurred)[1],
        "VAE PSNR, dB": psnr(sources, reconstructed),
        "correlation with other sources": off_diagonal_mean(
            correlations(source_pixels, source_pixels)),
        "brightness": brightness(sources).mean().item()}

    # Samples.
    results = []
    pictures = [sources[:8], reconstructed[:8]]
    condition = None if model.config.condition == "none" else tokens
    for seed in seeds:
        noise_seeds = [seed * 1_000_003 + i for i in range(len(sources))]
        samples = model.sample(condition, noise_seeds, guidance_scale=guidance_scale, batch=batch,
                               refine=refine).cpu()
        pixels, distance = describe_set(samples)
        by_pixels = correlations(pixels, source_pixels)  # (N, N)
        again = F.normalize(in_batches(model.embed, samples).flatten(1), dim=1)
        by_tokens = again @ F.normalize(tokens.flatten(1), dim=1).T  # (N, N)
        results.append({
            "correlation with own source": by_pixels.diagonal().mean().item(),
            "correlation with other sources": off_diagonal_mean(by_pixels),
            "own source first, by pixels": first_share(by_pixels),
            "own source first, by the model's own tokens": first_share(by_tokens),
            "Frechet to training": distance,
            "Frechet, times the real floor": distance / floor,
            "sharpness / real": (sharpness(samples).mean() / sharpness(sources).mean()).item(),
            "brightness": brightness(samples).mean().item()})
        pictures.append(samples[:8])
    return reference, results, pictures


def add_flags(parser):
    add_run_flags(parser, count=256, train_limit=2000)
    add = parser.add_argument
    add("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="of the samples")
    add("--guidance-scale", type=number(float, 0), help="(default: the model's)")
    add("--no-refine", action="store_true", help="the decoder alone")


def main(args):
    run = open_run(args)
    model = run.model
    if model.prompts:
        raise UserError("this model follows prompts", "one that follows images is needed",
                        "run python -m experiments fidelity on its samples")
    judge = RandomFeatures().to(next(model.buffers()).device)
    sources = run.images.batch(run.test.tolist())
    training = run.images.batches(run.train, args.batch)
    with user_errors():
        reference, results, pictures = resemblance(model, sources, training, args.seeds, judge,
                                                   not args.no_refine, args.batch,
                                                   args.guidance_scale)

    # A column for real images, then the mean and the deviation over the seeds.
    print(f"{len(sources)} held-out sources, one sample each for {len(results)} seeds; "
          f"{len(run.train)} training images")
    table = {name: {"real": value} for name, value in reference.items()}
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary[name] = {"mean": float(np.mean(values)), "sd": sd}
        table.setdefault(name, {}).update(summary[name])
    print_table(table)

    captions = ["held-out source", "VAE reconstruction"]
    captions += [f"sample, seed {seed}" for seed in args.seeds]
    save_grid(run.folder / "resemble.png", pictures, captions)
    print(f"wrote {run.folder / 'resemble.png'}")
    write_json(run.folder / "resemble.json", {
        "sources": len(sources), "training_images": len(run.train), "refined": not args.no_refine,
        "real": reference, "summary": summary,
        "seeds": dict(zip(map(str, args.seeds), results))})
