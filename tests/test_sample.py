"""sample.py: every way to sample, from small models with random weights; tables, errors, memory."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import sample
from small_run import make, pixels, write_run
from dinodiff import DinoDiffusion
from support import files, sample_folder
from support.command import UserError
from support.datasets import open_dataset
from unet import UNetConfig

WORDS = "Histology image of cancer tissue, morphology type"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A model that follows prompts: 3 clusters x 2 labels; the last one has no training image."""
    return write_run(tmp_path_factory.mktemp("runs") / "prompted", condition="prompts",
                     labels=("cancer", "healthy"), clusters=3,
                     template="Histology image of <label> tissue, morphology type <index>")


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "none", condition="none")


# ---- what is written

@pytest.mark.parametrize("arguments,says,count", [
    (["--from-image", "IMAGE", "--count", "2"], "reconstruct", 2),
    (["--from-image", "FOLDER"], "reconstruct", 8),
    (["--from-image", "IMAGE", "--strength", "0.5", "--guidance-scale", "2",
      "--guidance-rescale", "0.7"],
     "img2img", 1),
    (["--interpolate", "IMAGE", "IMAGE2", "--frames", "3", "--count", "2"], "interpolate", 6),
    (["--prototypes", "2", "--count", "2"], "prototype", 4),
    (["--random", "--count", "2", "--sampler", "ddpm"], "random", 2),
    (["--random", "--count", "2", "--sampler", "ddim"], "random", 2),
])
def test_every_way_to_sample_writes_images_grid_and_table(small_run, tmp_path, arguments, says,
                                                          count):
    """PNGs of the model's side, a grid, and one row of provenance for each image."""
    rows = make(small_run, tmp_path / "out", *arguments)
    assert len(rows) == count and {row["strategy"] for row in rows} == {says}
    assert len({row["seed"] for row in rows}) == (2 if says == "interpolate" else len(rows))
    for row in rows:
        assert Image.open(tmp_path / "out" / row["file"]).size == (32, 32)
        assert bool(row["sources"]) == bool(row["weights"]) == (says != "random")
    assert len(list((tmp_path / "out" / "images").iterdir())) == count
    assert (tmp_path / "out" / "grid.png").is_file()
    if says == "interpolate":
        assert [row["weights"] for row in rows[:3]] == ["1.000|0.000", "0.500|0.500", "0.000|1.000"]
        assert rows[0]["sources"] == f"{small_run}/held_out/0.png|{small_run}/held_out/1.png"
    if says == "prototype":
        assert [row["sources"][:11] for row in rows] == ["prototype 0"] * 2 + ["prototype 1"] * 2


def test_labels_are_inherited_from_a_folders_own_table(small_run, tmp_path):
    """Of a folder, its labels.csv comes back in samples.csv, with the rule; a file alone has none,
    whatever tables lie around it."""
    rows = make(small_run, tmp_path / "out", "--from-image", "FOLDER", steps=1)
    assert [row["label_finding"] for row in rows] == ["none", "effusion"] * 4
    assert {row["label_rule"] for row in rows} == {"of the source"}
    rows = make(small_run, tmp_path / "bare", "--from-image", "IMAGE", steps=1)
    assert rows[0]["label_rule"] == "" and "label_finding" not in rows[0]


