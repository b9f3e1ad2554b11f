"""What vector does the embedder give each image?

    python -m experiments embed FOLDER              # tokens of the newest run, or the bundled model
    x = np.load("FOLDER.npz"); x["tokens"].mean(1)  # (N, D): one vector an image

Writes a .npz with files (N names) and tokens (N, G, D) float32, not standardised: the file that
`train.py --embedder` and `sample.py --from-vector` read. Prints how far apart two images are, and
an image and its mirror.
"""
from pathlib import Path

import numpy as np
import torch

from experiments.common import batches_of, load_model
from support.command import UserError, number, print_table
from support.datasets import open_dataset
from support.files import atomic_file, resolve_checkpoint


def add_flags(parser):
    add = parser.add_argument
    add("data", help="a folder of images, or anything else that train.py --data takes")
    add("--checkpoint", help="run folder, model.pt or box (default: the newest run, else the box)")
    add("--batch", type=number(int, 1), default=64, help="images at once")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", help=".npz file (default: the data's name, here)")


def main(args):
    checkpoint, model = load_model(resolve_checkpoint(args.checkpoint), args.device)
    images = open_dataset(args.data, model.config.image_size,
                          depth=checkpoint["training"].get("depth"))
    print(images.note, *(f"  note: {problem}" for problem in images.problems), sep="\n")
    if len(images) < 2 or not model.config.vit:
        raise UserError(f"{len(images)} images, {'a ViT' if model.config.vit else 'no ViT'}",
                        "2 images and a ViT are needed", "add images, or pass --checkpoint box")

    # Raw tokens of each image, and of its mirror.
    pairs = []
    for x in batches_of(images, torch.arange(len(images)), args.batch):
        x = x.to(model.shift.device)
        pairs.append([model.embedder.tokens(image).cpu() for image in (x, x.flip(-1))])
    tokens, mirrored = map(torch.cat, zip(*pairs))
    path = Path(args.out or f"{Path(args.data).resolve().stem}.npz")
    with atomic_file(path) as file:
        np.savez(file, files=np.array(images.files), tokens=tokens.numpy())
    print(f"wrote {path}: files, tokens {tuple(tokens.shape)}")

    model.cpu()
    x, mirror = (model.standardise(part).flatten(1) for part in (tokens, mirrored))
    print_table({"mean distance": {
        "of two images": (x - x.roll(1, 0)).norm(dim=1).mean().item(),
        "of an image and its mirror": (x - mirror).norm(dim=1).mean().item()}})
