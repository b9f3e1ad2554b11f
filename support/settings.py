"""The command line of train.py and sample.py: flags, presets filled in, a resume merged."""
import argparse
import json
import os
from pathlib import Path

from support.command import (Help, UserError, batch_int, fraction, not_negative, not_negative_int,
                             positive_float, positive_int, share_above_zero, user_errors,
                             workers_int)
from support.files import load_checkpoint, resolve_checkpoint
from support.ranks import ranks
from support.run import FREE_TO_CHANGE

# ---- train.py ----------------------------------------------------------------------------------


def train_flags(presets, embedders, token_kinds):
    """The parser of train.py; what a preset sets has no default here."""
    parser = argparse.ArgumentParser(
        description="Train DiNO-Diffusion. The default runs on a laptop without downloads.",
        usage="%(prog)s [flags]", formatter_class=Help)

    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="cxr", help="cxr, histology, phantoms, a folder of images, a MedMNIST "
         ".npz, or PatchCamelyon's .h5")
    flag("--size", type=batch_int, help="image side in pixels (default: the preset's)")
    flag("--holdout", default="0.15", help="share of groups that training never sees, or a file")
    flag("--group-column", help="column of the table whose groups stay together (default: patient)")
    flag("--count", type=positive_int, default=2400, help="how many phantoms to generate")
    flag("--label-column", help="column for prompts (default: label if there; or none)")
    flag("--uncertain", choices=("ignore", "zeros", "ones"), default="ignore",
         help="what an uncertain label (-1) counts as")
    flag("--drop-outliers", action=argparse.BooleanOptionalAction,
         help="leave out black, blank and blurred patches (default: of colour images)")

    flag = parser.add_argument_group("model").add_argument
    flag("--preset", choices=presets, default="tiny", help="64 px: tiny, tissue64; 128: "
         "cxr128, small; 256: base; 512: sd15")
    flag("--init", help="start from a run, a model.pt, or box: its parts are kept, and its U-Net "
         "goes on training; with --embedder tiny or --vae train that part goes on as well")
    flag("--embedder", help="tiny, random, a path, or one of: " + ", ".join(embedders))
    flag("--vae", help="train, a path, or a published name; decoder: that of --init alone, "
         "latents stay (default: the preset's)")
    flag("--unet", help="train, a path, or sd15 (default: the preset's)")
    flag("--tokens", choices=token_kinds, default="global", help="which tokens condition; patch "
         "kinds are for the ablation: the model may copy")
    flag("--condition", choices=("dino", "prompts", "labels", "none"), default="dino",
         help="tokens; words from clusters of tokens (and labels); labels alone; unconditional")
    flag("--clusters", type=positive_int,
         help="morphology types of --condition prompts (default: 33 with labels, 10 without)")
    flag("--template", help="of prompts, with <label> and <index> (default: the paper's)")
    flag("--schedule", choices=("scaled_linear", "linear", "cosine"), default="scaled_linear",
         help="noise schedule")
    flag("--prediction", choices=("v", "eps"), help="what the U-Net predicts (default: v; of sd15 "
         "eps)")
    flag("--zero-snr", action=argparse.BooleanOptionalAction,
         help="end the schedule in pure noise (default: on for v, off for eps)")

    flag = parser.add_argument_group("training").add_argument
    flag("--steps", type=positive_int, help="caps every stage")
    flag("--embedder-steps", type=positive_int, help="overrides the preset and --steps")
    flag("--vae-steps", type=positive_int, help="overrides the preset and --steps")
    flag("--unet-steps", type=positive_int, help="overrides the preset and --steps")
    flag("--batch", type=batch_int, help="images a step of the U-Net (default: the preset's)")
    flag("--vae-batch", type=batch_int,
         help="of the VAE: small ones learn it faster (default: the preset's)")
    flag("--embedder-batch", type=batch_int, help="of the embedder (default: the preset's)")
    flag("--accumulate", type=positive_int, default=1, help="parts a batch is cut into")
    flag("--checkpointing", action="store_true",
         help="less memory for the U-Net, a third more time")
    flag("--lr", type=positive_float, help="peak learning rate of the U-Net (default: the "
         "preset's)")
    flag("--vae-lr", type=positive_float, help="peak learning rate of the VAE (default: the "
         "preset's)")
    flag("--vae-windows", type=fraction, default=0.0, metavar="SHARE", help="of the VAE's steps "
         "that see windows of half the side, a quarter of the work: for texture, e.g. 0.8")
    flag("--ema", type=fraction, default=0.999, help="decay of the averaged weights")
    flag("--min-snr", type=not_negative, default=0.0, help="min-SNR gamma, 0 = off (Hang: 5)")
    flag("--perceptual", type=not_negative, default=0.0, help="weight in the VAE's loss")
    flag("--seed", type=not_negative_int, default=0, help="of everything random")

    flag = parser.add_argument_group("machine and files").add_argument
    flag("--device", default="auto", help="auto, cuda, mps or cpu")
    flag("--dtype", choices=("auto", "float32", "bf16"), default="auto", help="autocast")
    flag("--compile", action="store_true", help="torch.compile the U-Net (minutes of warm-up)")
    flag("--workers", type=workers_int, help="processes that read images (default: one a CPU "
         "beside a GPU, else 0)")
    flag("--grids", type=positive_int, default=5, help="sample grids drawn in a run")
    flag("--keep-checkpoints", action="store_true", help="a model_STEP.pt with each sample grid")
    flag("--out", help="the run's folder (default: runs/NAME)")
    flag("--resume", action="store_true", help="go on where the run stopped")
    flag("--dry-run", action="store_true",
         help="print the settings, and the size of the cache, as JSON, and exit")
    return parser


