"""Pictures out: PNGs, grids of images, line charts."""
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image, ImageDraw, ImageFont

from support.files import atomic_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's


def to_picture(image):
    """(3, H, W) or (1, H, W) in [-1, 1] -> Pillow image, RGB or grey."""
    x = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy())  # (C, H, W) -> (H, W[, 3])


def save_png(path, image):
    """Write (3, H, W) as RGB or (1, H, W) as grey, in [-1, 1], or a Pillow image, as a PNG."""
    picture = image if isinstance(image, Image.Image) else to_picture(image)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def save_pngs(paths, images, threads=4):
    """Write images (N, 3 or 1, H, W) in [-1, 1] to N paths, fast: by a few threads, hardly
    compressed, and with the system in charge of when they reach the disk. Each is whole or not
    there, and all are there on return."""
    def save(path, image):
        with atomic_file(path, sync=False) as file:
            to_picture(image).save(file, format="PNG", compress_level=1)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(save, paths, images))  # the list waits, and raises what went wrong


def save_grid(path, rows, captions=None):
    """Write rows of images, each (N, 3 or 1, H, W) in [-1, 1], as one PNG, captions at the left."""
    height, width = rows[0].shape[-2:]
    scale = -(-128 // height)  # small images are repeated to whole multiples, for people to see
    gap = 2
    left = gap
    font = ImageFont.load_default(size=14)
    if captions:
        left = max(math.ceil(font.getlength(text)) for text in captions) + 12

    # A white canvas, a cell for each image.
    down = height * scale + gap
    across = width * scale + gap
    sides = left + max(map(len, rows)) * across, gap + len(rows) * down
    canvas = Image.new("RGB", sides, "white")
    for y, row in enumerate(rows):
        if captions:
            middle = (6, (y + 0.5) * down)
            ImageDraw.Draw(canvas).text(middle, captions[y], "black", font, "lm")
        for x, image in enumerate(row):
            large = to_picture(image).resize((width * scale, height * scale), Image.NEAREST)
            canvas.paste(large, (left + x * across, gap + y * down))
    save_png(path, canvas)


def line_chart(path, series, title, xlabel, ylabel, log_y=False):
    """Write a PNG line chart of at most five name -> (xs, ys), from x = 0: see draw_chart."""
    save_png(path, draw_chart(series, title, xlabel, ylabel, log_y))


def draw_chart(series, title, xlabel, ylabel, log_y=False, dots=False):
    """A chart of at most five name -> (xs, ys), as a Pillow image: lines from x = 0, or dots."""
    # What is drawn, and its range.
    shown = {}
    for name, (xs, ys) in series.items():
        if log_y:
            ys = [math.log10(max(y, 1e-9)) for y in ys]
        shown[name] = list(zip(xs, ys))
    points = sum(shown.values(), []) or [(0, 0)]
    across = [x for x, _ in points]
    heights = [y for _, y in points]
    margin = 0.05 * (max(heights) - min(heights)) or 0.5
    bottom = min(heights) - margin
    top = max(heights) + margin
    left = 0
    right = max(1, *across)
    if dots:
        margin = 0.05 * (max(across) - min(across)) or 0.5
        left = min(across) - margin
        right = max(across) + margin

    def place(x, y):
        return 160 + 1580 * (x - left) / (right - left), 960 - 780 * (y - bottom) / (top - bottom)

    # Grid lines with their values.
    picture = Image.new("RGB", (1800, 1080), "white")  # halved in the end, so lines are smooth
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=28)
    for k in range(6):
        x = left + (right - left) * k / 5
        y = bottom + (top - bottom) * k / 5
        draw.line([place(x, bottom), place(x, top)], "#dddddd", 2)
        draw.line([place(left, y), place(right, y)], "#dddddd", 2)
        value = 10 ** y if log_y else y
        label = f"{x:.2g}" if dots else f"{x:g}"  # steps are whole
        draw.text((place(x, y)[0], 974), label, "black", font, "ma")
        draw.text((146, place(x, y)[1]), f"{value:.3g}", "black", font, "rm")
    draw.text((900, 20), title, "black", font, "ma")
    draw.text((160, 166), ylabel, "black", font, "lb")
    draw.text((1740, 1060), xlabel, "black", font, "rd")

    # The lines or dots, and above them their names, each in its colour.
    key = 160
    for colour, (name, points) in zip(COLOURS, shown.items()):
        draw.text((key, 100), name, colour, font, "lm")
        key += font.getlength(name) + 50
        if dots:
            for point in points:
                draw.circle(place(*point), 6, colour)
        elif len(points) > 1:
            draw.line([place(*point) for point in points], colour, 4, "curve")
    return picture.reduce(2)
