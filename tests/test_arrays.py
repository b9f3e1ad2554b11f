"""arrays.py: .npz files read by rows, stored and packed."""
import pickle
import tracemalloc

import numpy as np
import pytest

from support.command import UserError
from support.datasets import open_dataset


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_large_npz_is_read_by_rows(tmp_path, save):
    """Opening one takes a fraction of its pixels, rows come in any order, and workers get none."""
    random = np.random.default_rng(0)
    arrays = {split: random.integers(0, 255, (n, 64, 64)).astype(np.uint8)
              for split, n in (("train", 1500), ("val", 200), ("test", 400))}
    save(tmp_path / "x.npz", **{f"{split}_images": array for split, array in arrays.items()},
         **{f"{split}_labels": np.zeros((len(array), 1)) for split, array in arrays.items()})
    tracemalloc.start()
    images = open_dataset(tmp_path / "x.npz", 64)
    joined = np.concatenate(list(arrays.values()))
    base = joined.nbytes
    order = random.permutation(len(images))[:300].tolist() + list(range(1490, 1520))
    got = [images.sources[i] for i in order]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(np.array_equal(row, joined[i]) for row, i in zip(got, order))
    assert peak < base + 3e6 + 300 * 4096  # what the test itself holds, and a little
    assert len(images.sources) == len(images) == 2100
    assert len(pickle.dumps(images.sources)) < 5000
    assert np.array_equal(pickle.loads(pickle.dumps(images.sources))[1501], joined[1501])


def test_a_damaged_npz_is_found_when_all_is_read(tmp_path):
    """One flipped bit of the pixels, which opening alone does not see."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 128, 128)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", train_images=pixels, train_labels=np.zeros((4, 1)))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[40_000] ^= 4
    (tmp_path / "x.npz").write_bytes(content)
    open_dataset(tmp_path / "x.npz", 28)
    with pytest.raises(UserError, match="x.npz"):
        open_dataset(tmp_path / "x.npz", 28, whole=True)
