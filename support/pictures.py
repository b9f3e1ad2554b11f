"""Pictures out: PNGs, grids of images, line charts."""
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from support.files import atomic_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's


def _to_picture(image):
    x = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy())  # (C, H, W) -> (H, W[, 3])


def save_png(path, image):
    """Write (3, H, W) as RGB or (1, H, W) as grey, in [-1, 1], or a Pillow image, as a PNG."""
    picture = image if isinstance(image, Image.Image) else _to_picture(image)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def save_grid(path, rows, captions=None):
    """Write rows of images, each (N, 3 or 1, H, W) in [-1, 1], as one PNG, captions at the left."""
    height, width = rows[0].shape[-2:]
    scale = -(-128 // height)  # small images are repeated to whole multiples, for people to see
    gap, font = 2, ImageFont.load_default(size=14)
    left = max(math.ceil(font.getlength(text)) for text in captions) + 12 if captions else gap
    down, across = height * scale + gap, width * scale + gap
    sides = left + max(map(len, rows)) * across, gap + len(rows) * down
    canvas = Image.new("RGB", sides, "white")
    for y, row in enumerate(rows):
        if captions:
            ImageDraw.Draw(canvas).text((6, (y + 0.5) * down), captions[y], "black", font, "lm")
        for x, image in enumerate(row):
            large = _to_picture(image).resize((width * scale, height * scale), Image.NEAREST)
            canvas.paste(large, (left + x * across, gap + y * down))
    save_png(path, canvas)


def line_chart(path, series, title, xlabel, ylabel, log_y=False):
    """Write a PNG line chart of at most five name -> (xs, ys), from x = 0."""
    lines = {name: [(x, math.log10(max(y, 1e-9)) if log_y else y) for x, y in zip(*xy)]
             for name, xy in series.items()}
    xs, ys = zip(*(sum(lines.values(), []) or [(0, 0)]))
    margin = 0.05 * (max(ys) - min(ys)) or 0.5
    x1, y0, y1 = max(1, *xs), min(ys) - margin, max(ys) + margin
    picture = Image.new("RGB", (1800, 1080), "white")  # halved in the end, so lines are smooth
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=28)

    def place(x, y):
        return 160 + 1580 * x / x1, 960 - 780 * (y - y0) / (y1 - y0)

    for k in range(6):  # grid lines with their values
        x, y = x1 * k / 5, y0 + (y1 - y0) * k / 5
        draw.line([place(x, y0), place(x, y1)], "#dddddd", 2)
        draw.line([place(0, y), place(x1, y)], "#dddddd", 2)
        draw.text((place(x, y)[0], 974), f"{x:g}", "black", font, "ma")
        draw.text((146, place(x, y)[1]), f"{10 ** y if log_y else y:.3g}", "black", font, "rm")
    draw.text((900, 20), title, "black", font, "ma")
    draw.text((160, 166), ylabel, "black", font, "lb")
    draw.text((1740, 1060), xlabel, "black", font, "rd")
    key = 160  # the names, each in the colour of its line
    for colour, (name, points) in zip(COLOURS, lines.items()):
        draw.text((key, 100), name, colour, font, "lm")
        key += font.getlength(name) + 50
        if len(points) > 1:
            draw.line([place(*point) for point in points], colour, 4, "curve")
    save_png(path, picture.reduce(2))
