"""What is computed once for every image: memory-mapped files of a run, and vectors in a file.

    build_cache(folder, arrays, dataset, encode, made_by, run)
    for mean, std, tokens in loader(Latents(folder), [[0, 1], [2, 3]]): ...

    np.savez("vectors.npz", files=names, tokens=vectors)    # (N,) of str, (N, G, D) or (N, D)
    table = read_vectors("vectors.npz")                     # {name of an image: (G, D) float32}

A dataset has __len__ and __getitems__(rows) -> a tuple of tensors with one row each. In a file of
vectors, `files` are names as in the data set, e.g. "patient1/a.png" below the folder.
"""
import hashlib
import math
import os
import shutil
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from support.command import StatusLine, Stopped, UserError, user_errors
from support.files import write_text_atomic
from support.ranks import all_ranks, rank, ranks, rows_of_rank


class Pictures(Dataset):
    """Some images of an ImageSet, by row: a tuple of one tensor (B, 3, H, W) in [-1, 1]."""

    def __init__(self, images, indices):
        self.images = images
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitems__(self, rows):
        return (self.images.batch(self.indices[rows]),)


class Arrays(Dataset):
    """Memory-mapped arrays of a cache, by row: a tuple of one float32 tensor for each name."""

    def __init__(self, folder, names):
        with user_errors(f"{folder} is damaged", "delete it, and pass --resume"):
            self.arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                           for name in names]

    def __len__(self):
        return len(self.arrays[0])

    def __getitems__(self, rows):
        rows = np.asarray(rows)
        return tuple(torch.from_numpy(array[rows].astype(np.float32)) for array in self.arrays)


class Latents(Arrays):
    """The cache of latents and tokens, by row: (mean, std, condition).

    conditions: one for each image, in place of its raw tokens (G, D).
    order: the image of each row, if images do not come equally often.
    """

    def __init__(self, folder, conditions=None, order=None):
        super().__init__(folder, ("latents", "tokens"))
        self.latents, self.tokens = self.arrays
        self.conditions = conditions
        self.order = torch.arange(len(self.tokens)) if order is None else order

    def __len__(self):
        return len(self.order)

    def __getitems__(self, rows):
        images = self.order[rows]
        latents, tokens = super().__getitems__(images)
        condition = tokens if self.conditions is None else self.conditions[images]
        return latents[:, 0], latents[:, 1], condition


def fingerprint(tensors):
    """A short hash of weights or indices, to tell whether a cache is still valid."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _ignore_ctrl_c(worker):
    """A terminal sends Ctrl-C to the loader's processes as well; the run decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(dataset, plan, device=torch.device("cpu"), workers=None):
    """One batch, a tuple of tensors, for each list of rows in `plan`.

    workers: processes that read ahead; by default up to eight to decode files for a GPU.
    """
    if workers is None:
        decodes = isinstance(dataset, Pictures) and isinstance(dataset.images.sources, list)
        workers = min(8, os.cpu_count()) if decodes and device.type == "cuda" else 0
    return DataLoader(dataset, batch_sampler=plan, num_workers=workers, collate_fn=tuple,
                      pin_memory=device.type == "cuda", worker_init_fn=_ignore_ctrl_c)


def build_cache(folder, arrays, dataset, encode, made_by, run, batch=64,
                device=torch.device("cpu")):
    """Write encode(batch of the dataset, its rows) -> {name: (B, ...)} for every row.

    arrays: name -> (shape of a row, NumPy dtype), one file NAME.npy each.
    made_by: identifies the weights and images; a complete cache with the same text is kept.
    Ranks take batches in turn and write into the same files of a shared folder.
    Raises Stopped after a signal: an incomplete cache is built again.
    """
    n = len(dataset)
    complete = folder / "made_by.txt"
    if all_ranks(complete.exists() and complete.read_text() == made_by)[0]:
        return
    if not rank():
        folder.mkdir(parents=True, exist_ok=True)
        complete.unlink(missing_ok=True)
        need = sum(n * math.prod(shape) * np.dtype(dtype).itemsize
                   for shape, dtype in arrays.values())
        if need > shutil.disk_usage(folder).free:  # a memory-mapped file would crash half-way
            raise UserError(f"{folder} has too little free space", f"{need / 1e9:.1f} GB are "
                            "needed", "make space, or pass another --out")
        for name, (shape, dtype) in arrays.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (n, *shape))
    all_ranks()
    files = {name: np.load(folder / f"{name}.npy", "r+", allow_pickle=False) for name in arrays}

    # Every rank gets the same number of batches; the last one may be done twice.
    plan = [list(range(i, min(i + batch, n))) for i in range(0, n, batch)]
    plan += plan[-1:] * (-len(plan) % ranks())
    plan = rows_of_rank(plan)
    status = StatusLine(n, " and ".join(arrays))
    for k, (x,) in enumerate(loader(dataset, plan, device), 1):
        rows = plan[k - 1]
        for name, values in encode(x.to(device, non_blocking=True), rows).items():
            files[name][rows] = values.cpu().numpy()
        if stop := max(all_ranks(run.stop_signal)):
            raise Stopped(stop)
        status.update(min(n, k * ranks() * batch), images=len(x) * ranks())
    status.close()

    for file in files.values():
        file.flush()
    all_ranks()
    if not rank():
        write_text_atomic(complete, made_by)


def decode_once(pictures, run):
    """The same pictures without decoding: those of files are kept in the run's cache/pictures/."""
    images = pictures.images
    if not isinstance(images.sources, list):  # phantoms and .npz need no decoding
        return pictures
    folder = run.folder / "cache" / "pictures"
    arrays = {"pictures": ((3, images.size, images.size), np.float16)}
    made_by = f"{images.size} {images.depth} {fingerprint([pictures.indices])}"
    build_cache(folder, arrays, pictures, lambda x, rows: {"pictures": x.half()},
                made_by, run)
    return Arrays(folder, ["pictures"])


def read_vectors(path):
    """{name: (G, D) float32} in the file's order; UserError for a file of another layout."""
    need = "a .npz with files (N names) and tokens (N, G, D), finite numbers, is needed"
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [str(name) for name in archive["files"]]
            tokens = torch.from_numpy(np.float32(archive["tokens"]))
    except Exception as error:  # a malformed file can raise anything
        raise UserError(f"{path} cannot be read ({str(error)[:120]})", need,
                        "write it with numpy.savez(path, files=names, tokens=vectors)") from error

    if tokens.ndim == 2:
        tokens = tokens[:, None]  # (N, D) -> (N, 1, D)
    if tokens.ndim != 3 or not names or len(tokens) != len(names) or not tokens.isfinite().all():
        raise UserError(f"{path} has tokens of shape {tuple(tokens.shape)} for {len(names)} names, "
                        "or not finite", need, "write one vector for each name")
    if len(set(names)) < len(names):
        raise UserError(f"{path} names an image twice", need, "keep one row for each image")
    return dict(zip(names, tokens))
