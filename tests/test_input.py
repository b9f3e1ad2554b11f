"""Files from strangers and flags from users: odd, damaged, hostile. Each ends well or in one line.

Images, tables, checkpoints, downloads, command lines, and a seeded fuzz of every reader.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import random
import re
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino
import evaluate
import experiments.__main__ as experiments
import prompts
import sample
import train
import unet
import vae
from dinodiff import DinoDiffusion, DinoDiffusionConfig, EmbeddingSampler
from support import files, splits, weights
from support.command import UserError, run_script
from support.datasets import open_dataset
from support.images import load_image

pytestmark = pytest.mark.usefixtures("small_networks")
ROOT = Path(__file__).parent.parent
NOISE = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)


class Payload(str):
    """Unpickling it would create a folder of that name."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


def encoded(kind, array=NOISE, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def png_head(width, height):
    """A PNG that claims to be of that size, and ends."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
             (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts)


def folder_with(tmp_path, files, good=40):
    """A folder of good images and of the given files (name -> bytes)."""
    for i in range(good):
        (tmp_path / f"good_{i:02d}.png").write_bytes(encoded("PNG"))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


# ---- images

GIANT = 50_000
BAD_IMAGES = {
    "empty.png": b"", "text.png": b"this is no image", "cut.png": encoded("PNG")[:-700],
    "cut.jpg": encoded("JPEG")[:-300], "cut.tif": encoded("TIFF", compression="tiff_lzw")[:-900],
    "cut.gif": encoded("GIF")[:-500], "cut.webp": encoded("WEBP")[:-300],
    "cut.bmp": encoded("BMP")[:-500],
    "flipped.png": encoded("PNG")[:2000] + b"\x00" + encoded("PNG")[2001:],
    "giant.png": png_head(GIANT, GIANT),
    "giant.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, GIANT, GIANT, 1, 24,
                                     0, 0, 0, 0, 0, 0) + bytes(60),
    "giant.gif": b"GIF89a" + struct.pack("<HHBBB", GIANT, GIANT, 0, 0, 0) + b"," + struct.pack(
        "<HHHHB", 0, 0, GIANT, GIANT, 0) + b"\x02\x01\x00\x00;",
    "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
                   b"(out) (w) file closefile\nshowpage\n",
    "bits.png": b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {0x00};\n",
    "portable.png": b"P5 8 8 255\n" + bytes(64),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_counted_listed_and_left_out(tmp_path, name):
    """Cut, empty, flipped, giant files and other formats under an image's name: found when a
    training set is opened, with the reason; fatal, with the file's name, only if asked for."""
    images = open_dataset(folder_with(tmp_path, {name: BAD_IMAGES[name]}), 8, whole=True)
    assert len(images) == 40 and name in images.problems[0] and ": 1 (" in images.problems[0]
    [(path, why)] = images.unreadable
    assert path.name == name and why and len(why) <= 200 and "\n" not in why
    with pytest.raises(UserError, match=name):
        load_image(tmp_path / name, 8)


def test_a_giant_header_costs_no_memory(tmp_path):
    """50,000 x 50,000 pixels (7.5 GB if they were made) are refused in a moment, on the head."""
    paths = [folder_with(tmp_path, BAD_IMAGES, good=0) / n for n in BAD_IMAGES if "giant" in n]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for path in paths:
        with pytest.raises(UserError, match="giant"):
            load_image(path, 8)
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB: 100 MB


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_pillow_warns_of_are_refused(tmp_path):
    """10,000 x 10,000 pixels, of which Pillow only warns: too many for a machine of 16 GB."""
    images = open_dataset(folder_with(tmp_path, {"large.png": png_head(10_000, 10_000)}), 8)
    assert "10,000 x 10,000 pixels are too many" in images.unreadable[0][1]
    with pytest.raises(UserError, match="too many"):
        load_image(tmp_path / "large.png", 8)


def test_a_program_under_an_images_name_is_not_run(tmp_path, monkeypatch):
    """Pillow would hand PostScript to Ghostscript: no process may be started."""
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a process was started"))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a process"))
    path = folder_with(tmp_path, BAD_IMAGES, good=0) / "program.png"
    with pytest.raises(UserError, match="program.png"):
        load_image(path, 8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 2), (5, 7), (64, 65)])
def test_odd_sides(tmp_path, shape):
    """One pixel and very long images come out square, of the value they have."""
    Image.fromarray(np.full(shape, 51, np.uint8)).save(tmp_path / "x.png")
    x = load_image(tmp_path / "x.png", 16)
    assert x.shape == (3, 16, 16) and (x - (51 / 127.5 - 1)).abs().max() < 1e-5


NAMES = ["ünïcödé 肺.png", "a\nb.png", "tab\t;,\"'.png", "\x1b[31mred.png", "-rf.png",
         "%s{0}.png", "CON.png", "x" * 251 + ".png",
         b"latin-\xe9.png".decode("utf-8", "surrogateescape")]


