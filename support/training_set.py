"""Which images a run trains on, and which it holds out.

A new run reads all images once, leaves out those that cannot be decoded, and splits the rest by
patient. It writes its decision to split.csv and unreadable.csv; a resumed run follows them.
"""
import json
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

from support.command import StatusLine, UserError, one_line
from support.datasets import ImageSet, open_dataset
from support.files import read_csv, write_csv
from support.pictures import save_grid, save_png
from support.ranks import all_ranks, rank
from support.splits import read_split, split_holdout, write_split


@dataclass
class TrainingSet:
    images: ImageSet
    train: torch.Tensor  # indices, int64
    test: torch.Tensor   # the held-out ones

    @property
    def examples(self):
        """Indices of at most eight images to preview: held-out ones, if there are any."""
        return (self.test if len(self.test) else self.train)[:8]


def open_training_set(folder, resume, size, data="cxr", holdout=0.15, seed=0, **options):
    """The TrainingSet of the run in `folder`; options go to open_dataset.

    Rank 0 decides and prints the first lines. Raises UserError if more than a tenth of the images
    cannot be read, or if the images of a resumed run have changed.
    """
    split = Path(folder, "split.csv")
    is_resumed = resume and split.exists()
    if is_resumed:
        options["depth"] = json.loads(Path(folder, "config.json").read_text()).get("depth")
    images = open_dataset(data, size, seed=seed, **options)

    reasons = {}
    if is_resumed:
        why = read_left_out(folder, "unreadable.csv", "why")
        reasons = {i: why[file] for i, file in enumerate(images.files) if file in why}
    elif not rank():
        reasons = decode_all(images)
    images.depth, reasons = all_ranks((images.depth, reasons))[0]
    images.leave_out(reasons)
    if not rank():
        print(images.note, *(f"  note: {problem}" for problem in images.problems), sep="\n")

    train, test = read_split(split, images) if is_resumed else split_holdout(images, holdout, seed)
    outliers = read_left_out(folder, "outliers.csv", "reason") if is_resumed else {}
    new = {*range(len(images))} - {*train.tolist(), *test.tolist()}
    new = [i for i in new if images.files[i] not in outliers]
    if new:
        raise UserError(f"the images differ from those that {folder} began with (new: "
                        f"{images.files[min(new)]})", "the same images are needed",
                        "restore them, or start a run with --out DIR")
    return TrainingSet(images, train, test)


def decode_all(images):
    """{index: why} of the images that cannot be decoded; the others are then in the cache."""
    reasons = {}

    def decode(i):
        try:
            images[i]
        except UserError as error:
            reasons[i] = one_line(error)

    if len(images.sources):  # phantoms have none
        status = StatusLine(len(images), "reading")
        with ThreadPool(4) as pool:  # Pillow releases Python's lock
            for i, _ in enumerate(pool.imap(decode, range(len(images)))):
                status.update(i + 1)
        status.close()
    return dict(sorted(reasons.items()))


def read_left_out(folder, name, column):
    """{file: reason} of a table of the images that the run left out when it began."""
    path = Path(folder, name)
    return {row["file"]: row[column] for row in read_csv(path)} if path.exists() else {}


def write_choice(run, training_set):
    """Write unreadable.csv, then split.csv, by which a resumed run goes."""
    if not run.writes or (run.config["resume"] and (run.folder / "split.csv").exists()):
        return
    images = training_set.images
    if images.unreadable:
        write_csv(run.folder / "unreadable.csv", [["file", "why"], *images.unreadable])
    write_split(run.folder / "split.csv", images, training_set.train, training_set.test)


def write_examples(folder, training_set):
    """Write the example images with their labels.csv, to try sample.py on; returns the last path.
    """
    images = training_set.images
    table = [["file", *images.columns]]
    for i in training_set.examples.tolist():
        path = folder / f"{one_line(Path(images.files[i]).stem)}.png"
        if path.name in {row[0] for row in table}:  # another folder's image of that name
            path = path.with_stem(f"{i}_{path.stem}"[:60])
        save_png(path, images[i])
        table.append([path.name, *(column[i] for column in images.columns.values())])
    write_csv(folder / "labels.csv", table)
    return path


def write_prompts(path, files, labels, clusters, prompts):
    """CSV of the label, cluster and prompt of each training image; labels, clusters may be None."""
    blank = [""] * len(files)
    rows = zip(files, labels or blank, blank if clusters is None else clusters, prompts)
    write_csv(path, [["file", "label", "cluster", "prompt"], *map(list, rows)])


def draw_clusters(path, images, indices, assignment, seed):
    """A grid with ten random images of each cluster; indices, assignment: (N,) int64."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    captions = []
    for k in range(int(assignment.max()) + 1):
        members = indices[assignment == k]
        order = torch.randperm(len(members), generator=generator)
        rows.append(images.batch(members[order[:10]].tolist()))
        captions.append(f"{k}: {len(members)} images")
    save_grid(path, rows, captions)
