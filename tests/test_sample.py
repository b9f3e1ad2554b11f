"""sample.py: every way to sample, from small models with random weights; tables, errors, memory."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from small_run import make, pixels, write_run
from support import files, sample_folder
from support.command import UserError
from support.datasets import open_dataset
from support.seeds import step_seed

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
    (["--from-image", "FOLDER", "--perturb", "0.5"], "perturb", 8),
    (["--from-image", "IMAGE", "--strength", "0.5", "--guidance", "2", "--guidance-rescale", "0.7"],
     "img2img", 1),
    (["--interpolate", "IMAGE", "IMAGE2", "--frames", "3", "--count", "2"], "interpolate", 6),
    (["--prototypes", "2", "--count", "2"], "prototype", 4),
    (["--random", "--count", "2", "--sampler", "ddpm"], "random", 2),
    (["--random", "--count", "2", "--sampler", "dpm", "--dtype", "bf16"], "random", 2),
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
    assert Image.open(tmp_path / "out" / "grid.png").size[0] >= 128
    if says == "interpolate":
        assert [row["weights"] for row in rows[:3]] == ["1.000|0.000", "0.500|0.500", "0.000|1.000"]
        assert rows[0]["sources"] == f"{small_run}/held_out/0.png|{small_run}/held_out/1.png"
        assert rows[0]["label_rule"] == "of the nearer source"
    if says == "prototype":
        assert [row["sources"][:11] for row in rows] == ["prototype 0"] * 2 + ["prototype 1"] * 2


def test_labels_are_inherited_from_the_source(small_run, tmp_path, monkeypatch):
    """labels.csv beside a source: its cells come back in samples.csv, with the rule."""
    rows = make(small_run, tmp_path / "out", "--from-image", "FOLDER", steps=1)
    assert [row["label_finding"] for row in rows] == ["none", "effusion"] * 4
    assert {row["label_rule"] for row in rows} == {"of the source"}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes((small_run / "held_out" / "0.png").read_bytes())
    rows = make(small_run, tmp_path / "bare", "--from-image", str(tmp_path / "x"), steps=1)
    assert rows[0]["label_rule"] == "" and "label_finding" not in rows[0]


# ---- what an image depends on

@pytest.mark.parametrize("arguments", [
    ["--random", "--count", "5"], ["--from-image", "FOLDER", "--perturb", "0.3"],
    ["--interpolate", "IMAGE", "IMAGE2", "--frames", "5", "--guidance", "20"],
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


def test_perturbation_and_start_noise_are_different_draws():
    """The generator of the tokens' noise must not repeat the one of the latent: torch's CPU
    generator keeps 32 bits of a seed, so seed + 2^40 would be the same stream."""
    one, other = (torch.randn(64, generator=torch.Generator().manual_seed(seed))
                  for seed in (5, step_seed("perturb", 5)))
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.5


def test_bf16_differs_by_less_than_a_grey_level_on_average(small_run, tmp_path):
    """--dtype bf16 rounds the U-Net's products alone; the table says which it was. On a CPU auto
    means float32."""
    whole, half, auto = (make(small_run, tmp_path / dtype, "--random", "--count", "4", "--dtype",
                              dtype, "--sampler", "dpm") for dtype in ("float32", "bf16", "auto"))
    assert whole[0]["dtype"] == auto[0]["dtype"] == "float32" and half[0]["dtype"] == "bfloat16"
    gap = (pixels(tmp_path / "float32", whole) - pixels(tmp_path / "bf16", half)).abs()
    assert 0 < gap.float().mean() < 1
    assert torch.equal(pixels(tmp_path / "float32", whole), pixels(tmp_path / "auto", auto))


def test_each_source_is_read_once_as_the_model_was_trained(small_run, tmp_path, monkeypatch):
    """Three images of each of eight sources in batches of four: eight reads in order, by the grey
    rule of the training images, and no image that was written is read again."""
    checkpoint = torch.load(small_run / "model.pt", weights_only=True)
    checkpoint["training"]["depth"] = {"rule": "of the set"}
    files.save_atomic(tmp_path / "model.pt", checkpoint)
    read, load = [], sample.load_image

    def load_and_note(path, size, depth):
        assert size == 32 and depth == {"rule": "of the set"}
        read.append(path.name)
        return load(path, size, None)
    monkeypatch.setattr(sample, "load_image", load_and_note)
    monkeypatch.setattr(sample_folder, "GRID_LINES", 0)
    monkeypatch.setattr(sample.SampleFolder, "write_grid", lambda *arguments, **names: None)
    sample.main(["--from-image", str(small_run / "held_out"), "--count", "3", "--strength", "0.5",
                 "--batch", "4", "--steps", "2", "--checkpoint", str(tmp_path / "model.pt"),
                 "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert read == [f"{i}.png" for i in range(8)]


def test_memory_does_not_grow_with_the_number_of_sources(small_run, tmp_path, monkeypatch):
    """2,000 sources of 512 x 512 pixels would be 6 GB as tensors; they pass one batch at a time."""
    source = small_run / "held_out" / "0.png"
    (tmp_path / "many").mkdir()
    for i in range(2000):
        (tmp_path / "many" / f"{i}.png").hardlink_to(source)
    alive = 0
    most = 0

    class Held(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def load(path, size, depth):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.zeros(3, 32, 32).as_subclass(Held)
    monkeypatch.setattr(sample, "load_image", load)
    monkeypatch.setattr(sample, "make_images",
                        lambda requests, args, model, read, centers, dtype: torch.stack(
                            [read(request.sources[0]).as_subclass(torch.Tensor)
                             for request in requests]))
    monkeypatch.setattr(sample_folder, "save_pngs", lambda paths, images: None)
    rows = make(small_run, tmp_path / "out", "--from-image", str(tmp_path / "many"), "--batch",
                "50")
    assert len(rows) == 2000 and most <= 120


# ---- prompts

def test_samples_by_prompt_and_a_balanced_labelled_set(prompted, tmp_path, capsys):
    """--prompt writes --count images of the words; --each-prompt N of every prompt in use, with
    labels from the table; the folder opens as a labelled data set."""
    rows = make(prompted, tmp_path / "a", "--prompt", f"{WORDS} two", "--count", "3")
    assert [(r["prompt"], r["label"], r["seed"]) for r in rows] == [
        (f"{WORDS} two", "cancer", str(i)) for i in range(3)]
    rows = make(prompted, tmp_path / "b", "--each-prompt", "2")
    model, *_ = sample.load_model(prompted, torch.device("cpu"))
    used = model.prompts[:5]
    assert [row["prompt"] for row in rows] == [prompt for prompt in used for _ in range(2)]
    assert Image.open(tmp_path / "b" / "grid.png").height == 2 + 5 * 130
    made = open_dataset(tmp_path / "b", 32)
    assert sorted(made.columns["prompt"]) == sorted([*used, *used])
    assert all(label in prompt for label, prompt in zip(made.columns["label"],
                                                        made.columns["prompt"]))
    rows = make(prompted, tmp_path / "c", "--random", "--count", "4", "--guidance", "3")
    assert {row["prompt"] for row in rows} <= set(used)
    assert "note" not in capsys.readouterr().out
    rows = make(prompted, tmp_path / "d", "--prompt", "healthy tissue")
    assert rows[0]["label_rule"] == "" and "label" not in rows[0]
    assert "no training image had the prompt 'healthy tissue'" in capsys.readouterr().out


@pytest.mark.parametrize("flags,says", [
    (["--from-image", "x.png"], "--prompt"),
    (["--prompt", "image of a seventeen legged cat"], "cat"),
    (["--prompt", "cancer " * 40], "at most"),
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
    with pytest.raises(UserError, match="cannot follow a source"):
        make(unconditional, tmp_path / "out", "--prototypes", "2")
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

@pytest.mark.parametrize("guidance", ["0", "1", "50"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm"])
def test_guidance_and_one_step(small_run, tmp_path, guidance, sampler):
    """Guidance 0, 1 and 50, in one step and in three: images that are no flat black."""
    for steps in (1, 3):
        rows = make(small_run, tmp_path / str(steps), "--random", "--count", "2", "--guidance",
                    guidance, "--sampler", sampler, steps=steps)
        assert all(image.float().std() > 0 for image in pixels(tmp_path / str(steps), rows))


def test_a_model_that_gives_no_numbers_is_named(small_run, tmp_path):
    """NaN in the weights would be black images: sample.py stops and writes none."""
    checkpoint = torch.load(small_run / "model.pt", weights_only=True)
    checkpoint["vae"]["decoder.conv_out.bias"].fill_(float("nan"))
    files.save_atomic(tmp_path / "model.pt", checkpoint)
    with pytest.raises(UserError, match="not finite"):
        make(tmp_path / "model.pt", tmp_path / "out", "--random", steps=1)
    assert not list((tmp_path / "out" / "images").iterdir())


class Payload(str):
    """Unpickling it would create a folder of that name."""
    def __reduce__(self):
        return Path.mkdir, (Path(self),)


@pytest.mark.parametrize("content", [
    np.zeros((20, 5, 13), np.float32), np.zeros(3), np.array([Payload("ran")], object), b"",
    b"\x93NUMPY\x01\x00\xff\xff", np.full((20, 5, 12), np.nan, np.float32), None])
def test_prototypes_need_the_runs_tokens(small_run, tmp_path, monkeypatch, content):
    """Tokens of another shape, not finite, pickled, empty, cut or missing: one line, and nothing is
    run or written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes((small_run / "model.pt").read_bytes())
    (tmp_path / "cache").mkdir()
    path = tmp_path / "cache" / "tokens.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError):
        make(tmp_path, tmp_path / "out", "--prototypes", "2")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


