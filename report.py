"""Pages for people: a run at a glance, and a blind reading of real and synthetic images.

    python report.py RUN                                       -> RUN/report.html
    python report.py readers --make REAL SYNTHETIC --out DIR   -> DIR/readers.html, DIR/key/key.csv
    python report.py readers --score answers/*.csv --key DIR/key/key.csv

A page is one file that a browser opens from the disk: pictures are data URIs, plots inline SVG, and
its content policy forbids every connection. Whatever comes from a file is escaped.
The readers' page knows no truth: all images pass one encoder at one size, uncompressed (so even
their lengths are equal), under names that hash a secret seed; seed and truth are in the key alone.
Positive is "synthetic": sensitivity is the share of synthetic images called so, specificity that of
real ones called real. Cohen's kappa of each pair of readers: on either kind apart (2312.09792).
"""
import argparse
import base64
import csv
import io
import json
import math
import secrets
from html import escape
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import (COLOURS, Help, UserError, load_image, not_negative_int, open_dataset,
                  positive_int, read_jsonl, read_split, resolve_checkpoint, run_script, step_seed,
                  write_text_atomic, read_table)
from evaluate import RandomFeatures, bootstrap_interval, cohen_kappa, describe
from experiments.common import batches_of, choose
from support.command import print_table
from support.files import write_json

STYLE = """*{box-sizing:border-box} [hidden]{display:none} h1,figcaption,p{overflow-wrap:anywhere}
body{margin:0;background:#f5f6f8;color:#1d2733;font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:auto;padding:0 1rem} figure,p{margin:0} h2,h3,h4{margin:0 0 .5rem}
section{background:#fff;border:1px solid #dde2e8;border-radius:10px;padding:1rem;margin:0 0 1rem}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.grid>*{min-width:0} .wide{grid-column:1/-1} .wide img{min-width:min(40rem,160vw)}
.box{overflow:auto;max-height:36rem} img{display:block;max-width:100%} svg{max-width:40rem}
figcaption,.note{color:#566373;font-size:.88rem} text{font-size:11px;fill:#566373}
table{border-collapse:collapse;font-size:.88rem;margin:0 0 1rem} tr>:first-child{text-align:left}
td,th{padding:.25rem .7rem;border-bottom:1px solid #e6eaee;text-align:right}
td+td{white-space:nowrap} progress{width:100%}
.row{display:flex;flex-wrap:wrap;gap:.6rem;justify-content:center;margin:.6rem}
button{font:inherit;padding:.7rem 1.1rem;border:1px solid #b6c0cb;border-radius:8px}
.main{background:#00629b;color:#fff} #picture{width:min(100%,58vh);margin:auto}"""

# What the readers' page decides, as pure functions. state: {reader, at, answers}, an answer or null
# for each image; every image before number `at` is answered, so at = total means done.
LOGIC = """
function act(state, event, total) {  // -> the state after a key; shortcuts and held keys are none
  const key = event.key.toLowerCase(), answer = {r: "real", s: "synthetic"}[key], at = state.at;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return state;
  if (answer && at < total)
    return {...state, at: at + 1, answers: Object.assign([...state.answers], {[at]: answer})};
  if (key === "backspace" || key === "arrowleft") return {...state, at: Math.max(at - 1, 0)};
  return key === "arrowright" && state.answers[at] ? {...state, at: at + 1} : state;
}
function table(state, ids) {  // -> the CSV file of answers
  const reader = '"' + state.reader.replaceAll('"', '""') + '"';
  const rows = ids.map((id, i) => [reader, id, state.answers[i]].join());
  return ["reader,file,answer", ...rows, ""].join("\\n");
}
"""
SCREEN = """
const find = id => document.getElementById(id), total = ids.length, place = "readers-" + ids[0];
const fresh = {reader: "", at: 0, answers: ids.map(() => null)};
let state = fresh;
try { state = JSON.parse(localStorage.getItem(place)) || fresh; } catch {}  // may be forbidden
function show(next) {
  state = next;
  try { localStorage.setItem(place, JSON.stringify(state)); }
  catch { find("kept").textContent = "This browser keeps nothing: please finish in one go."; }
  const done = state.at === total, answer = state.answers[state.at];
  for (const part of ["picture", "real", "synthetic"]) find(part).hidden = done;
  find("save").hidden = !done;
  find("bar").value = state.at / total;
  find("count").textContent = done ? "All are answered, thank you: now save your answers."
    : `${state.at + 1} of ${total}` + (answer ? `, so far: ${answer}` : "");
  if (!done) find("picture").src = "data:image/png;base64," + pictures[state.at];
}
document.onkeydown = event => {
  const next = act(state, event, total);
  if (next !== state) { event.preventDefault(); show(next); }
};
for (const button of document.querySelectorAll("[value]"))
  button.onclick = () => { button.blur(); show(act(state, {key: button.value}, total)); };
find("anew").onclick = () => { if (confirm("Forget all answers?")) show(fresh); };
find("save").onclick = () => {
  const reader = state.reader || (prompt("Your name or number") || "").trim();
  if (!reader) return;
  show({...state, reader});
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([table(state, ids)], {type: "text/csv"}));
  link.download = `answers_${reader.replace(/[^\\w-]+/g, "_")}.csv`;
  link.click();
};
show(state);
"""
READERS = """<h1>Real or synthetic?</h1><section><p>Some of these {count} images are real, some
were made by a computer. Say of each what you think it is. Nothing leaves this page: at the end you
save a file of your answers, and hand it in.</p><progress id="bar"></progress>
<p id="count" class="row"></p><img id="picture" alt="the image to judge"><p class="row">
<button id="save" class="main">Save the answers</button>
<button id="real" value="r" class="main">Real (R)</button>
<button id="synthetic" value="s" class="main">Synthetic (S)</button>
<button value="backspace">Back (&larr;)</button><button id="anew">Another reader</button></p>
<p id="kept" class="note"></p></section>
<script>const ids = {ids}, pictures = {pictures};{script}</script>"""


