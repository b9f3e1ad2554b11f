"""report.py: what the pages hold, what they must not hold, and the scores of readers.

The readers' script runs in node where there is one, on a stand-in for the browser's document;
what needs no script is checked on the text of the pages.
"""
import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data
import report
from evaluate import cohen_kappa
from support.phantoms import chest_phantoms

VOID = {"meta", "img", "input", "br"}


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects addresses, text and table rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.text, self.rows = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += text


def row_of(outline, name):
    return next(row[1:] for row in outline.rows if row[0] == name)


# ---------------------------------------------------------------- the readers' page

@pytest.fixture
def folders(tmp_path):
    """Real images of three file types with metadata, synthetic ones as plain RGB with a tint."""
    images, _, _ = chest_phantoms(20, size=32, seed=0)
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
    note = PngImagePlugin.PngInfo()
    note.add_text("Patient", "REAL PERSON")
    for i, image in enumerate(images[:12, 0]):
        pixels = ((image + 1) * 127.5).round().byte().numpy()
        if i % 3 == 0:
            Image.fromarray(pixels).save(tmp_path / "real" / f"person_{i}.png", pnginfo=note)
        elif i % 3 == 1:
            deep = pixels.astype(np.uint16) * 257
            Image.fromarray(deep).save(tmp_path / "real" / f"person_{i}.png")
        else:
            Image.fromarray(pixels).save(tmp_path / "real" / f"person_{i}.jpg", quality=95)
    tint = torch.tensor([0.02, 0, -0.02]).view(3, 1, 1)
    for i, image in enumerate(images[12:]):
        data.save_png(tmp_path / "fake" / f"sampled_{i}.png", image + tint)
    return tmp_path


def make(tmp_path, *flags, out="test", real="real", fake="fake"):
    report.main(["readers", "--make", str(tmp_path / real), str(tmp_path / fake), "--out",
                 str(tmp_path / out), *flags])
    page = (tmp_path / out / "readers.html").read_text()
    ids, pictures = (json.loads(re.search(rf"{name} = (\[.*?\])", page)[1])
                     for name in ("ids", "pictures"))
    return page, ids, [base64.b64decode(picture) for picture in pictures]


def key_of(tmp_path, out="test"):
    rows = [line.split(",") for line in (tmp_path / out / "key/key.csv").read_text().splitlines()]
    assert rows[0] == ["file", "truth", "source", "seed"]
    return {row[0]: row[1:] for row in rows[1:]}


def test_readers_page_does_not_know_the_truth(folders):
    """Equal counts, one size, one mode, one length, no metadata, no name, no seed, no address."""
    page, ids, pictures = make(folders, "--count", "30")
    key = key_of(folders)
    assert set(ids) == set(key) and len(ids) == 16
    assert sorted(truth for truth, *_ in key.values()) == ["real"] * 8 + ["synthetic"] * 8
    assert len({len(picture) for picture in pictures}) == 1
    assert len({picture[:33] for picture in pictures}) == 1  # signature and header, with its sum
    for picture in pictures:
        assert re.findall(rb"IHDR|IDAT|IEND|tEXt|pHYs|gAMA|iCCP|tIME|eXIf", picture) == [
            b"IHDR", b"IDAT", b"IEND"]
        assert Image.open(io.BytesIO(picture)).mode == "L"  # the tint is gone: the real are grey
    frame = re.sub(r"(ids|pictures) = \[.*?\]", "", page)
    again = re.sub(r"(ids|pictures) = \[.*?\]", "", make(folders, "--count", "8", out="2")[0])
    assert frame == again  # all that depends on the images are the two lists
    for _, source, seed in key.values():
        assert source not in page and Path(source).stem not in page and seed not in page
    assert "person" not in page and "sampled" not in page and "PERSON" not in page
    assert Outline(page).addresses == []
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page


def test_pictures_are_those_of_the_key(folders):
    """Each name stands beside its own picture, value for value."""
    _, ids, pictures = make(folders)
    for name, picture in zip(ids, pictures):
        truth, source, _ = key_of(folders)[name]
        image = data.load_image(folders / ("real" if truth == "real" else "fake") / source, None)
        want = ((image.mean(dim=0) + 1) * 127.5).numpy()
        got = np.asarray(Image.open(io.BytesIO(picture)))
        assert np.abs(got - want).max() <= 0.5 + 1e-3  # rounded once


