"""What lies between the training images? A page on which to walk through the model's samples.

    python -m experiments explore                          # the newest run, or the bundled model
    python -m experiments explore box --data /path/to/xrays --grid 8      # a quarter of the time

Writes one HTML file: training images on the plane of the first two principal directions of their
tokens, over a grid of samples from that plane; a sample step by step; guidance; what the
autoencoder keeps. The 256 samples take minutes on a CPU.
"""
import base64
import html
import io
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from experiments.common import choose, load_model
from support.command import StatusLine, UserError, number
from support.datasets import open_dataset
from support.files import resolve_checkpoint, write_text_atomic
from support.pictures import COLOURS, to_picture
from support.training_set import read_split

SHAPES = ("M-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0", "M-7-7H7V7H-7z", "M0-10L9 7H-9z",
          "M0-11L8 0 0 11-8 0z", "M-3-9H3V-3H9V3H3V9H-3V3H-9V-3H-3z")  # one for each of COLOURS


def read_images(args, path, flags, model):
    """At most 600 images, of the run's training part or of --data: tokens (N, G, D), thumbnails
    (N, 3, 64, 64), names, groups; and one image (1, 3, H, W), held out if possible."""
    images = open_dataset(args.data or flags["data"], model.config.image_size,
                          seed=flags.get("seed", 0), count=flags.get("count", 2400),
                          depth=flags.get("depth"))
    print(images.note)
    train = test = torch.arange(len(images))
    if not args.data:
        train, test = read_split(path.parent / "split.csv", images)
    indices = choose(train, 600)
    if len(indices) < 3:
        raise UserError(f"{len(indices)} images", "3 are needed for a plane", "add images")
    tokens, thumbnails = map(torch.cat, zip(*(
        (model.embed(x.to(model.shift.device)).cpu(), F.interpolate(x, 64, mode="area"))
        for x in images.batches(indices, 32))))

    # The column with most values that shapes can tell apart; without a table: the folder.
    columns = {"image": [""] * len(images), **images.columns}
    groups = [[f"{name} {cells[i]}" for i in indices] for name, cells in columns.items()]
    groups = max((x for x in groups if len(set(x)) <= len(SHAPES)), key=lambda x: len(set(x)))
    source = images.batch((test if len(test) else train)[:1])
    return tokens, thumbnails, [images.files[i] for i in indices], groups, source