def test_strange_names_from_folder_to_samples(tmp_path, capsys):
    """Names with line ends, quotes, terminal codes, bytes that are no UTF-8, and of 255 bytes: a
    run is trained, resumed and sampled from; what is printed is plain text."""
    (tmp_path / "in").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "in" / name).write_bytes(encoded("PNG", NOISE // (i + 1)))
    folder = tmp_path / "run"
    argv = ["--data", str(tmp_path / "in"), "--size", "32", "--steps", "1", "--batch", "2",
            "--grids", "1", "--holdout", "0.5", "--no-drop-outliers", "--device", "cpu",
            "--out", str(folder)]
    assert run_script(lambda: train.main(argv)) == 0
    assert run_script(lambda: train.main([*argv, "--resume"])) == 0  # the same images
    images = open_dataset(tmp_path / "in", 32)
    train_rows, test_rows = splits.read_split(folder / "split.csv", images)
    assert sorted(images.files) == sorted(NAMES) and len(train_rows) + len(test_rows) == len(NAMES)
    with open(folder / "cache" / "index.csv", newline="", errors="surrogateescape") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {
            images.files[i] for i in train_rows.tolist()}
    sources = sorted((folder / "held_out").glob("*.png"))
    assert len(sources) == len(test_rows) and all(s.name.isprintable() for s in sources)
    assert sample.main(["--from-image", str(folder / "held_out"), "--steps", "1", "--device", "cpu",
                        "--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_equal_stems_do_not_overwrite_each_other(tmp_path):
    """Sources a/x.png and b/x.png are two examples of a run, each with its label."""
    for place in "abcdef":
        (tmp_path / "in" / place).mkdir(parents=True)
        (tmp_path / "in" / place / "x.png").write_bytes(encoded("PNG", NOISE + ord(place)))
    (tmp_path / "in" / "labels.csv").write_text("file,kind\n" + "".join(
        f"{p}/x.png,{p}\n" for p in "abcdef"))
    folder = tmp_path / "run"
    assert train.main(["--data", str(tmp_path / "in"), "--size", "32", "--steps", "1", "--batch",
                       "2", "--grids", "1", "--holdout", "0.5", "--device", "cpu", "--out",
                       str(folder)]) == 0
    examples = sorted((folder / "held_out").glob("*.png"))
    held_out = [row for row in csv.DictReader(open(folder / "split.csv")) if row["split"] == "test"]
    assert len(examples) == len(held_out) > 1
    assert len({labels_of(path)["kind"] for path in examples}) == len(examples)


def test_what_is_no_file(tmp_path):
    """Folders named like images are no images; pipes, broken, endless and leaving links are listed
    and not opened, links inside the folder work, and equal files under two names are both kept."""
    inside, secret = tmp_path / "in", tmp_path / "secret.png"
    inside.mkdir()
    folder_with(inside, {}, good=60)
    secret.write_bytes(encoded("PNG"))
    (inside / "folder.png").mkdir()
    os.mkfifo(inside / "pipe.png")
    for name, target in (("broken.png", "nowhere"), ("loop.png", "loop.png"),
                         ("out.png", secret), ("up.png", "../secret.png"), ("etc.png", "/etc"),
                         ("fine.png", "good_00.png")):
        (inside / name).symlink_to(target)
    images = open_dataset(inside, 8, whole=True)
    assert len(images) == 61 and "fine.png" in images.files
    assert {path.name for path, _ in images.unreadable} == {"pipe.png", "broken.png", "loop.png",
                                                            "out.png", "up.png"}
    (inside / "masks").mkdir()
    (inside / "masks" / "good_00.png").symlink_to(secret)
    with pytest.raises(UserError, match="link out of its folder"):
        open_dataset(inside, 8)


@pytest.mark.parametrize("name", ["images", "labels.csv", "masks"])
def test_links_that_leave_the_folder_are_refused(tmp_path, name):
    """images/, labels.csv and masks/ that point out of the folder: no path may leave it."""
    inside, outside = tmp_path / "in", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    folder_with(inside, {}), folder_with(outside, {"labels.csv": b"file,x\ngood_00.png,1\n"})
    (inside / name).symlink_to(outside / name if name == "labels.csv" else outside)
    with pytest.raises(UserError, match="link out of its folder"):
        open_dataset(inside, 8)
    (tmp_path / "linked").symlink_to(outside)  # the folder itself may be a link: the user named it
    assert len(open_dataset(tmp_path / "linked", 8)) == 40


def test_a_run_lists_what_it_could_not_read(tmp_path):
    """Four bad files of forty: unreadable.csv names them with the reason, the run goes on without;
    five of forty: the run stops before it made its folder."""
    bad = {name: BAD_IMAGES[name] for name in ("cut.jpg", "cut.png", "giant.png", "text.png")}
    (tmp_path / "in").mkdir()
    folder_with(tmp_path / "in", bad, good=36)
    argv = ["--data", str(tmp_path / "in"), "--size", "32", "--steps", "1", "--batch", "2",
            "--grids", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    with open(tmp_path / "run" / "unreadable.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["file"]).name for row in rows} == set(bad) and all(r["why"] for r in rows)
    with open(tmp_path / "run" / "split.csv") as file:
        assert sum(1 for _ in file) == 37
    folder_with(tmp_path / "in", {"empty.png": b""}, good=0)
    with pytest.raises(UserError, match="at least 90 %"):
        train.main([*argv[:-1], str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def many_files(folder, count):
    """Folders of a thousand names each for one good image (a file system allows so many)."""
    for i in range(count):
        place = folder / f"{i // 1000:03d}"
        if i % 1000 == 0:
            place.mkdir()
            (place / f"{i:06d}.png").write_bytes(encoded("PNG"))
        else:
            os.link(place / f"{i - i % 1000:06d}.png", place / f"{i:06d}.png")


@pytest.mark.parametrize("count,seconds", [
    (2000, 5), pytest.param(100_000, 240, marks=pytest.mark.slow)])
def test_large_folders(tmp_path, count, seconds):
    """A folder of 100,000 files, its labels, its split and a whole check take minutes at most."""
    many_files(tmp_path, count)
    rows = [f"{i // 1000:03d}/{i:06d}.png,{i // 3}" for i in range(count)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,patient", *rows]))
    began = time.process_time()
    images = open_dataset(tmp_path, 8)
    listed = time.process_time() - began
    train_rows, test_rows = splits.split_holdout(images, 0.1, 0)
    splits.write_split(tmp_path / "split.csv", images, train_rows, test_rows)
    assert len(splits.read_split(tmp_path / "split.csv", images)[0]) == len(train_rows)
    split = time.process_time() - began - listed
    open_dataset(tmp_path, 8, whole=True)
    whole = time.process_time() - began - listed - split
    print(f"{count} files: listed {listed:.1f} s, split {split:.1f} s, read {whole:.1f} s of CPU")
    assert len(images) == count and listed + split + whole < seconds


# ---- tables

@pytest.mark.parametrize("text,cells", [
    ("file,a\ngood_00.png,1\ngood_01.png,2", ["1", "2"]),
    ("\ufefffile;a\r\ngood_00.png;1\r\ngood_01.png;2\r\n", ["1", "2"]),
    ("file , a \n good_00.png , 1 \ngood_01.png,2\n", ["1", "2"]),
    ("file,a,,\ngood_00.png,1,,\ngood_01.png,2,,\n", ["1", "2"]),
    ("file,a\ngood_00.png,\ngood_01.png\n", ["", ""]),
    ("file,a\n/home/you/set/good_00.png,1\n..\\good_01.png,2\nC:\\set\\good_01.png,2\n",
     ["1", "2"]),
    ("file,a\n/elsewhere/good_00.png,1\n../../good_01.png,2\n", ["1", "2"]),
    ("file,a\ngood_00.png,1\nmissing.png,9\n../../../etc/passwd,9\n/etc/shadow,9\n", ["1", ""]),
    ("file,a\ngood_00.png,\"1, or\n2\"\ngood_01.png,2\n", ["1, or\n2", "2"]),
    ("file,a\rgood_00.png,1\rgood_01.png,2\r", ["1", "2"]),
    ("\ufefffile\ta\ngood_00.png\t1\ngood_01.png\t2\n", ["1", "2"]),
])
def test_tables_of_every_kind(tmp_path, text, cells):
    """BOM, CRLF, semicolons, spaces, trailing commas, short rows, line ends in cells, absolute and
    climbing paths (matched by name, never opened), files that are not there (counted)."""
    folder_with(tmp_path, {"labels.csv": text.encode()}, good=2)
    images = open_dataset(tmp_path, 8)
    assert images.columns == {"a": cells}
    lost = "/etc/" in text or "C:" in text  # a second name of an image counts as another's
    assert len(images.problems) == lost + (cells == ["1", ""])


@pytest.mark.parametrize("text,says", [
    (b"name,a\ngood_00.png,1\n", "must be called file"), (b"", "has the columns none"),
    (b"good_00.png,1\n", "must be called file"), (b"file,a,a\ngood_00.png,1,2\n", "no two alike"),
    (b"file,a\ngood_00.png,1\ngood_00.png,1\n", "2 rows for good_00.png"),
    (b"file,a\n,1\n,2\n", "2 rows for no name"), (b"file,a\ngood_00.png,one, two\n", "more cells"),
    (b"file,a\n\"good_00.png,1\n", "unexpected end"), (b"file,a\nx,\x81\n", "UTF-8"),
    (b"file,a\nx,\xff\n", "names none of the images"), (b"\x00" * 99, "columns"),
    (b"file,a\nx," + b"y" * 200_000, "field larger"), (b"PK\x03\x04" + bytes(range(256)), "UTF-8")])
def test_tables_that_are_refused(tmp_path, text, says):
    """Another header, equal columns, equal rows, more cells than columns, open quotes, bytes
    of no text, names of no image, a spreadsheet: one line that names the file."""
    folder_with(tmp_path, {"labels.csv": text}, good=2)
    with pytest.raises(UserError, match=says) as error:
        open_dataset(tmp_path, 8)
    assert "labels.csv" in str(error.value) and "\n" not in str(error.value)


# ---- checkpoints and weights

SMALL = DinoDiffusionConfig(
    image_size=16, vae=vae.VAEConfig(3, 4, 8, (1, 2), 1),
    unet=unet.UNetConfig(4, 4, 8, (1, 1), 1, (False, True), 8, 2),
    vit=dino.ViTConfig(8, 12, 4, 3, image_size=16), token_shape=(5, 12))
TRAINING = {"data": "phantoms", "seed": 0, "count": 8, "embedder": "tiny", "size": 16}


def small_model():
    """A model.pt's content, with random weights."""
    torch.manual_seed(0)
    model = DinoDiffusion(SMALL)
    model.embedding_sampler = EmbeddingSampler.fit(torch.randn(20, 5, 12), components=2, max_rank=4)
    return {"version": files.CHECKPOINT_VERSION, **model.to_checkpoint(), "training": TRAINING}


@pytest.fixture
def run_folder(tmp_path):
    """A run as sample.py and evaluate.py find it, without training."""
    folder = tmp_path / "runs" / "small"
    files.save_atomic(folder / "model.pt", small_model())
    (folder / "cache").mkdir()
    np.save(folder / "cache" / "tokens.npy", np.random.default_rng(0).normal(
        size=(20, 5, 12)).astype(np.float32))
    images = open_dataset("phantoms", 16, count=8)
    splits.write_split(folder / "split.csv", images, torch.arange(4), torch.arange(4, 8))
    return folder


def spoil(checkpoint, way):
    """A model.pt of another kind."""
    config = checkpoint["config"]
    changes = {
        "version": {"version": 1}, "no version": {"version": None},
        "config": {"config": {**config, "colour": "red"}},
        "no config": {"config": None}, "list": {"config": [1, 2]},
        "embedder": {"embedder": {"config": {}, "model": {}}},
        "other embedder": {"config": {**config, "vit": {**config["vit"], "embed_dim": 24}}},
        "image size": {"config": {**config, "image_size": 18}},
        "tokens": {"config": {**config, "token_shape": (1, 12)}},
        "prediction": {"config": {**config, "prediction": "x0"}},
        "no unet": {"unet": {}}, "text": {"unet": "hello"}, "statistics": {"statistics": {"x": 1}},
        "sampler": {"embedding_sampler": {"means": torch.zeros(3)}},
        "heads": {"config": {**config, "unet": {**config["unet"], "num_heads": 0}}},
        "patch": {"config": {**config, "vit": {**config["vit"], "patch_size": 0}}},
        "levels": {"config": {**config, "vae": {**config["vae"], "channel_multipliers": ()}}},
        "huge": {"config": {**config, "unet": {**config["unet"], "base_channels": 2 ** 40}}},
        "deep": {"config": {**config, "vit": {**config["vit"], "depth": 10 ** 9}}},
    }
    return {**checkpoint, **changes[way]}


@pytest.mark.parametrize("way", [
    "version", "no version", "config", "no config", "list", "embedder", "other embedder",
    "image size", "tokens", "prediction", "no unet", "text", "statistics", "sampler", "heads",
    "patch", "levels", "huge", "deep"])
def test_models_that_do_not_fit(run_folder, way):
    """Another version, config, embedder, image size, or sizes that would fill the memory: one line
    each from sample.py and evaluate.py, in a moment."""
    files.save_atomic(run_folder / "model.pt", spoil(small_model(), way))
    began = time.process_time()
    for main, argv in ((sample.main, ["--random"]), (experiments.main, ["resemble"])):
        with pytest.raises(UserError) as error:
            main([*argv, "--checkpoint", str(run_folder), "--device", "cpu"])
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert time.process_time() - began < 5


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bit", "zip", "folder"])
def test_damaged_models(run_folder, damage):
    """Cut, flipped, foreign: refused, and one flipped bit of a weight is noticed too."""
    path, content = run_folder / "model.pt", (run_folder / "model.pt").read_bytes()
    middle = len(content) // 2
    path.write_bytes({"cut": content[:middle], "empty": b"", "text": b"hello", "zip": b"PK\x05\x06"
                      + bytes(18), "folder": b"", "bit": content[:middle] + bytes(
                          [content[middle] ^ 4]) + content[middle + 1:]}[damage])
    if damage == "folder":
        path.unlink(), path.mkdir()
    with pytest.raises(UserError, match="model.pt"):
        sample.main(["--random", "--checkpoint", str(path), "--device", "cpu"])


def test_evaluation_needs_the_runs_own_files(run_folder):
    """Without the training's flags, with a damaged or foreign split, evaluate.py says so."""
    whole = small_model()
    for content, split in (({k: v for k, v in whole.items() if k != "training"}, None),
                           ({**whole, "training": {"data": "phantoms"}}, None),
                           ({**whole, "training": {**TRAINING, "count": "x"}}, None),
                           ({**whole, "training": [1]}, None),
                           (whole, "file,split\nother.png,test\n"), (whole, "\x00")):
        files.save_atomic(run_folder / "model.pt", content)
        if split:
            (run_folder / "split.csv").write_text(split)
        with pytest.raises(UserError):
            experiments.main(["resemble", "--checkpoint", str(run_folder), "--device", "cpu"])


def test_no_reader_runs_what_it_reads(tmp_path):
    """A pickle that would make a folder, given to every reader: refused, and no folder."""
    ran = tmp_path / "ran"
    evil = {"version": files.CHECKPOINT_VERSION, "config": Payload(ran), "model": Payload(ran),
            "encoder.conv_in.weight": Payload(ran), "state_dict": {"x": Payload(ran)}}
    for name in ("model.pt", "weights.pth", "weights.bin", "diffusion_pytorch_model.bin"):
        torch.save(evil, tmp_path / name)
    torch.save(evil, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "set.npz", train_images=np.array([Payload(ran)], object), train_labels=[1])
    np.save(tmp_path / "tokens.npy", np.array([Payload(ran)], object))
    for path in sorted(tmp_path.glob("*.p*")) + sorted(tmp_path.glob("*.bin")):
        for read in (files.load_checkpoint, dino.load_dino, vae.AutoencoderKL.from_pretrained,
                     unet.UNet.from_pretrained):
            with pytest.raises((UserError, ValueError)):
                read(path)
    with pytest.raises(UserError):
        open_dataset(tmp_path / "set.npz", 8)
    with pytest.raises(ValueError):
        np.load(tmp_path / "tokens.npy", allow_pickle=False)
    assert not ran.exists()
    with suppress(FileExistsError):  # the second payload of the file
        torch.load(tmp_path / "model.pt", weights_only=False)
    assert ran.exists(), "the payload would not have run anyway: nothing was tested"


# ---- downloads

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub keeps its files in an empty folder of the test."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("kind,name,load", [
    ("vae", "sd15", vae.AutoencoderKL.from_pretrained),
    ("unet", "sd15", unet.UNet.from_pretrained), ("vit", "dino_vits16", dino.load_dino)])
def test_a_download_with_another_hash_leaves_nothing(tmp_path, monkeypatch, hub, kind, name, load):
    """Other bytes than published: an error, and no file is left to be taken for good later; with
    the right hash they reach the reader, which says that they are no weights; no network: the
    error says where to put the file."""
    def publish(url, digits):
        """Let the name point to another address."""
        monkeypatch.setitem(weights.PUBLISHED[kind], name, url)
        monkeypatch.setitem(weights.SHA256[kind], name, digits)

    (tmp_path / "weights.pth").write_bytes(b"not what was published")
    url = (tmp_path / "weights.pth").as_uri()
    publish(url, "0123456789abcdef")
    with pytest.raises((ValueError, OSError), match="hash"):
        load(name)
    assert not [path for path in hub.rglob("*") if path.is_file()]
    right = hashlib.sha256(b"not what was published").hexdigest()[:16]
    publish(url, right)
    with pytest.raises(ValueError):
        load(name)
    assert [path.read_bytes() for path in hub.rglob("*") if path.is_file()] == [
        b"not what was published"]
    for path in hub.rglob("*.*"):
        path.unlink()
    publish("http://localhost:9/none", right)
    with pytest.raises(OSError, match="put"):
        load(name)
    assert not [path for path in hub.rglob("*") if path.is_file()]


def test_every_published_file_has_a_hash():
    """All published weights but those three are checked against digits of their SHA-256."""
    unknown = set()
    for kind, names in weights.PUBLISHED.items():
        digits = weights.SHA256[kind]
        assert digits.keys() <= names.keys()
        assert all(re.fullmatch("[0-9a-f]{16}", text) for text in digits.values())
        unknown |= names.keys() - digits.keys()
    assert unknown == {"dino_vits16", "dino_vits8", "rad-dino"}


# ---- command lines

def script(main, argv, monkeypatch, capsys):
    """Run a script's main as `python SCRIPT ARGV` does; (exit code, what it wrote to stderr)."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as end:
        run_script(lambda: main(argv))
    return end.value.code, capsys.readouterr().err


TRAIN = train.main
BAD_LINES = [
    (TRAIN, "--nonsense", "--nonsense"), (TRAIN, "extra", "extra"),
    (TRAIN, "--data", "expected one argument"), (TRAIN, "--data /nowhere", "pass --data"),
    (TRAIN, "--data TEXT", "pass --data"), (TRAIN, "--data EMPTY", "name another folder"),
    (TRAIN, "--data TEXT.npz", "download it again"), (TRAIN, "--data ''", "pass --data"),
    (TRAIN, "--size 0", "pass 1"), (TRAIN, "--size -8", "pass 1"), (TRAIN, "--size x", "pass 1"),
    (TRAIN, "--size 64.5", "pass 1"), (TRAIN, "--size 99999999", "pass 1"),
    (TRAIN, "--size 50", "pass --size 56"), (TRAIN, "--size 8", "pass"),
    (TRAIN, "--holdout 1", "pass e.g. 0.15"), (TRAIN, "--holdout -0.1", "pass e.g. 0.15"),
    (TRAIN, "--holdout nan", "pass e.g. 0.15"), (TRAIN, "--holdout /nowhere", "CSV"),
    (TRAIN, "--holdout TEXT", "correct it"), (TRAIN, "--holdout OTHER.csv", "correct it"),
    (TRAIN, "--group-column hospital", "pass another --group-column"),
    (TRAIN, "--count 0", "pass 1"), (TRAIN, "--count 1e9", "pass 1"),
    (TRAIN, "--preset huge", "choose from"), (TRAIN, "--embedder resnet", "path or one of"),
    (TRAIN, "--embedder TEXT", "download it again"), (TRAIN, "--embedder EMPTY", "another path"),
    (TRAIN, "--vae nowhere", "give another path"), (TRAIN, "--vae TEXT", "torch.save"),
    (TRAIN, "--unet nowhere", "give another path"), (TRAIN, "--unet TEXT", "torch.save"),
    (TRAIN, "--unet EMPTY", "give another path"), (TRAIN, "--tokens all", "choose from"),
    (TRAIN, "--condition words", "choose from"), (TRAIN, "--schedule sine", "choose from"),
    (TRAIN, "--prediction x0", "choose from"),
    (TRAIN, "--prediction eps --zero-snr", "prediction 'v'"), (TRAIN, "--steps 0", "pass 1"),
    (TRAIN, "--embedder-steps 0", "pass 1"), (TRAIN, "--vae-steps -1", "pass 1"),
    (TRAIN, "--unet-steps many", "pass 1"), (TRAIN, "--batch 0", "pass 1"),
    (TRAIN, "--batch 1000000000000", "pass 1"), (TRAIN, "--vae-batch 99999", "pass 1"),
    (TRAIN, "--embedder-batch 0", "pass 1"), (TRAIN, "--accumulate 0", "pass 1"),
    (TRAIN, "--batch 8 --accumulate 3", "divisor"), (TRAIN, "--lr 0", "pass above 0"),
    (TRAIN, "--lr nan", "pass above 0"), (TRAIN, "--vae-lr -1", "pass above 0"),
    (TRAIN, "--ema 1.5", "from 0 to 1"), (TRAIN, "--min-snr -5", "pass 0 or more"),
    (TRAIN, "--perceptual inf", "pass 0 or more"), (TRAIN, "--seed -1", "pass 0"),
    (TRAIN, "--seed 1e3", "pass 0"), (TRAIN, "--seed 99999999999999999999", "pass 0"),
    (TRAIN, "--device tpu", "pass --device auto"), (TRAIN, "--device cuda:99", "--device auto"),
    (TRAIN, "--dtype fp16", "choose from"), (TRAIN, "--workers -1", "pass 0"),
    (TRAIN, "--workers 99999", "pass 0"), (TRAIN, "--grids 0", "pass 1"),
    (TRAIN, "--out TEXT", "pass another --out"), (TRAIN, "--out /proc/run", "pass another --out"),
    (TRAIN, "--out RUN", "pass --out DIR or --resume"),
    (TRAIN, f"--out {'x' * 300}", "a writable place"),
    (evaluate.main, "", "required"), (evaluate.main, "EMPTY EMPTY", "name another folder"),
    (evaluate.main, "FEW FEW", "add images"), (experiments.main, "judge", "pass one of these"),
    (experiments.main, "fidelity EMPTY EMPTY", "name another folder"),
    (experiments.main, "fidelity /nowhere EMPTY", "pass --data"),
    (experiments.main, "fidelity FEW FEW", "add images"),
    (experiments.main, "fidelity FEW", "required"),
    (experiments.main, "fidelity FEW FEW --size 0", "pass 1"),
    (experiments.main, "fidelity FEW FEW --features clip", "choose from"),
    (experiments.main, "fidelity FEW FEW --seed x", "pass 0"),
    (experiments.main, "resemble --steps 0", "pass 1"),
    (experiments.main, "resemble --guidance nan", "pass 0"),
    (experiments.main, "resemble --guidance -1", "pass 0"),
    (experiments.main, "resemble --eta 2", "from 0 to 1"),
    (experiments.main, "resemble --seeds 0 99999999999999999999", "pass 0"),
    (experiments.main, "resemble --data /nowhere", "pass --data"),
    (experiments.main, "resemble --device tpu", "--device auto"),
    (experiments.main, "resemble --steps 1001", "1 to 1000"),
    (experiments.main, "fidelity FEW FEW --features inception --weights TEXT",
     "pass --weights FILE"),
    (experiments.main, "fidelity FEW FEW --max-features 0", "pass 1"),
    (experiments.main, "privacy", "required"),
    (experiments.main, "privacy EMPTY", "name another folder"),
    (experiments.main, "clusters --clusters 0", "pass 1"),
    (experiments.main, "classify --cnn-steps 0", "pass 1"),
    (experiments.main, "probe --tokens all", "choose from"),
    (experiments.main, "probe --label-column nothing", "--label-column"),
    (experiments.main, "probe --checkpoint TEXT", "python train.py"),
    (experiments.main, "attention", "--image"),
    (experiments.main, "attention --image TEXT --embedder RUN/model.pt", "replace or remove it"),
    (experiments.main, "attention --image /nowhere.png --embedder RUN/model.pt", "/nowhere.png"),
    (experiments.main, "attention --image GOOD.png --embedder resnet", "one of"),
    (experiments.main, "attention --image GOOD.png --embedder RUN/model.pt --out TEXT/x.png",
     "pass another --out"),
    (experiments.main, "attention --image GOOD.png --embedder RUN/model.pt --out TEXT", ".png"),
    (experiments.main, "report /nowhere", "pass runs/NAME"),
    (experiments.main, "report RUN --count 0", "pass 1"),
    (experiments.main, "readers", "--make and --out"),
    (experiments.main, "readers --seed -1", "pass 0"),
    (experiments.main, "readers --make FEW EMPTY --out new", "name another folder"),
    (experiments.main, "readers --score TEXT --key TEXT", "pass the key.csv"),
    (experiments.main, "choose_k", "run"),
    (experiments.main, "choose_k /nowhere", "python train.py"),
    (experiments.main, "choose_k RUN --range 5", "try --range 5:60"),
    (experiments.main, "choose_k RUN --range 9:2", "try --range 5:60"),
    (experiments.main, "choose_k RUN --step 0", "pass 1 to"),
    (experiments.main, "choose_k RUN --seed x", "pass 0 or more"),
]


@pytest.fixture
def desk(run_folder, tmp_path, monkeypatch):
    """A working folder with what the command lines name; runs/small is the newest run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FEW").mkdir()
    folder_with(tmp_path / "FEW", {}, good=3)
    (tmp_path / "TEXT").write_text("hello")
    (tmp_path / "TEXT.npz").write_text("hello")
    (tmp_path / "OTHER.csv").write_text("file,split\nother.png,test\n")
    (tmp_path / "GOOD.png").write_bytes(encoded("PNG"))
    (run_folder / "config.json").write_text("{}")
    (tmp_path / "RUN").symlink_to(run_folder)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "samples.csv").write_text("file\n")
    return tmp_path


def test_bad_command_lines(desk, monkeypatch, capsys):
    """Each ends with code 2 and a message that says what to pass, without a traceback, and leaves
    no run behind."""
    assert len(BAD_LINES) >= 60
    wrong = []
    for main, line, says in BAD_LINES:
        argv = [word.strip("'") for word in line.split()]
        if main is TRAIN and "--count" not in line:
            argv += ["--count", "8"]
        code, error = script(main, argv, monkeypatch, capsys)
        if code != 2 or says not in error or "Traceback" in error or len(error) > 6000:
            wrong.append((line, code, error[-300:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert sorted(path.name for path in desk.iterdir()) == [
        "EMPTY", "FEW", "FULL", "GOOD.png", "OTHER.csv", "RUN", "TEXT", "TEXT.npz", "runs"]
    assert os.listdir(desk / "runs") == ["small"]


@pytest.mark.parametrize("main,command", [
    (train.main, []), (evaluate.main, []), (experiments.main, ["fidelity"]),
    (experiments.main, ["resemble"]), (experiments.main, ["probe"]),
    (experiments.main, ["privacy"]), (experiments.main, ["clusters"]),
    (experiments.main, ["classify"]), (experiments.main, ["downstream"]),
    (experiments.main, ["segment"]), (experiments.main, ["report"]),
    (experiments.main, ["readers"]), (experiments.main, ["attention"]),
    (experiments.main, ["choose_k"])])
def test_help_fits_two_screens_and_shows_defaults(monkeypatch, capsys, main, command):
    """At most 100 lines of 80 columns; every flag has a text, and its default stands in it."""
    monkeypatch.setenv("COLUMNS", "80")
    parsers, parse = [], argparse.ArgumentParser.parse_known_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", lambda self, *a, **k: (
        parsers.append(self), parse(self, *a, **k))[1])
    monkeypatch.setattr(sys, "argv", ["script.py", *command, "--help"])
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100
    for action in parsers[-1]._actions:
        shown = " ".join(action.help.split()) if action.help else ""
        assert shown or action.choices, action
        known = action.default is None or action.default is False
        if action.option_strings and not known and action.default != argparse.SUPPRESS:
            flag = text[text.index(f"  {action.option_strings[-1]}"):].split("\n  -")[0]
            assert f"{action.default}" in " ".join(flag.split()), action.option_strings


# ---- fuzz

WATCHED = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.remove",
           "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
           "socket.connect", "socket.bind", "shutil.rmtree"}
watch = {"inside": None, "seen": []}


def audit(event, arguments):
    """Python tells this of every file that is opened and every process that is started."""
    if watch["inside"] is None:
        return
    if event == "open":
        path, _, flags = arguments
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        inside = isinstance(path, int) or os.fsdecode(path).startswith(watch["inside"])
        if writes and not inside and "__pycache__" not in os.fsdecode(path):
            watch["seen"].append((event, arguments))
    elif event in WATCHED and not str(arguments[0]).startswith(watch["inside"]):
        watch["seen"].append((event, arguments))


def mutated(content, draw):
    """The bytes with one to four faults: flipped, cut, doubled, zeroed, or numbers put in."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(len(content), 1)) if draw.random() < 0.5 else draw.randrange(
            max(min(len(content), 64), 1))  # heads decide more
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at:at + draw.randint(1, 40)]
        elif kind == 2:
            content[at:at] = content[at:at + draw.randint(1, 40)]
        elif kind == 3:
            content[at:at + 4] = struct.pack("<I", draw.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1)))
        elif kind == 4:
            content[at:at] = draw.choice((b"\x00", b"\xff\xfe", b'"', b"\r", b";", b"..", b"/",
                                          b"\xf0\x9f", b"-1", b"1e999", b"null", b"{", b"]"))
        elif len(content) > 1:
            del content[draw.randrange(len(content)):]
    return bytes(content)


JUNK = (None, True, -1, 0, 2**31, 1e308, float("nan"), "", "\x00", [], {}, (), [[]], torch.zeros(0),
        torch.zeros(3), torch.full((2, 2), float("inf")), torch.zeros(1, dtype=torch.int64), b"x")


def mutated_tree(tree, draw):
    """Nested dicts and lists with one entry dropped, renamed, or replaced by junk."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw.choice(keys) if keys else None
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if key is None or not isinstance(copy[key], (dict, list, tuple)) or draw.random() < 0.2:
        if isinstance(copy, dict) and key is not None and draw.random() < 0.4:
            value = copy.pop(key)
            if draw.random() < 0.5:
                copy[draw.choice(("x", "", 5, f"{key}.x"))] = value
        elif key is not None:
            copy[key] = draw.choice(JUNK)
    else:
        copy[key] = mutated_tree(copy[key], draw)
    return copy


def safetensors(tensors):
    """The bytes of a .safetensors file."""
    header, body = {}, b""
    for name, array in tensors.items():
        raw = array.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def saved(write, *args, **kwargs):
    """The bytes that a function which writes to a file writes."""
    file = io.BytesIO()
    write(*(file if a is io else a for a in args), **kwargs)
    return file.getvalue()


def fuzz_cases(tmp_path):
    """kind -> (how many, contents to spoil, suffix, reader of a path, errors it may raise)."""
    small = NOISE[:12, :12]
    content = small_model()
    vae_weights = vae.AutoencoderKL(SMALL.vae).state_dict()
    folder_with(tmp_path / "set", {}, good=2)

    def read_folder(path):
        (tmp_path / "set" / "labels.csv").write_bytes(path.read_bytes())
        open_dataset(tmp_path / "set", 8)

    def read_config(path):
        (tmp_path / "run" / "config.json").write_bytes(path.read_bytes())
        train.parse(["--resume", "--out", str(tmp_path / "run")])

    def read_model(path):
        sample.load_model(path, torch.device("cpu"))

    def read_split(path):
        splits.read_split(path, open_dataset("phantoms", 16, count=2))

    (tmp_path / "run").mkdir()
    deep = saved(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save, io, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [encoded(kind, small, **options) for kind, options in (
        ("PNG", {}), ("JPEG", {"exif": exif}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}), ("BMP", {}), ("WEBP", {}), ("WEBP", {"lossless": True}))] + [deep]
    table = "\ufefffile;label;age\r\ngood_00.png;a, b;\"4;2\"\r\ngood_01.png;ü;\r\n".encode()
    arrays = {"train_images": small[None], "train_labels": np.ones((1, 1)),
              "test_images": small[None], "test_labels": np.ones((1, 1))}
    ours = (UserError,)
    floor_1 = (ValueError, OSError)
    return {
        "images": (2700, pictures, ".png", lambda path: load_image(path, 8), ours),
        "tables": (700, [table, b"file,split\nphantom_000000,test\n"], ".csv",
                   files.read_csv, ours),
        "folders with tables": (200, [table], ".csv", read_folder, ours),
        "splits": (100, [b"file,split\nphantom_000000,test\nphantom_000001,train\n"], ".csv",
                   read_split, ours),
        "MedMNIST files": (300, [saved(np.savez, io, **arrays)], ".npz",
                           lambda path: open_dataset(path, 8), ours),
        "models, bytes": (250, [saved(torch.save, content, io)], ".pt", read_model, ours),
        "embedders": (250, [saved(torch.save, content["embedder"], io)], ".pth", dino.load_dino,
                      floor_1),
        "VAE weights": (250, [saved(torch.save, vae_weights, io)], ".pth",
                        vae.AutoencoderKL.from_pretrained, floor_1),
        "safetensors": (400, [safetensors(vae_weights)], ".safetensors",
                        vae.AutoencoderKL.from_pretrained, floor_1),
        "settings": (250, [json.dumps({"size": 32, "batch": 4, "lr": 1e-3}).encode()], ".json",
                     read_config, ours),
        "logs": (100, [b'{"stage": "vae", "step": 1}\n{"stage": "unet", "step": 2}\n'], ".jsonl",
                 files.read_jsonl, ours),
    }


@pytest.mark.filterwarnings("ignore")
def test_fuzz(tmp_path, seed=0):
    """Over 5,000 spoiled inputs to every reader: it reads them or raises the project's own error;
    no other crash, no file written outside the folder, no process or connection started."""
    draw, counts, refused = random.Random(seed), Counter(), Counter()
    sys.addaudithook(audit)
    (tmp_path / "set").mkdir()
    cases = fuzz_cases(tmp_path)
    content = small_model()
    encoder = prompts.PromptEncoder(["cancer", "healthy", "type", "one"], 8, depth=1, num_heads=2)
    watch.update(inside=str(tmp_path), seen=[])

    def attempt(kind, errors, read, *what):
        counts[kind] += 1
        try:
            read(*what)
        except errors as error:
            refused[kind] += 1
            assert str(error).strip(), kind
        except Exception as error:
            raise AssertionError(f"{kind} number {counts[kind]}: {type(error).__name__}: {error}"
                                 ) from error
    try:
        for kind, (number, contents, suffix, read, errors) in cases.items():
            path = tmp_path / f"spoiled{suffix}"
            for i in range(number):
                path.write_bytes(mutated(contents[i % len(contents)], draw))
                attempt(kind, errors, read, path)
        for _ in range(150):
            attempt("models, content", ValueError, DinoDiffusion.from_checkpoint,
                    mutated_tree(content, draw))
        for _ in range(400):
            words = [draw.choice(("cancer", "type", "one", "", " ", "\x00", "<label>", "🫁", "é",
                                  "cancer-type", "\u202e", "x" * 999))
                     for _ in range(draw.randint(0, 40))]
            attempt("prompts", ValueError, encoder.tokenize, [" ".join(words)])
    finally:
        watch["inside"] = None
    assert sum(counts.values()) >= 5000 and not watch["seen"], watch["seen"][:5]
    print("; ".join(f"{kind} {n:,}, refused {refused[kind]:,}" for kind, n in counts.items()),
          f"; {sum(counts.values()):,} in all")
    assert all(refused[kind] for kind in counts if kind != "logs")