def test_a_broken_source_is_left_out_and_named(small_run, tmp_path, capsys):
    """Before the first image is made; if none is left, the line is an error."""
    (tmp_path / "set").mkdir()
    whole = (small_run / "held_out" / "0.png").read_bytes()
    for i in range(4):
        (tmp_path / "set" / f"{i}.png").write_bytes(whole[:len(whole) // 2] if i == 2 else whole)
    for i in range(4, 16):
        (tmp_path / "set" / f"{i}.png").write_bytes(whole if i < 15 else b"no header")
    rows = make(small_run, tmp_path / "out", "--from-image", str(tmp_path / "set"), steps=1)
    assert {Path(row["sources"]).stem for row in rows} == {*map(str, range(15))} - {"2"}
    assert "2 of 16 sources left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="2.png"):
        make(small_run, tmp_path / "no", "--from-image", str(tmp_path / "set" / "2.png"))
    assert not (tmp_path / "no").exists()


def test_a_call_that_is_cut_off_leaves_a_table_of_what_is_there(small_run, tmp_path, monkeypatch):
    """An image of the second batch cannot be written: the table has the first batch alone."""
    save = sample_folder.save_png

    def full(path, image, sync):
        if "00002" in str(path):
            raise UserError("no space")
        save(path, image, sync)
    monkeypatch.setattr(sample_folder, "save_png", full)
    with pytest.raises(UserError, match="no space"):
        make(small_run, tmp_path / "out", "--random", "--count", "4", "--batch", "2", steps=1)
    assert len(files.read_csv(tmp_path / "out" / "samples.csv")) == 2


# ---- what an image depends on

@pytest.mark.parametrize("arguments", [
    ["--random", "--count", "5"], ["--from-image", "FOLDER"],
    ["--interpolate", "IMAGE", "IMAGE2", "--frames", "5", "--guidance-scale", "20"],
    ["--from-image", "FOLDER", "--strength", "0.5", "--sampler", "dpm"]])
def test_same_seed_same_file_whatever_the_batch(small_run, tmp_path, arguments):
    """At batch 5 and at batch 2 images differ by at most one grey level of rounding."""
    one, other = (pixels(out, make(small_run, out, *arguments, "--batch", out.name, steps=3))
                  for out in (tmp_path / "5", tmp_path / "2"))
    assert (one - other).abs().max() <= 1
    assert (one[0] - one[-1]).abs().max() > 1


def test_noise_is_of_the_seed(small_run, tmp_path):
    """--seed S gives image j the seed S + j: the images of two calls overlap."""
    first = pixels(tmp_path / "a", make(small_run, tmp_path / "a", "--random", "--count", "3"))
    second = pixels(tmp_path / "b", make(small_run, tmp_path / "b", "--random", "--count", "2",
                                         "--seed", "1"))
    assert (first[1:] - second).abs().max() <= 1


def test_an_animation_ends_in_the_grid(tmp_path):
    """animation.gif: a frame for each step and one for the refiner; the last is grid.png, the first
    is not, and all sources stand still; the images are those made without it."""
    refiner = UNetConfig(8, 4, 8, (1, 2), 1, (False, False), 8, 2)
    run = write_run(tmp_path / "run", refiner=refiner)
    request = ["--from-image", "IMAGE", "IMAGE2", "--count", "2", "--batch", "3"]
    rows = make(run, tmp_path / "a", *request, "--animate", steps=4)
    plain = make(run, tmp_path / "b", *request, steps=4)
    assert (pixels(tmp_path / "a", rows) == pixels(tmp_path / "b", plain)).all()
    assert rows[0]["refined"] == "True"
    assert not (tmp_path / "b" / "animation.gif").exists()

    animation = Image.open(tmp_path / "a" / "animation.gif")
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert len(frames) == 5
    assert (frames[-1] == grid).all()
    for frame in frames[:-1]:
        assert (frame[:, :130] == grid[:, :130]).all() and (frame != grid).any()


# ---- prompts

def test_samples_by_prompt_and_a_balanced_labelled_set(prompted, tmp_path):
    """--prompt writes --count images of the words; --each-prompt N of every prompt in use, with
    labels from the table; the folder opens as a labelled data set; words that are no training
    prompt have no label."""
    rows = make(prompted, tmp_path / "a", "--prompt", f"{WORDS} two", "--count", "3")
    assert [(r["prompt"], r["label"], r["seed"]) for r in rows] == [
        (f"{WORDS} two", "cancer", str(i)) for i in range(3)]
    rows = make(prompted, tmp_path / "b", "--each-prompt", "2")
    model = DinoDiffusion.from_checkpoint(files.load_checkpoint(prompted / "model.pt"))
    used = model.prompts[:5]
    assert [row["prompt"] for row in rows] == [prompt for prompt in used for _ in range(2)]
    dataset = open_dataset(tmp_path / "b", 32, table=tmp_path / "b" / "samples.csv")
    assert sorted(dataset.columns["prompt"]) == sorted([*used, *used])
    assert all(label in prompt for label, prompt in zip(dataset.columns["label"],
                                                        dataset.columns["prompt"]))
    rows = make(prompted, tmp_path / "c", "--random", "--count", "4", "--guidance-scale", "3")
    assert {row["prompt"] for row in rows} <= set(used)
    rows = make(prompted, tmp_path / "d", "--prompt", "healthy tissue")
    assert rows[0]["label_rule"] == "" and "label" not in rows[0]


@pytest.mark.parametrize("flags,says", [
    (["--from-image", "x.png"], "--prompt"),
    (["--prompt", "image of a seventeen legged cat"], "cat"),
])
def test_a_prompt_model_refuses_what_it_cannot_follow(prompted, tmp_path, flags, says):
    """Unknown words list the known ones; images are no condition here; nothing is written."""
    with pytest.raises(UserError, match=says):
        sample.main([*flags, "--checkpoint", str(prompted), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_other_models_refuse_what_they_cannot_follow(small_run, unconditional, tmp_path):
    """Prompts for a model of tokens; sources for an unconditional one, which samples at random and
    from start images; a model without its mixture."""
    with pytest.raises(UserError, match="knows no prompts"):
        make(small_run, tmp_path / "out", "--prompt", "cancer")
    with pytest.raises(UserError, match="cannot follow a source"):
        make(unconditional, tmp_path / "out", "--from-image", "IMAGE")
    with pytest.raises(UserError, match="it needs two"):
        make(small_run, tmp_path / "out", "--interpolate", "FOLDER", "IMAGE")
    checkpoint = torch.load(small_run / "model.pt", weights_only=True)
    files.save_atomic(tmp_path / "model.pt", {**checkpoint, "embedding_sampler": None})
    with pytest.raises(UserError, match="no embedding sampler"):
        make(tmp_path / "model.pt", tmp_path / "out", "--random")
    assert not (tmp_path / "out").exists()
    assert len(make(unconditional, tmp_path / "a", "--random", "--count", "2")) == 2
    assert len(make(unconditional, tmp_path / "b", "--from-image", "IMAGE", "--strength",
                    "0.5")) == 1


# ---- limits and mistakes

def test_a_model_that_gives_no_numbers_is_named(small_run, tmp_path):
    """NaN in the weights would be black images: sample.py stops and writes none."""
    checkpoint = torch.load(small_run / "model.pt", weights_only=True)
    checkpoint["vae"]["decoder.conv_out.bias"].fill_(float("nan"))
    files.save_atomic(tmp_path / "model.pt", checkpoint)
    with pytest.raises(UserError, match="not finite"):
        make(tmp_path / "model.pt", tmp_path / "out", "--random", steps=1)
    assert not list((tmp_path / "out" / "images").iterdir())


@pytest.mark.parametrize("tokens", [
    np.zeros((20, 5, 13), np.float32), np.full((20, 5, 12), np.nan, np.float32),
    np.array([{}], object), None])
def test_prototypes_need_the_runs_tokens(small_run, tmp_path, tokens):
    """Tokens of another shape, not finite, pickled or missing: one line, and nothing is written."""
    (tmp_path / "model.pt").write_bytes((small_run / "model.pt").read_bytes())
    (tmp_path / "cache").mkdir()
    if tokens is not None:
        np.save(tmp_path / "cache" / "tokens.npy", tokens)
    with pytest.raises(UserError, match="tokens"):
        make(tmp_path, tmp_path / "out", "--prototypes", "2")
    assert not (tmp_path / "out").exists()