def sheet(images, columns=1, side=128):
    """Images (N, 3, H, W) in [-1, 1], `columns` in a row, as the data URI of a JPEG."""
    images = F.interpolate(images, min(side, images.shape[-1]), mode="area")
    file = io.BytesIO()
    to_picture(make_grid(images, columns, padding=0)).save(file, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def draw_dots(places, groups):
    """Places (N, 2) in 0..1000 -> SVG marks with the shape and colour of a group, and a legend."""
    names = sorted(set(groups))
    style = {name: f'<path d="{shape}" fill="{colour}"'
             for name, shape, colour in zip(names, SHAPES, COLOURS)}
    marks = [f'{style[group]} transform="translate({x} {y})"/>'
             for (x, y), group in zip(places, groups)]
    legend = [f'<svg width="24" viewBox="-12 -12 24 24">{style[name]}/></svg>&nbsp;'
              f"{html.escape(name)}&nbsp;({groups.count(name)}) &emsp;" for name in names]
    return "".join(marks), "".join(legend)


def add_flags(parser):
    add = parser.add_argument
    add("run", nargs="?", help="run folder, model.pt or box (default: newest run, else the box)")
    add("--data", help="images to plot (default: the training images of the run)")
    add("--grid", type=number(int, 2, 32), default=16, help="samples along a side of the plane")
    add("--steps", type=number(int, 1, 100), default=15, help="of the sampler")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", default="explore.html", help="the page")


@torch.no_grad()
def main(args):
    path = resolve_checkpoint(args.run)
    checkpoint, model = load_model(path, args.device)
    device = model.shift.device
    if model.config.condition != "dino" or not model.config.vit:
        raise UserError(f"{path} does not follow the tokens of an image",
                        "a model with a ViT is needed", "pass another run, or box")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    # The dots: images, or samples of the K-means centres that the bundled model brings along.
    if args.data or "prototypes" not in checkpoint:
        tokens, thumbnails, names, groups, source = read_images(
            args, path, checkpoint["training"], model)
    else:
        tokens = checkpoint["prototypes"].float()
        thumbnails = model.sample(tokens, [0] * len(tokens), args.steps).cpu()
        names = [f"K-means centre {k + 1}" for k in range(len(tokens))]
        groups = ["typical sample"] * len(tokens)
        source = thumbnails[:1]

    # The plane between the outermost hundredths, from the upper left; one seed for all samples.
    x = tokens.flatten(1)
    mean = x.mean(0)
    _, scales, directions = torch.linalg.svd(x - mean, full_matrices=False)
    share = (scales[:2].square().sum() / scales.square().sum()).item()
    places = (x - mean) @ directions[:2].T
    low, high = places.quantile(torch.tensor([0.01, 0.99]), dim=0)
    centres = (torch.arange(args.grid) + 0.5) / args.grid
    cells = low + (high - low) * torch.cartesian_prod(1 - centres, centres).flip(1)
    status = StatusLine(args.grid, "rows of samples")
    samples = []
    for row in (mean + cells @ directions[:2]).view(-1, *tokens.shape[1:]).split(args.grid):
        samples.append(model.sample(row, [0] * args.grid, args.steps).cpu())
        status.update(len(samples), images=args.grid)
    status.close()

    # What the sampler holds at each step, then what the network predicts; the sample ends both.
    first = model.embed(source.to(device))
    noisy = []
    predicted = []
    hook = model.unet.register_forward_hook(lambda _, inputs, output: noisy.append(inputs[0][:1]))
    sample = model.sample(first, [0], args.steps, watch=predicted.append)
    hook.remove()
    noisy, predicted = (model.decode(torch.cat(latents)) for latents in (noisy, predicted))
    frames = torch.cat([noisy, sample, predicted, sample])

    # What the autoencoder keeps, and guidance.
    decoded = model.decode(model.encode(source.to(device)))
    figures = {"source": source, "source through the autoencoder": decoded}
    for scale in 1.0, 1.5, 2.0, 3.0, 4.0:
        figures[f"sample, guidance {scale:g}"] = model.sample(first, [0], args.steps, scale)

    # The page.
    dots = ((places - low) / (high - low).clamp(min=1e-6) * 1000).clamp(0, 1000).int()
    dots[:, 1] = 1000 - dots[:, 1]
    marks, legend = draw_dots(dots.tolist(), groups)
    side = math.ceil(len(names) ** 0.5)
    curves = path.parent / "curves.png"
    parts = {
        "NAME": html.escape(path.parent.name if path.stem == "model" else path.stem),
        "SHARE": f"{share:.0%}", "MARKS": marks, "LEGEND": legend, "CELL": f"{1000 / args.grid}",
        "SAMPLES": sheet(torch.cat(samples), args.grid, 2048 // args.grid),
        "FRAMES": sheet(frames, args.steps + 1),
        "THUMBNAILS": sheet(thumbnails, side),
        "FIGURES": "".join(
            f'<figure><img src="{sheet(image, side=256)}" alt="{caption}">{caption}</figure>'
            for caption, image in figures.items()),
        "CURVES": "" if not curves.exists() else
            '<h2>Training</h2><img alt="loss of each stage over its steps" src="data:image/png;'
            f'base64,{base64.b64encode(curves.read_bytes()).decode()}">',
        "DATA": json.dumps({"grid": args.grid, "steps": args.steps, "side": side, "names": names,
                            "dots": dots.tolist(), "groups": groups}).replace("<", "\\u003c"),
    }
    page = re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE)
    write_text_atomic(args.out, page)
    print(f"{args.out}: {len(names)} dots, {len(cells)} samples, {share:.0%} of the variance")


PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explore @NAME@</title>
<style>
body { max-width: 1120px; margin: auto; padding: 16px; color: #111; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; --samples: url(@SAMPLES@) }
.walk { display: flex; flex-wrap: wrap; gap: 16px }
.row { flex: 1 1 200px; display: grid; gap: 16px; align-content: start;
       grid-template-columns: repeat(auto-fit, minmax(146px, 1fr)) }
#map { flex: 5 1 360px; aspect-ratio: 1; touch-action: none; cursor: crosshair;
       background: linear-gradient(#fff9, #fff9), var(--samples) 0 / 100% 100% }
#map path { stroke: #fff; stroke-width: 1.5 }
#sample { background-image: var(--samples) }
#nearest { background-image: url(@THUMBNAILS@) }
#noisy, #predicted { background-image: url(@FRAMES@) }
figure { margin: 0; max-width: 330px }
output { display: block; grid-column: 1 / -1; overflow-wrap: anywhere }
figure div { aspect-ratio: 1 }
img, input { display: block; width: 100%; max-width: 900px }
svg { vertical-align: middle }
</style>
<h1>Explore @NAME@</h1>
<p>Samples are synthetic: fine detail is drawn at random, and nothing here is for clinical use.
<h2>Walk the manifold</h2>
<p>Point at the map, touch it, or use the arrow keys. Right and up are the directions in which the
tokens of the dots vary most (@SHARE@ of their variance). A sample is drawn from the tokens at its
place, always with the same noise.
<div class="walk">
<div id="map" tabindex="0" role="application" aria-label="map of the samples, use the arrow keys">
<svg viewBox="0 0 1000 1000" aria-hidden="true">@MARKS@
<rect id="cell" width="@CELL@" height="@CELL@" fill="none" stroke="#000" stroke-width="5"/></svg>
</div>
<div class="row">
<figure><div id="sample" role="img" aria-label="sample"></div>sample</figure>
<figure><div id="nearest" role="img" aria-label="nearest dot"></div>nearest dot</figure>
<output id="place"></output></div></div>
<p>@LEGEND@
<h2>Out of noise</h2>
<output id="now"></output><input type="range" id="step" min="0" aria-label="sampling step">
<div class="row">
<figure><div id="noisy" role="img" aria-label="noisy"></div>what the sampler holds</figure>
<figure><div id="predicted" role="img" aria-label="clean"></div>what the network predicts</figure>
</div>
<h2>One image, and guidance</h2>
<p>A sample shares the tokens of its source, not its pixels; guidance above 1 exaggerates them.
<div class="row">@FIGURES@</div>
@CURVES@
<script>
const data = @DATA@;
const n = data.grid;
const find = id => document.getElementById(id);
const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
let column, row;

function show(id, columns, rows, x, y) {  // one picture of a sheet
  find(id).style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
  find(id).style.backgroundPosition = `${100 * x / (columns - 1)}% ${100 * y / (rows - 1)}%`;
}

function walk(...place) {  // in cells from the left and the top
  const [x, y] = place.map(z => Math.max(0, Math.min(n - .01, z)));
  [column, row] = [Math.floor(x), Math.floor(y)];
  show("sample", n, n, column, row);
  find("cell").setAttribute("x", column * 1000 / n);
  find("cell").setAttribute("y", row * 1000 / n);

  const distances = data.dots.map(dot => Math.hypot(dot[0] * n / 1000 - x, dot[1] * n / 1000 - y));
  const k = distances.indexOf(Math.min(...distances));
  const rows = Math.ceil(data.names.length / data.side);
  show("nearest", data.side, rows, k % data.side, Math.floor(k / data.side));
  find("place").textContent = `Column ${column + 1}, row ${row + 1} of ${n}. Nearest dot: ` +
    `${data.names[k]} (${data.groups[k]})`;
}

find("map").onpointermove = find("map").onpointerdown = event => {
  const box = find("map").getBoundingClientRect();
  walk((event.clientX - box.left) / box.width * n, (event.clientY - box.top) / box.height * n);
};
find("map").onkeydown = event => {
  if (!moves[event.key]) return;
  event.preventDefault();
  walk(column + .5 + moves[event.key][0], row + .5 + moves[event.key][1]);
};
find("step").oninput = () => {
  const k = Number(find("step").value);
  show("noisy", data.steps + 1, 2, k, 0);
  show("predicted", data.steps + 1, 2, k, 1);
  find("now").textContent = k < data.steps ? `step ${k + 1} of ${data.steps}` : "finished sample";
};
find("step").max = data.steps;
find("step").value = Math.round(data.steps / 2);
find("step").oninput();
walk(n / 2, n / 2);
</script>
"""
