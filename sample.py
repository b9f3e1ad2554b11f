"""Sample new images from a trained DiNO-Diffusion model.

    python sample.py --from-image x.png --count 4        # images that resemble x.png
    python sample.py --interpolate a.png b.png --frames 8
    python sample.py --prototypes 8                      # K-means centres of the training tokens
    python sample.py --random --count 16                 # no source image: tokens from a mixture
    python sample.py --prompt "Histology image of cancer tissue, morphology type two" --count 16
    python sample.py --each-prompt 10                    # a balanced labelled data set
    torchrun --nproc-per-node 8 sample.py --random --count 100000     # on eight GPUs

--prompt and --each-prompt are for a model trained with --condition prompts or labels; its --random
draws prompts as often as its training images had them.

The way of an image: a `Request` says what to make; `make_condition` turns it into tokens or prompt
ids; `DinoDiffusion.sample` makes noise of the request's seed, and an image of both; `main` writes
images/*.png, grid.png (sources at the left) and samples.csv, with each image's provenance:
strategy, sources and weights or prompt, seed, settings, and the labels it inherits with the rule
that gave them. Image j uses seed `--seed + j` and does not depend on the batch size, nor on the
number of processes (ranks), which take batches in turn. Sources are read as they are needed.
"""
import sys
from functools import lru_cache
from pathlib import Path

import torch

from dinodiff import DinoDiffusion, lerp, perturb, prototypes, slerp
from support.files import BOX, note_colour
from support.command import (StatusLine, UserError, autocast_dtype, pick_device, run_script,
                             user_errors)
from support.files import load_checkpoint, next_folder, resolve_checkpoint
from support.images import load_image
from support.ranks import all_ranks, join_ranks, rank, ranks
from support.sample_folder import (Request, SampleFolder, find_sources,
                                   read_training_tokens)
from support.seeds import step_seed
from support.settings import check_sample_flags, sample_flags
from support.tables import labels_of


def load_model(path, device):
    """A run's folder or model.pt -> (DinoDiffusion on the device, the flags of its training, the
    centres of its training tokens, which a packed model holds, or None)."""
    checkpoint = load_checkpoint(resolve_checkpoint(path))
    with user_errors():
        model = DinoDiffusion.from_checkpoint(checkpoint).to(device)
    training = checkpoint.get("training")
    training = training if isinstance(training, dict) else {}
    return model, training, checkpoint.get("prototypes")


# ---------------------------------------------------------------------------- what to make

def requests_from_images(args, sources):
    """--count images that resemble each source."""
    strategy = "img2img" if args.strength < 1 else "perturb" if args.perturb else "reconstruct"
    requests = []
    for line, source in enumerate(sources):
        labels = labels_of(source)
        rule = "of the source" if labels else ""
        requests += [Request(strategy, line, args.seed + line * args.count + i, (source,),
                             labels=labels, label_rule=rule) for i in range(args.count)]
    return requests


def requests_between(args, sources):
    """--count strips of --frames images from source A to source B, one noise for a strip."""
    if len(sources) != 2:
        raise UserError(f"--interpolate got {len(sources)} images", "it needs two",
                        "pass two files")
    labels = [labels_of(source) for source in sources]
    rule = "of the nearer source" if any(labels) else ""
    requests = []
    for strip in range(args.count):
        for frame in range(args.frames):
            weight = frame / max(1, args.frames - 1)
            nearer = labels[1] if weight > 0.5 else labels[0]
            requests.append(Request("interpolate", strip, args.seed + strip, tuple(sources),
                                    weight, labels=nearer, label_rule=rule))
    return requests


