"""train.py as a user runs it: tiny sizes, real files, real signals, on a CPU."""
import csv
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from dinodiff import DinoDiffusion
from prompts import balance
from support import images as images_module
from support import training_set
from support.cache import Latents
from support.command import UserError, run_script
from support.datasets import open_dataset
from support.files import load_checkpoint, read_jsonl
from support.pictures import save_png
from support.run import Run
from vae import VAEConfig

pytestmark = pytest.mark.usefixtures("small_networks")
ROOT = Path(__file__).parent.parent
TINY = ["--data", "phantoms", "--count", "40", "--size", "32", "--batch", "4", "--steps", "4",
        "--grids", "1", "--device", "cpu", "--dtype", "float32"]
PROMPTS = ["--data", "histology", "--condition", "prompts", "--clusters", "3", "--lr", "0.02"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four steps a stage, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert train.main([*TINY, "--out", str(folder)]) == 0
    return folder


def weights(folder):
    model = torch.load(folder / "model.pt", weights_only=True)
    return {f"{part}.{name}": tensor for part in ("vae", "unet", "projection", "statistics")
            for name, tensor in model[part].items()} | {
            f"embedder.{name}": tensor for name, tensor in model["embedder"]["model"].items()} | {
            f"sampler.{name}": tensor for name, tensor in model["embedding_sampler"].items()}


def model_of(folder):
    return DinoDiffusion.from_checkpoint(load_checkpoint(folder / "model.pt"))


def losses(folder):
    return [(r["stage"], r["step"], r["loss"]) for r in read_jsonl(folder / "log.jsonl")]


def test_a_run_leaves_what_it_promises(finished):
    """Config, log of three stages, split, curves, grid, model, state, cache, example sources."""
    for name in ("config.json", "log.jsonl", "split.csv", "curves.png", "model.pt", "state.pt",
                 "grid_000004.png", "cache/latents.npy", "cache/tokens.npy", "cache/index.csv"):
        assert (finished / name).stat().st_size > 0, name
    assert [row[:2] for row in losses(finished)] == [
        (stage, step) for stage in train.STAGES for step in (1, 2, 3, 4)]
    assert list((finished / "held_out").glob("*.png"))
    tokens = np.load(finished / "cache/tokens.npy", mmap_mode="r")
    held_out = sum(row["split"] == "test" for row in csv.DictReader(open(finished / "split.csv")))
    assert len(tokens) + held_out == 40 and held_out > 0


@pytest.mark.parametrize("stage,step", [("embedder", 2), ("vae", 3), ("unet", 1), ("unet", 3)])
def test_a_resumed_run_equals_one_never_stopped(finished, tmp_path, monkeypatch, stage, step):
    """Stopped at a step of each stage and resumed: weights and log are equal bit for bit."""
    look = Run.log

    def log_and_stop(self, **row):
        look(self, **row)
        if row["stage"] == stage and row["step"] == step:
            self.stop_signal = signal.SIGINT
    monkeypatch.setattr(Run, "log", log_and_stop)
    assert train.main([*TINY, "--out", str(tmp_path / "again")]) == 130
    monkeypatch.setattr(Run, "log", look)
    assert train.main(["--resume", "--out", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == losses(finished)
    mine, theirs = weights(tmp_path / "again"), weights(finished)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_previews_are_stops_that_change_nothing(finished, tmp_path, monkeypatch):
    """With four grids in place of one the loop ends and goes on four times: losses and weights are
    those of one go; stopped in the middle and resumed as well."""
    folder = tmp_path / "run"
    log = Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        if (row["stage"], row["step"]) == ("unet", 2):
            self.stop_signal = signal.SIGINT
    flags = [*TINY, "--grids", "4", "--out", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        assert train.main(flags) == 130
    assert train.main(["--resume", "--out", str(folder)]) == 0
    assert losses(folder) == losses(finished)
    mine, theirs = weights(folder), weights(finished)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len(list(folder.glob("grid_*.png"))) == 4


def test_fit_goes_on_where_a_run_stands(tmp_path):
    """Five steps in one go, and in three: the same weights, bit for bit; a run that is past `upto`
    makes no step."""
    def fitted(*stops):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        run = Run(tmp_path / str(len(stops)), {})
        ema = {name: p.detach().clone() for name, p in model.named_parameters()}

        def loss_fn(rows, step, generator):
            noise = torch.randn(1, generator=generator)
            return (model(*rows) - noise).square().sum(), {}
        for upto in stops:
            train.fit("line", model, loss_fn, Rows(), steps=5, upto=upto, batch=2, lr=0.1,
                      device=torch.device("cpu"), run=run, ema=ema)
        return [*model.parameters(), *ema.values()]
    whole = fitted(5)
    for parts in (fitted(1, 3, 5), fitted(2, 2, 4, 5)):
        assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """A real SIGINT to a real process: exit code 130, a state on disk, the command to type."""
    def work():
        sys.stdout = open(tmp_path / "output", "w", buffering=1)
        sys.exit(train.main([*TINY, "--embedder", "random", "--count", "8", "--vae-steps", "5000",
                             "--out", str(tmp_path / "run")]))
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        if log.exists() and '"vae"' in log.read_text():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(100)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 130, output
    assert "--resume" in output and (tmp_path / "run" / "state.pt").exists()


def test_learning_rate_warms_up_and_ends_near_zero():
    """Linear to the peak, then half a cosine."""
    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_windows_are_of_half_the_side_and_reach_every_corner():
    """Side and place are multiples of the autoencoder's factor; one seed, one place."""
    x = torch.arange(40 * 40).float().view(1, 1, 40, 40).repeat(2, 3, 1, 1)
    windows = [train.random_window(x, 8, seed) for seed in range(60)]
    assert {window.shape for window in windows} == {(2, 3, 16, 16)}
    places = {divmod(int(window[0, 0, 0, 0]), 40) for window in windows}
    assert places == {(row, column) for row in (0, 8, 16, 24) for column in (0, 8, 16, 24)}
    for window in windows:
        row, column = divmod(int(window[0, 0, 0, 0]), 40)
        torch.testing.assert_close(window, x[..., row:row + 16, column:column + 16])
    torch.testing.assert_close(windows[7], train.random_window(x, 8, 7))
    assert train.random_window(x[..., :8, :8], 8, 0).shape[-2:] == (8, 8)  # there is no half


def test_the_autoencoder_sees_windows_first_and_whole_images_at_the_end(tmp_path, monkeypatch):
    sides = []
    loss = train.vae_loss

    def watched(vae, images, *args, **options):
        sides.append(images.shape[-1])
        return loss(vae, images, *args, **options)
    monkeypatch.setattr(train, "vae_loss", watched)
    train.main([*TINY, "--vae-steps", "8", "--vae-windows", "0.75", "--embedder-steps", "1",
                "--unet-steps", "1", "--out", str(tmp_path / "run")])
    assert sides == [16] * 6 + [32] * 2


def test_ema_warms_up():
    """After n steps towards a constant, the EMA has forgotten its start: the product of the
    decays min(d, (1 + i) / (10 + i))."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = {"weight": torch.ones(1, 1)}
    left = 1.0
    train.fit("test", model, lambda rows, s, g: (0.0 * model(*rows).sum(), {}), Rows(), steps=20,
              batch=1, lr=1e-9, device=torch.device("cpu"), ema=ema,
              ema_decay=train.warmed_up(0.9))
    for step in range(20):
        left *= min(0.9, (1 + step) / (10 + step))
    assert abs(ema["weight"].item() - left) < 1e-5


class Rows:
    """Ten rows of ones."""
    def __len__(self):
        return 10

    def __getitems__(self, rows):
        return (torch.ones(len(rows), 1),)


def test_a_loss_that_is_not_finite_stops_the_run():
    """The error names step, learning rate and what to do."""
    model = torch.nn.Linear(1, 1)

    def loss_fn(rows, step, generator):
        return model(*rows).sum() * (float("nan") if step == 2 else 1.0), {}
    with pytest.raises(UserError, match="at step 3 .*learning rate.*lower --lr"):
        train.fit("test", model, loss_fn, Rows(), steps=5, batch=1, lr=1e-3,
                  device=torch.device("cpu"))


@pytest.mark.parametrize("flags", [
    ["--condition", "none"], ["--embedder", "random", "--tokens", "cls"],
    ["--tokens", "patch", "--accumulate", "2"],
    ["--prediction", "eps", "--min-snr", "5", "--perceptual", "0.1"]])
def test_other_settings_train_and_sample(tmp_path, flags):
    """The control, the ablations and the classic settings run end to end."""
    assert train.main([*TINY, *flags, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert model_of(tmp_path / "run").sample(None, [0, 1], steps=2).shape == (2, 3, 32, 32)


def test_a_folder_of_images_trains(tmp_path):
    """A user's folder with labels and patients: no patient on both sides of the split."""
    rng = np.random.RandomState(0)
    rows = ["file,patient"]
    (tmp_path / "mine" / "images").mkdir(parents=True)
    for i in range(24):
        Image.fromarray(rng.randint(0, 255, (40, 36), dtype=np.uint8)).save(
            tmp_path / "mine" / "images" / f"{i}.png")
        rows.append(f"{i}.png,p{i // 3}")
    (tmp_path / "mine" / "labels.csv").write_text("\n".join(rows))
    assert train.main(["--data", str(tmp_path / "mine"), "--steps", "2", "--size", "32",
                       "--batch", "4", "--holdout", "0.3", "--out", str(tmp_path / "run"),
                       "--device", "cpu"]) == 0
    sides = {}
    for row in csv.DictReader(open(tmp_path / "run" / "split.csv")):
        sides.setdefault(row["group"], set()).add(row["split"])
    assert len(sides) == 8 and all(len(s) == 1 for s in sides.values())


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A finished run on histology phantoms: 3 clusters x 2 labels."""
    folder = tmp_path_factory.mktemp("runs") / "prompted"
    assert train.main([*TINY, *PROMPTS, "--out", str(folder)]) == 0
    return folder


def test_prompts_are_derived_from_the_images(prompted):
    """prompts.csv: every training image with its label, its cluster and the words for both; the
    clusters are K-means on the cached tokens, and the sheet has a row for each."""
    rows = list(csv.DictReader(open(prompted / "prompts.csv")))
    split = {r["file"]: r["split"] for r in csv.DictReader(open(prompted / "split.csv"))}
    assert {row["file"] for row in rows} == {f for f, part in split.items() if part == "train"}
    words = ("zero", "one", "two")
    for row in rows:
        assert row["prompt"] == (f"Histology image of {row['label']} tissue, morphology type "
                                 f"{words[int(row['cluster'])]}")
    images = open_dataset("histology", 32, count=40)
    truth = dict(zip(images.files, images.columns["label"]))
    assert all(row["label"] == truth[row["file"]] for row in rows)
    model = model_of(prompted)
    tokens = torch.from_numpy(np.load(prompted / "cache/tokens.npy"))
    assert model.cluster_of(model.standardise(tokens)).tolist() == [int(r["cluster"]) for r in rows]
    assert model.prompt_counts.sum() == len(rows)
    assert Image.open(prompted / "morphologies.png").height > 3 * 128


@pytest.mark.parametrize("condition,clusters,prompts", [
    ("prompts", None, 10), ("labels", None, 2), ("prompts", "4", 8)])
def test_conditions_make_their_prompts(tmp_path, condition, clusters, prompts):
    """X-rays without labels: ten types; labels alone: two prompts; 4 clusters x 2 labels: eight."""
    source = "phantoms" if prompts == 10 else "histology"
    flags = ["--clusters", clusters] if clusters else []
    assert train.main([*TINY, "--steps", "1", "--data", source, "--condition", condition, *flags,
                       "--out", str(tmp_path / "run")]) == 0
    model = model_of(tmp_path / "run")
    assert len(model.prompts) == prompts
    assert model.prompts[-1] == {
        10: "Chest X-Ray image with morphology type nine", 2: "Histology image of healthy tissue",
        8: "Histology image of healthy tissue, morphology type three"}[prompts]


def test_a_resumed_prompt_run_equals_one_never_stopped(prompted, tmp_path, monkeypatch):
    """Stopped in the U-Net stage and resumed: the clusters are kept, weights equal bit for bit."""
    look = Run.log

    def stop(self, **row):
        look(self, **row)
        if (row["stage"], row["step"]) == ("unet", 2):
            self.stop_signal = signal.SIGINT

    flags = [*TINY, *PROMPTS, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop)
        assert train.main(flags) == 130
    monkeypatch.setattr(train, "kmeans", None)  # a second fit would fail
    assert train.main([*flags, "--resume"]) == 0
    ours, theirs = (torch.load(f / "model.pt", weights_only=True)
                    for f in (tmp_path / "run", prompted))
    for part in ("unet", "projection", "statistics"):
        for name, tensor in theirs[part].items():
            assert torch.equal(ours[part][name], tensor), name


def test_every_prompt_comes_equally_often(prompted):
    """One epoch of the balanced cache holds each prompt the same number of times, and all images
    of the commonest one."""
    numbers = torch.tensor([0] * 20 + [2] * 5 + [3] * 9)
    cache = Latents(prompted / "cache", numbers, balance(numbers.tolist(), 60))
    mean, std, condition = cache.__getitems__(list(range(len(cache))))
    assert condition.bincount().tolist() == [20, 0, 20, 20]
    assert mean.shape == std.shape and len(set(cache.order[condition == 0].tolist())) == 20


def test_the_same_prompt_and_seed_give_the_same_image_whatever_the_company(prompted):
    """A prompt's length does not change its neighbours: padding is masked, K is one for all."""
    model = model_of(prompted)
    short, long = "cancer", model.prompts[0]
    alone = model.sample(model.prompt_ids([short]), [5], steps=2, guidance_scale=2.0)
    beside = model.sample(model.prompt_ids([long, short]), [4, 5], steps=2, guidance_scale=2.0)
    assert torch.allclose(alone[0], beside[1], atol=1e-5)  # float32 sums in another order
    other = model.sample(model.prompt_ids([long]), [5], steps=2)
    assert not torch.allclose(alone[0], other[0], atol=1e-5)  # after four steps they differ little


def test_the_empty_prompt_is_the_null_condition(prompted):
    """At guidance 1 the empty prompt and no condition give one and the same image."""
    model = model_of(prompted)
    empty = model.sample(model.prompt_ids([""]), [0], steps=2)
    assert torch.equal(empty, model.sample(None, [0], steps=2))


def test_outliers_are_left_out_and_named(tmp_path):
    """Black, blank and blurred patches of a colour folder are dropped and listed with a reason."""
    images = open_dataset("histology", 64, count=24)
    for i in range(24):
        save_png(tmp_path / f"patches/{i:02d}.png", images[i])
    save_png(tmp_path / "patches/black.png", torch.full((3, 64, 64), -0.95))
    save_png(tmp_path / "patches/white.png", torch.full((3, 64, 64), 0.95))
    save_png(tmp_path / "patches/blur.png", torch.nn.functional.avg_pool2d(
        images[3][None], 31, 1, 15)[0])
    flags = [*TINY, "--steps", "1", "--data", str(tmp_path / "patches"), "--size", "64",
             "--embedder", "random"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    rows = {r["file"]: r["reason"] for r in csv.DictReader(open(tmp_path / "run/outliers.csv"))}
    assert rows == {"black.png": "black", "white.png": "blank", "blur.png": "out of focus"}
    listed = {r["file"] for r in csv.DictReader(open(tmp_path / "run/split.csv"))}
    assert not listed & set(rows) and len(listed) == 24
    assert train.main([*flags, "--no-drop-outliers", "--out", str(tmp_path / "all")]) == 0
    assert not (tmp_path / "all/outliers.csv").exists()


@pytest.mark.parametrize("table,flags,says", [
    (None, ["--condition", "labels"], "no label column 'label'"),
    ("file,label\n00.png,a\n01.png,b\n", ["--label-column", "grade"], "no label column 'grade'"),
    ("file,label\n" + "".join(f"{i:02d}.png,a\n" for i in range(12)), [], "holds only 'a'"),
    ("file,label\n" + "".join(f"{i:02d}.png,{'ab'[i % 2] * (i > 0)}\n" for i in range(12)), [],
     "is empty for 1 images"),
    ("file,label\n" + "".join(f"{i:02d}.png,{'ab'[i % 2]}\n" for i in range(12)),
     ["--clusters", "50"], "--clusters 50 for"),
    ("file,label\n" + "".join(f"{i:02d}.png,{'ab'[i % 2]}\n" for i in range(12)),
     ["--clusters", "2", "--template", "a photo of <label>"], "lacks <index>"),
])
def test_labels_that_make_no_prompts_are_refused(tmp_path, table, flags, says):
    """Missing or one-valued columns, empty cells, too many clusters, a template that does not fit:
    one clear error each, nothing written."""
    images = open_dataset("phantoms", 32, count=12)
    for i in range(12):
        save_png(tmp_path / f"in/{i:02d}.png", images[i])
    if table:
        (tmp_path / "in/labels.csv").write_text(table)
    with pytest.raises(UserError, match=says):
        train.main([*TINY, "--data", str(tmp_path / "in"), "--condition", "prompts", *flags,
                    "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_resume_with_other_images_is_refused(tmp_path, monkeypatch):
    """Images that came or went since the start: an error, and split.csv stays as it was."""
    log = Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        self.stop_signal = signal.SIGINT
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        assert train.main([*TINY, "--out", str(folder)]) == 130
    before = (folder / "split.csv").read_text()
    opened = training_set.open_dataset
    monkeypatch.setattr(training_set, "open_dataset", lambda name, size, seed, count, **more:
                        opened(name, size, seed, 41, **more))
    with pytest.raises(UserError, match="images differ"):
        train.main(["--resume", "--out", str(folder)])
    assert (folder / "split.csv").read_text() == before


def test_readme_commands_start(tmp_path, monkeypatch):
    """Every `python train.py` of the README has flags that exist."""
    monkeypatch.chdir(tmp_path)
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]  # the fenced ones
    lines = [line for block in blocks for line in block.splitlines() if "train.py" in line]
    words = [shlex.split(line, comments=True) for line in lines]
    commands = [line[2:] for line in words if line[:2] == ["python", "train.py"]]
    assert len(commands) >= 3
    for command in commands:
        assert train.main([*command, "--dry-run"]) == 0


def test_dry_run_forecasts_the_cache(finished, tmp_path, monkeypatch):
    """Bytes an image times images is the size of the files (headers: 128 bytes); nothing is
    written; a folder that is not there gives settings without a forecast; images in files are
    kept as float16 pixels beside."""
    monkeypatch.chdir(tmp_path)

    def forecast(*flags):
        return train.forecast_cache(train.parse([*TINY, "--dry-run", *flags]))
    told, rows = forecast(), sum(1 for _ in open(finished / "cache/index.csv")) - 1
    size = sum((finished / "cache" / name).stat().st_size - 128
               for name in ("latents.npy", "tokens.npy"))
    assert told["bytes_an_image"] * rows == size and told["images"] == 40
    shutil.copytree(finished / "held_out", "mine/images")
    mine = forecast("--data", "mine")
    assert mine["images"] == len(list(Path("mine").rglob("*.png")))
    assert mine["bytes_an_image"] == told["bytes_an_image"] + 2 * 3 * 32 ** 2
    assert set(forecast("--data", "nowhere")) == {"note"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_each_file_is_decoded_once(tmp_path, monkeypatch, kind):
    """A run decodes each file once, outliers included; a resume whose cache is complete decodes
    the held-out examples alone."""
    chests = open_dataset("histology", 32, count=20)
    (tmp_path / "in").mkdir()
    for i in range(20):
        picture = ((chests[i] + 1) * 127.5).byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(tmp_path / "in" / f"{i:02d}.{kind.lower()}")
    decoded = Counter()
    decode = images_module._decode

    def count(path, *rest):
        decoded[Path(path).name] += 1
        return decode(path, *rest)
    monkeypatch.setattr(images_module, "_decode", count)

    log = Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        if (row["stage"], row["step"]) == ("unet", 2):
            self.stop_signal = signal.SIGINT
    flags = [*TINY, "--data", str(tmp_path / "in"), "--steps", "3", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        assert train.main(flags) == 130
    assert len(decoded) == 20 and set(decoded.values()) == {1}

    decoded.clear()
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    split = csv.DictReader(open(tmp_path / "run" / "split.csv"))
    held_out = {row["file"] for row in split if row["split"] == "test"}
    assert set(decoded) == held_out and set(decoded.values()) == {1}


def test_a_folder_that_moved_goes_on(tmp_path, monkeypatch):
    """--resume --data NEW: the same names, and the run ends; a folder of other names is refused."""
    images = open_dataset("phantoms", 32, count=12)
    for i in range(12):
        save_png(tmp_path / f"old/{i:02d}.png", images[i])
    log = Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        self.stop_signal = signal.SIGINT
    run = ["--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        assert train.main([*TINY, "--data", str(tmp_path / "old"), "--steps", "2", *run]) == 130
    (tmp_path / "old").rename(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "more")
    save_png(tmp_path / "more/12.png", images[0])
    (tmp_path / "fewer").mkdir()
    shutil.copy(tmp_path / "new/00.png", tmp_path / "fewer")
    with pytest.raises(UserError, match="images differ.*12.png"):
        train.main(["--resume", "--data", str(tmp_path / "more"), *run])
    with pytest.raises(UserError, match="01.png"):
        train.main(["--resume", "--data", str(tmp_path / "fewer"), *run])
    with pytest.raises(UserError, match="--data histology differs"):
        train.main(["--resume", "--data", "histology", *run])
    assert train.main(["--resume", "--data", str(tmp_path / "new"), *run]) == 0
    settings = json.loads((tmp_path / "run/config.json").read_text())
    training = load_checkpoint(tmp_path / "run/model.pt")["training"]
    assert settings["data"] == training["data"] == str(tmp_path / "new") and "depth" in training


def test_dry_run_prints_the_settings_and_writes_nothing(tmp_path, capsys):
    """--dry-run: JSON with every flag resolved, no folder."""
    assert train.main(["--dry-run", "--preset", "sd15", "--out", str(tmp_path / "x")]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert settings["prediction"] == "eps" and settings["zero_snr"] is False
    assert settings["size"] == 512 and not (tmp_path / "x").exists()


BAD = [
    (["--data", "/nowhere"], "/nowhere"),
    (["--data", "EMPTY"], "no image"),
    (["--size", "50"], "multiple of 8"),
    (["--embedder", "resnet"], "dino_vits16"),
    (["--embedder", "TEXT"], "TEXT"),
    (["--vae", "TEXT"], "TEXT"),
    (["--preset", "huge"], "tiny"),
    (["--steps", "0"], "0"),
    (["--batch", "8", "--accumulate", "3"], "divisor"),
    (["--out", "/proc/run"], "--out"),
    (["--prediction", "eps", "--zero-snr"], "prediction 'v'"),
    (["--device", "tpu"], "tpu"),
]


@pytest.mark.parametrize("arguments,says", BAD, ids=range(len(BAD)))
def test_a_users_mistake_ends_in_one_clear_message(tmp_path, monkeypatch, capsys, arguments, says):
    """Exit code 2, the message names what is needed, no run folder is left."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXT").write_text("hello")
    monkeypatch.chdir(tmp_path)
    if "--steps" not in arguments:
        arguments = [*arguments, "--steps", "1", "--count", "8"]
    with pytest.raises(SystemExit) as end:
        run_script(lambda: train.main(arguments))
    shown = capsys.readouterr().err
    assert end.value.code == 2 and says in shown and len(shown) < 3000
    assert not (tmp_path / "runs").exists()


def test_a_mistake_from_the_shell_shows_no_traceback(tmp_path, monkeypatch, capsys):
    """The script as a user starts it: exit code 2, one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "/nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error, error
    assert "/nowhere" in error and error.count("\n") == 1


@pytest.mark.parametrize("base, dtype, is_said", [
    (24, torch.bfloat16, True), (32, torch.bfloat16, False), (24, torch.float32, False)])
def test_widths_that_are_slow_in_bf16_are_named(base, dtype, is_said, capsys):
    train.note_widths(VAEConfig(3, 4, base, (1, 2)), torch.device("cpu"), dtype)
    assert ("no multiples of 16" in capsys.readouterr().out) == is_said
