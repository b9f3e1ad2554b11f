"""Sample new images from a trained DiNO-Diffusion model.

    python sample.py --from-image x.png --count 4        # images that resemble x.png
    python sample.py --interpolate a.png b.png --frames 8
    python sample.py --prototypes 8                      # K-means centres of the training tokens
    python sample.py --random --count 16                 # no source image: tokens from a mixture
    python sample.py --prompt "Histology image of cancer tissue, morphology type two" --count 16
    python sample.py --each-prompt 10                    # a balanced labelled data set
    torchrun --nproc-per-node 8 sample.py --random --count 100000     # on eight GPUs

The last two are for a model trained with --condition prompts or labels; its --random draws prompts
as often as its training images had them. Writes images/*.png, grid.png (sources at the left) and
samples.csv with each image's provenance: strategy, sources and weights or prompt, seed, settings,
and the labels it inherits with the rule that gave them. Image j uses seed `--seed + j` and does not
depend on the batch size, nor on the number of processes (ranks), which take batches in turn.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import data
from data import StatusLine, UserError, run_script, step_seed, user_errors
from dinodiff import DinoDiffusion, lerp, perturb, prototypes, slerp


def load_model(checkpoint, device):
    """model.pt -> (DinoDiffusion on the device, path of the file)."""
    path = data.resolve_checkpoint(checkpoint)
    with user_errors():
        return DinoDiffusion.from_checkpoint(data.load_checkpoint(path)).to(device), path


def find_sources(paths):
    """Files named or in named folders -> list of Path."""
    files = []
    for path in map(Path, paths):
        files += data.list_images(path) if path.is_dir() else [path]
    return files


def plan_samples(args, model, run_folder):
    """What to make -> (rows of samples.csv without file names, tokens (N, G, D) or N prompts or
    None, start images (N, 3, H, W) or None, list of (source images, rows) for the grid)."""
    size, device = model.config.image_size, model.shift.device
    rows, tokens, start, strips = [], [], [], []
    seeds = iter(range(args.seed, args.seed + 10 ** 9))

    def add(strategy, count, seed=None, **details):
        """Append `count` rows that share a condition; returns their row numbers."""
        first = len(rows)
        for _ in range(count):
            own_seed = next(seeds) if seed is None else seed
            rows.append({"strategy": strategy, "seed": own_seed, **details})
        return list(range(first, len(rows)))

    if model.prompts and not (args.prompt is not None or args.each_prompt or args.random):
        raise UserError("this model follows prompts, not images: pass --prompt, --each-prompt or "
                        "--random")
    if (args.prompt is not None or args.each_prompt) and not model.prompts:
        raise UserError(f"this model was trained with --condition {model.config.condition}: it "
                        "knows no prompts: pass --from-image or --random, or another --checkpoint")
    if model.prompts:
        return plan_prompts(args, model)
    if args.from_image:
        for path in find_sources(args.from_image):
            image = data.load_image(path, size)[None]
            labels = data.labels_of(path)
            name = "img2img" if args.strength < 1 else "perturb" if args.perturb else "reconstruct"
            own = add(name, args.count, sources=str(path), weights="1", labels=labels,
                      label_rule="of the source" if labels else "")
            strips.append((image, own))
            if model.config.condition == "dino":
                token = model.embed(image.to(device)).cpu().expand(args.count, -1, -1)
                if args.perturb:
                    noise = [torch.Generator().manual_seed(step_seed("perturb", rows[i]["seed"]))
                             for i in own]
                    token = perturb(token, args.perturb, noise)
                tokens.append(token)
            start += [image] * args.count
    elif args.interpolate:
        paths = find_sources(args.interpolate)
        if len(paths) != 2:
            raise UserError(f"--interpolate got {len(paths)} images: need two: pass two files")
        images = torch.stack([data.load_image(p, size) for p in paths])
        a, b = model.embed(images.to(device)).cpu()
        mix = lerp if args.mix == "lerp" else slerp
        labels = [data.labels_of(p) for p in paths]
        for _ in range(args.count):
            seed, own = next(seeds), []  # one noise for a strip: only the condition moves
            for i in range(args.frames):
                w = i / max(1, args.frames - 1)
                own += add("interpolate", 1, seed, sources="|".join(map(str, paths)),
                           weights=f"{1 - w:.3f}|{w:.3f}", labels=labels[int(w > 0.5)],
                           label_rule="of the nearer source" if any(labels) else "")
                tokens.append(mix(a, b, w)[None])
            strips.append((images, own))
    elif args.prototypes:
        cache = run_folder / "cache" / "tokens.npy"
        if not cache.is_file():
            raise UserError(f"no {cache}: prototypes are centres of the training tokens: need the "
                            "run's cache folder beside model.pt; copy it there")
        training = torch.from_numpy(np.load(cache, allow_pickle=False)[:50_000])
        if training.shape[1:] != model.token_mean.shape or not training.isfinite().all():
            raise UserError(f"{cache} holds tokens {tuple(training.shape)}, or NaN: need this "
                            f"model's, N of {tuple(model.token_mean.shape)}: copy them there")
        training = model.standardise(training.to(device))
        centers = prototypes(training, args.prototypes, args.seed).cpu()
        for k, center in enumerate(centers):
            own = add("prototype", args.count, sources=f"prototype {k} of {args.prototypes}",
                      weights="1")
            strips.append((torch.empty(0, 3, size, size), own))
            tokens.append(center.expand(args.count, -1, -1))
    else:
        own = add("random", args.count)
        if model.config.condition == "dino":
            if model.embedding_sampler is None:
                raise UserError("this model has no embedding sampler, its training was not "
                                "finished: need a finished run; use train.py --resume")
            draws = [torch.Generator().manual_seed(step_seed("random", row["seed"]))
                     for row in rows]
            tokens.append(model.embedding_sampler.sample(draws).cpu())
        strips += [(torch.empty(0, 3, size, size), own[i:i + 8]) for i in range(0, len(own), 8)]
    unconditional = model.config.condition == "none"
    if unconditional and not (args.random or args.strength < 1):
        raise UserError("this model was trained with --condition none: it cannot follow a source: "
                        "pass --random, or --from-image with --strength below 1")
    return (rows, None if unconditional else torch.cat(tokens),
            torch.cat(start) if args.strength < 1 else None, strips)


def plan_prompts(args, model):
    """The same for a model that follows prompts; the grid has a line for each prompt."""
    known, counts = model.prompts, model.prompt_counts.cpu()
    used = counts.nonzero()[:, 0].tolist()
    if args.prompt is not None:
        model.projection.tokenize([args.prompt])  # refuses unknown words
        plan = [(args.prompt, args.count)]
        if args.prompt not in [known[number] for number in used]:
            print(f"note: no training image had the prompt {args.prompt!r}")
    elif args.each_prompt:
        plan = [(known[number], args.each_prompt) for number in used]
    else:
        draws = torch.multinomial(counts.double(), args.count, replacement=True,
                                  generator=torch.Generator().manual_seed(args.seed))
        plan = [(known[number], 1) for number in draws.tolist()]
    rows, strips, seeds = [], [], iter(range(args.seed, args.seed + 10 ** 9))
    no_source = torch.empty(0, 3, model.config.image_size, model.config.image_size)
    for prompt, count in plan:
        labels, first = {}, len(rows)
        if model.config.labels and prompt in known:  # looked up, never read out of the text
            number = known.index(prompt) // (model.config.clusters or 1)
            labels = {"label": model.config.labels[number]}
        rows += [{"strategy": "prompt", "sources": "", "weights": "", "prompt": prompt,
                  "seed": next(seeds), "labels": labels,
                  "label_rule": "of the prompt" if labels else ""} for _ in range(count)]
        strips.append((no_source, list(range(first, len(rows)))))
    if len(plan) == 1 or args.random:
        strips = [(no_source, list(range(i, min(i + 8, len(rows)))))
                  for i in range(0, len(rows), 8)]
    return rows, [row["prompt"] for row in rows], None, strips


def write_table(path, rows, settings):
    """samples.csv: one line for each image; label columns are `label` or begin with `label_`."""
    columns = sorted({name for row in rows for name in row.get("labels") or {}})
    head = ["file", "strategy", "sources", "weights", "prompt", "seed", *settings, "label_rule"]
    table = [head + [name if name == "label" else f"label_{name}" for name in columns]]
    for row in rows:
        table.append([{**settings, **row}.get(name, "") for name in head]
                     + [(row.get("labels") or {}).get(name, "") for name in columns])
    data.write_csv(path, table)


def parse(argv=None):
    p = argparse.ArgumentParser(description="Sample images from a trained model.",
                                usage="%(prog)s WHAT [flags]",
                                formatter_class=data.Help)
    a = p.add_argument_group("what to make (one of)").add_mutually_exclusive_group(
        required=True).add_argument
    a("--from-image", nargs="+", metavar="PATH", help="images, or folders of images, to resemble")
    a("--interpolate", nargs=2, metavar=("A", "B"), help="go from image A to image B")
    a("--prototypes", type=data.positive_int, metavar="K", help="centres of K clusters")
    a("--random", action="store_true", help="no source image")
    a("--prompt", metavar="TEXT", help="words of the training prompts")
    a("--each-prompt", type=data.positive_int, metavar="N", help="N images of every prompt")
    a = p.add_argument_group("how far from the source").add_argument
    a("--perturb", type=data.not_negative, default=0.0,
      help="noise on the tokens, in training-set standard deviations")
    a("--strength", type=data.share_above_zero, default=1.0,
      help="below 1: start from the source image with this share of the noise (img2img)")
    a("--frames", type=data.batch_int, default=8, help="images from A to B")
    a("--mix", choices=("slerp", "lerp"), default="slerp", help="how --interpolate mixes")
    a = p.add_argument_group("sampling").add_argument
    a("--count", type=data.positive_int, default=1, help="images for each source")
    a("--steps", type=data.positive_int, default=50, help="denoising steps, 1 to 1000")
    a("--sampler", choices=("ddim", "ddpm"), default="ddim", help="ddpm with --steps 1000 is Ho's")
    a("--guidance", type=data.not_negative, default=1.0, help="1 = off; above 1 pushes away from "
      "the unconditional model")
    a("--eta", type=data.fraction, default=0.5, help="DDIM: 0 deterministic, 1 noisy as DDPM; 0.5 "
      "gave the smallest Frechet distance")
    a("--seed", type=data.not_negative_int, default=0, help="of the first image; the next has +1")
    a("--batch", type=data.batch_int, default=32, help="images at a time")
    a = p.add_argument_group("machine and files").add_argument
    a("--checkpoint", help="a run's folder or a model.pt (default: the newest run)")
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    a("--out", help="folder (default: a new one in the run's samples/)")
    args = p.parse_args(argv)
    if (args.perturb or args.strength < 1) and not args.from_image:
        p.error("--perturb and --strength change a source: need --from-image; pass it, or leave "
                "them out")
    return args


def main(argv=None):
    data.join_ranks()
    args = parse(argv)
    model, path = load_model(args.checkpoint, data.pick_device(args.device))
    with user_errors():
        model.schedule.sampling_timesteps(args.steps)
        rows, tokens, start, strips = plan_samples(args, model, path.parent)
    out = Path(args.out or data.next_folder(path.parent / "samples", rows[0]["strategy"]))
    out = data.all_ranks(out)[0]
    if (out / "samples.csv").exists():
        raise UserError(f"{out} already holds samples: need a new folder, pass another --out")
    data.make_folder(out / "images")
    for number, row in enumerate(rows):
        row["file"] = f"images/{row['strategy']}_{number:05d}.png"
    settings = {"guidance": args.guidance, "steps": args.steps, "sampler": args.sampler,
                "eta": args.eta, "strength": args.strength, "perturb": args.perturb,
                "checkpoint": str(path)}
    status, at_once = StatusLine(len(rows), "sample"), args.batch * data.ranks()
    for first in range(0, len(rows), at_once):
        i = first + args.batch * data.rank()
        part = slice(i, i + args.batch)
        if rows[part]:
            images = model.sample(
                None if tokens is None else tokens[part], [row["seed"] for row in rows[part]],
                steps=args.steps, guidance_scale=args.guidance, eta=args.eta, sampler=args.sampler,
                batch=args.batch, start=None if start is None else start[part],
                strength=args.strength).cpu()
            if not images.isfinite().all():
                raise UserError(f"images {i} to {i + len(images) - 1} are not finite: need sound "
                                "weights, moderate guidance: lower --guidance, or pass another "
                                "model")
            for row, image in zip(rows[part], images):
                data.save_png(out / row["file"], image)
        data.all_ranks()  # the table names only what is there
        if not data.rank():
            write_table(out / "samples.csv", rows[:first + at_once], settings)
        status.update(min(len(rows), first + at_once), images=len(rows[first:first + at_once]))
    status.close()
    if data.rank():
        return 0
    data.save_grid(out / "grid.png", [
        torch.cat([source[:1], torch.stack([data.load_image(out / rows[row]["file"], None)
                                            for row in own]), source[1:]])
        for source, own in strips[:16]], captions=[
            rows[own[0]]["prompt"].rpartition(" image of ")[2] for _, own in strips[:16]]
        if args.each_prompt else None)
    if len(strips) > 16:
        print(f"grid.png shows the first 16 of {len(strips)} sources or prompts")
    print(f"{len(rows)} images, grid.png and samples.csv: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
