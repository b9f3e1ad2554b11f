"""masks.py: masks by every name, left and right joined."""
import numpy as np
import pytest

from pictures_on_disk import folder_of, write
from support.datasets import open_dataset


@pytest.mark.parametrize("names, count", [
    (["masks/{}_mask.png"], 3), (["masks/{}.gif"], 3), (["mask/{}.png"], 3),
    (["masks/{}_lung.gif"], 3), (["ManualMask/leftMask/{}.png", "ManualMask/rightMask/{}.png"], 3),
    (["leftMask/{}.png", "rightMask/{}.png"], 3), (["masks/{}_left.png", "masks/{}_right.png"], 3),
    (["masks/left lung/{}.gif", "masks/right lung/{}.gif", "masks/heart/{}.gif"], 3),
    (["images/{}_mask.png"], 3), (["masks/one/{}.png", "masks/two/{}.png"], 0)])
def test_masks_by_every_name(tmp_path, names, count):
    """NAME_mask, NAME, NAME_lung; left and right are joined; others are not guessed."""
    folder_of(tmp_path, [f"images/CHN_{i}_0.png" for i in range(3)])
    for k, name in enumerate(names):
        half = np.zeros((8, 8), np.uint8)
        half[:, 4 * k:4 * k + 4] = 255
        for i in range(3):
            write(tmp_path / name.format(f"CHN_{i}_0"), half)
    images = open_dataset(tmp_path, 8)
    assert len(images) == 3 and list(images.masks) == ["masks"]
    masks = [images.mask(i) for i in range(3)]
    assert sum(mask is not None for mask in masks) == count
    if count:
        assert masks[1].float().mean() == (1 if len(names) > 1 else 0.5)
    else:
        assert any("masks/" in line for line in images.problems)
