"""train.py as a user runs it: tiny sizes, real files, on a CPU."""
import csv
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import train
from pictures_on_disk import write_phantoms
from dinodiff import DinoDiffusion
from prompts import balance
from support.cache import Latents
from support.command import UserError
from support.datasets import open_dataset
from support.files import load_checkpoint, read_jsonl
from support.pictures import save_png
from support.run import Run
from support.training_set import TrainingSet

pytestmark = pytest.mark.usefixtures("small_networks")
TINY = ["--data", "phantoms", "--count", "40", "--size", "32", "--batch", "4", "--steps", "4",
        "--device", "cpu", "--dtype", "float32"]
SET = ["--set", "previews=1"]
PROMPTS = ["--data", "histology", "--condition", "prompts", "--lr", "0.02",
           "--set", "previews=1", "clusters=3", "refiner_steps=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four steps a stage, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert train.main([*TINY, *SET, "--out", str(folder)]) == 0
    return folder


def stop_after(patch, stage=None, step=None):
    """From now on a run gets a signal after this step, or after any."""
    log = Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        if stage is None or (row["stage"], row["step"]) == (stage, step):
            self.stop_signal = signal.SIGINT
    patch.setattr(Run, "log", log_and_stop)


def weights(folder):
    model = load_checkpoint(folder / "model.pt")
    parts = ("embedder", "vae", "unet", "projection", "refiner", "statistics", "embedding_sampler")
    return {f"{part}.{name}": tensor for part in parts if model[part]
            for name, tensor in model[part].items()}


def model_of(folder):
    return DinoDiffusion.from_checkpoint(load_checkpoint(folder / "model.pt"))


def losses(folder):
    return [(r["stage"], r["step"], r["loss"]) for r in read_jsonl(folder / "log.jsonl")]


def held_out_rows(folder):
    return [row for row in read_jsonl(folder / "log.jsonl") if row["stage"] == "unet, held out"]


def trained_losses(folder):
    return [row for row in losses(folder) if row[0] in train.STAGES]


def test_a_run_leaves_what_it_promises(finished):
    """Config, log of all stages, split, curves, grids, model, state, cache, example sources."""
    for name in ("config.json", "log.jsonl", "split.csv", "curves.png", "model.pt", "state.pt",
                 "grid_000004.png", "grid_refined.png", "noise_levels.png", "cache/latents.npy",
                 "cache/tokens.npy"):
        assert (finished / name).stat().st_size > 0, name
    assert [row[:2] for row in trained_losses(finished)] == [
        (stage, step) for stage in train.STAGES for step in (1, 2, 3, 4)]
    assert list((finished / "held_out").glob("*.png"))
    tokens = np.load(finished / "cache/tokens.npy", mmap_mode="r")
    held_out = sum(row["split"] == "test" for row in csv.DictReader(open(finished / "split.csv")))
    assert len(tokens) + held_out == 40 and held_out > 0


@pytest.mark.parametrize("stage,step", [("embedder", 2), ("vae", 3), ("unet", 1), ("refiner", 2)])
def test_a_resumed_run_equals_one_never_stopped(finished, tmp_path, stage, step):
    """Stopped at a step of each stage and resumed: weights and log are equal bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, stage, step)
        assert train.main([*TINY, *SET, "--out", str(tmp_path / "again")]) == 130
    assert train.main(["--resume", "--out", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == losses(finished)
    mine, theirs = weights(tmp_path / "again"), weights(finished)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_previews_change_nothing(finished, tmp_path):
    """With four grids in place of one, stopped in the middle and resumed: the same losses and
    weights."""
    flags = [*TINY, "--set", "previews=4", "--out", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, "unet", 2)
        assert train.main(flags) == 130
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert trained_losses(tmp_path / "run") == trained_losses(finished)
    mine, theirs = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len(list((tmp_path / "run").glob("grid_0*.png"))) == 4

    # What was measured on held-out images is there once for each preview, and by level at the end.
    rows = held_out_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [len(row.get("levels", ())) for row in rows] == [0, 0, 0, 10]
    assert rows[-1] == held_out_rows(finished)[-1]


def held_out_of(model, images, training, test):
    dataset = TrainingSet(images, training, test)
    return train.HeldOut(model, *train.conditions_of(model, dataset, None, test), seed=0)


def test_held_out_loss_is_that_of_unseen_images_at_all_timesteps(finished):
    """The same at every call. A U-Net that answers 0 has the loss a_t + (1 - a_t) E[x0^2] of the
    held-out images, over all timesteps and in each tenth of them (4 % for chance)."""
    model = model_of(finished)
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    torch.nn.init.zeros_(model.unet.conv_out.bias)
    model.scale.mul_(2)  # so that E[x0^2] is far from 1
    images = open_dataset("phantoms", 32, count=40)
    held_out = held_out_of(model, images, torch.arange(20), torch.arange(20, 40))
    mean, std = model.posterior(images.batch(range(20, 40)))
    power = (((mean - model.shift).square() + std ** 2) * model.scale ** 2).mean()
    assert power > 2
    for low, high in ((0, 1000), *((low, low + 100) for low in range(0, 1000, 100))):
        a = model.schedule.alphas_cumprod[low:high]
        loss = held_out.loss(model, low, high - 1)
        assert loss == pytest.approx((a + (1 - a) * power).mean().item(), rel=0.04)
        assert loss == held_out.loss(model, low, high - 1)


def test_samples_that_are_copies_are_counted(finished):
    """Training images given as samples are all nearer to one than held-out images are; held-out
    images given as samples are not, but for the nearest."""
    model = model_of(finished)
    images = open_dataset("phantoms", 32, count=40)
    split = {r["file"]: r["split"] for r in csv.DictReader(open(finished / "split.csv"))}
    parts = {part: torch.tensor([i for i, file in enumerate(images.files) if split[file] == part])
             for part in ("train", "test")}
    held_out = held_out_of(model, images, parts["train"], parts["test"])
    cache = Latents(finished / "cache")
    assert held_out.share_near(model, cache, images.batch(parts["train"][:8])) == 1
    assert held_out.share_near(model, cache, images.batch(parts["test"])) < 0.5


def test_learning_rate_warms_up_and_ends_near_zero():
    """Linear to the peak, then half a cosine."""
    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_windows_are_the_same_square_of_each_batch_and_reach_every_corner():
    """Side as asked, places multiples of 4."""
    x = torch.arange(16 * 16).float().view(1, 1, 16, 16)
    places = set()
    for seed in range(60):
        one, other = train.random_window((x, 2 * x), 8, 4, seed)
        assert one.shape == (1, 1, 8, 8) and torch.equal(other, 2 * one)
        row, column = divmod(int(one[0, 0, 0, 0]), 16)
        assert torch.equal(one, x[..., row:row + 8, column:column + 8])
        places.add((row, column))
    assert places == {(row, column) for row in (0, 4, 8) for column in (0, 4, 8)}


def test_ema_warms_up():
    """After n steps towards a constant, the EMA has forgotten its start: the product of the
    decays min(d, (1 + i) / (10 + i))."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = {"weight": torch.ones(1, 1)}
    left = 1.0
    train.fit("test", model, lambda rows, s, g: 0.0 * model(*rows).sum(), Rows(), steps=20,
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


@pytest.mark.parametrize("flags", [
    ["--condition", "none", *SET], ["--embedder", "random", *SET, "tokens=cls", "refiner_steps=0"],
    ["--accumulate", "2", *SET, "tokens=patch"],
    ["--checkpointing", *SET, "prediction=eps"],
    ["--condition", "prompts", *SET, "refiner_steps=0"],
    ["--data", "histology", "--condition", "labels", *SET, "refiner_steps=0"]])
def test_other_settings_train_and_sample(tmp_path, flags):
    """The control, the ablations, the classic settings, prompts without labels and labels alone
    run end to end."""
    assert train.main([*TINY, *flags, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert model_of(tmp_path / "run").sample(None, [0, 1], steps=2).shape == (2, 3, 32, 32)


def test_an_autoencoder_that_starts_as_pca(tmp_path, monkeypatch):
    """Two steps from PCA it reconstructs; stopped inside that stage, the run resumes to the same
    weights; latent channels differ in deviation as their effects on pixels do."""
    tiny = train.PRESETS["tiny"]
    monkeypatch.setitem(train.PRESETS, "tiny", train.replace(
        tiny, vae_config=train.replace(tiny.vae_config, linear=True)))
    flags = [*TINY, "--steps", "2", "--set", "latent_power=1"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, "vae", 1)
        assert train.main([*flags, "--out", str(tmp_path / "stopped")]) == 130
    assert train.main(["--resume", "--out", str(tmp_path / "stopped")]) == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(one[name], other[name]) for name in one)

    model = model_of(tmp_path / "whole")
    images = open_dataset("phantoms", 32, count=40).batch(range(40))
    x0 = model.encode(images)
    assert (model.decode(x0) - images).abs().mean() < 0.1
    z = x0 / model.scale + model.shift
    effects = model.vae.linear_decode.weight.flatten(1).norm(dim=0) * z.std((0, 2, 3))
    assert effects.max() > 1.5 * effects.min()
    torch.testing.assert_close(x0.std((0, 2, 3)), effects / effects.square().mean().sqrt(),
                               rtol=0.15, atol=0)


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


def test_a_resumed_prompt_run_equals_one_never_stopped(prompted, tmp_path, monkeypatch):
    """Stopped in the U-Net stage and resumed: the clusters are kept, weights equal bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, "unet", 2)
        assert train.main([*TINY, *PROMPTS, "--out", str(tmp_path / "run")]) == 130
    monkeypatch.setattr(train, "kmeans", None)  # a second fit would fail
    assert train.main(["--out", str(tmp_path / "run"), "--resume"]) == 0
    mine, theirs = weights(tmp_path / "run"), weights(prompted)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_fine_tuning_keeps_what_the_words_mean(prompted, tmp_path, monkeypatch):
    """Clusters are those of --init, whatever the new images and seed."""
    monkeypatch.setattr(train, "kmeans", None)  # a second fit would fail
    flags = [*TINY, *PROMPTS, "--init", str(prompted), "--seed", "1", "--steps", "1"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert torch.equal(model_of(tmp_path / "run").centers, model_of(prompted).centers)


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


def test_outliers_are_left_out_and_named(tmp_path):
    """With prompts, black, blank and blurred patches are dropped and listed with a reason; a run
    that was stopped resumes without them."""
    images = write_phantoms(tmp_path / "patches", "histology", 24, 64)
    save_png(tmp_path / "patches/black.png", torch.full((3, 64, 64), -0.95))
    save_png(tmp_path / "patches/white.png", torch.full((3, 64, 64), 0.95))
    save_png(tmp_path / "patches/blur.png", torch.nn.functional.avg_pool2d(
        images[3][None], 31, 1, 15)[0])
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, "vae", 1)
        assert train.main([*TINY, "--data", str(tmp_path / "patches"), "--size", "64",
                           "--embedder", "random", "--holdout", "0", "--steps", "2",
                           "--condition", "prompts", *SET, "clusters=2",
                           "--out", str(tmp_path / "run")]) == 130
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert {row["file"] for row in csv.DictReader(open(tmp_path / "run/split.csv"))} == {
        f"{i:02d}.png" for i in range(24)}
    rows = {r["file"]: r["reason"] for r in csv.DictReader(open(tmp_path / "run/outliers.csv"))}
    assert rows == {"black.png": "black", "white.png": "blank", "blur.png": "out of focus"}
    assert len(np.load(tmp_path / "run/cache/tokens.npy")) == 24


@pytest.mark.parametrize("table,flags,says", [
    (None, ["--condition", "labels"], "no label column 'label'"),
    ("file,label\n" + "".join(f"{i:02d}.png,a\n" for i in range(12)), [], "two or more"),
    ("file,label\n" + "".join(f"{i:02d}.png,{'ab'[i % 2] * (i > 0)}\n" for i in range(12)), [],
     "labels '', 'a', 'b'"),
    ("file,label\n" + "".join(f"{i:02d}.png,{'ab'[i % 2]}\n" for i in range(12)),
     ["--set", "clusters=50"], "50 .*for"),
    ("file,label\n" + "".join(f"{i:02d}.png,{'ab'[i % 2]}\n" for i in range(12)),
     ["--set", "clusters=2", "template=a photo of <label>"], "lacks <index>"),
])
def test_labels_that_make_no_prompts_are_refused(tmp_path, table, flags, says):
    """Missing or one-valued columns, empty cells, too many clusters, a template that does not fit:
    one clear error each, nothing written."""
    write_phantoms(tmp_path / "in")
    if table:
        (tmp_path / "in/labels.csv").write_text(table)
    with pytest.raises(UserError, match=says):
        train.main([*TINY, "--data", str(tmp_path / "in"), "--condition", "prompts", *flags,
                    "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_file_of_vectors_conditions(tmp_path):
    """--embedder vectors.npz: 48 numbers an image, from another program, each image with its own;
    samples follow a row; an image without a vector is refused before a folder is there."""
    import sample
    write_phantoms(tmp_path / "in")
    names = [f"{i:02d}.png" for i in range(12)]
    vectors = np.random.default_rng(0).normal(size=(12, 48)).astype(np.float32)
    np.savez(tmp_path / "vectors.npz", files=names, tokens=vectors)
    np.savez(tmp_path / "few.npz", files=names[:9], tokens=vectors[:9])
    flags = [*TINY, *SET, "--data", str(tmp_path / "in"), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="images have no vector"):
        train.main([*flags, "--embedder", str(tmp_path / "few.npz")])
    assert not (tmp_path / "run").exists()

    assert train.main([*flags, "--embedder", str(tmp_path / "vectors.npz")]) == 0
    model = model_of(tmp_path / "run")
    assert model.config.token_shape == (1, 48) and model.config.vit is None
    rows = csv.DictReader(open(tmp_path / "run/split.csv"))
    training = [names.index(row["file"]) for row in rows if row["split"] == "train"]
    assert (np.load(tmp_path / "run/cache/tokens.npy")[:, 0] == vectors[training]).all()
    request = ["--from-vector", str(tmp_path / "vectors.npz"), "--row", "3", "--count", "2",
               "--steps", "2", "--checkpoint", str(tmp_path / "run"), "--device", "cpu"]
    assert sample.main([*request, "--out", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader(open(tmp_path / "out/samples.csv")))
    assert [row["sources"] for row in rows] == ["03.png"] * 2 and rows[0]["strategy"] == "vector"
    with pytest.raises(UserError, match="cannot embed an image"):
        sample.main(["--from-image", str(tmp_path / "in"), "--checkpoint", str(tmp_path / "run")])


def test_a_folder_that_moved_can_resume(tmp_path):
    """--resume --data NEW: the same names, and the run ends; another set is refused, and split.csv
    stays as it was."""
    write_phantoms(tmp_path / "old")
    run = ["--out", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch)
        assert train.main([*TINY, *SET, "--data", str(tmp_path / "old"), *run]) == 130
    before = (tmp_path / "run/split.csv").read_text()
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(UserError, match="--data histology differs"):
        train.main(["--resume", "--data", "histology", *run])
    assert (tmp_path / "run/split.csv").read_text() == before
    assert train.main(["--resume", "--data", str(tmp_path / "new"), *run]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["data"] == str(tmp_path / "new")


def test_flags_win_over_the_preset():
    """--steps caps every stage but what --set names; a resume, a dry run; sd15 means eps."""
    def preset(*argv):
        args = train.flags().parse_args(argv)
        return train.choose_preset(args, None)
    chosen = preset("--steps", "500", "--set", "vae_steps=900", "ema=0.9", "--batch", "4")
    assert (chosen.embedder_steps, chosen.vae_steps, chosen.unet_steps) == (300, 900, 500)
    assert (chosen.batch, chosen.ema, chosen.lr, chosen.size) == (4, 0.9, 1e-3, 64)
    assert preset("--preset", "sd15").prediction == preset("--unet", "sd15").prediction == "eps"


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
            return (model(*rows) - noise).square().sum()
        for upto in stops:
            train.fit("line", model, loss_fn, Rows(), steps=5, upto=upto, batch=2, lr=0.1,
                      device=torch.device("cpu"), run=run, ema=ema)
        return [*model.parameters(), *ema.values()]
    whole = fitted(5)
    for parts in (fitted(1, 3, 5), fitted(2, 2, 4, 5)):
        assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_a_loss_that_is_not_finite_stops_the_run():
    """The error names step, learning rate and what to do."""
    model = torch.nn.Linear(1, 1)

    def loss_fn(rows, step, generator):
        return model(*rows).sum() * (float("nan") if step == 2 else 1.0)
    with pytest.raises(UserError, match="at step 3 .*learning rate"):
        train.fit("test", model, loss_fn, Rows(), steps=5, batch=1, lr=1e-3,
                  device=torch.device("cpu"))
