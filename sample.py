"""Sample new images from a trained DiNO-Diffusion model.

    python sample.py --from-image x.png --count 4        # images that resemble x.png
    python sample.py --interpolate a.png b.png --frames 8
    python sample.py --prototypes 8                      # K-means centres of the training tokens
    python sample.py --random --count 16                 # no source image: tokens from a mixture
    python sample.py --from-vector vectors.npz --row 3   # precomputed tokens
    python sample.py --prompt "Histology image of cancer tissue, morphology type two" --count 16
    python sample.py --each-prompt 10                    # a balanced labelled data set
    python sample.py --random --count 16 --animate       # and how they appear out of noise
    torchrun --nproc-per-node 8 sample.py --random --count 100000     # on eight GPUs

--prompt and --each-prompt need a model trained with --condition prompts or labels; its --random
draws prompts with their training frequencies.

`plan` makes one `Request` per image; `make_condition` turns requests into tokens or prompt ids;
`DinoDiffusion.sample` turns these and the requests' seeds into images; `main` writes images/*.png,
grid.png (sources at the left), animation.gif and samples.csv: each image's strategy, sources or
prompt, seed, settings and inherited labels. Image j has seed `--seed + j`; it does not depend on
the batch size or the number of processes (ranks). The refiner adds random fine detail.
"""
import argparse
import sys
from functools import lru_cache, partial
from pathlib import Path

import torch

from dinodiff import DEFAULT_STEPS, SAMPLERS, DinoDiffusion, prototypes, slerp
from prompts import find_prompt, labels_of_prompts
from support.cache import read_vectors
from support.command import Help, StatusLine, UserError, number, run_script, user_errors
from support.files import BOX, load_checkpoint, next_folder, resolve_checkpoint
from support.images import load_image
from support.ranks import all_ranks, autocast_dtype, join_ranks, pick_device, rank, ranks
from support.sample_folder import Request, SampleFolder, find_sources, read_training_tokens
from support.seeds import step_seed
from support.speed import compile_where_it_pays, rehearse


def flags():
    parser = argparse.ArgumentParser(description="Sample images from a trained model.",
                                     usage="%(prog)s WHAT [flags]", formatter_class=Help)

    flag = parser.add_argument_group("what to make (one of)").add_mutually_exclusive_group(
        required=True).add_argument
    flag("--from-image", nargs="+", metavar="PATH", help="images, or folders of them, to resemble")
    flag("--from-vector", metavar="FILE", help="a .npz with files (N) and tokens (N, G, D)")
    flag("--interpolate", nargs=2, metavar=("A", "B"), help="from image A to image B")
    flag("--prototypes", type=number(int, 1), metavar="K", help="centres of K clusters")
    flag("--random", action="store_true", help="no source image")
    flag("--prompt", metavar="TEXT", help="words of the training prompts")
    flag("--each-prompt", type=number(int, 1), metavar="N", help="N images of every prompt")

    flag = parser.add_argument_group("how").add_argument
    flag("--row", type=number(int, 0), help="a row of --from-vector (default: all)")
    flag("--strength", type=number(float, 1e-9, 1), default=1.0,
         help="below 1: start from the source image with this share of the noise (img2img)")
    flag("--frames", type=number(int, 1), default=8, help="images from A to B")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--count", type=number(int, 1), default=1, help="images per source")
    flag("--steps", type=number(int, 1, 1000), help="denoising steps (default: dpm 15, ddim 50, "
         "ddpm 1000)")
    flag("--sampler", choices=SAMPLERS, default="dpm", help="DPM-Solver++, DDIM or DDPM")
    flag("--guidance-scale", type=number(float, 0, 1e6),
         help="1 = off; above 1 follows the condition more closely (default: the model's)")
    flag("--guidance-rescale", type=number(float, 0, 1), default=0.0,
         help="undo the contrast that guidance above 1 adds, e.g. 0.7")
    flag("--no-refine", action="store_true", help="no refiner: blurry, no random detail")
    flag("--seed", type=number(int, 0, 2 ** 62), default=0, help="of the first image; then +1 each")
    flag("--batch", type=number(int, 1), default=32, help="images at a time")

    flag = parser.add_argument_group("machine and files").add_argument
    flag("--checkpoint", help="a run's folder, a model.pt or box (default: the newest run or box)")
    flag("--device", default="auto", help="auto, cuda, mps or cpu")
    flag("--compile", action=argparse.BooleanOptionalAction,
         help="torch.compile all blocks (default: on a GPU, for many images, if it is faster)")
    flag("--out", help="folder (default: a new one in the run's samples/)")
    flag("--animate", action="store_true", help="also animation.gif: the estimate after each step")
    return parser


