"""PNGs, grids of images, line charts."""
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from support.files import atomic_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito


def to_picture(image):
    """(3, H, W) or (1, H, W) in [-1, 1] -> Pillow image, RGB or grey."""
    x = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy())  # (C, H, W) -> (H, W[, 3])


def save_png(path, image, sync=True):
    """Write (3, H, W) or (1, H, W) in [-1, 1], or a Pillow image, as a PNG; sync: to the disk."""
    picture = image if isinstance(image, Image.Image) else to_picture(image)
    with atomic_file(path, sync) as file:
        picture.save(file, format="PNG")


def draw_grid(rows, captions=None):
    """Rows of images, each (N, 3 or 1, H, W) in [-1, 1], as one Pillow image, captions at the
    left."""
    height, width = rows[0].shape[-2:]
    scale = -(-128 // height)  # small images are enlarged by a whole factor
    columns = max(map(len, rows))
    cells = []
    for row in rows:
        row = row.detach().float().cpu().expand(-1, 3, -1, -1).clamp(-1, 1)
        blank = torch.ones(columns - len(row), 3, height, width)
        cells += [*row, *blank]
    large = F.interpolate(torch.stack(cells), scale_factor=scale)
    grid = to_picture(make_grid(large, columns, padding=2, pad_value=1))

    # Each caption in a margin, in the middle of its row.
    font = ImageFont.load_default(size=14)
    left = max(math.ceil(font.getlength(text)) for text in captions) + 10 if captions else 0
    canvas = Image.new("RGB", (left + grid.width, grid.height), "white")
    canvas.paste(grid, (left, 0))
    for y, text in enumerate(captions or []):
        place = (6, (y + 0.5) * grid.height / len(rows))
        ImageDraw.Draw(canvas).text(place, text, "black", font, "lm")
    return canvas


def save_grid(path, rows, captions=None):
    """Write draw_grid's picture as a PNG."""
    save_png(path, draw_grid(rows, captions))


def save_gif(path, pictures):
    """Write Pillow images of one size as an endless GIF: about two seconds, and the last one held
    for another. If the last one is grey, all are, and exact; else each has its own 256 colours."""
    if pictures[-1].convert("L").convert("RGB") == pictures[-1]:
        pictures = [picture.convert("L") for picture in pictures]
    durations = [max(20, 2000 // len(pictures))] * (len(pictures) - 1) + [1000]  # milliseconds
    with atomic_file(path) as file:
        pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:],
                         duration=durations, loop=0)


def line_chart(path, series, title, xlabel, ylabel, log_y=False):
    """Write a PNG chart of at most five lines name -> (xs, ys), from x = 0."""
    # The lines, and their range.
    lines = {name: [(x, math.log10(max(y, 1e-9)) if log_y else y) for x, y in zip(xs, ys)]
             for name, (xs, ys) in series.items()}
    points = sum(lines.values(), []) or [(0, 0)]
    heights = [y for _, y in points]
    margin = 0.05 * (max(heights) - min(heights)) or 0.5
    bottom = min(heights) - margin
    top = max(heights) + margin
    right = max(1, *(x for x, _ in points))

    def place(x, y):
        return 160 + 1580 * x / right, 960 - 780 * (y - bottom) / (top - bottom)

    # Grid lines with their values.
    picture = Image.new("RGB", (1800, 1080), "white")  # halved at the end, for smooth lines
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=28)
    for k in range(6):
        x = right * k / 5
        y = bottom + (top - bottom) * k / 5
        draw.line([place(x, bottom), place(x, top)], "#dddddd", 2)
        draw.line([place(0, y), place(right, y)], "#dddddd", 2)
        draw.text((place(x, y)[0], 974), f"{x:g}", "black", font, "ma")
        draw.text((146, place(x, y)[1]), f"{10 ** y if log_y else y:.3g}", "black", font, "rm")
    draw.text((900, 20), title, "black", font, "ma")
    draw.text((160, 166), ylabel, "black", font, "lb")
    draw.text((1740, 1060), xlabel, "black", font, "rd")

    # The lines, and above them their names in the same colours.
    key = 160
    for colour, (name, points) in zip(COLOURS, lines.items()):
        draw.text((key, 100), name, colour, font, "lm")
        key += font.getlength(name) + 50
        if len(points) > 1:
            draw.line([place(*point) for point in points], colour, 4, "curve")
    save_png(path, picture.reduce(2))
