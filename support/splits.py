"""Who is held out: groups, splits, outliers."""
import hashlib
import os
import re
from contextlib import suppress

import torch
import torch.nn.functional as F

from support.command import UserError, fraction
from support.datasets import read_table
from support.files import write_csv

GROUP_COLUMN = (  # of the letters of its name: PatientID, subject_id, "Case no.", dicom_patient_id
    "(anon|deid|dicom|bcr|id)?(patient|subject|participant|person|case)s?"
    "(submitter)?(id|uid|no|nr|num|number|name|code|key|identifier|index|barcode)?(dicom|anon)?"
    "|groups?(id)?")


def is_group_column(name):
    """Whether a column of that name tells patients apart, in whatever spelling."""
    letters = re.sub("[^a-z]", "", name.lower())
    return re.fullmatch(GROUP_COLUMN, letters) is not None


def image_groups(dataset, group_column=None):
    """The group of each image (default column: Patient ID, patient or group), or else its name."""
    if group_column and group_column not in dataset.columns:
        raise UserError(f"there is no column {group_column!r}", f"{dataset.name} has "
                        f"{', '.join(dataset.columns) or 'none'}", "pass another --group-column")
    default = filter(is_group_column, dataset.columns)
    cells = dataset.columns.get(group_column or next(default, None), [""] * len(dataset))
    return [cell or file for cell, file in zip(cells, dataset.files)]


def split_holdout(dataset, holdout, seed, group_column=None):
    """(train, test) numbers as int64 tensors; images of one group are never parted.

    `holdout` is a fraction, met by a hash of seed and group, so that images added later move no
    other, or a CSV that read_split reads: its test images are held out with their whole groups.
    MedMNIST brings its own test part, which takes the place of any fraction above 0.
    """
    groups, part = image_groups(dataset, group_column), None
    with suppress(ValueError):
        part = float(str(holdout))
    if part is None:
        held = {groups[i] for i in read_split(holdout, dataset)[1]}
    elif not 0 <= part < 1:
        raise UserError(f"--holdout {holdout}", "from 0 to below 1 is needed", "pass e.g. 0.15")
    elif part and dataset.official_test:
        held = {groups[i] for i in dataset.official_test}
    else:
        shares = {group: int(hashlib.sha256(os.fsencode(f"{seed}/{group}")).hexdigest()[:16], 16)
                  / 16 ** 16 for group in groups}
        count = sum(share < part for share in shares.values())
        count = max(1, min(count, len(shares) - 1)) if part else 0  # someone on either side
        held = set(sorted(shares, key=shares.get)[:count])
    out = torch.tensor([group in held for group in groups])
    if out.all():
        raise UserError(f"--holdout {holdout} holds out all {len(groups):,} images",
                        "some must be left for training", "hold out less, or change --group-column")
    return torch.nonzero(~out)[:, 0], torch.nonzero(out)[:, 0]


def write_split(path, dataset, train, test, group_column=None):
    """Write who is held out: a CSV of file, split (train or test), group."""
    groups = image_groups(dataset, group_column)
    rows = [[dataset.files[i], split, groups[i]]
            for split, part in (("train", train), ("test", test)) for i in part.tolist()]
    write_csv(path, [["file", "split", "group"]] + rows)


def read_split(path, dataset):
    """(train, test) numbers, int64, from a CSV of file and split; without split all are test."""
    split = {row["file"]: row.get("split", "test")
             for row in read_table(path, "surrogateescape")}  # as write_text_atomic wrote it
    unknown = sorted(set(split) - set(dataset.files))
    if unknown:
        raise UserError(f"{path} names {', '.join(unknown[:3])}, which {dataset.name} has not",
                        "names as in split.csv are needed", "correct it, or pass that run's --data")
    sides = [split.get(file) for file in dataset.files]
    return tuple(torch.tensor([i for i, side in enumerate(sides) if side == part],
                              dtype=torch.int64) for part in ("train", "test"))


def find_outliers(images, dark=0.2, pale=0.9, grey=0.05, blurred=150.0):
    """Of histology patches (B, 3, H, W) in [-1, 1] those that show nothing: a str each, or "".

    Seen at 64 pixels a side. "black": mean brightness (HSV value) below `dark`. "out of focus":
    variance of the Laplacian, of grey in 0..255, below `blurred`. "blank": brighter than `pale`,
    mean saturation below `grey` and few edges (4 x `blurred`), for fat is bright and pale as well.
    Source: the idea of arXiv:2312.09792; the limits are ours. Not meant for X-rays.
    """
    x = F.adaptive_avg_pool2d((images + 1) / 2, 64)
    value = x.amax(1)
    brightness = value.mean((1, 2))
    saturation = (1 - x.amin(1) / value.clamp(min=1e-3)).mean((1, 2))
    kernel = x.new_tensor([[[[0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    edges = F.conv2d(x.mean(1, keepdim=True) * 255, kernel).flatten(1).var(1)
    return ["black" if b < dark else "blank" if b > pale and s < grey and e < 4 * blurred else
            "out of focus" if e < blurred else ""
            for b, s, e in zip(brightness.tolist(), saturation.tolist(), edges.tolist())]
