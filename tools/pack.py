"""Pack a run's model into a small file, as the bundled model is.

    python tools/pack.py runs/cxr small.pt

Writes a model.pt in half precision, without paths of the run, with K-means centres of its training
tokens in place of the cache. Prints its size and how far its samples differ.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dinodiff import DinoDiffusion, prototypes
from support.command import number, print_table, run_script, user_errors
from support.files import CHECKPOINT_VERSION, load_checkpoint, resolve_checkpoint, save_atomic
from support.sample_folder import read_training_tokens

KEPT = ("preset", "seed", "steps", "condition", "depth", "settings", "torch")  # of the flags


def halved(value):
    """A nested dict with its float tensors in half precision."""
    if isinstance(value, dict):
        return {name: halved(part) for name, part in value.items()}
    is_float = torch.is_tensor(value) and value.is_floating_point()
    return value.half() if is_float else value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder or model.pt with its cache")
    parser.add_argument("file", help="where to write")
    parser.add_argument("--prototypes", type=number(int, 1), default=64, help="centres to keep")
    args = parser.parse_args(argv)

    path = resolve_checkpoint(args.run)
    content = load_checkpoint(path, ("training",))
    with user_errors():
        model = DinoDiffusion.from_checkpoint(content)
        tokens = model.standardise(read_training_tokens(path.parent, model.token_mean.shape))
        centers = prototypes(tokens, args.prototypes)
    training = {name: content["training"].get(name) for name in KEPT}
    save_atomic(args.file, {"version": CHECKPOINT_VERSION, **halved(model.to_checkpoint()),
                            "prototypes": centers.half(), "training": training})

    # The same seeds from both.
    packed = DinoDiffusion.from_checkpoint(load_checkpoint(args.file))
    condition = model.prompt_ids(model.prompts[:8]) if model.prompts else tokens[:8]
    if model.config.condition == "none":
        condition = None
    seeds = list(range(min(8, len(tokens), len(model.prompts) or 8)))
    images, others = (m.sample(condition, seeds) for m in (model, packed))
    print_table({args.file: {
        "megabytes": Path(args.file).stat().st_size / 1e6,
        "mean difference, grey levels of 255": 127.5 * (images - others).abs().mean().item()}})


if __name__ == "__main__":
    run_script(main)
