"""Who is held out: patients, splits, and patches that show nothing.

    train, test = split_holdout(images, 0.15, seed=0)     # int64 numbers; patients are never parted
    write_split("split.csv", images, train, test)
    train, test = read_split("split.csv", images)         # by names, wherever the images are now
"""
import hashlib
import os
import re
from contextlib import suppress

import torch
import torch.nn.functional as F

from support.command import UserError
from support.files import read_csv, write_csv
from support.names import file_columns, match_names

# The letters of a column's name, as in PatientID, subject_id, "Case no.", bcr_patient_barcode.
GROUP_COLUMN = (
    "(anon|deid|dicom|bcr|id)?(patient|subject|participant|person|case)s?"
    "(submitter)?(id|uid|no|nr|num|number|name|code|key|identifier|index|barcode)?(dicom|anon)?"
    "|groups?(id)?")

# patient00001/study1/view1.jpg, p10/p10000032/s5/x.jpg, PNEUMONIA/person12_virus_46.jpeg
PATIENT_IN_PATH = re.compile(
    r"(?:^|/)(?:((?:patient|subject|participant|person|case|sub)[ _-]?\d+)(?![^/_. -])"
    r"|p\d\d/(p\d{8})/)", re.IGNORECASE)


# ---- patients ----------------------------------------------------------------------------------

def is_group_column(name):
    """Whether a column of that name tells patients apart, in whatever spelling."""
    return re.fullmatch(GROUP_COLUMN, re.sub("[^a-z]", "", name.lower())) is not None


def find_group_column(names):
    """The first column of patients, else of cases, else of groups; None if there is none."""
    found = [name for name in names if is_group_column(name)]
    for word in ("patient", "subject", "participant", "person", "case", "group"):
        for name in found:
            if word in name.lower():
                return name
    return None


def patient_in_path(file):
    """The patient that a file's path tells, as CheXpert's and Kermany's do, or ""."""
    match = PATIENT_IN_PATH.search(file)
    return (match[1] or match[2]).lower() if match else ""


def image_groups(dataset, group_column=None):
    """The group of each image: its patient by column or path, or else its own name."""
    if group_column and group_column not in dataset.columns:
        raise UserError(f"there is no column {group_column!r}", f"{dataset.name} has "
                        f"{', '.join(dataset.columns) or 'none'}", "pass another --group-column")
    column = group_column or find_group_column(dataset.columns)
    cells = dataset.columns.get(column, [""] * len(dataset))
    return [cell or patient_in_path(file) or file for cell, file in zip(cells, dataset.files)]


def describe_groups(dataset):
    """A line on how patients are told apart, for the first lines of a run."""
    column = find_group_column(dataset.columns)
    count = len(set(image_groups(dataset)))
    if column:
        return f"{count:,} patients by column {column}"
    if any(map(patient_in_path, dataset.files)):
        return f"{count:,} patients by the files' paths"
    return "no patient column: images count as their own patients"


# ---- splits ------------------------------------------------------------------------------------

def split_holdout(dataset, holdout, seed, group_column=None):
    """(train, test) numbers as int64 tensors; images of one group are never parted.

    `holdout` is a fraction, met by a hash of seed and group, so that images added later move no
    other; or a file that read_split reads, or a public set's list of names, some of which may not
    be here: its test images are held out with their whole groups. MedMNIST brings its own test
    part, which takes the place of any fraction above 0.
    """
    groups = image_groups(dataset, group_column)
    share = None
    with suppress(ValueError):
        share = float(str(holdout))
    if share is None:
        held = {groups[i] for i in _read_sides(holdout, dataset, may_lack=True)[1]}
    elif not 0 <= share < 1:
        raise UserError(f"--holdout {holdout}", "from 0 to below 1 is needed", "pass e.g. 0.15")
    elif share and dataset.official_test:
        held = {groups[i] for i in dataset.official_test}
    else:
        held = _draw_groups(groups, share, seed)

    is_held = torch.tensor([group in held for group in groups])
    if is_held.all():
        raise UserError(f"--holdout {holdout} holds out all {len(groups):,} images",
                        "some must be left for training", "hold out less, or change --group-column")
    return torch.nonzero(~is_held)[:, 0], torch.nonzero(is_held)[:, 0]


