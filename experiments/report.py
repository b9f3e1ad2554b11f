"""What is in a run? One page shows it: settings, curves, grids, samples, a map, every table.

    python -m experiments report runs/NAME      -> runs/NAME/report.html

The page is one file that a browser opens from the disk: pictures are data URIs, and its content
policy forbids every connection. Whatever comes from a file is escaped. What is missing or damaged
becomes a note on the page. At its end stands the number of notes.
"""
import base64
import io
import json
import math
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluate import RandomFeatures, describe
from experiments.common import batches_of, choose
from support.command import UserError, positive_int
from support.datasets import open_dataset
from support.files import read_jsonl, resolve_checkpoint, write_text_atomic
from support.images import load_image
from support.pictures import draw_chart
from support.splits import read_split

MOST = 24  # files of a section that are shown

STYLE = """*{box-sizing:border-box} [hidden]{display:none} h1,figcaption,p{overflow-wrap:anywhere}
body{margin:0;background:#f5f6f8;color:#1d2733;font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:auto;padding:0 1rem} figure,p{margin:0} h2,h3,h4{margin:0 0 .5rem}
section{background:#fff;border:1px solid #dde2e8;border-radius:10px;padding:1rem;margin:0 0 1rem}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.grid>*{min-width:0} .wide{grid-column:1/-1} .wide img{min-width:min(40rem,160vw)}
.box{overflow:auto;max-height:36rem} img{display:block;max-width:100%}
figcaption,.note{color:#566373;font-size:.88rem}
table{border-collapse:collapse;font-size:.88rem;margin:0 0 1rem} tr>:first-child{text-align:left}
td,th{padding:.25rem .7rem;border-bottom:1px solid #e6eaee;text-align:right}
td+td{white-space:nowrap} progress{width:100%}
.row{display:flex;flex-wrap:wrap;gap:.6rem;justify-content:center;margin:.6rem}
button{font:inherit;padding:.7rem 1.1rem;border:1px solid #b6c0cb;border-radius:8px}
.main{background:#00629b;color:#fff} #picture{width:min(100%,58vh);margin:auto}"""


def page(title, body, scripts="'none'"):
    """A whole HTML page that can load nothing from anywhere."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'; script-src {scripts}; form-action 'none'; base-uri 'none'">
<style>{STYLE}</style></head><body><main>{body}</main></body></html>
"""


# ---------------------------------------------------------------- tables of any JSON

def text_of(leaf):
    """A leaf of JSON as short text; two values are an interval."""
    if isinstance(leaf, list):
        texts = [text_of(item) for item in leaf[:8]]
        if len(leaf) > 8:
            texts.append(f"... ({len(leaf):,} values)")
        return (" to " if len(leaf) == 2 else ", ").join(texts)
    if leaf is None:
        return ""
    return f"{leaf:.4g}" if isinstance(leaf, float) else str(leaf)


def html_table(rows):
    """{row: {column: leaf}} as HTML, laid on its side where it is wider than long."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if len(columns) > max(len(rows), 5):
        turned = {column: {name: row.get(column) for name, row in rows.items()}
                  for column in columns}
        rows, columns = turned, list(rows)

    lines = [html_line("th", ["", *columns])]
    for name, row in rows.items():
        lines.append(html_line("td", [name, *(text_of(row.get(column)) for column in columns)]))
    return f"<div class=box><table>{''.join(lines)}</table></div>"


def html_line(tag, cells):
    """A row of a table."""
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def leaves_of(value, path=()):
    """(path, leaf) of each leaf of any JSON; a list of dicts is a dict numbered from 1."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = dict(enumerate(value, 1))
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves_of(item, (*path, str(name)))
    else:
        yield path, value


def html_json(file):
    """A JSON file as tables: a leaf's row is the outermost dict on its path that holds leaves."""
    leaves = dict(leaves_of(json.loads(file.read_bytes())))
    holders = {path[:-1] for path in leaves}
    single = []
    tables = {}
    for path, leaf in leaves.items():
        k = next((k for k in range(1, len(path)) if path[:k] in holders), 0)
        if k:
            rows = tables.setdefault(" ".join(path[:k - 1]), {})
            rows.setdefault(path[k - 1], {})[" ".join(path[k:])] = leaf
        else:
            single.append(f"{escape(' '.join(path))} <b>{escape(text_of(leaf))}</b>")

    body = "".join(f"<h4>{escape(title)}</h4>{html_table(rows)}" for title, rows in tables.items())
    return (f"<div class=wide><h3>{escape('/'.join(file.parts[-2:]))}</h3>"
            f"<p>{' &middot; '.join(single)}</p>{body}</div>")


# ---------------------------------------------------------------- pictures

