"""Memory-mapped caches, written once; and the loader."""
import signal

import numpy as np
import pytest
import torch

from support import cache
from support.cache import Arrays, build_cache, fingerprint, loader
from support.command import Stopped, UserError
from support.run import Run

ARRAYS = {"half": ((3,), np.float16), "sums": ((), np.float32)}


class Numbers:
    """Row i is three numbers i; remembers which rows were read."""

    def __init__(self, n):
        self.n = n
        self.read = []

    def __len__(self):
        return self.n

    def __getitems__(self, rows):
        self.read += rows
        return (torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, 3),)


def encode(x, rows):
    return {"half": x / 2, "sums": x.sum(1)}


def test_a_cache_holds_every_row_once(tmp_path):
    """Rows are read once, in order; a second call reads none; other weights build it again."""
    numbers = Numbers(23)
    for made_by, reads in (("a", 23), ("a", 23), ("b", 46)):
        build_cache(tmp_path, ARRAYS, numbers, encode, made_by, Run(), batch=5)
        assert numbers.read == list(range(23)) * (reads // 23)
    half, sums = Arrays(tmp_path, ARRAYS).__getitems__([4, 22])
    assert half.tolist() == [[2, 2, 2], [11, 11, 11]] and sums.tolist() == [12, 66]
    assert half.dtype == torch.float32 and len(Arrays(tmp_path, ["sums"])) == 23


def test_a_stopped_cache_is_not_taken_for_a_whole_one(tmp_path):
    """A signal in the second batch stops it there; the next run builds all rows, also where an
    older cache was complete."""
    build_cache(tmp_path, ARRAYS, Numbers(23), encode, "old", Run(), batch=5)
    run, numbers = Run(), Numbers(23)

    def encode_and_stop(x, rows):
        run.stop_signal = signal.SIGINT if len(numbers.read) > 5 else 0
        return encode(x, rows)
    with pytest.raises(Stopped):
        build_cache(tmp_path, ARRAYS, numbers, encode_and_stop, "a", run, batch=5)
    assert numbers.read == list(range(10))
    again = Numbers(23)
    build_cache(tmp_path, ARRAYS, again, encode, "old", Run(), batch=5)
    assert again.read == list(range(23))


def test_a_damaged_cache_and_a_full_disk_are_named(tmp_path, monkeypatch):
    """A file that is cut, and too little space: one line each with what to do."""
    build_cache(tmp_path, ARRAYS, Numbers(9), encode, "a", Run())
    path = tmp_path / "half.npy"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="is damaged.*delete it"):
        Arrays(tmp_path, ARRAYS)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 89}))
    with pytest.raises(UserError, match="too little free space.*are needed"):
        build_cache(tmp_path, ARRAYS, Numbers(9), encode, "b", Run())  # 9 x (6 + 4) bytes


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_follows_its_plan(workers):
    """The batches of the plan, in its order, also from another process."""
    plan = [[3, 1], [2], [0, 4, 5]]
    batches = loader(Numbers(6), plan, workers=workers)
    assert [x[:, 0].tolist() for (x,) in batches] == plan


def test_fingerprints_depend_on_values_alone():
    """The same for equal tensors in any layout, another for other values."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert fingerprint([x]) == fingerprint([x.to(memory_format=torch.channels_last)])
    assert fingerprint([x]) != fingerprint([x + 1])
