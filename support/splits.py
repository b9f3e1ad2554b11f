"""Which images are held out. Images of one patient are never on both sides.

    train, test = split_holdout(images, 0.15, seed=0)     # int64 indices
    write_split("split.csv", images, train, test)         # file, split (train or test), group
    train, test = read_split("split.csv", images)         # by names, wherever the folder is now
"""
import hashlib
import os

import torch

from support.command import UserError
from support.datasets import match_names, official_sides
from support.files import read_csv, write_csv


def image_groups(images):
    """The group of each image, never split: its patient, or itself if patients are unknown."""
    return images.groups or images.files


def split_holdout(images, holdout, seed):
    """(train, test) indices, int64, for an ImageSet.

    holdout: a share from 0 to below 1, or a CSV with the columns file and split. A share above 0
    gives way to the set's official test part. Otherwise a hash of seed and group decides, so that
    images added later move no others. Groups of which any image is held out are held out whole.
    Raises UserError if nothing is left to train on.
    """
    groups = image_groups(images)
    try:
        share = float(str(holdout))
    except ValueError:  # a file
        share = None
    if share is None:
        _, test = read_split(holdout, images)
        held_out = {groups[i] for i in test.tolist()}
    elif not 0 <= share < 1:
        raise UserError(f"--holdout {holdout}", "a share from 0 to below 1, or a CSV, is needed",
                        "pass e.g. 0.15")
    elif share and images.official:
        held_out = {group for group, side in zip(groups, images.official) if side == "test"}
    else:
        held_out = draw_groups(groups, share, seed)

    in_test = torch.tensor([group in held_out for group in groups])
    if in_test.all():
        raise UserError(f"--holdout {holdout} holds out all {len(groups):,} images",
                        "some must be left for training", "hold out less, or change --group-column")
    return torch.nonzero(~in_test)[:, 0], torch.nonzero(in_test)[:, 0]


def draw_groups(groups, share, seed):
    """About that share of the groups, at least one and never all; none for a share of 0."""
    place = {}  # of each group in [0, 1)
    for group in set(groups):
        digest = hashlib.sha256(os.fsencode(f"{seed}/{group}")).hexdigest()
        place[group] = int(digest[:16], 16) / 16 ** 16
    count = sum(value < share for value in place.values())
    count = max(1, min(count, len(place) - 1)) if share else 0
    return set(sorted(place, key=place.get)[:count])


def write_split(path, images, train, test):
    """Write who is held out."""
    groups = image_groups(images)
    rows = [["file", "split", "group"]]
    for split, indices in (("train", train), ("test", test)):
        rows += [[images.files[i], split, groups[i]] for i in indices.tolist()]
    write_csv(path, rows)


def read_split(path, images):
    """(train, test) indices, int64, from a CSV with the columns file and split.

    Raises UserError if it lacks the columns, or names an image that the data set has not.
    """
    rows = read_csv(path)
    if not rows or not {"file", "split"} <= set(rows[0]):
        raise UserError(f"{path} has the columns {', '.join(rows[0] if rows else ())[:200]}",
                        "file and split are needed", "correct its first line")
    indices = match_names([row["file"] for row in rows], images.files)
    if None in indices:
        lost = rows[indices.index(None)]["file"]
        raise UserError(f"{path} names {lost}, which {images.name} does not have (or not once)",
                        "the images that it was made of are needed", "pass their folder as --data")
    sides = official_sides([row["split"] for row in rows]) or ()
    return tuple(torch.tensor(sorted(i for i, other in zip(indices, sides) if other == side),
                              dtype=torch.int64) for side in ("train", "test"))
