"""What sample.py asks for, and what it writes: images/*.png, samples.csv, grid.png.

Ranks write images into it side by side; rank 0 writes the table, a round at a time, and the grid.
The table names only files that are whole, and a call costs the same whatever is there already.
"""
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from support.command import UserError, user_errors
from support.files import append_csv, make_folder
from support.images import list_images
from support.pictures import save_grid, save_pngs
from support.ranks import all_ranks, rank

GRID_LINES = 16
GRID_COLUMNS = 16


@dataclass(frozen=True, slots=True)
class Request:
    """One image to make."""
    strategy: str          # reconstruct, perturb, img2img, interpolate, prototype, random, prompt
    line: int              # of the grid
    seed: int              # of the noise
    sources: tuple = ()    # files of images, at most two, or the name of a prototype
    weight: float = 0.0    # of the second source
    prototype: int = -1    # number of the K-means centre
    prompt: str = ""
    labels: dict = field(default_factory=dict)  # that the image inherits
    label_rule: str = ""   # where from


def find_sources(paths):
    """Files named, or in named folders -> list of Path."""
    files = []
    for path in map(Path, paths):
        files += list_images(path) if path.is_dir() else [path]
    return files


def read_training_tokens(folder, shape, most=50_000):
    """The tokens that a run's cache holds, (N, *shape), N at most `most`; UserError for others."""
    path = folder / "cache" / "tokens.npy"
    if not path.is_file():
        raise UserError(f"no {path}", "prototypes are centres of the training tokens, which stand "
                        "in the run's cache folder", "copy it beside model.pt")
    with user_errors(f"{path} must be whole", "copy it here again"):
        tokens = torch.from_numpy(np.load(path, allow_pickle=False)[:most])
    if tokens.shape[1:] != shape or not tokens.isfinite().all():
        raise UserError(f"{path} holds tokens {tuple(tokens.shape)}, or NaN", "need this model's, "
                        f"N of {tuple(shape)}", "copy them there")
    return tokens


class SampleFolder:
    """A new folder for the images of these requests (see sample.Request), in their order.

    settings: {name: value} of the columns that are the same for all images.
    Raises UserError if the folder holds samples, or cannot be made.
    """

    def __init__(self, folder, requests, settings):
        self.folder = folder
        self.requests = requests
        self.settings = settings
        if (folder / "samples.csv").exists():
            raise UserError(f"{folder} already holds samples", "need a new folder",
                            "pass another --out")
        make_folder(folder / "images")
        self.label_names = sorted({name for request in requests for name in request.labels})

        # Numbers of the requests that the grid shows: {line: [numbers]}.
        self.lines = {}
        for number, request in enumerate(requests):
            shown = self.lines.setdefault(request.line, [])
            if request.line < GRID_LINES and len(shown) < GRID_COLUMNS:
                shown.append(number)
        self.images = {number: None for shown in self.lines.values() for number in shown}

    def file(self, number):
        return f"images/{self.requests[number].strategy}_{number:05d}.png"

    def add(self, numbers, images, round_numbers):
        """Write this rank's images (B, 3, H, W) of these numbers, and rows for those of all ranks.

        Every rank calls it once a round. numbers may be empty; round_numbers: those of all ranks.
        """
        save_pngs([self.folder / self.file(number) for number in numbers], images)
        shown = {number: image for number, image in zip(numbers, images) if number in self.images}
        for made in all_ranks(shown):  # they meet here: all files of the round are whole
            self.images.update(made)
        if not rank():
            rows = [self.row(number) for number in round_numbers]
            append_csv(self.folder / "samples.csv", rows if 0 not in round_numbers
                       else [self.head(), *rows])

    def head(self):
        """Names of the columns; those of labels are `label` or begin with `label_`."""
        labels = [name if name == "label" else f"label_{name}" for name in self.label_names]
        return ["file", "strategy", "sources", "weights", "prompt", "seed", *self.settings,
                "label_rule", *labels]

    def row(self, number):
        """Where an image comes from."""
        request = self.requests[number]
        weights = ""
        if len(request.sources) == 1:
            weights = "1"
        elif len(request.sources) == 2:
            weights = f"{1 - request.weight:.3f}|{request.weight:.3f}"
        labels = [request.labels.get(name, "") for name in self.label_names]
        return [self.file(number), request.strategy, "|".join(map(str, request.sources)), weights,
                request.prompt, request.seed, *self.settings.values(), request.label_rule, *labels]

    def write_grid(self, read_sources, with_prompts):
        """The first lines as one picture, each behind its source; a second source ends its line.

        read_sources: request -> list of at most two images (3, H, W).
        with_prompts: whether the words of its prompt stand before a line.
        """
        rows = []
        captions = []
        for numbers in list(self.lines.values())[:GRID_LINES]:
            first = self.requests[numbers[0]]
            sources = read_sources(first)
            samples = [self.images[number] for number in numbers]
            rows.append(torch.stack([*sources[:1], *samples, *sources[1:]]))
            captions.append(first.prompt.rpartition(" image of ")[2])  # what differs
        save_grid(self.folder / "grid.png", rows, captions if with_prompts else None)
        if len(self.lines) > GRID_LINES:
            print(f"grid.png shows the first {GRID_LINES} of {len(self.lines)} sources or prompts")
