"""What vector does the embedder give each image?

    python -m experiments embed FOLDER              # tokens of the newest run, or the bundled model
    x = np.load("FOLDER.npz"); x["tokens"].mean(1)  # (N, D): one vector an image

Writes a .npz with files (N names) and tokens (N, G, D) float32, not standardised: the file that
`train.py --embedder` and `sample.py --from-vector` read. Prints how far apart two images are.
"""
from pathlib import Path

import numpy as np
import torch

from experiments.common import load_model
from support.command import UserError, number
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
    path = Path(args.out or f"{Path(args.data).resolve().stem}.npz")
    if path.resolve() == Path(args.data).resolve():
        raise UserError(f"{path} is the data set itself", "another file is needed",
                        "pass --out FILE")

    tokens = torch.cat([model.embedder.tokens(x.to(model.shift.device)).cpu()
                        for x in images.batches(range(len(images)), args.batch)])
    with atomic_file(path) as file:
        np.savez(file, files=np.array(images.files), tokens=tokens.numpy())
    x = model.cpu().standardise(tokens).flatten(1)
    distance = (x - x.roll(1, 0)).norm(dim=1).mean().item()
    print(f"wrote {path}: files, tokens {tuple(tokens.shape)}; mean distance of two images "
          f"{distance:.2f}, standardised")