def parse(argv=None):
    """Flags -> Namespace; exits with code 2 after a mistake."""
    parser = flags()
    args = parser.parse_args(argv)
    args.steps = args.steps or DEFAULT_STEPS[args.sampler]
    if args.strength < 1 and not args.from_image:
        parser.error("--strength needs --from-image: pass it, or leave --strength out")
    if args.row is not None and not args.from_vector:
        parser.error("--row needs --from-vector: pass a file, or leave --row out")
    if args.animate and (args.steps > 50 or ranks() > 1):
        parser.error("--animate takes at most 50 --steps, in one process: pass fewer")
    return args


def refuse_impossible(args, model):
    """UserError if this DinoDiffusion cannot make what the flags ask for."""
    condition = model.config.condition
    wants_prompt = args.prompt is not None or args.each_prompt
    if model.prompts and not (wants_prompt or args.random):
        raise UserError("this model follows prompts, not images", "a prompt is needed",
                        "pass --prompt, --each-prompt or --random")
    if wants_prompt and not model.prompts:
        raise UserError(f"this model was trained with --condition {condition}", "it knows no "
                        "prompts", "pass --from-image or --random, or another --checkpoint")
    if condition == "none" and not (args.random or args.strength < 1):
        raise UserError("this model was trained with --condition none", "it cannot follow a source",
                        "pass --random, or --from-image with --strength below 1")
    if condition == "dino" and (args.from_image or args.interpolate) and not model.config.vit:
        raise UserError("this model was trained on a file of vectors", "it cannot embed an image",
                        "pass --from-vector FILE, --prototypes or --random")
    if condition == "dino" and args.random and model.embedding_sampler is None:
        raise UserError("this model has no embedding sampler, its training was not finished",
                        "a finished run is needed", "use train.py --resume")


# ---------------------------------------------------------------------------- what to make