def test_names_and_order_tell_nothing(folders):
    """Many of few and few of few: the names of both kinds are spread alike, in an order that mixes.

    75 uniform names a kind: their means differ by 0.05 (one sd); names that also chose the images
    would differ by 0.3, names that count up by 0.5.
    """
    for path in sorted((folders / "fake").iterdir())[5:]:
        path.unlink()
    names = {"real": [], "synthetic": []}
    for seed in range(15):
        _, ids, _ = make(folders, "--seed", str(seed), "--count", "5", out=f"t{seed}")
        assert ids == sorted(ids)
        for name, (truth, *_) in key_of(folders, f"t{seed}").items():
            names[truth].append(int(name, 16) / 2 ** 63)
    means = {truth: np.mean(values) for truth, values in names.items()}
    assert abs(means["real"] - means["synthetic"]) < 0.2
    assert len(set(names["real"])) == 75


def test_seed_is_secret_unless_given(folders):
    """Without --seed each test is another; with it the same page comes back, byte for byte."""
    pages = [make(folders, out=out)[0] for out in "ab"]
    assert pages[0] != pages[1]
    seed = next(iter(key_of(folders, "a").values()))[2]
    assert int(seed) > 2 ** 40  # 1 in 8 million draws of 63 bits is below
    assert make(folders, "--seed", seed, out="c")[0] == pages[0]


def test_folders_that_make_no_fair_test(folders, monkeypatch):
    """Mixed sides, enlarging, a picture on both sides, a key that would be lost: one line each."""
    data.save_png(folders / "fake" / "large.png", torch.zeros(1, 64, 64))
    for flags in ([], ["--size", "48"]):
        with pytest.raises(data.UserError, match=r"\[32, 64\] pixels a side.*--size 32"):
            make(folders, *flags)
    assert Image.open(io.BytesIO(make(folders, "--size", "32", out="s")[2][0])).size == (32, 32)
    assert not (folders / "test").exists()
    with pytest.raises(data.UserError, match="key.csv exists: a key must not be lost"):
        make(folders, "--size", "32", out="s")
    with pytest.raises(data.UserError, match="a picture is on both sides"):
        make(folders, fake="real")
    with pytest.raises(data.UserError, match="there is no data set"):
        make(folders, fake="nothing")


BROWSER = """
const nodes = {}, blobs = [], store = STORE;
const node = id => nodes[id] ??= {id, click() { this.clicked = true; }, blur() {}};
const buttons = ["r", "s", "backspace"].map(value => ({...node("b" + value), value}));
const document = {getElementById: node, querySelectorAll: () => buttons,
                  createElement: () => node("link")};
class Blob { constructor(parts) { blobs.push(parts.join("")); } }
const URL = {createObjectURL: () => "blob:1"}, confirm = () => true, prompt = () => ' Ann "B", Ö ';
const localStorage = {getItem: place => { if (!store) throw 1; return store[place] ?? null; },
                      setItem: (place, text) => { if (!store) throw 1; store[place] = text; }};
const press = (key, more = {}) => document.onkeydown({key, preventDefault() {}, ...more});
const look = () => [nodes.count.textContent, nodes.picture.src, nodes.save.hidden];
"""


def run_node(page, commands, store="{}"):
    """Run the page's own script, then commands; returns what they print as JSON."""
    script = re.search(r"<script>(.*)</script>", page, re.S)[1]
    done = subprocess.run(["node", "-"], input=BROWSER.replace("STORE", store) + script + commands,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-600:]
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(not shutil.which("node"), reason="no node to run the page's script")