def train_settings(argv, presets, embedders, token_kinds):
    """Arguments of train.py -> Namespace, complete: presets filled in, a resumed run's flags kept.

    Raises UserError for a folder that holds a run, for a resume that changes a setting, and for
    batches that cannot be cut into equal parts.
    """
    parser = train_flags(presets, embedders, token_kinds)
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{Path(args.data).resolve().stem}"

    # A resumed run has the settings it began with, where no flag says otherwise.
    before = {}
    if not args.dry_run and (Path(args.out) / "config.json").exists():
        if not args.resume:
            raise UserError(f"{args.out} already holds a run", "a new folder is needed, or "
                            "--resume to go on", "pass --out DIR or --resume")
        asked_once = {"out", "resume", "dry_run"}
        before = {name: value for name, value in saved_settings(args.out).items()
                  if name in vars(args) and name not in asked_once}
        out = args.out
        args = parser.parse_args(argv, argparse.Namespace(**before))
        args.out = out

    if args.init:
        fill_from_init(args)
    elif args.vae == "decoder":
        raise UserError("--vae decoder trains on what --init names", "a trained autoencoder is "
                        "needed", "pass --init RUN")
    fill_in(args, presets[args.preset])
    check_batches(args)
    refuse_changes(args, before)
    return args


def saved_settings(out):
    """The settings of the run in that folder, from config.json; none if it holds no run."""
    path = Path(out) / "config.json"
    if not path.exists():
        return {}
    with user_errors(f"{path} is damaged", "copy it again, or start anew with --out DIR"):
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict):
            raise ValueError("no settings")
    return settings


def fill_from_init(args):
    """What no flag has set is as in the model that --init names: its parts, its size."""
    config = load_checkpoint(resolve_checkpoint(args.init), ("config",))["config"]
    given = {"embedder": args.init, "vae": args.init, "unet": args.init,
             "size": config.get("image_size"), "prediction": config.get("prediction"),
             "zero_snr": config.get("zero_terminal_snr")}
    for name, value in given.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def fill_in(args, preset):
    """What no flag has set is as the preset says, steps capped by --steps."""
    for name, value in preset.items():
        if getattr(args, name) is None:
            if name.endswith("_steps"):
                value = min(value, args.steps or value)
            setattr(args, name, value)
    if args.prediction is None:
        args.prediction = "eps" if "sd15" in (args.preset, args.unet) else "v"
    if args.zero_snr is None:
        args.zero_snr = args.prediction == "v"


def check_batches(args):
    """Every rank needs equally many images: the mean of their means must be the batch's."""
    for name, parts in ("batch", args.accumulate), ("vae_batch", 1), ("embedder_batch", 1):
        batch = getattr(args, name)
        if batch % (ranks() * parts):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {batch} cannot be cut into {ranks()} x {parts} equal parts "
                            "(processes x --accumulate)", "need a divisor of it",
                            f"pass another {flag}, or --accumulate")


def refuse_changes(args, before):
    """A resumed run keeps its settings, but for those that change no result."""
    for name, value in before.items():
        now = getattr(args, name)
        is_moved = name == "data" and Path(now).is_dir()  # split.csv tells whether it is the same
        if now == value or is_moved or (name in FREE_TO_CHANGE and name != "data"):
            continue
        raise UserError(f"--{name.replace('_', '-')} {now} differs from the run's {value}",
                        "a resumed run keeps its settings", "leave the flag out, or start anew "
                        "with --out DIR")


def reading_processes(workers, device):
    """How many processes read images: as asked, or else one for each CPU beside a GPU."""
    if workers is not None:
        return workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device.type != "cuda" or cpus <= 2:
        return 0  # the CPUs are busy with training
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, cpus // on_this_machine)


