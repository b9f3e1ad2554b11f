"""How small can a model become, and do its samples stay the same?

    python -m experiments pack runs/mine mine.pt        # half precision: half the bytes

The file is a model.pt that sample.py and train.py --init read. In place of the run's cache it holds
the centres of K-means on the training tokens, of which `sample.py --prototypes` makes fewer. What
only the run's folder knows (paths) is left out. Prints bytes, SHA-256, and how far samples move.
"""
import hashlib
from pathlib import Path

import torch

from dinodiff import DinoDiffusion, prototypes
from support.command import positive_int, print_table, user_errors
from support.files import (CHECKPOINT_VERSION, load_checkpoint, resolve_checkpoint, save_atomic)
from support.sample_folder import read_training_tokens
from vae import AutoencoderKL

KEPT = ("size", "preset", "tokens", "condition", "seed", "depth")  # of the training's settings


def add_flags(parser):
    parser.add_argument("run", help="run folder or model.pt with its cache")
    parser.add_argument("file", help="where to write")
    parser.add_argument("--vae", help="take the autoencoder of this model.pt, of train.py --vae "
                        "decoder: its latents are the same")
    parser.add_argument("--prototypes", type=positive_int, default=64, help="centres to keep")


def halved(value):
    """A nested dict with its float tensors in half precision."""
    if isinstance(value, dict):
        return {name: halved(part) for name, part in value.items()}
    is_float = torch.is_tensor(value) and value.is_floating_point()
    return value.half() if is_float else value


def main(args):
    path = resolve_checkpoint(args.run)
    content = load_checkpoint(path, ("training",))
    with user_errors():
        model = DinoDiffusion.from_checkpoint(content)
        if args.vae:
            vae = AutoencoderKL.from_pretrained(resolve_checkpoint(args.vae))
            model.vae.load_state_dict(vae.state_dict())
        tokens = model.standardise(read_training_tokens(path.parent, model.token_mean.shape))
        centers = prototypes(tokens, args.prototypes)

    training = {name: content["training"].get(name) for name in KEPT}
    small = {"version": CHECKPOINT_VERSION, **halved(model.to_checkpoint()),
             "prototypes": centers.half(), "training": training}
    save_atomic(args.file, small)

    # The same seeds from both.
    again = DinoDiffusion.from_checkpoint(load_checkpoint(args.file))
    seeds = list(range(8))
    images, others = (m.sample(tokens[:8], seeds, steps=15, sampler="dpm") for m in (model, again))
    raw = Path(args.file).read_bytes()
    print_table({args.file: {"megabytes": len(raw) / 1e6, "mean difference, grey levels of 255":
                             127.5 * (images - others).abs().mean().item()}})
    print(f"SHA-256 {hashlib.sha256(raw).hexdigest()}")
