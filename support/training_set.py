"""Which images a run trains on: opened, readable, without outliers, split by patient.

A run decides this once and writes it down, in split.csv, outliers.csv and unreadable.csv. A resume
goes by split.csv, and reads no image to decide anew.
"""
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

from support.cache import are_files
from support.command import StatusLine, UserError, one_line
from support.datasets import CACHE_BYTES, ImageSet, open_dataset
from support.files import read_csv, write_csv
from support.pictures import save_grid, save_png
from support.ranks import all_ranks, rank
from support.settings import saved_settings
from support.splits import find_outliers, read_split, split_holdout, write_split


@dataclass
class TrainingSet:
    images: ImageSet
    train: torch.Tensor  # numbers of the images to train on, int64
    test: torch.Tensor   # and of those held out
    outliers: list       # (number, reason) of images that a new run leaves out

    @property
    def examples(self):
        """Numbers of at most eight images to show: held-out ones, if there are any."""
        return (self.test if len(self.test) else self.train)[:8]


def open_training_set(args):
    """The TrainingSet of train.py's flags; rank 0 decides, the others follow.

    Raises UserError if nothing is left to train on, or if a resumed run's images have changed.
    """
    folder = Path(args.out)
    is_resumed = args.resume and (folder / "split.csv").exists()
    depth = saved_settings(folder).get("depth") if is_resumed else None
    decided = None
    if not rank():
        images = open_images(args, False, depth) if is_resumed else open_new(args)
        if is_resumed:
            found = TrainingSet(images, *split_of_run(folder, images), [])
        else:
            found = choose(args, images)
        print(images.note, *(f"  note: {problem}" for problem in images.problems), sep="\n")
        decided = {"depth": images.depth, "train": names(images, found.train),
                   "test": names(images, found.test)}

    # The other ranks read no more than the names; numbers may differ, if files were left out.
    decided = all_ranks(decided)[0]
    if not rank():
        return found
    images = open_images(args, False, decided["depth"])
    number = {file: i for i, file in enumerate(images.files)}
    train, test = (torch.tensor([number[file] for file in decided[side]], dtype=torch.int64)
                   for side in ("train", "test"))
    return TrainingSet(images, train, test, [])


def open_images(args, whole, depth=None):
    """The ImageSet that --data names; whole: look for files that are damaged further in."""
    return open_dataset(args.data, args.size, args.seed, args.count, whole=whole, depth=depth,
                        uncertain=args.uncertain)


def open_new(args):
    """The ImageSet of a new run, without damaged files.

    A set that fits into the ImageSet's memory is simply read, and each file so decoded once; if
    that fails, or the set is larger, all files are checked, and the damaged ones listed.
    """
    images = open_images(args, whole=False)
    if not len(images.sources):
        return images  # phantoms
    if not are_files(images) or len(images) * 3 * 4 * args.size ** 2 > CACHE_BYTES:
        return open_images(args, whole=True)
    status = StatusLine(len(images), "reading")
    try:
        with ThreadPool(4) as pool:  # Pillow lets go of Python's lock
            for done, _ in enumerate(pool.imap(images.__getitem__, range(len(images))), 1):
                status.update(done)
    except UserError:
        return open_images(args, whole=True)
    finally:
        status.close()
    return images


def names(images, numbers):
    """The files with these numbers."""
    return [images.files[i] for i in numbers.tolist()]


def choose(args, images):
    """The TrainingSet of a new run: outliers left out, patients held out."""
    train, test = split_holdout(images, args.holdout, args.seed, args.group_column)
    outliers = outliers_of(images, args.drop_outliers)
    dropped = torch.tensor([number for number, _ in outliers], dtype=torch.int64)
    train = train[~torch.isin(train, dropped)]
    test = test[~torch.isin(test, dropped)]
    if not len(train):
        raise UserError(f"all {len(images)} images are outliers, or held out",
                        "some must be left to train on", "pass --no-drop-outliers")
    return TrainingSet(images, train, test, outliers)


def outliers_of(images, drop, batch=256):
    """(number, reason) of each patch that shows nothing; drop None: looked for in colour alone."""
    if drop is None:
        first = images.batch(range(min(16, len(images))))
        drop = (first.amax(1) - first.amin(1)).max() > 0.1
    if not drop:
        return []
    outliers = []
    status = StatusLine(len(images), "outliers")
    for i in range(0, len(images), batch):
        numbers = range(i, min(i + batch, len(images)))
        reasons = find_outliers(images.batch(numbers))
        outliers += [(number, reason) for number, reason in zip(numbers, reasons) if reason]
        status.update(numbers.stop, images=len(numbers))
    status.close()
    return outliers


def split_of_run(folder, images):
    """(train, test) as the run in the folder began; its images must still be the same set."""
    train, test = read_split(folder / "split.csv", images)
    left_out = [row["file"] for name in ("outliers.csv", "unreadable.csv")
                if (folder / name).exists() for row in read_csv(folder / name)]
    known = {*torch.cat([train, test]).tolist()}
    for number, file in enumerate(images.files):
        if number not in known and not any(f"/{path}".endswith(f"/{file}") for path in left_out):
            raise UserError(f"the images differ from those that {folder} began with (new: {file})",
                            "the same set is needed", "restore it, or start anew with --out DIR")
    return train, test


