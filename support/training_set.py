"""Which images a run trains on, and which it holds out: images of one patient stay together.

    train, test = split_holdout(images, 0.15, seed=0)     # int64 indices
    write_split("split.csv", images, train, test)         # file, split (train or test), group
    train, test = read_split("split.csv", images)         # by names, wherever the folder is now

A new run reads all images once, leaves out those that cannot be decoded and, with prompts, patches
that show no tissue, and splits the rest. It writes its decision to split.csv, unreadable.csv and
outliers.csv; a resumed run follows them.
"""
import hashlib
import json
import os
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import torch.nn.functional as F

from support.command import StatusLine, UserError, one_line
from support.datasets import ImageSet, leave_out, match_names, official_sides, open_dataset
from support.files import read_csv, write_csv
from support.pictures import save_grid, save_png
from support.ranks import all_ranks, rank
from support.seeds import spaced_rows


# ---- the split ---------------------------------------------------------------------------------

def split_holdout(images, holdout, seed):
    """(train, test) indices, int64, for an ImageSet.

    holdout: a share from 0 to below 1. An official test part takes precedence over a share above 0.
    Otherwise a hash of seed and patient decides, so images added later move no others. Patients of
    whom any image is held out are held out whole. Raises UserError if nothing is left to train on.
    """
    groups = images.patients
    if holdout and "test" in (images.official or ()):
        held_out = {group for group, side in zip(groups, images.official) if side == "test"}
    else:
        held_out = draw_groups(groups, holdout, seed)

    in_test = torch.tensor([group in held_out for group in groups])
    left_out = images.unreadable | images.outliers
    used = torch.tensor([file not in left_out for file in images.files])
    if in_test.all():
        raise UserError(f"--holdout {holdout} holds out all {len(groups):,} images",
                        "some must be left for training", "hold out less, or change --group-column")
    return tuple(torch.nonzero(side & used)[:, 0] for side in (~in_test, in_test))


def split_halves(images, seed):
    """(first, second) indices, int64, of the halves of an ImageSet, whatever its official split."""
    return split_holdout(replace(images, official=None), 0.5, seed)