@needs_node
def test_script_answers_goes_back_and_saves(folders, capsys):
    """From the first key to a CSV that --score takes: keys, buttons, back, a corrected answer."""
    page, ids, pictures = make(folders, "--count", "3")
    result = run_node(page, """
    const seen = [look()];
    press("s"); press("R"); seen.push(look());
    press("r", {ctrlKey: true}); press("r", {repeat: true}); press("x"); seen.push(look());
    press("Backspace"); press("ArrowLeft"); press("ArrowLeft"); seen.push(look());
    press("r"); press("ArrowRight"); press("ArrowRight"); seen.push(look());
    buttons[1].onclick(); buttons[2].onclick(); buttons[1].onclick();
    press("s"); press("s"); seen.push(look()); press("s"); seen.push(look());
    press("s"); press("ArrowRight"); seen.push(look());
    nodes.save.onclick();
    console.log(JSON.stringify({seen, csv: blobs[0], file: nodes.link.download,
                                clicked: nodes.link.clicked, store}));""")
    counts = [count for count, *_ in result["seen"]]
    assert counts == ["1 of 6", "3 of 6", "3 of 6", "1 of 6, so far: synthetic", "3 of 6",
                      "6 of 6", *["All are answered, thank you: now save your answers."] * 2]
    assert result["seen"][1][1].endswith(base64.b64encode(pictures[2]).decode())
    assert [hidden for *_, hidden in result["seen"]] == [True] * 6 + [False] * 2
    assert result["file"] == "answers_Ann_B_.csv" and result["clicked"]
    (folders / "answers.csv").write_text(result["csv"])
    capsys.readouterr()
    report.main(["readers", "--score", str(folders / "answers.csv"), "--key",
                 str(folders / "test/key/key.csv")])
    answers = {row["file"]: row for row in data.read_table(folders / "answers.csv")}
    assert [answers[name]["answer"] for name in ids] == ["real", "real", *["synthetic"] * 4]
    assert {row["reader"] for row in answers.values()} == {'Ann "B", Ö'}
    assert "readers: 1; images: 3 synthetic" in capsys.readouterr().out


@needs_node
def test_script_resumes_where_it_may_and_starts_afresh(folders):
    """A kept state comes back; a forbidden store is said; another reader starts at 1."""
    page, ids, _ = make(folders, "--count", "3")
    show = "console.log(JSON.stringify({store, look: look(), kept: nodes.kept?.textContent}));"
    first = run_node(page, 'press("s"); press("r");' + show)
    again = run_node(page, show, store=json.dumps(first["store"]))
    assert again["look"][0] == "3 of 6" and list(first["store"]) == [f"readers-{ids[0]}"]
    assert run_node(page, "nodes.anew.onclick();" + show,
                    store=json.dumps(first["store"]))["look"][0] == "1 of 6"
    forbidden = run_node(page, 'press("s");' + show, store="null")
    assert forbidden["look"][0] == "2 of 6" and "finish in one go" in forbidden["kept"]
    assert first.get("kept") is None


def test_script_finds_what_it_asks_for(folders):
    """What the script looks up is in the page, and it calls nothing of the network."""
    page = make(folders)[0]
    wanted = set(re.findall(r'find\("(\w+)"\)', report.SCREEN)) | {"picture", "real", "synthetic"}
    assert wanted == set(re.findall(r'id="(\w+)"', report.READERS))
    assert set(re.findall(r' value="(\w+)"', page)) == {"r", "s", "backspace"}
    assert not re.search(r"fetch|XMLHttp|WebSocket|sendBeacon|import|eval|innerHTML", page)
    assert "script-src 'unsafe-inline'" in page and "form-action 'none'" in page


# ---------------------------------------------------------------- scores

ANSWERS = {  # first four images are real, the others synthetic; 1: said synthetic
    "Ann": [0, 0, 0, 1, 1, 1, 1, 1], "Bob": [0, 0, 1, 1, 1, 0, 0, 0],
    "Cy": [1, 0, 0, 0, 1, 1, 0, 0]}


def write_study(folder, answers=ANSWERS, edit=lambda name, text: text):
    """key.csv, and a file of answers for each reader, its text changed by `edit`."""
    names = [f"{i:016x}" for i in range(8)]
    kinds = ["real"] * 4 + ["synthetic"] * 4
    (folder / "key.csv").write_text("file,truth,source,seed\n" + "".join(
        f"{name},{kind},x_{i}.png,7\n" for i, (name, kind) in enumerate(zip(names, kinds))))
    files = []
    for reader, said in answers.items():
        text = "reader,file,answer\n" + "".join(
            f'"{reader}",{name},{"synthetic" if s else "real"}\n' for name, s in zip(names, said))
        files.append(folder / f"answers_{reader}.csv")
        files[-1].write_text(edit(reader, text))
    return ["readers", "--key", str(folder / "key.csv"), "--score", *map(str, files)]