def _draw_groups(groups, share, seed):
    """About that share of the groups, at least one and never all, unless the share is 0."""
    place = {}  # of each group in [0, 1)
    for group in set(groups):
        digest = hashlib.sha256(os.fsencode(f"{seed}/{group}")).hexdigest()
        place[group] = int(digest[:16], 16) / 16 ** 16
    count = sum(value < share for value in place.values())
    count = max(1, min(count, len(place) - 1)) if share else 0
    return set(sorted(place, key=place.get)[:count])


def write_split(path, dataset, train, test, group_column=None):
    """Write who is held out: a CSV of file, split (train or test), group."""
    groups = image_groups(dataset, group_column)
    rows = []
    for split, numbers in (("train", train), ("test", test)):
        rows += [[dataset.files[i], split, groups[i]] for i in numbers.tolist()]
    write_csv(path, [["file", "split", "group"], *rows])


def read_split(path, dataset):
    """(train, test) numbers, int64, from a CSV of file and split; without split all are test.

    Raises UserError if it names an image that the data set has not.
    """
    return _read_sides(path, dataset, may_lack=False)


def _read_sides(path, dataset, may_lack):
    """read_split, also of a list of names without a head; may_lack: names may not be here."""
    rows = read_csv(path)
    columns = file_columns(rows[0] if rows else ())
    if not columns and len(rows[0] if rows else ()) < 2:
        rows = read_csv(path, columns=["file"])
        columns = ["file"]
    if not columns:
        raise UserError(f"{path} has the columns {', '.join(rows[0])[:200]}", "one must be called "
                        "file", "correct its first line")

    found, lost, ambiguous = match_names(dataset.files, [row[columns[0]] for row in rows])
    unknown = lost + ambiguous
    if unknown and not (may_lack and any(found)):
        raise UserError(f"{path} names {', '.join(unknown[:3])}, which {dataset.name} has not",
                        "names as in split.csv are needed", "correct it, or pass that run's --data")
    if unknown:
        dataset.problems.append(f"names in {path} without an image here: {len(unknown):,} "
                                f"({', '.join(unknown[:3])})")
    split = next((name for name in rows[0] if name.lower() == "split"), None)
    sides = {"train": [], "test": []}
    for i, numbers in enumerate(found):
        if numbers:
            side = rows[numbers[0]][split].lower() if split else "test"
            sides.get(side, []).append(i)
    return tuple(torch.tensor(numbers, dtype=torch.int64) for numbers in sides.values())


# ---- outliers ----------------------------------------------------------------------------------

def find_outliers(images, dark=0.2, pale=0.9, grey=0.05, blurred=150.0):
    """Of histology patches (B, 3, H, W) in [-1, 1] those that show nothing: a str each, or "".

    Seen at 64 pixels a side. "black": mean brightness (HSV value) below `dark`. "out of focus":
    variance of the Laplacian, of grey in 0..255, below `blurred`. "blank": brighter than `pale`,
    mean saturation below `grey` and few edges (4 x `blurred`), for fat is bright and pale as well.
    Source: the idea of arXiv:2312.09792; the limits are ours. Not meant for X-rays.
    """
    x = F.adaptive_avg_pool2d((images + 1) / 2, 64)                        # (B, 3, 64, 64)
    value = x.amax(1)
    brightness = value.mean((1, 2))
    saturation = (1 - x.amin(1) / value.clamp(min=1e-3)).mean((1, 2))
    kernel = x.new_tensor([[[[0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    edges = F.conv2d(x.mean(1, keepdim=True) * 255, kernel).flatten(1).var(1)

    reasons = []
    for b, s, e in zip(brightness.tolist(), saturation.tolist(), edges.tolist()):
        if b < dark:
            reasons.append("black")
        elif b > pale and s < grey and e < 4 * blurred:
            reasons.append("blank")
        else:
            reasons.append("out of focus" if e < blurred else "")
    return reasons
