"""A run with a small model of random weights, for tests that need a model and no training."""
import csv

import numpy as np
import torch
from PIL import Image

import sample
from dino import ViTConfig
from dinodiff import DinoDiffusion, DinoDiffusionConfig, EmbeddingSampler
from support import files
from support.datasets import open_dataset
from support.pictures import save_png
from unet import UNetConfig
from vae import VAEConfig

SMALL = dict(
    image_size=32, vae=VAEConfig(3, 4, 8, (1, 2), 1),
    unet=UNetConfig(4, 4, 8, (1, 1), 1, (False, True), 8, 2),
    vit=ViTConfig(8, 12, 4, 3, image_size=32), token_shape=(5, 12))
def write_run(folder, **config):
    """A run with a model.pt of random weights, cached tokens and eight labelled images."""
    torch.manual_seed(0)
    model = DinoDiffusion(DinoDiffusionConfig(**SMALL, **config)).eval()
    for p in model.unet.parameters():  # zero-initialised outputs would hide everything
        torch.nn.init.normal_(p, std=0.2)
    for p in model.refiner.parameters() if model.refiner else ():
        torch.nn.init.normal_(p, std=0.2)
    images = open_dataset("phantoms", 32, count=8)
    for i in range(8):
        save_png(folder / "held_out" / f"{i}.png", images[i])
    files.write_csv(folder / "held_out" / "labels.csv", [["file", "finding"], *(
        [f"{i}.png", ("none", "effusion")[i % 2]] for i in range(8))])
    tokens = model.embedder.tokens(images.batch(range(8))).repeat(3, 1, 1)
    tokens += 0.1 * tokens.std(0) * torch.randn(tokens.shape)
    (folder / "cache").mkdir()
    np.save(folder / "cache" / "tokens.npy", tokens.numpy())
    model.token_mean.copy_(tokens.mean(0))
    model.token_std.copy_(tokens.std(0))
    if model.prompts:
        model.prompt_counts[:-1] = 5
    else:
        model.embedding_sampler = EmbeddingSampler.fit(model.standardise(tokens), components=2,
                                                         max_rank=4)
    files.save_atomic(folder / "model.pt", {
        "version": files.CHECKPOINT_VERSION, **model.to_checkpoint(),
        "training": {"data": "phantoms", "seed": 0, "count": 8, "depth": None}})
    return folder


def make(run, out, *arguments, steps=2):
    """sample.py with these arguments: the rows of its table."""
    places = {"IMAGE": run / "held_out" / "0.png", "IMAGE2": run / "held_out" / "1.png",
              "FOLDER": run / "held_out"}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    assert sample.main([*arguments, "--steps", str(steps), "--checkpoint", str(run), "--out",
                        str(out), "--device", "cpu"]) == 0
    return list(csv.DictReader(open(out / "samples.csv")))


def pixels(folder, rows):
    return torch.stack([torch.from_numpy(np.array(Image.open(folder / row["file"])).astype(int))
                        for row in rows])
