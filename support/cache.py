"""What is computed once for every training image, in memory-mapped files, and how it is read.

    build_cache(folder, arrays, dataset, encode, made_by, run)     # in a stream, resumable
    for mean, std, tokens in loader(Latents(folder), [[0, 1], [2, 3]]): ...

A data set for `loader` has __len__ and __getitems__(rows) -> a tuple of tensors, one row each.
"""
import hashlib
import json
import math
import os
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from support.command import StatusLine, user_errors
from support.files import make_folder, write_text_atomic
from support.ranks import all_ranks, rank, ranks
from support.run import Stopped


def leave_signals_to_the_run(worker):
    """Ctrl-C in a terminal, and a cluster's SIGTERM, reach the loader's processes as well."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loader(dataset, plan, workers=0, device=torch.device("cpu")):
    """One ready batch (a tuple of tensors) for each list of rows in `plan`.

    With `workers`, so many processes read ahead. For a GPU the batches lie in pinned memory, from
    where they are copied without waiting.
    Raises MemoryError if a process that reads was killed: most often memory was full.
    """
    batches = iter(DataLoader(dataset, batch_sampler=plan, num_workers=workers, collate_fn=tuple,
                              pin_memory=device.type == "cuda",
                              worker_init_fn=leave_signals_to_the_run))
    if workers:  # torch's handler would raise in the middle of whatever runs when one is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            rows = next(batches)
        except StopIteration:
            return
        except (EOFError, ConnectionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "worker (pid" not in str(error):
                raise
            raise MemoryError("a process that reads images was killed") from error
        yield rows


def are_files(images):
    """Whether an ImageSet's pixels are in files, to be decoded; those of arrays are at hand."""
    return isinstance(images.sources, list) and len(images.sources) > 0


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
        with user_errors(f"{folder} must be whole", "delete it, and pass --resume"):
            self.arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                           for name in names]

    def __len__(self):
        return len(self.arrays[0])

    def __getitems__(self, rows):
        rows = np.asarray(rows)
        return tuple(torch.from_numpy(array[rows].astype(np.float32)) for array in self.arrays)


class Latents(Arrays):
    """The cache of latents and tokens, by row: (mean, std, condition).

    The condition is the image's raw tokens (G, D), or its row of `conditions` where these are
    given. `order`: which image each row is, where they are not to come equally often.
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
    """A short hash: a cache made by other weights or for other images must not be used."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def claim_disk(path):
    """Give a sparse file its blocks: a full disk is an error now, not the end by SIGBUS later."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def row_bytes(arrays):
    """Bytes of a row of a cache; arrays: name -> (shape, dtype)."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())


def rows_cached(folder, arrays, made_by):
    """How many rows of a cache an earlier run has made, by the same weights for the same images."""
    progress = folder / "progress.json"
    if not progress.exists() or not all((folder / f"{name}.npy").exists() for name in arrays):
        return 0
    seen = json.loads(progress.read_text())
    return seen["rows"] if seen["made_by"] == made_by else 0


def open_arrays(folder, arrays, rows, made_by):
    """(files of the cache, opened to write; rows that they hold already), the same on all ranks."""
    with user_errors(f"{folder} must be whole, on a disk with space for {rows:,} rows",
                     "make space or delete it, and pass --resume"):
        done = all_ranks(rows_cached(folder, arrays, made_by))[0]
        if not rank():
            make_folder(folder)
            for name, (shape, dtype) in arrays.items():
                path = folder / f"{name}.npy"
                if not done:
                    np.lib.format.open_memmap(path, "w+", dtype, (rows, *shape))
                claim_disk(path)
        all_ranks()
        files = {name: np.load(folder / f"{name}.npy", "r+", allow_pickle=False)
                 for name in arrays}
    return files, done


def build_cache(folder, arrays, dataset, encode, made_by, run, batch=64, workers=0,
                device=torch.device("cpu")):
    """Write what encode(batch of the data set) -> {name: (B, ...)} gives for every row.

    arrays: name -> (shape of a row, NumPy dtype), a file NAME.npy each. made_by: a text that
    changes with the weights and the images; rows made by the same are kept.
    Ranks take batches in turn and write into the same files: they need one shared folder.
    Raises Stopped after a signal: the rows made so far are kept.
    """
    n = len(dataset)
    files, done = open_arrays(folder, arrays, n, made_by)
    if done == n:
        return

    # As many batches for each rank; the last one may come twice.
    plan = [list(range(i, min(i + batch, n))) for i in range(done, n, batch)]
    plan += plan[-1:] * (-len(plan) % ranks())
    plan = plan[rank()::ranks()]

    status = StatusLine(n, " and ".join(arrays), done)
    for k, (x,) in enumerate(loader(dataset, plan, workers, device)):
        for name, values in encode(x.to(device, non_blocking=True)).items():
            files[name][plan[k]] = values.cpu().numpy()

        # Every now and then, what all ranks have made is marked as done.
        stop = max(all_ranks(run.stop_signal))
        through = min(n, done + (k + 1) * ranks() * batch)
        if k % 50 == 49 or through == n or stop:
            for file in files.values():
                file.flush()
            all_ranks()
            if not rank():
                write_text_atomic(folder / "progress.json",
                                  json.dumps({"rows": through, "made_by": made_by}))
            if stop:
                raise Stopped(stop)
        status.update(through, images=len(plan[k]) * ranks())
    status.close()


def picture_arrays(size):
    """What `decode_once` keeps of an image: name -> (shape, dtype)."""
    return {"pictures": ((3, size, size), np.float16)}


def decode_once(pictures, run, workers=0):
    """Pictures that need no decoding any more: those of files are kept, at their size, in
    cache/pictures/ of the run; others are at hand already."""
    images = pictures.images
    if not are_files(images):
        return pictures
    folder = run.folder / "cache" / "pictures"
    made_by = f"{images.size} {images.depth} {fingerprint([pictures.indices])}"
    build_cache(folder, picture_arrays(images.size), pictures, lambda x: {"pictures": x.half()},
                made_by, run, workers=workers)
    return Arrays(folder, ["pictures"])