def test_scores_are_those_counted_by_hand(tmp_path, capsys):
    """Sensitivity, specificity, accuracy, their medians; kappa of pairs on either kind."""
    report.main(write_study(tmp_path))
    result = json.loads((tmp_path / "readers.json").read_text())
    rows = result["readers"]
    assert result["positive"] == "synthetic"
    assert [rows[r]["sensitivity"] for r in ANSWERS] == [1, 0.25, 0.5]
    assert [rows[r]["specificity"] for r in ANSWERS] == [0.75, 0.5, 0.75]
    assert [rows[r]["accuracy"] for r in ANSWERS] == [7 / 8, 3 / 8, 5 / 8]
    assert [rows["median"][f] for f in ("sensitivity", "specificity", "accuracy")] == [
        0.5, 0.75, 5 / 8]
    for reader in rows.values():
        for figure in ("sensitivity", "specificity", "accuracy"):
            low, high = reader[f"{figure}, 95 %"]
            assert 0 <= low <= reader[figure] <= high <= 1 and (low < high or low == 1)
    # real: Ann-Bob agree on 3 of 4, by chance (3*2 + 1*2)/16 = 1/2: kappa 1/2; Ann-Cy 2 of 4,
    # by chance (3*3 + 1*1)/16 = 5/8: -1/3; Bob-Cy 1 of 4, by chance 1/2: -1/2
    want = [0.5, -1 / 3, -0.5]
    assert result["kappa"]["real"]["mean"] == pytest.approx(np.mean(want), abs=1e-12)
    assert result["kappa"]["real"]["sd"] == pytest.approx(np.std(want, ddof=1), abs=1e-12)
    parts = np.array([ANSWERS[r][4:] for r in ANSWERS])
    want = [cohen_kappa(parts[i], parts[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert result["kappa"]["synthetic"]["mean"] == pytest.approx(np.mean(want), abs=1e-12)
    out = capsys.readouterr().out
    assert "synthetic (positive)" in out and "readers: 3; images: 4 synthetic" in out
    assert "median" in out and "one kind of image alone" in out


def test_kappa_that_is_not_defined(tmp_path, capsys):
    """One reader has none; a pair of one and the same answer has none, and the others count."""
    report.main(write_study(tmp_path, {"Ann": ANSWERS["Ann"]}))
    assert "kappa is not defined for one reader: two are needed" in capsys.readouterr().out
    alone = json.loads((tmp_path / "readers.json").read_text())
    assert alone["kappa"]["real"] == {"mean": None, "sd": None, "pairs": 0, "95 %": None}
    assert alone["readers"]["Ann"]["sensitivity"] == 1
    trusting = [0, 0, 0, 0, 1, 0, 1, 0]
    report.main(write_study(tmp_path, {"Ann": ANSWERS["Ann"], "Di": trusting, "Ed": trusting}))
    kappas = json.loads((tmp_path / "readers.json").read_text())["kappa"]
    assert kappas["real"]["pairs"] == 2 and kappas["real"]["mean"] == 0  # Di-Ed: all "real"
    assert kappas["synthetic"]["pairs"] == 3 and kappas["synthetic"]["95 %"] is None
    mean, sd, pairs = report.pair_kappas(np.ones((5, 2), bool))
    assert math.isnan(mean) and math.isnan(sd) and pairs == 0


def test_interval_has_the_width_of_theory():
    """100 images, 80 % right: the bootstrap's width is that of the binomial, within a tenth."""
    hits = np.arange(100)[:, None] < 80
    low, high = report.bootstrap_interval(lambda x: np.median(x.mean(axis=0)), hits)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 100), rel=0.1)


def cut(line):
    return lambda name, text: "".join(text.splitlines(True)[:line]) if name == "Bob" else text


def swap(old, new):
    return lambda name, text: text.replace(old, new) if name == "Bob" else text


LAST = f"{7:016x}"


@pytest.mark.parametrize("edit, words", [
    (cut(-2), f"no answer to: 2 .*{LAST}.*let the reader finish"),
    (cut(1), "no answer to: 8"),
    (cut(0), "answers_Bob.csv has the columns none: one must be called file"),
    (lambda name, text: text + text.splitlines()[-1] + "\n",
     f"answers_Ann.csv has 2 rows for {LAST}: one is needed"),
    (swap(LAST, "f" * 16), f"unknown images: 1 .f{{16}}.*pass the key of that page"),
    (swap(f"{LAST},real", f"{LAST},fake"), "other answers: 1 .fake.: real or synthetic is needed"),
    (swap(f"{LAST},real", LAST), "other answers: 1"),
    (swap("answer", "verdict"), "other answers: 1"),
    (swap("Bob", "Ann"), "readers: 1 .Ann.: one reader a file, each once"),
    (swap(f'"Bob",{LAST}', f'"Rob",{LAST}'), "readers: 2 .Bob, Rob."),
    (swap("Bob", ""), "readers: 1 "),
    (lambda name, text: "\0\0" + text, "answers_Ann.csv")])
def test_answers_that_cannot_be_scored(tmp_path, edit, words):
    """A fault of a reader's file is one error that names the file; nothing is written."""
    with pytest.raises(data.UserError, match=words) as error:
        report.main(write_study(tmp_path, edit=edit))
    assert "answers_" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "readers.json").exists()