BAD_LINES = [
    ("", "--from-image"), ("--random --prototypes 2", "not allowed with"),
    ("--from-image /nowhere.png", "replace or remove"), ("--from-image TEXT", "replace or remove"),
    ("--from-image EMPTY", "name another folder"), ("--interpolate TEXT", "expected 2 arguments"),
    ("--interpolate TEXT TEXT", "replace or remove"), ("--prototypes 0", "pass 1"),
    ("--prototypes 25", "lower k"), ("--random --perturb 1", "pass it, or leave"),
    ("--random --perturb x", "pass"), ("--random --strength 0", "pass e.g. 0.6"),
    ("--random --frames 0", "pass 1"), ("--random --mix add", "choose from"),
    ("--random --count 0", "pass 1"), ("--random --count 99999999999", "pass 1"),
    ("--random --steps 0", "pass 1"), ("--random --steps 1001", "1 to 1000"),
    ("--random --sampler euler", "choose"), ("--random --guidance -1", "pass 0"),
    ("--random --guidance nan", "pass 0"),
    ("--random --guidance-rescale 2", "from 0 to 1"), ("--random --eta 2", "from 0 to 1"),
    ("--random --seed -1", "pass 0"), ("--random --batch 0", "pass 1"),
    ("--random --device tpu", "--device auto"), ("--random --dtype half", "choose"),
    ("--random --checkpoint nowhere", "python train.py"),
    ("--random --checkpoint TEXT", "python train.py"),
    ("--random --out TEXT", "pass another --out"),
    ("--random --out FULL", "pass another --out"), ("--random --nonsense", "--nonsense"),
]


