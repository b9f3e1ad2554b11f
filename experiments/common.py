"""What experiments share: a trained run with its data, flags, and a fixed choice of images.

    add_run_flags(parser)               # --checkpoint --data --batch --device --count --train-limit
    run = open_run(args)                # .folder .model .flags .images .train .test
    for x in batches_of(run.images, run.test, args.batch): ...   # (B, 3, H, W) in [-1, 1]
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dinodiff import DinoDiffusion
from support.command import UserError, number, pick_device, user_errors
from support.datasets import ImageSet, label_matrix, open_dataset
from support.files import load_checkpoint, resolve_checkpoint
from support.phantoms import CHEST_LABELS
from support.training_set import read_split


@dataclass(frozen=True)
class OpenedRun:
    """A trained model with the images it was trained on, and those it has never seen."""
    folder: Path
    model: DinoDiffusion  # on the device, in eval mode
    flags: dict  # of its training
    images: ImageSet
    train: torch.Tensor  # indices of at most --train-limit training images, int64, shuffled
    test: torch.Tensor  # indices of at most --count held-out images, int64, shuffled


def add_run_flags(parser, count=5000, train_limit=None):
    """Add the flags that open_run reads, which mean the same in every experiment."""
    add = parser.add_argument
    add("--checkpoint", help="run folder, model.pt or box (default: the newest run, else the box)")
    add("--data", help="where the run's images are now (default: as trained)")
    add("--batch", type=number(int, 1), default=64, help="images at once")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--count", type=number(int, 1), default=count,
        help="at most this many images: held out, or of each set")
    add("--train-limit", type=number(int, 1), default=train_limit,
        help="at most this many training images")


def choose(indices, count):
    """At most `count` of the indices (None: all), shuffled, always in the same way: int64 (N,)."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(indices)[order[:count]]


def batches_of(images, indices, batch):
    """Iterator of the images with these indices, in batches (B, 3, H, W) in [-1, 1]."""
    return (images.batch(rows.tolist()) for rows in torch.as_tensor(indices).split(batch))


def load_model(path, device):
    """(content of a model.pt, its DinoDiffusion on the device and in eval mode)."""
    checkpoint = load_checkpoint(path, ("training",))
    with user_errors():
        return checkpoint, DinoDiffusion.from_checkpoint(checkpoint).to(pick_device(device))


def open_run(args, checkpoint=None):
    """The OpenedRun of a checkpoint (a path, default: --checkpoint) and of the run flags.

    Raises UserError if its data are not there, or without two training and two held-out images.
    """
    path = resolve_checkpoint(checkpoint or args.checkpoint)
    checkpoint, model = load_model(path, args.device)
    flags = checkpoint["training"]
    if "data" not in flags:
        raise UserError(f"{path} does not say which images it was trained on", "a run is needed",
                        "pass the folder of a run as --checkpoint")

    images = open_dataset(args.data or flags["data"], model.config.image_size, seed=flags["seed"],
                          count=flags["count"], depth=flags.get("depth"))
    train, test = read_split(path.parent / "split.csv", images)
    if min(len(test), len(train)) < 2:
        raise UserError(f"{path.parent} has {len(train)} training and {len(test)} held-out images",
                        "2 of each are needed", "train with a larger --holdout")
    print(f"{path}: {images.note}; held-out images are sources, {model.config.tokens} tokens, "
          f"condition {model.config.condition}")
    return OpenedRun(path.parent, model, flags, images, choose(train, args.train_limit),
                     choose(test, args.count))


def finding_columns(images):
    """The columns of the labels that experiments ask about by default."""
    return list(CHEST_LABELS) if set(CHEST_LABELS) <= set(images.columns) else ["finding"]


def with_known_labels(images, names, train, test):
    """The indices (train, test) of images whose labels in these columns are all known."""
    _, values = label_matrix(images.columns, names)
    known = ~np.isnan(values).any(axis=1)
    for part, title in (train, "training"), (test, "held-out"):
        print(f"{title} images without a label, left out: {(~known[part]).sum()}")
    return train[known[train]], test[known[test]]


def binary_labels(columns, names, train, test, least=20):
    """Columns of str -> (list of label names, train (N, L), test (M, L)) of 0.0 and 1.0.

    A column of 0 and 1 is one label; any other is cut at "|" into one label per value. Labels need
    `least` images with and without them in both parts.
    """
    labels, values = label_matrix(columns, names)
    common = [j for j in range(len(labels))
              if all(least <= values[part, j].sum() <= len(part) - least for part in (train, test))]
    if not common:
        raise UserError(f"no label of {', '.join(names)} is in {least} images, and not in {least}, "
                        "of both parts", "an AUC needs both", "pass another --label-column")
    rare = [label for j, label in enumerate(labels) if j not in common]
    if rare:
        print(f"left out, too rare or too common: {', '.join(rare)}")
    return [labels[j] for j in common], values[train][:, common], values[test][:, common]