def test_keys_that_cannot_be_used(tmp_path):
    """A missing key, one of one kind only, and the answers in place of the key."""
    flags = write_study(tmp_path)
    key = tmp_path / "key.csv"
    for text in (key.read_text().replace("synthetic", "real"), "file,truth\n",
                 (tmp_path / "answers_Ann.csv").read_text()):
        key.write_text(text)
        with pytest.raises(data.UserError, match="does not hold real and synthetic"):
            report.main(flags)
    key.unlink()
    with pytest.raises(data.UserError, match="key.csv cannot be read"):
        report.main(flags)


def test_spreadsheets_may_rewrite_the_answers(tmp_path):
    """Semicolons, a byte order mark and CRLF, as spreadsheets write them, change nothing."""
    report.main(write_study(tmp_path))
    plain = (tmp_path / "readers.json").read_text()
    flags = write_study(tmp_path)
    for path in tmp_path.glob("answers_*.csv"):
        text = "\ufeff" + path.read_text().replace(",", ";").replace("\n", "\r\n")
        path.write_bytes(text.encode())
    report.main(flags)
    assert (tmp_path / "readers.json").read_text() == plain


@pytest.mark.parametrize("flags", [
    ["readers"], ["readers", "--make", "a", "b"], ["readers", "--score", "a.csv"],
    ["runs/x", "--make", "a", "b", "--out", "c"], ["readers", "--key", "k"],
    ["readers", "--make", "a", "b", "--out", "c", "--score", "d", "--key", "k"]])
def test_flags_that_do_not_fit(flags, capsys):
    """Half of a command is refused before anything is read."""
    with pytest.raises(SystemExit) as stop:
        report.main(flags)
    assert stop.value.code == 2
    assert "readers needs --make and --out, or --score and --key" in capsys.readouterr().err


# ---------------------------------------------------------------- a run's page

EVIL = "<script>alert('&')</script>"


