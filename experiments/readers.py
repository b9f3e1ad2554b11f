"""Can people tell synthetic images from real ones? A blind reading (a visual Turing test).

    python -m experiments readers --make REAL SYNTHETIC --out DIR   -> DIR/readers.html and the key
    python -m experiments readers --score answers/*.csv --key DIR/key/key.csv

The page knows no truth: all images pass one encoder at one size, uncompressed (so even their
lengths are equal), under names that hash a secret seed; seed and truth are in the key alone.
Readers open it from the disk, and hand in the file of answers that it saves.

Positive is "synthetic": sensitivity is the share of synthetic images called so, specificity that of
real ones called real. Cohen's kappa of each pair of readers: on either kind apart (2312.09792).
--score prints both with intervals, and writes readers.json beside the key.
"""
import base64
import io
import json
import math
import secrets
from itertools import combinations
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from evaluate import bootstrap_interval, cohen_kappa
from experiments.report import page
from support.command import UserError, not_negative_int, positive_int, print_table
from support.datasets import open_dataset
from support.files import read_csv, write_csv, write_json, write_text_atomic
from support.pictures import to_picture
from support.seeds import step_seed

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


# ---------------------------------------------------------------- making a test

def choose_images(folders, count, seed):
    """[(truth, file name, image (3, H, W))], equally many of both folders, chosen by the seed."""
    sets = {truth: open_dataset(folder, None)
            for truth, folder in zip(("real", "synthetic"), folders)}
    count = min(count, *map(len, sets.values()))
    chosen = []
    for truth, images in sets.items():
        print(f"{truth}: {count} of {images.note}", *images.problems, sep="\n  note: ")
        order = sorted(range(len(images)), key=lambda i: step_seed(seed, "choose", truth, i))
        chosen += [(truth, images.files[i], images[i]) for i in order[:count]]
    return chosen


def common_side(chosen, size):
    """The side in pixels that all images get. Raises UserError where some would be enlarged."""
    sides = {image.shape[-1] for _, _, image in chosen}
    side = size or max(sides)
    if side > min(sides):
        raise UserError(f"got images of {sorted(sides)} pixels a side", "one side is needed, and "
                        "enlarging some would give them away", f"pass --size {min(sides)}")
    return side


def encode(image, side, is_grey):
    """Image (3, H, W) -> base64 text of an uncompressed PNG of that side, grey or RGB."""
    if side < image.shape[-1]:
        image = F.interpolate(image[None], (side, side), mode="bicubic", antialias=True)[0]
    if is_grey:
        image = image.mean(dim=0, keepdim=True)
    content = io.BytesIO()
    to_picture(image).save(content, "PNG", compress_level=0)
    return base64.b64encode(content.getvalue()).decode()


def make(args):
    """Write the readers' page, which knows no truth, and the key, which does.

    All images become grey if the real ones are: a tint would give the synthetic ones away.
    """
    sheet = Path(args.out, "readers.html")
    key = Path(args.out, "key", "key.csv")
    if key.exists():
        raise UserError(f"{key} exists", "a key must not be lost", "pass another --out")
    seed = secrets.randbits(63) if args.seed is None else args.seed
    chosen = choose_images(args.make, args.count, seed)
    side = common_side(chosen, args.size)
    is_grey = all(image.eq(image[0]).all() for truth, _, image in chosen if truth == "real")

    # Rows of the key, each with its picture, in the order of their names: by a hash, so shuffled.
    rows = []
    for truth, source, image in chosen:
        name = f"{step_seed(seed, 'name', truth, source):016x}"
        source = source.encode(errors="replace").decode()
        rows.append([name, truth, source, seed, encode(image, side, is_grey)])
    rows.sort()
    names = [row[0] for row in rows]
    pictures = [row[-1] for row in rows]
    if len(set(pictures)) < len({(truth, picture) for _, truth, *_, picture in rows}):
        raise UserError("a picture is on both sides", "each must be real or synthetic",
                        "name other folders")

    write_csv(key, [["file", "truth", "source", "seed"], *(row[:-1] for row in rows)])
    body = READERS.format(count=len(rows), ids=json.dumps(names), pictures=json.dumps(pictures),
                          script=LOGIC + SCREEN)
    write_text_atomic(sheet, page("Real or synthetic?", body, "'unsafe-inline'"))
    print(f"{sheet}: {len(rows) // 2} real and {len(rows) // 2} synthetic images, {side} px; give "
          f"readers this file alone\n{key}: the truth; keep it away from them")


# ---------------------------------------------------------------- scores

def rows_by_file(path):
    """{file: row} of a CSV. Raises UserError without a column `file`, or for two rows of a file."""
    rows = {}
    for row in read_csv(path):
        if "file" not in row:
            raise UserError(f"{path} has the columns {', '.join(row)[:200]}",
                            "one must be called file", "correct its first line")
        if row["file"] in rows:
            raise UserError(f"{path} has 2 rows for {row['file'] or 'no name'}", "one is needed",
                            "delete one")
        rows[row["file"]] = row
    return rows


