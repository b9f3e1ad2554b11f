"""What numbers does the embedder give each image, for a study of one's own?

    python -m experiments embed FOLDER                  # tokens of the newest run, or of the box
    x = np.load("FOLDER.npz"); x["tokens"].mean(1)      # (N, D): one vector an image

Writes an .npz: tokens (N, G, D) float32, standardised as the model takes them, and files (N,).
Prints how far apart two images are, and the same image mirrored: what the tokens call near.
"""
from pathlib import Path

import numpy as np
import torch

from experiments.common import batches_of, load_model
from support.command import UserError, batch_int, print_table
from support.datasets import open_dataset
from support.files import atomic_file, resolve_checkpoint


def add_flags(parser):
    add = parser.add_argument
    add("data", help="a folder of images, or what else train.py --data takes")
    add("--checkpoint", help="run folder, model.pt or box (default: the newest run, else the box)")
    add("--batch", type=batch_int, default=64, help="images at once")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", help=".npz file (default: the data's name, here)")


def main(args):
    checkpoint, model = load_model(resolve_checkpoint(args.checkpoint), args.device)
    images = open_dataset(args.data, model.config.image_size,
                          depth=checkpoint["training"].get("depth"))
    print(images.note, *(f"  note: {problem}" for problem in images.problems), sep="\n")
    if len(images) < 2:
        raise UserError(f"got {len(images)} images", "2 are needed", "add images")
    device = model.shift.device
    tokens = []
    mirrored = []
    for x in batches_of(images, torch.arange(len(images)), args.batch):
        tokens.append(model.embed(x.to(device)).cpu())
        mirrored.append(model.embed(x.flip(-1).to(device)).cpu())
    tokens = torch.cat(tokens)

    path = Path(args.out or f"{Path(args.data).resolve().stem}.npz")
    with atomic_file(path) as file:
        np.savez(file, tokens=tokens.numpy(), files=np.array(images.files))
    print(f"wrote {path}: tokens {tuple(tokens.shape)}, files")

    flat = tokens.flatten(1)
    others = (flat - flat.roll(1, 0)).norm(dim=1).mean().item()
    turned = (flat - torch.cat(mirrored).flatten(1)).norm(dim=1).mean().item()
    print_table({"mean distance": {"of two images": others, "of an image and its mirror": turned}})