def write_choice(run, found, group_column):
    """Write which images are left out and held out; a resume goes by split.csv, written last."""
    images = found.images
    if not run.writes or (run.config["resume"] and (run.folder / "split.csv").exists()):
        return
    if images.unreadable:
        write_csv(run.folder / "unreadable.csv", [["file", "why"], *images.unreadable])
    if found.outliers:
        rows = [[images.files[number], reason] for number, reason in found.outliers]
        write_csv(run.folder / "outliers.csv", [["file", "reason"], *rows])
        print(f"{len(rows)} outliers left out, named in {run.folder / 'outliers.csv'}")
    write_split(run.folder / "split.csv", images, found.train, found.test, group_column)


def labels_for_prompts(args, found):
    """The label of each image in lower case, or None if there are none to put into prompts.

    Raises UserError if the column is missing, has empty cells, or a single value.
    """
    columns = found.images.columns
    name = args.label_column
    if name is None:
        name = "label" if "label" in columns or args.condition == "labels" else "none"
    if args.condition not in ("prompts", "labels") or (
            name == "none" and args.condition != "labels"):
        return None
    if name not in columns:
        raise UserError(f"there is no label column {name!r}", f"{found.images.name} has "
                        f"{', '.join(columns) or 'no table'}", "pass another --label-column, or "
                        "--condition prompts --label-column none")
    labels = [cell.strip().lower() for cell in columns[name]]
    rows = torch.cat([found.train, found.test]).tolist()
    empty = [found.images.files[i] for i in rows if not labels[i]]
    if empty:
        raise UserError(f"column {name!r} is empty for {len(empty):,} images (first: {empty[0]})",
                        "each image needs a label", "fill the cells, or pass --label-column none")
    if len({labels[i] for i in rows}) < 2:
        raise UserError(f"column {name!r} holds only {labels[rows[0]]!r}", "two labels are needed "
                        "to tell apart", "pass another --label-column, or --label-column none")
    return labels


def plan_prompts(args, labels, rows, templates):
    """(template, values of the labels, number of clusters) of the model's prompts.

    templates: the paper's, for "labels", "clusters", "labels and clusters". Raises UserError for
    more clusters than images, and for a template that does not fit what is used.
    """
    if args.condition not in ("prompts", "labels"):
        return "", (), 0
    values = tuple(sorted({labels[i] for i in rows})) if labels else ()
    clusters = 0
    if args.condition == "prompts":
        clusters = args.clusters or (33 if values else 10)
    if clusters > min(len(rows), 1000):
        raise UserError(f"--clusters {clusters} for {len(rows)} training images",
                        "need no more clusters than images, and at most 1,000",
                        "pass a smaller --clusters")

    # The paper's template for what there is; another must use the same.
    used = [name for name, has in (("labels", values), ("clusters", clusters)) if has]
    template = args.template or templates[" and ".join(used)]
    for word, is_used in (("<label>", bool(values)), ("<index>", bool(clusters))):
        if is_used and word not in template:
            raise UserError(f"--template {template!r} lacks {word}", f"{word[1:-1]}s are used",
                            "put it there")
        if word in template and not is_used:
            raise UserError(f"--template {template!r} holds {word}", f"no {word[1:-1]}s are used",
                            "take it away")
    return template, values, clusters


def write_prompts(folder, found, labels, cluster, prompts):
    """prompts.csv: label, cluster and prompt of each training image."""
    table = [["file", "label", "cluster", "prompt"]]
    for i, k, prompt in zip(found.train.tolist(), cluster, prompts):
        table.append([found.images.files[i], labels[i] if labels else "", k, prompt])
    write_csv(folder / "prompts.csv", table)


def draw_clusters(path, found, cluster, seed):
    """A grid of ten training images of each cluster; cluster: (N,) int64."""
    shuffle = torch.Generator().manual_seed(seed)
    rows = []
    captions = []
    for k in range(int(cluster.max()) + 1):
        members = found.train[cluster == k]
        order = torch.randperm(len(members), generator=shuffle)
        rows.append(found.images.batch(members[order[:10]]))
        captions.append(f"{k}: {len(members)} images")
    save_grid(path, rows, captions)


def write_examples(folder, found):
    """Write the example images with their labels.csv, to try sample.py on; returns the last path.
    """
    images = found.images
    table = [["file", *images.columns]]
    for i in found.examples.tolist():
        path = folder / f"{one_line(Path(images.files[i]).stem)}.png"
        if path.name in {row[0] for row in table}:  # another folder's image of that name
            path = path.with_stem(f"{i}_{path.stem}"[:60])
        save_png(path, images[i])
        table.append([path.name, *(column[i] for column in images.columns.values())])
    write_csv(folder / "labels.csv", table)
    return path
