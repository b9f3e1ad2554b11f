"""What experiments share: a trained run with its data and flags, and a fixed choice of images.

    add_run_flags(parser)               # --checkpoint --data --batch --device --count --train-limit
    run = open_run(args)                # .folder .model .images .train .test
    for x in run.images.batches(run.test, args.batch): ...   # (B, 3, H, W) in [-1, 1]
"""
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch

from dinodiff import DinoDiffusion
from support.command import UserError, number, user_errors
from support.datasets import ImageSet, label_matrix, open_dataset
from support.files import BOX, load_checkpoint, read_csv, resolve_checkpoint
from support.phantoms import CHEST_LABELS
from support.ranks import pick_device
from support.training_set import choose, read_split


@dataclass(frozen=True)
class OpenedRun:
    """A trained model with the images it was trained on, and those it has never seen."""
    folder: Path
    model: DinoDiffusion  # on the device, in eval mode
    images: ImageSet
    train: torch.Tensor  # indices of at most --train-limit training images, int64, shuffled
    test: torch.Tensor  # indices of at most --count held-out images, int64, shuffled


def add_run_flags(parser, count=5000, train_limit=None):
    """Add the flags that open_run reads; they mean the same in every experiment."""
    add = parser.add_argument
    add("--checkpoint", help="run folder, model.pt or box (default: the newest run, else the box)")
    add("--data", help="where the run's images are now (default: as trained)")
    add("--batch", type=number(int, 1), default=64, help="images at once")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--count", type=number(int, 1), default=count,
        help="at most this many held-out images, or images of each set")
    add("--train-limit", type=number(int, 1), default=train_limit,
        help="at most this many training images")


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
    data = args.data or flags.get("data")
    if not data:  # a packed model does not say
        raise UserError(f"{path} does not say which images it was trained on", "they are needed",
                        "pass --data FOLDER, or the folder of a run as --checkpoint")

    images = open_dataset(data, model.config.image_size, seed=flags.get("seed", 0),
                          count=flags.get("count", 2400), depth=flags.get("depth"))
    split = BOX.with_name("cxr128_files.csv") if path == BOX else path.parent / "split.csv"
    train, test = read_split(split, images)
    if min(len(test), len(train)) < 2:
        raise UserError(f"{path.parent} has {len(train)} training and {len(test)} held-out images",
                        "2 of each are needed", "train with a larger --holdout")
    print(f"{path}: {images.note}")
    return OpenedRun(path.parent, model, images, choose(train, args.train_limit),
                     choose(test, args.count))


def match_sources(folder, samples, images):
    """For each image of a folder of sample.py: indices of the images it was made from; None if its
    samples.csv does not list it.

    A source is the image of that name whose folders agree for longest, from the last one on, or
    all of them where several do: the images may have moved.
    """
    by_stem = {}
    for i, file in enumerate(images.files):
        by_stem.setdefault(Path(file).stem, []).append(i)

    def find(name):
        same = {}  # number of folders that agree -> indices
        for i in by_stem.get(Path(name).stem, []):
            pairs = zip(Path(name).parts[-2::-1], Path(images.files[i]).parts[-2::-1])
            agree = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
            same.setdefault(agree, []).append(i)
        return same[max(same)] if same else []

    path = Path(folder, "samples.csv")
    rows = read_csv(path) if path.is_file() else []
    sources = {Path(row["file"]).stem: [i for name in row["sources"].split("|") for i in find(name)]
               for row in rows if row.get("sources") is not None}
    return [sources.get(Path(file).stem) for file in samples.files]


def refuse_vectors(model):
    """UserError for a model without a ViT: it cannot embed images."""
    if model.config.vit is None:
        raise UserError("this model was trained on a file of vectors", "one with a ViT is needed",
                        "pass another --checkpoint")


def read_labels(images, columns, train, test, least=20):
    """(label names, train, test, labels (len(images), L) of 1, 0, and NaN where unknown).

    columns: of the table, or None for the findings. A column of 0 and 1 is one label; any other is
    cut at "|" into one label per value. Images with an unknown label leave train and test. A label
    needs `least` images with and without it in both. Raises UserError if there is none.
    """
    if not columns:
        columns = CHEST_LABELS if set(CHEST_LABELS) <= set(images.columns) else ["finding"]
    names, values = label_matrix(images.columns, columns)
    known = torch.from_numpy(~np.isnan(values).any(axis=1))
    print(f"images without a label, left out: {(~known[train]).sum()} for training, "
          f"{(~known[test]).sum()} held out")
    train, test = train[known[train]], test[known[test]]

    common = [j for j in range(len(names))
              if all(least <= values[part, j].sum() <= len(part) - least for part in (train, test))]
    if not common:
        raise UserError(f"no label of {', '.join(columns)} is in {least} images, and not in "
                        f"{least}, of both parts", "an AUC needs both",
                        "pass another --label-column")
    rare = [name for j, name in enumerate(names) if j not in common]
    if rare:
        print(f"left out, too rare or too common: {', '.join(rare)}")
    return [names[j] for j in common], train, test, values[:, common]