# ---- sample.py ---------------------------------------------------------------------------------


SAMPLER_STEPS = {"dpm": 15, "ddim": 50, "ddpm": 1000}


def sample_flags(argv=None):
    """Arguments of sample.py -> Namespace; a mistake ends the program with a line and code 2."""
    parser = argparse.ArgumentParser(description="Sample images from a trained model.",
                                     usage="%(prog)s WHAT [flags]", formatter_class=Help)

    flag = parser.add_argument_group("what to make (one of)").add_mutually_exclusive_group(
        required=True).add_argument
    flag("--from-image", nargs="+", metavar="PATH", help="images, or folders of them, to resemble")
    flag("--interpolate", nargs=2, metavar=("A", "B"), help="go from image A to image B")
    flag("--prototypes", type=positive_int, metavar="K", help="centres of K clusters")
    flag("--random", action="store_true", help="no source image")
    flag("--prompt", metavar="TEXT", help="words of the training prompts")
    flag("--each-prompt", type=positive_int, metavar="N", help="N images of every prompt")

    flag = parser.add_argument_group("how far from the source").add_argument
    flag("--perturb", type=not_negative, default=0.0,
         help="noise on the tokens, in training-set standard deviations")
    flag("--strength", type=share_above_zero, default=1.0,
         help="below 1: start from the source image with this share of the noise (img2img)")
    flag("--frames", type=batch_int, default=8, help="images from A to B")
    flag("--mix", choices=("slerp", "lerp"), default="slerp", help="how --interpolate mixes")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--count", type=positive_int, default=1, help="images for each source")
    flag("--steps", type=positive_int, help="denoising steps, 1 to 1000 (default: dpm 15, ddim 50, "
         "ddpm 1000)")
    flag("--sampler", choices=SAMPLER_STEPS, default="dpm",
         help="DPM-Solver++; DDIM; the first one, of Ho 2020")
    flag("--guidance", type=not_negative, default=1.0,
         help="1 = off; above 1 pushes away from the unconditional model")
    flag("--guidance-rescale", type=fraction, default=0.0,
         help="takes back the contrast that guidance above 1 adds, e.g. 0.7")
    flag("--eta", type=fraction,
         help="of ddim: 0 deterministic, 1 noisy as ddpm (default: 0.5)")
    flag("--seed", type=not_negative_int, default=0, help="of the first image; the next has +1")
    flag("--batch", type=batch_int, default=32, help="images at a time")

    flag = parser.add_argument_group("machine and files").add_argument
    flag("--checkpoint", help="a run's folder, a model.pt or box (default: the newest run, else "
         "the box)")
    flag("--device", default="auto", help="auto, cuda, mps or cpu")
    flag("--dtype", choices=("auto", "float32", "bf16"), default="auto",
         help="of the U-Net (auto: bf16 on a GPU that computes in it)")
    flag("--out", help="folder (default: a new one in the run's samples/)")

    args = parser.parse_args(argv)
    if (args.perturb or args.strength < 1) and not args.from_image:
        parser.error("--perturb and --strength change a source: need --from-image; pass it, or "
                     "leave them out")
    if args.eta is not None and args.sampler != "ddim":
        parser.error(f"--eta is of ddim alone, not of {args.sampler}: pass --sampler ddim, or "
                     "leave it out")
    args.steps = args.steps or SAMPLER_STEPS[args.sampler]
    if args.eta is None:
        args.eta = 0.5 if args.sampler == "ddim" else 0.0
    return args


def check_sample_flags(args, model):
    """Raise UserError for what this DinoDiffusion cannot make."""
    condition = model.config.condition
    wants_prompt = args.prompt is not None or bool(args.each_prompt)
    if model.prompts and not (wants_prompt or args.random):
        raise UserError("this model follows prompts, not images", "a prompt is needed",
                        "pass --prompt, --each-prompt or --random")
    if wants_prompt and not model.prompts:
        raise UserError(f"this model was trained with --condition {condition}", "it knows no "
                        "prompts", "pass --from-image or --random, or another --checkpoint")
    if condition == "none" and not (args.random or args.strength < 1):
        raise UserError("this model was trained with --condition none", "it cannot follow a source",
                        "pass --random, or --from-image with --strength below 1")
    if condition == "dino" and args.random and model.embedding_sampler is None:
        raise UserError("this model has no embedding sampler, its training was not finished",
                        "need a finished run", "use train.py --resume")
    with user_errors():
        model.schedule.sampling_timesteps(args.steps)
        if args.prompt is not None:
            model.prompt_ids([args.prompt])