@pytest.fixture
def run(tmp_path):
    """A small finished run on generated phantoms, with samples that are its held-out images."""
    folder, count = tmp_path / "run<b>", 24
    images = data.open_dataset("phantoms", 32, 0, count)
    train, test = data.split_holdout(images, 0.4, 0)
    data.write_split(folder / "split.csv", images, train, test)
    config = {"data": "phantoms", "size": 32, "seed": 0, "count": count, "note": EVIL}
    data.write_text_atomic(folder / "config.json", json.dumps(config))
    for stage in ("vae", "unet"):
        for step in range(1, 501):
            data.append_jsonl(folder / "log.jsonl", {"stage": stage, "step": step,
                                                     "loss": 10 * math.exp(-step / 100)})
    pictures = torch.zeros(3, 3, 32, 32)
    for step in (1, 2):
        data.save_grid(folder / f"grid_{step:06d}.png", [pictures] * 2, ["source", "sample"])
    data.save_grid(folder / "samples/interpolate/grid.png", [pictures])
    for number, i in enumerate(test.tolist()):
        data.save_png(folder / f"samples/interpolate/images/{number}.png", images[i])
    data.save_png(folder / "curves.png", pictures[0])
    data.save_png(folder / "held_out/a.png", pictures[0])
    data.save_png(folder / "closest_pairs.png", pictures[0])
    (folder / "cache").mkdir()
    (folder / "cache/progress.json").write_text('{"cached": 1}')
    (folder / "probe.json").write_text(json.dumps(
        {"CLS": {"mean": 0.5, "interval": [0.25, 0.75], "labels": {EVIL: 0.123456}}}))
    (folder / "samples/interpolate/images/fidelity.json").write_text('{"real": 80}')
    return folder


def write_report(run, *flags):
    report.main([str(run), "--count", "10", *flags])
    return (run / "report.html").read_text()


def test_report_shows_what_the_run_holds(run, capsys):
    """Settings, curves, grids, samples, map, tables, pictures; escaped, balanced, offline."""
    page = write_report(run)
    outline = Outline(page)
    for title in ("Settings", "Training loss", "Sources, their VAE", "Samples and interpolations",
                  "on one map", "Evaluation", "More pictures", "Not for clinical use"):
        assert title in outline.text
    assert EVIL not in page and outline.text.count(EVIL) == 2 and "<script" not in page
    assert "run<b>" in outline.text and "<b></b>" not in page
    sources = outline.addresses
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)
    embedded = [base64.b64decode(source.split(",")[1]) for source in sources]
    assert embedded == [(run / name).read_bytes() for name in (
        "grid_000002.png", "grid_000001.png", "samples/interpolate/grid.png", "closest_pairs.png")]
    assert row_of(outline, "CLS") == ["0.5", "0.25 to 0.75", "0.1235"]
    assert "real 80" in outline.text and "cached" not in outline.text
    assert "script-src 'none'" in page and "default-src 'none'" in page
    assert not re.search(r"https?://", page)
    assert "note:" not in capsys.readouterr().out
    assert write_report(run) == page  # nothing random


def svgs(page):
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def curves(svg):
    """Points (N, 2) of each drawn series; the grid lines have no stroke-width."""
    return [np.array([[float(x) for x in pair.split(",")]
                      for pair in re.findall(r"[-\d.]+,[-\d.]+", path.get("d"))])
            for path in svg.iter("path") if path.get("stroke-width")]


def test_curves_are_drawn_where_they_belong(run):
    """exp(-step) falls in a straight line on the logarithmic axis, in 200 bins, in the box."""
    vae, unet, _ = svgs(write_report(run))
    for svg in (vae, unet):
        line, = curves(svg)
        assert line.shape == (200, 2)
        assert (np.diff(line, axis=0) > 0).all()  # right, and down: y points downwards
        slope = np.diff(line[:, 1]) / np.diff(line[:, 0])
        assert np.ptp(slope) < 0.35 * slope.mean()  # bins hold 2 or 3 steps, places one decimal
        assert line[:, 0].min() >= 50 and line[:, 0].max() <= 390
        assert line[:, 1].min() >= 25 and line[:, 1].max() <= 240


@pytest.mark.parametrize("points", [[(1, 2)], [(0, 0), (5, 0)], [(3, 1e-12), (3, 1e9)]])
def test_charts_of_odd_series(points):
    """One point, a constant loss of zero, equal steps: finite places inside the box."""
    for dots in (False, True):
        (line,), = map(curves, svgs(report.svg_chart({"a<b": points}, "x<", "y&", dots)))
        assert np.isfinite(line).all() and line.min() >= 0 and line.max() <= 400