def page(title, body, scripts="'none'"):
    """A whole HTML page that can load nothing from anywhere."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'; script-src {scripts}; form-action 'none'; base-uri 'none'">
<style>{STYLE}</style></head><body><main>{body}</main></body></html>
"""


# ---------------------------------------------------------------- a page about a run

def text_of(leaf):
    """A leaf of JSON as short text; two values are an interval."""
    if isinstance(leaf, list):
        more = [f"... ({len(leaf):,} values)"] * (len(leaf) > 8)
        return (" to " if len(leaf) == 2 else ", ").join([*map(text_of, leaf[:8]), *more])
    return "" if leaf is None else f"{leaf:.4g}" if isinstance(leaf, float) else str(leaf)


def html_table(rows):
    """{row: {column: leaf}} as HTML, laid on its side where it is wider than long."""
    heads = list(dict.fromkeys(column for row in rows.values() for column in row))
    if len(heads) > max(len(rows), 5):
        rows, heads = {c: {r: row.get(c) for r, row in rows.items()} for c in heads}, list(rows)
    lines = [["", *heads], *([name, *(text_of(row.get(h)) for h in heads)]
                             for name, row in rows.items())]
    return "<div class=box><table>" + "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    ).replace("td>", "th>", 2 * len(lines[0])) + "</table></div>"  # the first line holds heads


def walk(value, way=()):
    """(way, leaf) of each leaf of any JSON; a list of dicts is a dict numbered from 1."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = dict(enumerate(value, 1))
    if isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, (*way, str(name)))
    else:
        yield way, value


def html_json(path):
    """A JSON file as tables: a leaf's row is the outermost dict on its way that holds leaves."""
    leaves, line, tables = dict(walk(json.loads(path.read_bytes()))), [], {}
    holders = {way[:-1] for way in leaves}
    for way, leaf in leaves.items():
        k = next((k for k in range(1, len(way)) if way[:k] in holders), 0)
        if k:
            rows = tables.setdefault(" ".join(way[:k - 1]), {})
            rows.setdefault(way[k - 1], {})[" ".join(way[k:])] = leaf
        else:
            line.append(f"{escape(' '.join(way))} <b>{escape(text_of(leaf))}</b>")
    parts = [f"<h4>{escape(title)}</h4>{html_table(rows)}" for title, rows in tables.items()]
    return (f"<div class=wide><h3>{escape('/'.join(path.parts[-2:]))}</h3>"
            f"<p>{' &middot; '.join(line)}</p>{''.join(parts)}</div>")