def plan(args, model, sources, labels, names):
    """A list of Requests, one per image, with seeds from --seed on. names: of prototypes or
    vectors."""
    requests = []

    def add(strategy, row, seed=None, **settings):
        seed = args.seed + len(requests) if seed is None else seed
        requests.append(Request(strategy, row, seed, **settings))

    # A model of prompts.
    if model.prompts:
        of_prompts = labels_of_prompts(model.config.labels, model.config.clusters)
        label_of = dict(zip(model.prompts, of_prompts))
        for i, prompt in enumerate(choose_prompts(args, model)):
            known = {"label": label_of[prompt]} if label_of.get(prompt) else {}
            add("prompt", i // (args.each_prompt or 8), prompt=prompt, labels=known)

    # Without a source image.
    elif args.random:
        for i in range(args.count):
            add("random", i // 8)
    elif names:
        strategy = "prototype" if args.prototypes else "vector"
        rows = range(len(names)) if args.row is None else [args.row]
        for i in range(len(rows) * args.count):
            index = rows[i // args.count]
            add(strategy, i // args.count, index=index, sources=(names[index],))

    # From images: --count for each, or strips from the first to the second.
    elif args.from_image:
        strategy = "img2img" if args.strength < 1 else "reconstruct"
        for i in range(len(sources) * args.count):
            row = i // args.count
            add(strategy, row, sources=(sources[row],), labels=labels[row])
    else:
        for strip in range(args.count):  # all frames of a strip share their noise
            for frame in range(args.frames):
                weight = frame / max(1, args.frames - 1)
                add("interpolate", strip, seed=args.seed + strip, sources=tuple(sources),
                    weight=weight)
    return requests


def choose_prompts(args, model):
    """The prompt of each image: --prompt, each in turn, or drawn with training frequencies."""
    counts = model.prompt_counts.cpu()
    if args.prompt is not None:
        with user_errors():
            model.prompt_ids([args.prompt])  # refuses unknown words
        index = find_prompt(args.prompt, model.prompts)
        if index is None or not counts[index]:
            print(f"note: no training image had the prompt {args.prompt!r}")
        return [args.prompt if index is None else model.prompts[index]] * args.count
    if args.each_prompt:
        used = counts.nonzero()[:, 0].tolist()
        return [model.prompts[index] for index in used for _ in range(args.each_prompt)]
    draws = torch.multinomial(counts.double(), args.count, replacement=True,
                              generator=torch.Generator().manual_seed(args.seed))
    return [model.prompts[index] for index in draws.tolist()]


# ---------------------------------------------------------------------------- tokens

def read_table(args, model, tokens, folder):
    """Names and standardised tokens (K, G, D) of --prototypes or --from-vector.

    Prototypes are K-means centres of `tokens` (N, G, D), which a packed model brings along, or of
    those in the run's folder.
    """
    device = model.shift.device
    if args.prototypes:
        if tokens is None:
            tokens = read_training_tokens(folder, model.token_mean.shape)
            tokens = model.standardise(tokens.to(device))
        with user_errors():
            table = prototypes(tokens.float(), args.prototypes, args.seed).to(device)
        return [f"prototype {k} of {args.prototypes}" for k in range(args.prototypes)], table

    vectors = read_vectors(args.from_vector)
    table = torch.stack(list(vectors.values())).to(device)
    if table.shape[1:] != model.token_mean.shape or (args.row or 0) >= len(table):
        raise UserError(f"{args.from_vector} holds {len(table)} tokens of shape "
                        f"{tuple(table.shape[1:])}", "this model needs "
                        f"{tuple(model.token_mean.shape)}, and a --row that is there",
                        "write them with the embedder that it was trained with")
    return list(vectors), model.standardise(table)


def make_condition(requests, args, model, read, table):
    """The condition of B requests: tokens (B, G, D), prompt ids (B, L), or None.

    read: path -> image (3, H, W). table: prototypes or standardised vectors (K, G, D), or None.
    """
    if model.prompts:
        return model.prompt_ids([request.prompt for request in requests])
    if model.config.condition == "none":
        return None
    if args.random:
        return model.embedding_sampler.sample([
            torch.Generator().manual_seed(step_seed("random", request.seed))
            for request in requests])
    if table is not None:
        return table[[request.index for request in requests]]

    # Embed each source of this batch once.
    paths = list(dict.fromkeys(path for request in requests for path in request.sources))
    images = torch.stack([read(path) for path in paths])
    embedded = dict(zip(paths, model.embed(images.to(model.shift.device))))

    # Tokens of each image: its source's, or between two.
    tokens = torch.stack([embedded[request.sources[0]] for request in requests])
    if args.interpolate:
        end = [embedded[request.sources[1]] for request in requests]
        tokens = torch.stack([slerp(a, b, request.weight)
                              for a, b, request in zip(tokens, end, requests)])
    return tokens


# ---------------------------------------------------------------------------- images and files

def make_images(requests, args, model, read, table, dtype, watch):
    """B requests -> images (B, 3, H, W) in [-1, 1] on the CPU; UserError if any is not finite.

    watch: called with the x0 of each step, see DinoDiffusion.sample.
    """
    start = None
    if args.strength < 1:
        start = torch.stack([read(request.sources[0]) for request in requests])
    images = model.sample(
        make_condition(requests, args, model, read, table),
        seeds=[request.seed for request in requests], steps=args.steps, sampler=args.sampler,
        guidance_scale=args.guidance_scale, guidance_rescale=args.guidance_rescale,
        batch=args.batch, start=start, strength=args.strength, dtype=dtype,
        refine=not args.no_refine, watch=watch).cpu()
    if not images.isfinite().all():
        raise UserError(f"images of seeds from {requests[0].seed} on are not finite",
                        "sound weights and moderate guidance are needed",
                        "lower --guidance-scale, or pass another model")
    return images


def main(argv=None):
    join_ranks()
    args = parse(argv)
    device = pick_device(args.device)
    checkpoint = resolve_checkpoint(args.checkpoint)
    content = load_checkpoint(checkpoint)
    with user_errors():
        model = DinoDiffusion.from_checkpoint(content).to(device)
    refuse_impossible(args, model)
    if args.guidance_scale is None:
        args.guidance_scale = model.config.guidance_scale
    dtype = torch.float32  # on a CPU bf16 is not faster
    if device.type == "cuda":
        dtype = autocast_dtype(device)
    depth = content.get("training", {}).get("depth")

    @lru_cache(maxsize=args.batch)
    def read(path):
        return load_image(path, model.config.image_size, depth)

    def read_sources(request):
        return [read(source) for source in request.sources if isinstance(source, Path)]

    # What to make; all errors are raised before a folder is created.
    paths = args.from_image or args.interpolate
    sources, labels = find_sources(paths, read) if paths else ([], [])
    if args.interpolate and len(sources) != 2:
        raise UserError(f"--interpolate got {len(sources)} images", "it needs two",
                        "pass two files")
    names, table = [], None
    if args.prototypes or args.from_vector:
        names, table = read_table(args, model, content.get("prototypes"), checkpoint.parent)
    requests = plan(args, model, sources, labels, names)
    if args.animate and len(requests) > 32:
        raise UserError(f"--animate with {len(requests)} images", "at most 32 are animated",
                        "ask for fewer, or leave it out")
    shown = read_sources(requests[0]) if checkpoint == BOX else ()
    if any((x.amax(0) - x.amin(0)).max() > 0.1 for x in shown):
        print("note: the source has colours; the bundled model renders any input as a chest X-ray")

    # The output folder, shared by all ranks.
    parent = Path() if checkpoint == BOX else checkpoint.parent
    out = Path(args.out or next_folder(parent / "samples", requests[0].strategy))
    out = all_ranks(out)[0]
    folder = SampleFolder(out, requests, {
        "guidance_scale": args.guidance_scale, "guidance_rescale": args.guidance_rescale,
        "steps": args.steps, "sampler": args.sampler, "strength": args.strength,
        "refined": bool(model.refiner) and not args.no_refine,
        "dtype": str(dtype).removeprefix("torch."), "checkpoint": str(checkpoint)})

    # Many images on a GPU: compiled blocks may be faster.
    rounds = len(requests) / (args.batch * ranks())
    passes = min(args.batch, len(requests)) * (1 if args.guidance_scale == 1 else 2)
    compile_where_it_pays(model, args.compile, device, rounds * args.steps,
                          partial(rehearse, model, passes, dtype, backward=False))

    # Sample in rounds of one batch per rank.
    status = StatusLine(len(requests), "sample")
    history = []  # for --animate: the x0 of each step (S, B, C, h, w), round by round
    for first in range(0, len(requests), args.batch * ranks()):
        everyone = range(len(requests))[first:first + args.batch * ranks()]
        mine = everyone[args.batch * rank():args.batch * (rank() + 1)]
        images = torch.empty(0)
        x0s = []
        if mine:
            images = make_images([requests[i] for i in mine], args, model, read, table, dtype,
                                 x0s.append if args.animate else None)
        if x0s:
            history.append(torch.stack(x0s))
        folder.add(mine, images, everyone)
        status.update(everyone.stop, images=len(everyone))
    status.close()

    if not rank():
        steps = torch.cat(history, dim=1) if history else ()
        frames = (model.decode(x0).cpu() for x0 in steps)
        folder.write_grid(read_sources, bool(args.each_prompt), frames)
        print(f"{len(requests)} images, grid.png and samples.csv: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
