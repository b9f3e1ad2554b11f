"""Memory-mapped caches: written once, in a stream, by whoever; and the loader."""
import json
import signal

import numpy as np
import pytest
import torch

from support.cache import Arrays, Latents, Pictures, are_files, build_cache, fingerprint, loader
from support.cache import row_bytes
from support.command import UserError
from support.datasets import open_dataset
from support.run import Run, Stopped

ARRAYS = {"half": ((3,), np.float16), "sums": ((), np.float32)}


class Numbers:
    """Row i is three numbers i; counts how often each is read."""

    def __init__(self, n):
        self.n = n
        self.read = []

    def __len__(self):
        return self.n

    def __getitems__(self, rows):
        self.read += rows
        return (torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, 3),)


def encode(x):
    return {"half": x / 2, "sums": x.sum(1)}


def test_a_cache_holds_every_row_once(tmp_path):
    """Rows are read once, in order; a second call reads none; other weights make all anew."""
    numbers = Numbers(23)
    build_cache(tmp_path, ARRAYS, numbers, encode, "a", Run(), batch=5)
    half, sums = Arrays(tmp_path, ARRAYS).__getitems__([4, 22])
    assert half.tolist() == [[2, 2, 2], [11, 11, 11]] and sums.tolist() == [12, 66]
    assert half.dtype == torch.float32 and len(Arrays(tmp_path, ["sums"])) == 23
    assert numbers.read == list(range(23))
    build_cache(tmp_path, ARRAYS, numbers, encode, "a", Run(), batch=5)
    assert len(numbers.read) == 23
    build_cache(tmp_path, ARRAYS, numbers, encode, "b", Run(), batch=5)
    assert len(numbers.read) == 46
    size = sum((tmp_path / f"{name}.npy").stat().st_size - 128 for name in ARRAYS)
    assert size == 23 * row_bytes(ARRAYS)


def test_a_stopped_cache_goes_on(tmp_path):
    """A signal in the second batch: two batches are kept, the rest follows."""
    run, numbers = Run(), Numbers(23)

    def encode_and_stop(x):
        run.stop_signal = signal.SIGINT if len(numbers.read) > 5 else 0
        return encode(x)
    with pytest.raises(Stopped):
        build_cache(tmp_path, ARRAYS, numbers, encode_and_stop, "a", run, batch=5)
    assert json.loads((tmp_path / "progress.json").read_text())["rows"] == 10
    build_cache(tmp_path, ARRAYS, numbers, encode, "a", Run(), batch=5)
    assert numbers.read == list(range(23))
    assert Arrays(tmp_path, ["sums"]).__getitems__(list(range(23)))[0].tolist() == [
        3 * i for i in range(23)]


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_cache_is_named(tmp_path, damage):
    """A file that is cut or no array: one line with what to do."""
    build_cache(tmp_path, ARRAYS, Numbers(9), encode, "a", Run())
    path = tmp_path / "half.npy"
    path.write_bytes(path.read_bytes()[:60] if damage == "cut" else b"hello")
    with pytest.raises(UserError, match="must be whole.*delete it"):
        Arrays(tmp_path, ARRAYS)
    with pytest.raises(UserError, match="must be whole.*delete it"):
        build_cache(tmp_path, ARRAYS, Numbers(9), encode, "a", Run())


def test_latents_give_mean_std_and_condition(tmp_path):
    """Tokens, or given conditions in their place; rows may be images in another order."""
    arrays = {"latents": ((2, 1, 1, 1), np.float16), "tokens": ((1, 3), np.float32)}

    def both(x):
        return {"latents": torch.stack([x[:, :1], -x[:, :1]], 1)[..., None, None],
                "tokens": x[:, None]}
    build_cache(tmp_path, arrays, Numbers(6), both, "a", Run())
    mean, std, tokens = Latents(tmp_path).__getitems__([5, 1])
    assert mean.flatten().tolist() == [5, 1] and std.flatten().tolist() == [-5, -1]
    assert tokens[:, 0, 0].tolist() == [5, 1]
    ids = torch.arange(12).view(6, 2)
    latents = Latents(tmp_path, ids, torch.tensor([3, 3, 0]))
    assert len(latents) == 3
    mean, _, condition = latents.__getitems__([1])
    assert mean.flatten().tolist() == [3] and condition.tolist() == [[6, 7]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_follows_its_plan(workers):
    """The batches of the plan, in its order, whoever reads them."""
    plan = [[3, 1], [2], [0, 4, 5]]
    batches = list(loader(Numbers(6), plan, workers))
    assert [x[:, 0].tolist() for (x,) in batches] == plan


def test_a_fault_of_ours_in_a_data_set_is_not_hidden():
    """Only a process that was killed counts as full memory."""
    class Broken(Numbers):
        def __getitems__(self, rows):
            raise RuntimeError("shape")
    with pytest.raises(RuntimeError, match="shape"):
        next(loader(Broken(3), [[0]]))


def test_pictures_are_images_of_a_set():
    """Rows of the chosen numbers; phantoms are at hand, files would be decoded."""
    images = open_dataset("phantoms", 16, count=5)
    pictures = Pictures(images, torch.tensor([4, 2]))
    (x,) = pictures.__getitems__([1, 0])
    assert torch.equal(x, images.batch([2, 4])) and len(pictures) == 2
    assert not are_files(images)


def test_fingerprints_tell_values_apart():
    """The same for equal tensors in any layout, another for other values."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert fingerprint([x]) == fingerprint([x.to(memory_format=torch.channels_last)])
    assert fingerprint([x]) != fingerprint([x + 1])
