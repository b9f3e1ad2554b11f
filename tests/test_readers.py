"""experiments/readers.py: the page does not know the truth, its script works, scores are right.

The script runs in node where there is one, on a stand-in for the browser's document; what needs no
script is checked on the text of the page.
"""
import base64
import io
import json
import math
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from evaluate import bootstrap_interval, cohen_kappa
from experiments import readers
from experiments.__main__ import main as experiments
from support.command import UserError
from support.files import read_csv
from support.images import load_image
from support.phantoms import chest_phantoms
from support.pictures import save_png
from tests.outline import Outline


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
        save_png(tmp_path / "fake" / f"sampled_{i}.png", image + tint)
    return tmp_path


def make(tmp_path, *flags, out="test", real="real", fake="fake"):
    experiments(["readers", "--make", str(tmp_path / real), str(tmp_path / fake), "--out",
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
        image = load_image(folders / ("real" if truth == "real" else "fake") / source, None)
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
    save_png(folders / "fake" / "large.png", torch.zeros(1, 64, 64))
    for flags in ([], ["--size", "48"]):
        with pytest.raises(UserError, match=r"\[32, 64\] pixels a side.*--size 32"):
            make(folders, *flags)
    assert Image.open(io.BytesIO(make(folders, "--size", "32", out="s")[2][0])).size == (32, 32)
    assert not (folders / "test").exists()
    with pytest.raises(UserError, match="key.csv exists: a key must not be lost"):
        make(folders, "--size", "32", out="s")
    with pytest.raises(UserError, match="a picture is on both sides"):
        make(folders, fake="real")
    with pytest.raises(UserError, match="there is no data set"):
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
    experiments(["readers", "--score", str(folders / "answers.csv"), "--key",
                 str(folders / "test/key/key.csv")])
    answers = {row["file"]: row for row in read_csv(folders / "answers.csv")}
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
    wanted = set(re.findall(r'find\("(\w+)"\)', readers.SCREEN)) | {"picture", "real", "synthetic"}
    assert wanted == set(re.findall(r'id="(\w+)"', readers.READERS))
    assert set(re.findall(r' value="(\w+)"', page)) == {"r", "s", "backspace"}
    assert not re.search(r"fetch|XMLHttp|WebSocket|sendBeacon|import|eval|innerHTML", page)
    assert "script-src 'unsafe-inline'" in page and "form-action 'none'" in page


# ---------------------------------------------------------------- scores

ANSWERS = {  # first four images are real, the others synthetic; 1: said synthetic
    "Ann": [0, 0, 0, 1, 1, 1, 1, 1], "Bob": [0, 0, 1, 1, 1, 0, 0, 0],
    "Cy": [1, 0, 0, 0, 1, 1, 0, 0]}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals of a hundred draws, not of a thousand."""
    few = partial(bootstrap_interval, rounds=100)
    monkeypatch.setattr(readers, "bootstrap_interval", few)


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
    experiments(write_study(tmp_path))
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
    experiments(write_study(tmp_path, {"Ann": ANSWERS["Ann"]}))
    assert "kappa is not defined for one reader: two are needed" in capsys.readouterr().out
    alone = json.loads((tmp_path / "readers.json").read_text())
    assert alone["kappa"]["real"] == {"mean": None, "sd": None, "pairs": 0, "95 %": None}
    assert alone["readers"]["Ann"]["sensitivity"] == 1
    trusting = [0, 0, 0, 0, 1, 0, 1, 0]
    experiments(write_study(tmp_path, {"Ann": ANSWERS["Ann"], "Di": trusting, "Ed": trusting}))
    kappas = json.loads((tmp_path / "readers.json").read_text())["kappa"]
    assert kappas["real"]["pairs"] == 2 and kappas["real"]["mean"] == 0  # Di-Ed: all "real"
    assert kappas["synthetic"]["pairs"] == 3 and kappas["synthetic"]["95 %"] is None
    mean, sd, pairs = readers.pair_kappas(np.ones((5, 2), bool))
    assert math.isnan(mean) and math.isnan(sd) and pairs == 0


def test_interval_has_the_width_of_theory():
    """100 images, 80 % right: the bootstrap's width is that of the binomial, within a tenth."""
    hits = np.arange(100)[:, None] < 80
    low, high = bootstrap_interval(lambda x: np.median(x.mean(axis=0)), hits)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 100), rel=0.1)