def choose(indices, count=None):
    """At most `count` of the indices (None: all), shuffled, always in the same way: int64 (N,)."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(indices)[order[:count]]


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
    groups = images.patients
    rows = [["file", "split", "group"]]
    for split, indices in (("train", train), ("test", test)):
        rows += [[images.files[i], split, groups[i]] for i in indices.tolist()]
    write_csv(path, rows)


def read_split(path, images):
    """(train, test) indices, int64, from a CSV with the columns file and split.

    Raises UserError if it lacks the columns, or names an image that the data set does not have.
    """
    rows = read_csv(path, "surrogateescape")
    if not rows or not {"file", "split"} <= set(rows[0]):
        raise UserError(f"{path} has the columns {', '.join(rows[0] if rows else ())[:200]}",
                        "file and split are needed", "correct its first line")
    indices = match_names([row["file"] for row in rows], images.files)
    if None in indices:
        lost = rows[indices.index(None)]["file"]
        raise UserError(f"{path} names {lost}, which {images.name} does not have (or not once)",
                        "the images that it was made for are needed", "pass their folder as --data")
    sides = official_sides([row["split"] for row in rows]) or ()
    return tuple(torch.tensor(sorted(i for i, other in zip(indices, sides) if other == side),
                              dtype=torch.int64) for side in ("train", "test"))


# ---- a run -------------------------------------------------------------------------------------

@dataclass
class TrainingSet:
    images: ImageSet
    train: torch.Tensor  # indices, int64
    test: torch.Tensor   # the held-out ones

    @property
    def examples(self):
        """Indices of at most eight images to preview: held-out ones, if there are any."""
        return (self.test if len(self.test) else self.train)[:8]


def open_training_set(folder, resume, size, data="cxr", holdout=0.15, seed=0,
                      condition="dino", **options):
    """The TrainingSet of the run in `folder`; options go to open_dataset.

    Rank 0 decides and prints the first lines. Raises UserError if more than a tenth of the images
    cannot be read, or if the images of a resumed run have changed.
    """
    split = Path(folder, "split.csv")
    is_resumed = resume and split.exists()
    if is_resumed:
        options["depth"] = json.loads(Path(folder, "config.json").read_text()).get("depth")
    images = open_dataset(data, size, seed=seed, **options)

    reasons = {} if is_resumed or rank() else decode_all(images)
    images.depth, reasons = all_ranks((images.depth, reasons))[0]
    leave_out(images, reasons)
    if not rank():
        print(images.note, *(f"  note: {problem}" for problem in images.problems), sep="\n")
    if not is_resumed:
        images.outliers = drop_outliers(images, condition)
        return TrainingSet(images, *split_holdout(images, holdout, seed))

    train, test = read_split(split, images)
    known = {images.files[i] for i in [*train.tolist(), *test.tolist()]}
    for path in (Path(folder, "unreadable.csv"), Path(folder, "outliers.csv")):
        known.update(row["file"] for row in (
            read_csv(path, "surrogateescape") if path.exists() else ()))
    new = [file for file in images.files if file not in known]
    if new:
        raise UserError(f"the images differ from those that {folder} began with (new: {new[0]})",
                        "the same images are needed", "restore them, or start a run with --out DIR")
    return TrainingSet(images, train, test)


def decode_all(images):
    """{file: why} of the images that cannot be decoded; the others are then in the cache."""
    reasons = {}

    def decode(i):
        try:
            images[i]
        except UserError as error:
            reasons[images.files[i]] = one_line(error)

    if len(images.sources):  # phantoms have none
        status = StatusLine(len(images), "reading")
        with ThreadPool(4) as pool:  # Pillow releases Python's lock
            for i, _ in enumerate(pool.imap(decode, range(len(images)))):
                status.update(i + 1)
        status.close()
    return dict(sorted(reasons.items()))


def find_outliers(images):
    """Why each patch (B, 3, H, W) in [-1, 1] shows no tissue: a list of str, "" where it does.

    Measured at 64 pixels a side. Blank patches are bright, pale and have few edges; fat is bright
    and pale too, but has edges. The idea is that of arXiv 2312.09792, the limits are ours.
    """
    x = F.adaptive_avg_pool2d((images + 1) / 2, 64)                    # (B, 3, 64, 64)
    value = x.amax(1)
    brightness = value.mean((1, 2))
    saturation = (1 - x.amin(1) / value.clamp(min=1e-3)).mean((1, 2))
    kernel = x.new_tensor([[[[0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    edges = F.conv2d(x.mean(1, keepdim=True) * 255, kernel).flatten(1).var(1)

    reasons = []
    for b, s, e in zip(brightness.tolist(), saturation.tolist(), edges.tolist()):
        if b < 0.2:
            reasons.append("black")
        elif b > 0.9 and s < 0.05 and e < 600:
            reasons.append("blank")
        else:
            reasons.append("out of focus" if e < 150 else "")
    return reasons


def drop_outliers(images, condition):
    """{file: reason} of the patches of an ImageSet that a run with prompts leaves out.

    Only colour images are examined. If more than half would be left out, none is: they are
    probably not histology.
    """
    if condition not in ("prompts", "labels"):
        return {}

    # Medians, so that a coloured mark on a grey X-ray does not count.
    rows = torch.tensor([i for i, file in enumerate(images.files) if file not in images.unreadable])
    sample = rows[spaced_rows(len(rows), 64)].tolist()
    colour = torch.stack([(images[i].amax(0) - images[i].amin(0)).median() for i in sample])
    if colour.median() <= 0.1:
        return {}

    outliers = {}
    status = StatusLine(len(rows), "outliers")
    for k, part in enumerate(rows.split(64), 1):
        reasons = find_outliers(images.batch(part.tolist()))
        outliers |= {images.files[i]: reason for i, reason in zip(part, reasons) if reason}
        status.update(min(64 * k, len(rows)), images=len(part))
    status.close()
    if 2 * len(outliers) > len(rows):
        print(f"note: {len(outliers)} of {len(rows)} images look empty or out of focus, too many "
              "to be outliers: all are used")
        return {}
    return outliers


def write_choice(run, training_set):
    """Write unreadable.csv and outliers.csv, then split.csv, which a resumed run follows."""
    if not run.writes or (run.config["resume"] and (run.folder / "split.csv").exists()):
        return
    images = training_set.images
    if images.unreadable:
        write_csv(run.folder / "unreadable.csv", [["file", "why"], *images.unreadable.items()])
    if images.outliers:
        write_csv(run.folder / "outliers.csv", [["file", "reason"], *images.outliers.items()])
        print(f"{len(images.outliers)} outliers left out: {run.folder / 'outliers.csv'}")
    write_split(run.folder / "split.csv", images, training_set.train, training_set.test)


def write_examples(folder, training_set):
    """Write the example images and their labels.csv, to try sample.py on; returns the last path."""
    images = training_set.images
    table = [["file", *images.columns]]
    for i in training_set.examples.tolist():
        path = folder / f"{i}_{one_line(Path(images.files[i]).stem)[:60]}.png"
        save_png(path, images[i])
        table.append([path.name, *(column[i] for column in images.columns.values())])
    write_csv(folder / "labels.csv", table)
    return path


def draw_clusters(path, images, indices, assignment, seed):
    """A grid with ten random images of each cluster; indices, assignment: (N,) int64."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    captions = []
    for k in assignment.unique().tolist():
        members = indices[assignment == k]
        order = torch.randperm(len(members), generator=generator)
        rows.append(images.batch(members[order[:10]].tolist()))
        captions.append(f"{k}: {len(members)} images")
    save_grid(path, rows, captions)
