"""Image files that the tests of data make."""
import numpy as np
from PIL import Image

from support.datasets import open_dataset
from support.pictures import save_png


def write(path, array, **options):
    """Save an array as an image file, folders made on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def folder_of(tmp_path, names, side=8):
    """A folder of grey images, each of one value that tells its place in the list."""
    for i, name in enumerate(names):
        write(tmp_path / name, np.full((side, side), 10 * i % 256, np.uint8))
    return tmp_path


def write_phantoms(folder, name="phantoms", count=12, size=32):
    """00.png, 01.png, ... of phantoms; returns their ImageSet."""
    images = open_dataset(name, size, count=count)
    for i in range(count):
        save_png(folder / f"{i:02d}.png", images[i])
    return images