@pytest.mark.parametrize("line,says", BAD_LINES)
def test_bad_command_lines(small_run, tmp_path, monkeypatch, capsys, line, says):
    """Each ends with code 2 and a message that says what to pass, without a traceback, and leaves
    nothing behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "samples.csv").write_text("file\n")
    (tmp_path / "TEXT").write_text("hello")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small").symlink_to(small_run)
    flags = line.split() + ([] if "--steps" in line else ["--steps", "1"])
    if "--out" not in line:
        flags += ["--out", "new"]
    with pytest.raises(SystemExit) as end:
        sample.run_script(lambda: sample.main(flags))
    error = capsys.readouterr().err
    assert end.value.code == 2 and says in error and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "FULL", "TEXT", "runs"]


def test_help_fits_two_screens(monkeypatch, capsys):
    """At most 100 lines of 80 columns; every flag has a text."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100 and not re.search(r"\n  --[a-z-]+\n", text)


def test_the_newest_run_is_the_default(small_run, tmp_path, monkeypatch, capsys):
    """Without --checkpoint and --out: the newest of runs/, and a new folder in its samples/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "new").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "model.pt").write_bytes((small_run / "model.pt").read_bytes())
    for name in ("random", "random_2"):
        assert sample.main(["--random", "--steps", "1", "--device", "cpu"]) == 0
        assert (tmp_path / "runs" / "new" / "samples" / name / "samples.csv").exists()
