"""Known damage to real images, to read a distance by: JPEG, blur, and a model's reconstructions."""
import io

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from evaluate import frechet_distance
from experiments.radiomics import frd
from experiments.small_cnn import from_bytes, to_bytes
from support.pictures import to_picture


def blur(images):
    """Means over 3 x 3 pixels of images (B, 3, H, W); the border is repeated."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def damages(model=None):
    """{name: function of images (B, 3, H, W) in [-1, 1] and B seeds}; a DinoDiffusion adds two."""
    def compress(images, seeds):
        stored = []
        for image in images:
            file = io.BytesIO()
            to_picture(image).save(file, format="JPEG", quality=90)
            stored.append(pil_to_tensor(Image.open(file)) / 127.5 - 1)
        return torch.stack(stored)

    def decode(images, seeds):
        return model.decode(model.encode(images))

    def refine(images, seeds):
        return model.refine(decode(images, seeds), seeds)

    by_name = {"JPEG 90": compress, "blur 3 x 3": lambda images, seeds: blur(images)}
    if model is not None:
        by_name["decoder alone"] = decode
        by_name["decoder and refiner"] = refine
    return by_name


@torch.no_grad()
def ladder(by_name, part, features, judge, device, batch):
    """{rung: {"frechet", "floors", "FRD"}} of real, damaged and synthetic images at equal counts.

    by_name: of `damages`; part: (ImageSet, indices) of the other real images, which are damaged;
    an image's index is its seed. features: of real, other real and synthetic images. FRD means
    something for radiomic features only.
    """
    count = min(map(len, features))
    half, other, fake = (x[:count] for x in features)
    images, indices = part
    rungs = {"real": other}
    for name, damage in by_name.items():
        measured = []
        for rows in indices[:count].split(batch):
            x = damage(images.batch(rows.tolist()).to(device), rows.tolist())
            x = from_bytes(to_bytes(x)).to(device)  # 256 levels, as the other images have
            measured.append(judge(x).flatten(1).cpu())
        rungs[name] = torch.cat(measured)
    rungs["synthetic"] = fake

    floor = frechet_distance(half, other)
    table = {}
    for name, x in rungs.items():
        distance = frechet_distance(half, x)
        table[name] = {"frechet": distance, "floors": distance / floor, "FRD": frd(half, x)}
    return table