def svg_chart(series, xlabel, ylabel, dots=False):
    """Figure of name -> (N, 2) points as dots, or as lines over a logarithmic y axis."""
    series = {name: np.array(points) for name, points in series.items()}
    if not dots:
        for points in series.values():
            points[:, 1] = np.log10(points[:, 1].clip(1e-9))
    every = np.concatenate(list(series.values()))
    low, size = every.min(axis=0), np.ptp(every, axis=0)
    low, size = low - size / 25 - 1e-9, 1.08 * size + 2e-9
    digits = ".2g" if dots else ".0f"  # steps are whole
    parts = [f'<text x="50" y="14">{escape(ylabel)}</text>'
             f'<text x="390" y="278" text-anchor="end">{escape(xlabel)}</text>']
    for k in (0.1, 0.3, 0.5, 0.7, 0.9):  # grid lines with their values
        (x, y), right, down = low + k * size, 50 + 340 * k, 240 - 215 * k
        parts.append(f'<path d="M50 {down}H390M{right} 25V240" stroke="#e6eaee"/><text x="45" y='
                     f'"{down + 4}" text-anchor="end">{y if dots else 10 ** y:.2g}</text><text x='
                     f'"{right}" y="256" text-anchor="middle">{x:{digits}}</text>')
    for colour, points in zip(COLOURS, series.values()):
        places = [f"{50 + 340 * x:.1f},{240 - 215 * y:.1f}" for x, y in (points - low) / size]
        path = "".join(f"M{p}h0" for p in places) if dots else "M" + "L".join(places)
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-opacity="0.7" '
                     f'stroke-linecap="round" stroke-width="{4 if dots else 2}"/>')
    legend = " ".join(f'<b style="color:{colour}">&#9679;</b> {escape(name)}'
                      for colour, name in zip(COLOURS, series))
    return (f'<figure{" class=wide" * dots}><svg viewBox="0 0 400 284">{"".join(parts)}</svg>'
            f"<figcaption>{legend}</figcaption></figure>")


def loss_charts(path):
    """A chart of each stage's loss in a log.jsonl, in means over at most 200 bins."""
    stages = {}
    for row in read_jsonl(path):
        if math.isfinite(row["loss"]):
            stages.setdefault(str(row["stage"]), []).append((row["step"], row["loss"]))
    return "".join(svg_chart({stage: [part.mean(axis=0) for part in np.array_split(
        np.array(points), min(200, len(points)))]}, "step", "loss")
        for stage, points in stages.items())


