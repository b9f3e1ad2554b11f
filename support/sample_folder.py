"""What sample.py reads and asks for, and what it writes: images/*.png, samples.csv, grid.png,
animation.gif.

Ranks write images in parallel; rank 0 writes the table, round by round, and the grid. The table
lists only complete files.
"""
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from support.command import UserError, user_errors
from support.datasets import open_dataset
from support.files import append_csv
from support.images import image_root
from support.pictures import draw_grid, save_gif, save_png
from support.ranks import all_ranks, rank

GRID_ROWS = 16
GRID_COLUMNS = 16


@dataclass(frozen=True)
class Request:
    """One image to make."""
    strategy: str          # reconstruct, img2img, interpolate, prototype, random, ...
    row: int               # of the grid
    seed: int              # of the noise
    sources: tuple = ()    # image files, at most two, or the name of a prototype or vector
    weight: float = 0.0    # of the second source
    index: int = -1        # of the prototype or vector
    prompt: str = ""
    labels: dict = field(default_factory=dict)  # that the image inherits


def find_sources(paths, read):
    """Files and folders -> paths, and a {column: label} for each, without unreadable ones."""
    sources = []  # (path, labels)
    for path in map(Path, paths):
        if not path.is_dir():
            sources.append((path, {}))
            continue
        images = open_dataset(path.resolve(), None)  # "cxr" is no folder of phantoms
        for i, source in enumerate(images.sources):
            labels = {name: column[i] for name, column in images.columns.items() if column[i]}
            sources.append((source, labels))
        sources += [(image_root(path) / file, {}) for file in images.unreadable]

    readable = []
    problems = []
    for source, labels in sources:
        try:
            read(source)
            readable.append((source, labels))
        except UserError as error:
            problems.append(error)
    if not readable:
        raise problems[0]
    if problems:
        print(f"note: {len(problems)} of {len(sources)} sources left out, the first: {problems[0]}")
    return zip(*readable)


def read_training_tokens(folder, shape):
    """At most 50,000 raw tokens (N, *shape) of a run's cache; UserError for a damaged one."""
    path = folder / "cache" / "tokens.npy"
    with user_errors("the training tokens in the run's cache are needed, whole",
                     "copy its cache folder beside model.pt"):
        tokens = torch.from_numpy(np.load(path, allow_pickle=False)[:50_000])
        if tokens.shape[1:] != shape or not tokens.isfinite().all():
            raise ValueError(f"{path} has tokens {tuple(tokens.shape)}, or NaN: this model's are "
                             f"(N, {', '.join(map(str, shape))})")
    return tokens


class SampleFolder:
    """A new folder for the images of these requests, in their order.

    settings: {name: value} of the columns that are the same for all images.
    Raises UserError if the folder holds samples, or cannot be made.
    """

    def __init__(self, folder, requests, settings):
        self.folder = folder
        self.requests = requests
        self.settings = settings
        if (folder / "samples.csv").exists():
            raise UserError(f"{folder} already contains samples", "a new folder is needed",
                            "pass another --out")
        (folder / "images").mkdir(parents=True, exist_ok=True)
        self.label_names = sorted({name for request in requests for name in request.labels})

        # Which requests the grid shows: {row: [indices]}.
        self.rows = {}
        for i, request in enumerate(requests):
            previews = self.rows.setdefault(request.row, [])
            if request.row < GRID_ROWS and len(previews) < GRID_COLUMNS:
                previews.append(i)
        self.images = {i: None for previews in self.rows.values() for i in previews}

    def file(self, i):
        return f"images/{self.requests[i].strategy}_{i:05d}.png"

    def add(self, indices, images, round_indices):
        """Write this rank's images (B, 3, H, W), and table rows for those of all ranks.

        Every rank calls it once a round. indices may be empty; round_indices: those of all ranks.
        """
        for i, image in zip(indices, images):
            save_png(self.folder / self.file(i), image, sync=False)
        previews = {i: image for i, image in zip(indices, images) if i in self.images}
        for part in all_ranks(previews):  # they meet here: all files of the round are whole
            self.images.update(part)
        if not rank():
            rows = [self.table_row(i) for i in round_indices]
            append_csv(self.folder / "samples.csv",
                       rows if 0 not in round_indices else [self.table_head(), *rows])

    def table_head(self):
        """Names of the columns; those of labels are `label` or begin with `label_`."""
        labels = [name if name == "label" else f"label_{name}" for name in self.label_names]
        return ["file", "strategy", "sources", "weights", "prompt", "seed", *self.settings,
                "label_rule", *labels]

    def table_row(self, i):
        """Provenance of an image."""
        request = self.requests[i]
        weights = ["", "1", f"{1 - request.weight:.3f}|{request.weight:.3f}"][len(request.sources)]
        labels = [request.labels.get(name, "") for name in self.label_names]
        rule = "of the prompt" if request.prompt else "of the source"
        return [self.file(i), request.strategy, "|".join(map(str, request.sources)), weights,
                request.prompt, request.seed, *self.settings.values(),
                rule if request.labels else "", *labels]

    def draw(self, images, read_sources, with_prompts):
        """The first rows as one picture, each behind its source; a second source ends its row.

        images: index of a request -> image (3, H, W).
        read_sources: request -> list of at most two images (3, H, W).
        with_prompts: whether the prompt is written before its row.
        """
        rows = []
        captions = []
        for indices in list(self.rows.values())[:GRID_ROWS]:
            first = self.requests[indices[0]]
            sources = read_sources(first)
            samples = [images[i] for i in indices]
            rows.append(torch.stack([*sources[:1], *samples, *sources[1:]]))
            captions.append(first.prompt.rpartition(" image of ")[2])  # the part that differs
        return draw_grid(rows, captions if with_prompts else None)

    def write_grid(self, read_sources, with_prompts, steps=()):
        """grid.png, see `draw`; and animation.gif if there are steps: all requests' images
        (N, 3, H, W) after each step, then grid.png."""
        grid = self.draw(self.images, read_sources, with_prompts)
        save_png(self.folder / "grid.png", grid)
        frames = [self.draw(images, read_sources, with_prompts) for images in steps]
        if frames:
            save_gif(self.folder / "animation.gif", [*frames, grid])
        if len(self.rows) > GRID_ROWS:
            print(f"grid.png shows the first {GRID_ROWS} of {len(self.rows)} sources or prompts")