def requests_without_source(args):
    """--count images of each of --prototypes centres, or --count random ones."""
    if args.random:
        return [Request("random", i // 8, args.seed + i) for i in range(args.count)]
    requests = []
    for i in range(args.prototypes * args.count):
        number = i // args.count
        name = f"prototype {number} of {args.prototypes}"
        requests.append(Request("prototype", number, args.seed + i, (name,), prototype=number))
    return requests


def requests_of_prompts(args, model):
    """--prompt, --each-prompt or --random, for a model that follows prompts."""
    counts = model.prompt_counts.cpu()
    used = [model.prompts[number] for number in counts.nonzero()[:, 0].tolist()]
    if args.prompt is not None:
        prompts = [args.prompt] * args.count
        if args.prompt not in used:
            print(f"note: no training image had the prompt {args.prompt!r}")
    elif args.each_prompt:
        prompts = [prompt for prompt in used for _ in range(args.each_prompt)]
    else:
        draws = torch.multinomial(counts.double(), args.count, replacement=True,
                                  generator=torch.Generator().manual_seed(args.seed))
        prompts = [model.prompts[number] for number in draws.tolist()]

    requests = []
    for i, prompt in enumerate(prompts):
        labels = {}
        if model.config.labels and prompt in model.prompts:  # looked up, never read out of the text
            number = model.prompts.index(prompt) // (model.config.clusters or 1)
            labels = {"label": model.config.labels[number]}
        line = i // (args.each_prompt or 8)
        rule = "of the prompt" if labels else ""
        requests.append(Request("prompt", line, args.seed + i, prompt=prompt, labels=labels,
                                label_rule=rule))
    return requests


def plan(args, model):
    """What to make: a list of Requests, one an image."""
    if model.prompts:
        return requests_of_prompts(args, model)
    if args.random or args.prototypes:
        return requests_without_source(args)

    sources = find_sources(args.from_image or args.interpolate)
    if args.from_image:
        return requests_from_images(args, sources)
    return requests_between(args, sources)


# ---------------------------------------------------------------------------- tokens

def find_prototypes(args, model, tokens, folder):
    """K-means centres (K, G, D) of the tokens that a packed model holds, or else of the training
    tokens in a run's folder; standardised, on the model's device."""
    if tokens is None:
        tokens = read_training_tokens(folder, model.token_mean.shape)
        tokens = model.standardise(tokens.to(model.shift.device))
    with user_errors():
        return prototypes(tokens.float(), args.prototypes, args.seed).to(model.shift.device)


def generators(purpose, requests):
    """One for each image; near seeds and other purposes share no random numbers."""
    return [torch.Generator().manual_seed(step_seed(purpose, request.seed)) for request in requests]


def make_condition(requests, args, model, read, centers):
    """The condition of B requests: tokens (B, G, D), prompt ids (B, L), or None.

    read: path -> image (3, H, W). centers: the prototypes (K, G, D), or None.
    """
    if model.prompts:
        return model.prompt_ids([request.prompt for request in requests])
    if model.config.condition == "none":
        return None
    if args.random:
        return model.embedding_sampler.sample(generators("random", requests))
    if args.prototypes:
        return centers[[request.prototype for request in requests]]

    # Embed each source of this batch once.
    paths = list(dict.fromkeys(path for request in requests for path in request.sources))
    images = torch.stack([read(path) for path in paths])
    embedded = dict(zip(paths, model.embed(images.to(model.shift.device))))

    # Each image's own mixture of them.
    tokens = torch.stack([embedded[request.sources[0]] for request in requests])
    if args.interpolate:
        mix = lerp if args.mix == "lerp" else slerp
        end = [embedded[request.sources[1]] for request in requests]
        tokens = torch.stack([mix(a, b, request.weight)
                              for a, b, request in zip(tokens, end, requests)])
    if args.perturb:
        tokens = perturb(tokens, args.perturb, generators("perturb", requests))
    return tokens


# ---------------------------------------------------------------------------- images and files

def make_images(requests, args, model, read, centers, dtype):
    """B requests -> images (B, 3, H, W) in [-1, 1] on the CPU; UserError if they hold NaN."""
    start = None
    if args.strength < 1:
        start = torch.stack([read(request.sources[0]) for request in requests])
    images = model.sample(
        make_condition(requests, args, model, read, centers),
        seeds=[request.seed for request in requests], steps=args.steps, sampler=args.sampler,
        guidance_scale=args.guidance, guidance_rescale=args.guidance_rescale, eta=args.eta,
        batch=args.batch, start=start, strength=args.strength, dtype=dtype).cpu()
    if not images.isfinite().all():
        raise UserError(f"images of seeds from {requests[0].seed} on are not finite",
                        "need sound weights, moderate guidance",
                        "lower --guidance, or pass another model")
    return images


def main(argv=None):
    join_ranks()
    args = sample_flags(argv)
    device = pick_device(args.device)
    checkpoint = resolve_checkpoint(args.checkpoint)
    model, training, held = load_model(checkpoint, device)
    dtype = autocast_dtype(device, args.dtype)
    if args.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32  # bf16 brings the U-Net nothing there

    @lru_cache(maxsize=args.batch)
    def read(path):
        return load_image(path, model.config.image_size, training.get("depth"))

    def read_sources(request):
        return [read(source) for source in request.sources if isinstance(source, Path)]

    # What to make; what cannot be made, or read, is refused before a folder is there.
    check_sample_flags(args, model)
    requests = plan(args, model)
    centers = None
    if args.prototypes:
        centers = find_prototypes(args, model, held, checkpoint.parent)
    sources = read_sources(requests[0])
    if checkpoint == BOX:
        note_colour(sources)

    # Where to put it: a folder that all ranks share.
    parent = Path() if checkpoint == BOX else checkpoint.parent
    out = Path(args.out or next_folder(parent / "samples", requests[0].strategy))
    out = all_ranks(out)[0]
    folder = SampleFolder(out, requests, {
        "guidance": args.guidance, "guidance_rescale": args.guidance_rescale, "steps": args.steps,
        "sampler": args.sampler, "eta": args.eta, "strength": args.strength,
        "perturb": args.perturb, "dtype": str(dtype).removeprefix("torch."),
        "checkpoint": str(checkpoint)})

    # Rounds, of a batch for each rank.
    status = StatusLine(len(requests), "sample")
    for first in range(0, len(requests), args.batch * ranks()):
        everyone = range(len(requests))[first:first + args.batch * ranks()]
        mine = everyone[args.batch * rank():args.batch * (rank() + 1)]
        images = torch.empty(0)
        if mine:
            images = make_images([requests[number] for number in mine], args, model, read, centers,
                                 dtype)
        folder.add(mine, images, everyone)
        status.update(everyone.stop, images=len(everyone))
    status.close()

    if not rank():
        folder.write_grid(read_sources, with_prompts=bool(args.each_prompt))
        print(f"{len(requests)} images, grid.png and samples.csv: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