def read_key(path):
    """{file: is it synthetic?} of a key.csv."""
    truths = {file: row.get("truth") for file, row in rows_by_file(path).items()}
    if set(truths.values()) != {"real", "synthetic"}:
        raise UserError(f"{path} does not hold real and synthetic images", "both are needed",
                        "pass the key.csv that --make wrote")
    return {file: truth == "synthetic" for file, truth in truths.items()}


def read_answers(path, files, known):
    """(reader, {file: answer}) of a reader's file.

    Raises UserError for images that are not in `files` or lack an answer, for other answers, and
    for more than one reader, or one of those `known` already.
    """
    rows = rows_by_file(path)
    answers = {file: row.get("answer", "") for file, row in rows.items()}
    readers = {row.get("reader", "") for row in rows.values()}

    def refuse(bad, what, need, remedy):
        if bad:
            first = ", ".join(sorted(bad)[:3])
            raise UserError(f"{path}: {what}: {len(bad)} ({first})", f"{need} needed", remedy)

    refuse(answers.keys() - files, "unknown images", "images of the key are",
           "pass the key of that page")
    refuse(files - answers.keys(), "no answer to", "one to each image is",
           "let the reader finish the page")
    refuse(set(answers.values()) - {"real", "synthetic"}, "other answers", "real or synthetic is",
           "correct the file")
    bad = readers if len(readers) > 1 else readers & {"", *known}
    refuse(bad, "readers", "one reader a file, each once, is",
           "correct the names, or leave the file out")
    return readers.pop(), answers


def pair_kappas(said):
    """(mean, standard deviation, pairs) of Cohen's kappa over the pairs of readers; NaN for none.

    said: (images, readers). A pair that gave all images one and the same answer has no kappa.
    """
    kappas = np.array([cohen_kappa(a, b) for a, b in combinations(said.T, 2)])
    kappas = kappas[np.isfinite(kappas)]
    mean = kappas.mean() if len(kappas) else math.nan
    sd = kappas.std(ddof=1) if len(kappas) > 1 else math.nan
    return mean, sd, len(kappas)


def median_share(hits):
    """Median over readers of the share of hits (images, readers)."""
    return float(np.median(hits.mean(axis=0)))


def score_readers(names, hits, synthetic):
    """{reader or "median": figures with intervals} of hits (images, readers) bool."""
    table = {name: {} for name in [*names, "median"]}
    figures = {"sensitivity": hits[synthetic], "specificity": hits[~synthetic], "accuracy": hits}
    for figure, part in figures.items():
        columns = {name: part[:, [j]] for j, name in enumerate(names)}
        for name, column in {**columns, "median": part}.items():
            table[name][figure] = median_share(column)
            table[name][f"{figure}, 95 %"] = bootstrap_interval(median_share, column)
    return table


def agreement_of(said):
    """Kappa of the pairs of readers on one kind of image: a dict, None where it is not defined."""
    mean, sd, pairs = pair_kappas(said)
    interval = bootstrap_interval(lambda x: pair_kappas(x)[0], said, rounds=200)
    row = {"mean": mean, "sd": sd, "pairs": pairs, "95 %": interval}
    return {name: value if np.isfinite(value).all() else None for name, value in row.items()}


def score(args):
    """Print each reader's figures, the medians, and the readers' agreement; write them as JSON."""
    key = read_key(args.key)
    synthetic = np.array(list(key.values()))
    said = {}
    for path in args.score:
        reader, answers = read_answers(path, key.keys(), said)
        said[reader] = np.array([answers[file] == "synthetic" for file in key])
    names = list(said)
    said = np.stack(list(said.values()), axis=1)  # (images, readers)

    table = score_readers(names, said == synthetic[:, None], synthetic)
    print(f"readers: {len(names)}; images: {synthetic.sum()} synthetic (positive), "
          f"{(~synthetic).sum()} real; intervals by bootstrap over images, not over readers")
    print_table(table)

    agreement = {"real": agreement_of(said[~synthetic]), "synthetic": agreement_of(said[synthetic])}
    if len(names) < 2:
        print("Cohen's kappa is not defined for one reader: two are needed: pass more files")
    else:
        print("Cohen's kappa of each pair of readers, on their answers to one kind of image alone:")
        print_table(agreement)
    write_json(args.out or Path(args.key).parent / "readers.json",
               {"positive": "synthetic", "readers": table, "kappa": agreement})


# ---------------------------------------------------------------- the question

def add_flags(parser):
    add = parser.add_argument
    add("--make", nargs=2, metavar=("REAL", "SYNTHETIC"), help="two folders of images")
    add("--count", type=positive_int, default=50, help="images of each kind, at most")
    add("--size", type=positive_int, help="resize to this side (default: as they are)")
    add("--seed", type=not_negative_int, help="makes a test again; who guesses it knows the truth "
        "(default: a secret one, kept in the key)")
    add("--score", nargs="+", metavar="CSV", help="files of answers, one a reader")
    add("--key", help="the key.csv of these answers")
    add("--out", help="folder of a test, or JSON file of scores (default: readers.json beside the "
        "key)")


def main(args):
    makes = args.make and args.out and not (args.score or args.key)
    scores = args.score and args.key and not args.make
    if not (makes or scores):
        raise UserError("got half of a command, or two",
                        "readers needs --make and --out, or --score and --key",
                        "pass one of these pairs")
    if makes:
        make(args)
    else:
        score(args)