def html_picture(path):
    """Figure of a PNG file."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        wide = " class=wide" * (image.width > 1.8 * image.height)
    return (f'<figure{wide}><div class=box><img alt="" src="data:image/png;base64,'
            f'{base64.b64encode(content).decode()}"></div>'
            f"<figcaption>{escape('/'.join(path.parts[-2:]))}</figcaption></figure>")


def feature_map(run, config, where, count):
    """Scatter of training, held-out and sampled images: two principal components of RandomFeatures.

    Mean and axes come from the real images and serve all: sets scaled apart would seem alike.
    """
    files, size = sorted(run.glob("samples/*/images/*.png")), config["size"]
    if not files:
        raise ValueError("no samples yet: make some with python sample.py --random --count 64")
    images = open_dataset(where or config["data"], size, config["seed"], config["count"])
    parts = zip(("training", "held out"), read_split(run / "split.csv", images))
    sets = {name: batches_of(images, choose(rows, count), 32) for name, rows in parts if len(rows)}
    sets["samples"] = (load_image(files[i], size)[None] for i in choose(range(len(files)), count))
    features = {name: describe(part, RandomFeatures())[0].double() for name, part in sets.items()}
    real = torch.cat([x for name, x in features.items() if name != "samples"])
    _, spread, axes = torch.linalg.svd(real - real.mean(dim=0), full_matrices=False)
    share = 100 * spread.square() / spread.square().sum()  # of the variance, per cent
    return svg_chart({f"{name} ({len(x)})": ((x - real.mean(dim=0)) @ axes[:2].T).numpy()
                      for name, x in features.items()}, dots=True,
                     xlabel=f"component 1, {share[0]:.0f} % of the real images' variance",
                     ylabel=f"component 2, {share[1]:.0f} %")


def report(args):
    """Write one page about a run, of all that its folder holds; it names what it cannot show."""
    run = Path(args.run or resolve_checkpoint().parent)
    try:
        config = dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run} is no run ({error})", "a folder with config.json is needed",
                        "pass runs/NAME") from error
    body, notes, seen = f"<h1>Run {escape(run.resolve().name)}</h1>", [], {run / "curves.png"}
    for title, pattern, show in (
            ("Settings", "config.json", html_json), ("Training loss", "log.jsonl", loss_charts),
            ("Sources, their VAE reconstructions, samples", "grid_*.png", html_picture),
            ("Samples and interpolations, beside sources", "samples/*/grid.png", html_picture),
            ("Real and synthetic images on one map", "split.csv",
             lambda path: feature_map(run, config, args.data, args.count or 200)),
            ("Evaluation", "**/*.json", html_json), ("More pictures", "**/*.png", html_picture)):
        paths = sorted((path for path in run.glob(pattern) if not (
            path in seen or {"cache", "held_out"} & set(path.relative_to(run).parts)
            or path.parent.name == "images" and path.suffix == ".png")),  # single samples
            key=lambda path: (len(path.parts), path), reverse=pattern == "grid_*.png")
        missing = [f"there is no {pattern}"] * (not paths)
        missing += [f"{len(paths) - 24} more files, from {path} on" for path in paths[24:25]]
        body += f"<section><h2>{title}</h2><div class=grid>"
        for path in paths[:24]:
            try:
                if not path.resolve().is_relative_to(run.resolve()):
                    raise ValueError("a link out of the run's folder")
                body += show(path)
            except Exception as error:  # a damaged file makes readers raise nearly any type
                missing.append(f"{path}: {str(error) or type(error).__name__}")
        lines = "".join(f"<p class=note>{escape(note)}</p>" for note in missing)
        body += f"{lines}</div></section>"
        notes += [f"note: {title}: {note}" for note in missing]
        seen |= set(paths)
    body += "<p class=note>Not for clinical use. A generated image shows no patient.</p>"
    out = Path(args.out or run / "report.html")
    write_text_atomic(out, page(f"Run {run.resolve().name}", body))
    print(*notes, f"wrote {out}", sep="\n")


# ---------------------------------------------------------------- the readers

def make(args):
    """Write the readers' page, which knows no truth, and the key, which does.

    All images become grey if the real ones are: a tint would give the synthetic ones away.
    """
    sheet, key = Path(args.out, "readers.html"), Path(args.out, "key", "key.csv")
    if key.exists():
        raise UserError(f"{key} exists", "a key must not be lost", "pass another --out")
    seed, chosen, rows = secrets.randbits(63) if args.seed is None else args.seed, [], []
    sets = dict(zip(("real", "synthetic"), (open_dataset(path, None) for path in args.make)))
    count = min(args.count or 50, *map(len, sets.values()))
    for truth, images in sets.items():
        print(f"{truth}: {count} of {images.note}", *images.problems, sep="\n  note: ")
        order = sorted(range(len(images)), key=lambda i: step_seed(seed, "choose", truth, i))
        chosen += [(truth, images.files[i], images[i]) for i in order[:count]]
    sides = {image.shape[-1] for *_, image in chosen}
    side = args.size or max(sides)
    if side > min(sides):
        raise UserError(f"got images of {sorted(sides)} pixels a side", "one side is needed, and "
                        "enlarging some would give them away", f"pass --size {min(sides)}")
    is_grey = all(image.eq(image[0]).all() for truth, _, image in chosen if truth == "real")
    for truth, source, image in chosen:
        if side < image.shape[-1]:
            image = F.interpolate(image[None], (side, side), mode="bicubic", antialias=True)[0]
        image = image.mean(dim=0, keepdim=True) if is_grey else image
        pixels = (image.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).squeeze(-1)
        Image.fromarray(pixels.numpy()).save(file := io.BytesIO(), "PNG", compress_level=0)
        rows.append([f"{step_seed(seed, 'name', truth, source):016x}", truth,
                     source.encode(errors="replace").decode(), seed,
                     base64.b64encode(file.getvalue()).decode()])
    if len({row[-1] for row in rows}) < len({(row[1], row[-1]) for row in rows}):
        raise UserError("a picture is on both sides", "each must be real or synthetic",
                        "name other folders")
    rows.sort()  # by a hash: shuffled
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(
        [["file", "truth", "source", "seed"], *(row[:4] for row in rows)])
    write_text_atomic(key, text.getvalue())
    write_text_atomic(sheet, page("Real or synthetic?", READERS.format(
        count=len(rows), ids=json.dumps([row[0] for row in rows]), script=LOGIC + SCREEN,
        pictures=json.dumps([row[-1] for row in rows])), "'unsafe-inline'"))
    print(f"{sheet}: {count} real and {count} synthetic images, {side} px; give readers this file "
          f"alone\n{key}: the truth; keep it away from them")


def pair_kappas(said):
    """(mean, standard deviation, pairs) of Cohen's kappa over the pairs of readers; NaN for none.

    said: (images, readers). A pair that gave all images one and the same answer has no kappa.
    """
    kappas = np.array([cohen_kappa(a, b) for a, b in combinations(said.T, 2)])
    kappas = kappas[np.isfinite(kappas)]
    return (kappas.mean() if len(kappas) else math.nan,
            kappas.std(ddof=1) if len(kappas) > 1 else math.nan, len(kappas))


def score(args):
    """Print each reader's figures, the medians, and the readers' agreement; write them as JSON."""
    key = {row["file"]: row.get("truth") for row in read_table(args.key)}
    if set(key.values()) != {"real", "synthetic"}:
        raise UserError(f"{args.key} does not hold real and synthetic images", "both are needed",
                        "pass the key.csv that --make wrote")
    synthetic, said = np.array([truth == "synthetic" for truth in key.values()]), {}
    for path in args.score:
        rows = {row["file"]: row for row in read_table(path)}
        readers, answers = ({row.get(column, "") for row in rows.values()}
                            for column in ("reader", "answer"))
        for bad, what, need, do in (
                (rows.keys() - key.keys(), "unknown images", "images of the key are",
                 "pass the key of that page"),
                (key.keys() - rows.keys(), "no answer to", "one to each image is",
                 "let the reader finish the page"),
                (answers - {"real", "synthetic"}, "other answers", "real or synthetic is",
                 "correct the file"),
                (readers if len(readers) > 1 else readers & {"", *said}, "readers", "one "
                 "reader a file, each once, is", "correct the names, or leave the file out")):
            if bad:
                some = ", ".join(sorted(bad)[:3])
                raise UserError(f"{path}: {what}: {len(bad)} ({some})", f"{need} needed", do)
        said[readers.pop()] = np.array([rows[file]["answer"] == "synthetic" for file in key])
    names, said = list(said), np.stack(list(said.values()), axis=1)  # (images, readers)
    hits, table = said == synthetic[:, None], {name: {} for name in [*names, "median"]}
    for figure, part in (("sensitivity", hits[synthetic]), ("specificity", hits[~synthetic]),
                         ("accuracy", hits)):
        for name, columns in [*zip(names, part.T[:, :, None]), ("median", part)]:
            table[name] |= {figure: float(np.median(columns.mean(axis=0))), f"{figure}, 95 %":
                            bootstrap_interval(lambda x: np.median(x.mean(axis=0)), columns)}
    print(f"readers: {len(names)}; images: {synthetic.sum()} synthetic (positive), "
          f"{(~synthetic).sum()} real; intervals by bootstrap over images, not over readers")
    print_table(table)
    agreement = {}
    for kind, part in (("real", said[~synthetic]), ("synthetic", said[synthetic])):
        mean, sd, pairs = pair_kappas(part)
        row = {"mean": mean, "sd": sd, "pairs": pairs, "95 %": bootstrap_interval(
            lambda x: pair_kappas(x)[0], part, rounds=200)}
        agreement[kind] = {name: x if np.isfinite(x).all() else None for name, x in row.items()}
    if len(names) < 2:
        print("Cohen's kappa is not defined for one reader: two are needed: pass more files")
    else:
        print("Cohen's kappa of each pair of readers, on their answers to one kind of image alone:")
        print_table(agreement)
    write_json(args.out or Path(args.key).parent / "readers.json",
               {"positive": "synthetic", "readers": table, "kappa": agreement})


def main(argv=None):
    p = argparse.ArgumentParser(description="Pages for people; see the head of this file.",
                                formatter_class=Help)
    a = p.add_argument
    a("run", nargs="?", help="a run's folder (default: the newest), or the word readers")
    a("--out", help="HTML file of a run (default: RUN/report.html), folder of a test, or JSON file "
      "of scores (default: readers.json beside the key)")
    a("--data", help="where the run's images are now (default: as trained)")
    a("--count", type=positive_int, help="images of each kind, at most (default: 200 on the map of "
      "a run, 50 in a test)")
    a = p.add_argument_group("readers: a visual Turing test").add_argument
    a("--make", nargs=2, metavar=("REAL", "SYNTHETIC"), help="two folders of images")
    a("--size", type=positive_int, help="resize to this side (default: as they are)")
    a("--seed", type=not_negative_int, help="makes a test again; who guesses it knows the truth "
      "(default: a secret one, kept in the key)")
    a("--score", nargs="+", metavar="CSV", help="files of answers, one a reader")
    a("--key", help="the key.csv of these answers")
    args = p.parse_args(argv)
    ways = bool(args.make) + bool(args.score)
    if ways != (args.run == "readers") or bool(args.score) != bool(args.key) or (
            args.make and not args.out):
        p.error("readers needs --make and --out, or --score and --key; a run takes none of them")
    (report if not ways else make if args.make else score)(args)


if __name__ == "__main__":
    run_script(main)