def test_map_lays_both_kinds_on_the_same_axes(run):
    """Samples that equal the held-out images lie on them; brighter ones lie apart."""
    *_, chart = svgs(write_report(run, "--count", "24"))
    training, held_out, samples = curves(chart)
    assert len(training) + len(held_out) == 24 and len(samples) == len(held_out)
    # 8-bit files move a feature by about 0.01 of the spread: 3 of the 340 units
    distances = np.linalg.norm(held_out[:, None] - samples[None], axis=-1)
    assert distances.min(axis=1).max() < 3 and distances.min(axis=0).max() < 3
    for path in (run / "samples/interpolate/images").glob("*.png"):
        data.save_png(path, data.load_image(path, None) * 0.3 + 0.7)
    *_, chart = svgs(write_report(run))
    _, held_out, samples = curves(chart)
    gap = np.linalg.norm(held_out.mean(axis=0) - samples.mean(axis=0))
    assert gap > 2 * held_out.std(axis=0).max()


def test_unfinished_or_damaged_runs_are_still_shown(run, capsys, tmp_path):
    """What is missing or broken becomes a note with its file's name; the rest is shown."""
    shutil.rmtree(run / "samples")
    (run / "log.jsonl").unlink()
    (run / "broken.json").write_text("{")
    (run / "list.json").write_text("[" * 100_000)
    (run / "fake.png").write_text("no picture")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (run / "link.json").symlink_to(tmp_path / "secret.json")
    for i in range(26):
        data.save_png(run / f"segment/{i:02d}.png", torch.zeros(1, 4, 4))
    outline = Outline(write_report(run))
    for words in ("there is no log.jsonl", "no samples yet: make some", "broken.json: Expecting",
                  "list.json: ", "fake.png: cannot identify", "link.json: a link out of the run",
                  "4 more files, from ", "segment/22.png on", "Not for clinical use"):
        assert words in outline.text, words
    assert "secret" not in outline.text.replace("secret.json", "")
    assert len(outline.addresses) == 2 + 23  # grids; 24 files, one of them no picture
    assert "/closest_pairs.png" in outline.text  # many small pictures do not push it out
    assert capsys.readouterr().out.count("note: ") >= 7


def test_map_says_why_it_is_missing(run, tmp_path):
    """Data that moved away is a note that says so; --data finds it where it is now."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "gone")}))
    assert "there is no data set" in write_report(run)
    page = write_report(run, "--data", "phantoms")
    assert "there is no data set" not in page and len(svgs(page)) == 3


def test_folders_that_are_no_run(tmp_path):
    """No folder, no config.json and a config.json that is no object are refused in one line."""
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[1]")
    for folder in ("absent", "list", "."):
        with pytest.raises(data.UserError, match="is no run .*config.json is needed"):
            report.main([str(tmp_path / folder)])


@pytest.mark.parametrize("value, rows", [
    ({"a": {"x": 1, "sub": {"y": 2.5}}, "b": {"x": None}}, [["", "x", "sub y"], ["a", "1", "2.5"],
                                                            ["b", "", ""]]),
    ([{"n": "<i>", "v": True}, {"n": "k", "v": [1, 2]}], [["", "n", "v"], ["1", "<i>", "True"],
                                                          ["2", "k", "1 to 2"]]),
    ({"t": {"r": {"c": 1}, "s": {"c": 2}}}, [["", "c"], ["r", "1"], ["s", "2"]]),
    ({"one": {c: i for i, c in enumerate("abcdef")}}, [["", "one"], ["a", "0"], ["b", "1"],
                                                       ["c", "2"], ["d", "3"], ["e", "4"],
                                                       ["f", "5"]]),
    ({"n": list(range(40)), "e": {}}, []), (3, []), ([], []), ({}, [])])
def test_any_json_becomes_tables(tmp_path, value, rows):
    """Rows are the dicts that hold leaves, deeper names are joined, wide tables turned."""
    (tmp_path / "a.json").write_text(json.dumps(value))
    outline = Outline(report.html_json(tmp_path / "a.json"))
    assert outline.rows == rows
    if isinstance(value, dict) and "n" in value:
        assert "0, 1, 2, 3, 4, 5, 6, 7, ... (40 values)" in outline.text