def html_figure(content, caption):
    """Figure of the bytes of a PNG."""
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        kind = " class=wide" if image.width > 1.8 * image.height else ""
    return (f'<figure{kind}><div class=box><img alt="" src="data:image/png;base64,'
            f'{base64.b64encode(content).decode()}"></div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def html_picture(file):
    """Figure of a PNG file."""
    return html_figure(file.read_bytes(), "/".join(file.parts[-2:]))


def html_chart(caption, *arguments, **settings):
    """Figure of a chart; arguments and settings are those of draw_chart."""
    content = io.BytesIO()
    draw_chart(*arguments, **settings).save(content, "PNG")
    return html_figure(content.getvalue(), caption)


def loss_charts(file):
    """A chart of each stage's loss in a log.jsonl, in means over at most 200 bins."""
    stages = {}
    for row in read_jsonl(file):
        if math.isfinite(row["loss"]):
            stages.setdefault(str(row["stage"]), []).append((row["step"], row["loss"]))

    figures = []
    for stage, points in stages.items():
        bins = np.array_split(np.array(points), min(200, len(points)))
        steps, losses = np.array([part.mean(axis=0) for part in bins]).T.tolist()
        figures.append(html_chart(f"loss of {stage}", {stage: (steps, losses)}, "", "step", "loss",
                                  log_y=True))
    return "".join(figures)


def feature_map(run, config, source, count):
    """Scatter of training, held-out and sampled images: two principal components of RandomFeatures.

    Mean and axes come from the real images and serve all: sets scaled apart would seem alike.
    """
    files = sorted(run.glob("samples/*/images/*.png"))
    size = config["size"]
    if not files:
        raise ValueError("no samples yet: make some with python sample.py --random --count 64")

    # Features of the three sets.
    images = open_dataset(source or config["data"], size, seed=config["seed"],
                          count=config["count"], depth=config.get("depth"))
    train, test = read_split(run / "split.csv", images)
    sets = {}
    for name, numbers in (("training", train), ("held out", test)):
        if len(numbers):
            sets[name] = batches_of(images, choose(numbers, count), 32)
    sets["samples"] = (load_image(files[i], size)[None] for i in choose(range(len(files)), count))
    judge = RandomFeatures()
    features = {name: describe(batches, judge)[0].double() for name, batches in sets.items()}

    # Axes of the real images.
    real = torch.cat([x for name, x in features.items() if name != "samples"])
    mean = real.mean(dim=0)
    _, spread, axes = torch.linalg.svd(real - mean, full_matrices=False)
    share = 100 * spread.square() / spread.square().sum()  # of the variance, per cent
    places = {f"{name} ({len(x)})": ((x - mean) @ axes[:2].T).T.tolist()
              for name, x in features.items()}
    return html_chart("features of a random network", places, "",
                      f"component 1, {share[0]:.0f} % of the real images' variance",
                      f"component 2, {share[1]:.0f} %", dots=True)


# ---------------------------------------------------------------- the page

def find_files(run, pattern, seen):
    """The run's files for a section, outer ones first; grids: the newest first.

    Not those seen in an earlier section, nor single samples, nor what the training keeps for
    itself.
    """
    found = []
    for path in run.glob(pattern):
        is_hidden = {"cache", "held_out"} & set(path.relative_to(run).parts)
        is_sample = path.parent.name == "images" and path.suffix == ".png"
        if not (path in seen or is_hidden or is_sample):
            found.append(path)
    return sorted(found, key=lambda path: (len(path.parts), path),
                  reverse=pattern == "grid_*.png")


def html_section(run, title, pattern, paths, show):
    """(a section with each of the paths as `show` makes it, notes of what it cannot show)."""
    figures = []
    notes = []
    if not paths:
        notes.append(f"there is no {pattern}")
    if len(paths) > MOST:
        notes.append(f"{len(paths) - MOST} more files, from {paths[MOST]} on")
    for path in paths[:MOST]:
        try:
            if not path.resolve().is_relative_to(run.resolve()):
                raise ValueError("a link out of the run's folder")
            figures.append(show(path))
        except Exception as error:  # a damaged file makes readers raise nearly any type
            notes.append(f"{path}: {str(error) or type(error).__name__}")

    lines = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    body = f"<h2>{title}</h2><div class=grid>{''.join(figures)}{lines}</div>"
    return f"<section>{body}</section>", notes


def add_flags(parser):
    add = parser.add_argument
    add("run", nargs="?", help="a run's folder (default: the newest)")
    add("--out", help="HTML file (default: RUN/report.html)")
    add("--data", help="where the run's images are now (default: as trained)")
    add("--count", type=positive_int, default=200, help="images of each kind on the map, at most")


def main(args):
    """Write one page about a run, of all that its folder holds; it names what it cannot show."""
    run = Path(args.run or resolve_checkpoint().parent)
    try:
        config = dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run} is no run ({error})", "a folder with config.json is needed",
                        "pass runs/NAME") from error

    def show_map(path):
        return feature_map(run, config, args.data, args.count)

    sections = (
        ("Settings", "config.json", html_json),
        ("Training loss", "log.jsonl", loss_charts),
        ("Sources, their VAE reconstructions, samples", "grid_*.png", html_picture),
        ("Samples and interpolations, beside sources", "samples/*/grid.png", html_picture),
        ("Real and synthetic images on one map", "split.csv", show_map),
        ("Evaluation", "**/*.json", html_json),
        ("More pictures", "**/*.png", html_picture))
    body = [f"<h1>Run {escape(run.resolve().name)}</h1>"]
    seen = {run / "curves.png"}  # the charts show the same
    count = 0
    for title, pattern, show in sections:
        paths = find_files(run, pattern, seen)
        section, notes = html_section(run, title, pattern, paths, show)
        body.append(section)
        seen |= set(paths)
        count += len(notes)
        for note in notes:
            print(f"note: {title}: {note}")

    body.append("<p class=note>Not for clinical use. A generated image shows no patient.</p>")
    out = Path(args.out or run / "report.html")
    write_text_atomic(out, page(f"Run {run.resolve().name}", "".join(body)))
    print(f"wrote {out}; notes of what it cannot show: {count}")