def cut(line):
    return lambda name, text: "".join(text.splitlines(True)[:line]) if name == "Bob" else text


def swap(old, new):
    return lambda name, text: text.replace(old, new) if name == "Bob" else text


LAST = f"{7:016x}"


@pytest.mark.parametrize("edit, words", [
    (cut(-2), f"no answer to: 2 .*{LAST}.*let the reader finish"),
    (cut(1), "no answer to: 8"),
    (cut(0), "answers_Bob.csv has the columns none"),
    (swap("reader,file", "reader,image"), "answers_Bob.csv has the columns reader, image, answer: "
     "one must be called file"),
    (lambda name, text: text + text.splitlines()[-1] + "\n",
     f"answers_Ann.csv has 2 rows for {LAST}: one is needed"),
    (swap(LAST, "f" * 16), "unknown images: 1 .f{16}.*pass the key of that page"),
    (swap(f"{LAST},real", f"{LAST},fake"), "other answers: 1 .fake.: real or synthetic is needed"),
    (swap(f"{LAST},real", LAST), "other answers: 1"),
    (swap("answer", "verdict"), "other answers: 1"),
    (swap("Bob", "Ann"), "readers: 1 .Ann.: one reader a file, each once"),
    (swap(f'"Bob",{LAST}', f'"Rob",{LAST}'), "readers: 2 .Bob, Rob."),
    (swap("Bob", ""), "readers: 1 "),
    (lambda name, text: "\0\0" + text, "answers_Ann.csv")])
def test_answers_that_cannot_be_scored(tmp_path, edit, words):
    """A fault of a reader's file is one error that names the file; nothing is written."""
    with pytest.raises(UserError, match=words) as error:
        experiments(write_study(tmp_path, edit=edit))
    assert "answers_" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "readers.json").exists()


def test_keys_that_cannot_be_used(tmp_path):
    """A missing key, one of one kind only, and the answers in place of the key."""
    flags = write_study(tmp_path)
    key = tmp_path / "key.csv"
    for text in (key.read_text().replace("synthetic", "real"), "file,truth\n",
                 (tmp_path / "answers_Ann.csv").read_text()):
        key.write_text(text)
        with pytest.raises(UserError, match="does not hold real and synthetic"):
            experiments(flags)
    key.unlink()
    with pytest.raises(UserError, match="key.csv cannot be read"):
        experiments(flags)


def test_spreadsheets_may_rewrite_the_answers(tmp_path):
    """Semicolons, a byte order mark and CRLF, as spreadsheets write them, change nothing."""
    experiments(write_study(tmp_path))
    plain = (tmp_path / "readers.json").read_text()
    flags = write_study(tmp_path)
    for path in tmp_path.glob("answers_*.csv"):
        text = "\ufeff" + path.read_text().replace(",", ";").replace("\n", "\r\n")
        path.write_bytes(text.encode())
    experiments(flags)
    assert (tmp_path / "readers.json").read_text() == plain


@pytest.mark.parametrize("flags", [
    [], ["--make", "a", "b"], ["--score", "a.csv"], ["--key", "k"],
    ["--make", "a", "b", "--out", "c", "--score", "d", "--key", "k"]])
def test_flags_that_do_not_fit(flags):
    """Half of a command is refused before anything is read."""
    with pytest.raises(UserError, match="readers needs --make and --out, or --score and --key"):
        experiments(["readers", *flags])
    with pytest.raises(SystemExit):
        experiments(["readers", "runs/x", *flags])
