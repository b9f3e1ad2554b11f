"""Make assets/cxr128.png and samples.gif, the README's pictures, with the bundled model.

    python tools/make_pictures.py XRAYS

XRAYS: a folder with the X-rays that weights/cxr128_files.csv lists. Five held-out ones are drawn by
seed 0: two of NIH, two of Shenzhen, one of Montgomery; for the GIF, five of Shenzhen and three of
Montgomery.
"""
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dinodiff import DinoDiffusion
from support.files import load_checkpoint, read_csv, resolve_checkpoint
from support.images import load_image
from support.pictures import draw_grid, save_gif, save_grid

COLUMNS = ("source", "decoder alone", "refined", "sample", "sample", "sample")
HEADER = 24  # pixels


def draw_sources(folder, **counts):
    """Held-out X-rays (N, 3, 128, 128), this many of each source, drawn by seed 0."""
    listed = [row["file"] for row in read_csv(ROOT / "weights" / "cxr128_files.csv")
              if row["split"] == "test"]
    rng = random.Random(0)
    files = []
    for source, count in counts.items():
        files += rng.sample([file for file in listed if file.startswith(source)], count)
    print("\n".join(files))
    paths = {path.name: path for path in Path(folder).rglob("*") if path.name in files}
    return torch.stack([load_image(paths[file], 128) for file in files])


def animate(model, sources, steps=18):
    """samples.gif: a sample of each source appears out of noise, from seeds 0 on."""
    x0s = []
    seeds = list(range(len(sources)))
    samples = model.sample(model.embed(sources), seeds, steps, watch=x0s.append)
    pictures = [draw_grid([sources, images], captions=["source", "sample"])
                for images in (*map(model.decode, x0s), samples)]
    save_gif(ROOT / "assets" / "samples.gif", pictures)


def main(folder):
    model = DinoDiffusion.from_checkpoint(load_checkpoint(resolve_checkpoint("box")))
    animate(model, draw_sources(folder, shenzhen=5, montgomery=3))
    sources = draw_sources(folder, nih=2, shenzhen=2, montgomery=1)
    decoded = model.decode(model.encode(sources))
    samples = model.sample(model.embed(sources).repeat_interleave(3, 0), seeds=list(range(15)))
    rows = [torch.stack([source, soft, sharp, *others]) for source, soft, sharp, others in zip(
        sources, decoded, model.refine(decoded, seeds=range(5)), samples.split(3))]
    out = ROOT / "assets" / "cxr128.png"
    save_grid(out, rows)

    # A name above each column.
    with Image.open(out) as grid:
        canvas = Image.new("L", (grid.width, grid.height + HEADER), "white")
        canvas.paste(grid.convert("L"), (0, HEADER))
    for i, name in enumerate(COLUMNS):
        place = ((i + 0.5) * canvas.width / len(COLUMNS), HEADER / 2)
        ImageDraw.Draw(canvas).text(place, name, "black", ImageFont.load_default(size=15), "mm")
    canvas.save(out, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
