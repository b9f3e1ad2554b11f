"""train.py and sample.py as a user runs them: tiny sizes, real files, real signals, on a CPU."""
import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import sample
import train
from data import UserError, read_jsonl

ROOT = Path(__file__).parent.parent
TINY = ["--data", "phantoms", "--count", "40", "--size", "32", "--batch", "4", "--steps", "4",
        "--grids", "1", "--device", "cpu", "--dtype", "float32"]


def run(script, *arguments, **settings):
    """Run a script in a process of its own, as a user does."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)],
                          capture_output=True, text=True, timeout=200, **settings)


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
    look = train.Run.log

    def log_and_stop(self, **row):
        look(self, **row)
        if row["stage"] == stage and row["step"] == step:
            self.stop_signal = signal.SIGINT
    monkeypatch.setattr(train.Run, "log", log_and_stop)
    assert train.main([*TINY, "--out", str(tmp_path / "again")]) == 130
    monkeypatch.setattr(train.Run, "log", look)
    assert train.main(["--resume", "--out", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == losses(finished)
    mine, theirs = weights(tmp_path / "again"), weights(finished)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """A real SIGINT to a real process: exit code 130, a state on disk, the command to type."""
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--vae-steps", "5000",
               "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        if log.exists() and '"vae"' in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    assert "--resume" in output and (tmp_path / "run" / "state.pt").exists()


def test_batches_are_epochs_of_permutations():
    """Every row once an epoch, also when the batch is larger than the data; a step's rows do not
    depend on the steps before it."""
    rows = [r for step in range(10) for r in train.batch_rows(step, 4, 10, seed=1)]
    assert all(sorted(rows[i:i + 10]) == list(range(10)) for i in range(0, 40, 10))
    assert rows[:10] != rows[10:20]
    assert train.batch_rows(7, 4, 10, seed=1) == rows[28:32]
    assert sorted(train.batch_rows(0, 7, 3, seed=1)[:3]) == [0, 1, 2]


def test_learning_rate_warms_up_and_ends_near_zero():
    """Linear to the peak, then half a cosine."""
    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_ema_warms_up():
    """After n steps towards a constant, the EMA has forgotten its start: the product of the
    decays min(d, (1 + i) / (10 + i))."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = {"weight": torch.ones(1, 1)}
    left = 1.0
    for step in train.fit("test", model, lambda rows, s, g: (0.0 * model(*rows).sum(), {}),
                          Rows(), steps=20, batch=1, lr=1e-9,
                          device=torch.device("cpu"), ema=ema, ema_decay=0.9):
        left *= min(0.9, step / (9 + step))
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
        for _ in train.fit("test", model, loss_fn, Rows(), steps=5, batch=1, lr=1e-3,
                           device=torch.device("cpu")):
            pass


@pytest.mark.parametrize("arguments,says", [
    (["--from-image", "IMAGE", "--count", "2"], "reconstruct"),
    (["--from-image", "FOLDER", "--perturb", "0.5"], "perturb"),
    (["--from-image", "IMAGE", "--strength", "0.5", "--guidance", "2"], "img2img"),
    (["--interpolate", "IMAGE", "IMAGE2", "--frames", "3"], "interpolate"),
    (["--prototypes", "2"], "prototype"),
    (["--random", "--count", "2", "--sampler", "ddpm"], "random"),
])
def test_every_way_to_sample_writes_images_grid_and_table(finished, tmp_path, arguments, says):
    """PNGs of the model's side, a grid, and one row of provenance for each image."""
    sources = sorted((finished / "held_out").glob("*.png"))
    places = {"IMAGE": sources[0], "IMAGE2": sources[1], "FOLDER": finished / "held_out"}
    arguments = [str(places.get(a, a)) for a in arguments]
    out = tmp_path / "out"
    assert sample.main([*arguments, "--steps", "2", "--checkpoint", str(finished), "--out",
                        str(out), "--device", "cpu"]) == 0
    rows = list(csv.DictReader(open(out / "samples.csv")))
    assert rows and {row["strategy"] for row in rows} == {says}
    assert len({row["seed"] for row in rows}) == (1 if says == "interpolate" else len(rows))
    for row in rows:
        assert Image.open(out / row["file"]).size == (32, 32)
    assert Image.open(out / "grid.png").size[0] >= 128


def readme_commands(script):
    """The arguments of each README line that starts with `python SCRIPT`."""
    lines = (ROOT / "README.md").read_text().split("```")[1::2]  # the fenced blocks
    commands = [shlex.split(line, comments=True) for block in lines for line in block.splitlines()
                if "python" in line]
    commands = [c[c.index("python"):] if "python" in c else c for c in commands]
    return [c[2:] for c in commands if c[:2] == ["python", script]]


def test_readme_commands_run(finished, prompted, tmp_path, monkeypatch):
    """Every command of the README's blocks does what it says, on small runs and their images."""
    sources = sorted((finished / "held_out").glob("*.png"))
    monkeypatch.chdir(tmp_path)
    for name, folder in (("cxr", finished), ("real", finished), ("histology", prompted)):
        shutil.copytree(folder, tmp_path / "runs" / name)
    split = tmp_path / "runs" / "real" / "split.csv"
    split.write_text(split.read_text().replace(",train,", ",test,", 9))  # metrics need a few
    os.utime(tmp_path / "runs" / "cxr" / "model.pt")  # the newest run is the default
    places = {"A.png": sources[0], "B.png": sources[1], "x.png": sources[0], "FOLDER": "labelled",
              "SOURCES": finished / "held_out"}
    words = "Histology image of cancer tissue, morphology type"
    small = ["--device", "cpu", "--steps", "2"]

    def arguments(command):
        return [str(sources[0] if a.startswith("runs/cxr/held_out") else places.get(a, a)).replace(
            f"{words} seventeen", f"{words} two") for a in command]  # the small run has three

    commands = readme_commands("sample.py")
    assert len(commands) >= 8
    for number, command in enumerate(commands):
        out = [] if "--out" in command else ["--out", f"out{number}"]
        count = ["--count", "12"] if "runs/real" in command else []
        assert sample.main([*arguments(command), *small, *out, *count]) == 0
    shutil.copytree("runs/real/samples/test", "runs/real/samples/train")  # "likewise train"
    assert sample.main(["--checkpoint", "runs/histology", "--each-prompt", "1", *small, "--out",
                        "labelled"]) == 0
    for command in readme_commands("evaluate.py"):
        extra = {"fidelity": ["--seed", "0"], "privacy": [], "resemble": [*small, "--count", "6"],
                 "classify": ["--cnn-steps", "2"]}.get(command[0], ["--seeds", "0"])
        evaluate.main([*arguments(command), *extra])
    for name in ("cxr/resemble", "real/privacy", "histology/clusters"):
        assert Path(f"runs/{name}.json").exists()
    for command in readme_commands("prompts.py"):
        done = run("prompts.py", *command, "--choose-k", "2:3", cwd=tmp_path)
        assert done.returncode == 0 and Path("runs/histology/choose_k.png").exists(), done.stderr
    for command in readme_commands("dino.py"):
        done = run("dino.py", *arguments(command), cwd=tmp_path)
        assert done.returncode == 0 and (tmp_path / "attention.png").exists(), done.stderr
    trains = readme_commands("train.py")
    assert len(trains) >= 5
    for command in trains:
        assert train.main([*command, "--dry-run"]) == 0


def test_same_seed_same_file_whatever_the_batch(finished, tmp_path):
    """Five images at batch 5 and at batch 2 differ by at most one grey level of rounding."""
    for name, batch in (("a", "5"), ("b", "2")):
        sample.main(["--random", "--count", "5", "--steps", "3", "--batch", batch, "--device",
                     "cpu", "--checkpoint", str(finished), "--out", str(tmp_path / name)])
    files = list((tmp_path / "a/images").glob("random*.png"))
    assert len(files) == 5
    for file in files:
        pair = [np.asarray(Image.open(tmp_path / d / "images" / file.name)).astype(int)
                for d in "ab"]
        assert np.abs(pair[0] - pair[1]).max() <= 1


def test_labels_are_inherited_from_the_source(finished, tmp_path):
    """labels.csv beside a source: its cells come back in samples.csv, with the rule."""
    source = next((finished / "held_out").glob("*.png"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(source.read_bytes())
    (tmp_path / "x" / "labels.csv").write_text("file,finding\na.png,effusion\n")
    sample.main(["--from-image", str(tmp_path / "x" / "a.png"), "--steps", "2", "--device", "cpu",
                 "--checkpoint", str(finished), "--out", str(tmp_path / "out")])
    row = next(csv.DictReader(open(tmp_path / "out" / "samples.csv")))
    assert row["label_finding"] == "effusion" and row["label_rule"] == "of the source"


@pytest.mark.parametrize("flags", [
    ["--condition", "none"], ["--embedder", "random", "--tokens", "cls"],
    ["--tokens", "patch", "--accumulate", "2"],
    ["--prediction", "eps", "--min-snr", "5", "--perceptual", "0.1"]])
def test_other_settings_train_and_sample(tmp_path, flags):
    """The control, the ablations and the classic settings run end to end."""
    assert train.main([*TINY, *flags, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert sample.main(["--random", "--steps", "2", "--device", "cpu", "--checkpoint",
                        str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0


def test_a_folder_of_images_trains(tmp_path):
    """A user's folder with labels and patients: no patient on both sides of the split."""
    rng = np.random.RandomState(0)
    rows = ["file,patientid"]
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


def test_perturbation_and_start_noise_are_different_draws():
    """The generator of the tokens' noise must not repeat the one of the latent: torch's CPU
    generator keeps 32 bits of a seed, so seed + 2^40 would be the same stream."""
    one, other = (torch.randn(64, generator=torch.Generator().manual_seed(seed))
                  for seed in (5, data.step_seed("perturb", 5)))
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.5


def test_samples_can_be_judged_as_they_lie(finished, tmp_path):
    """evaluate.py fidelity takes a folder that sample.py wrote: its grid is not an image of it."""
    for seed, name in (("0", "a"), ("100", "b")):
        sample.main(["--random", "--count", "14", "--steps", "2", "--device", "cpu", "--seed", seed,
                     "--checkpoint", str(finished), "--out", str(tmp_path / name)])
    evaluate.main(["fidelity", str(tmp_path / "a"), str(tmp_path / "b"), "--device", "cpu"])
    table = json.loads((tmp_path / "b" / "fidelity.json").read_text())
    assert table["real"] == table["synthetic"] == 14 and table["size"] == 32
    with pytest.raises(UserError, match="already holds samples"):
        sample.main(["--random", "--device", "cpu", "--checkpoint", str(finished), "--out",
                     str(tmp_path / "a")])


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A finished run on histology phantoms: 3 clusters x 2 labels."""
    folder = tmp_path_factory.mktemp("runs") / "prompted"
    assert train.main([*TINY, "--data", "histology", "--condition", "prompts", "--clusters", "3",
                       "--out", str(folder)]) == 0
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
    images = data.open_dataset("histology", 32, count=40)
    truth = dict(zip(images.files, images.columns["label"]))
    assert all(row["label"] == truth[row["file"]] for row in rows)
    model, _ = sample.load_model(prompted, torch.device("cpu"))
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
    model, _ = sample.load_model(tmp_path / "run", torch.device("cpu"))
    assert len(model.prompts) == prompts
    assert model.prompts[-1] == {
        10: "Chest X-Ray image with morphology type nine", 2: "Histology image of healthy tissue",
        8: "Histology image of healthy tissue, morphology type three"}[prompts]


def test_a_resumed_prompt_run_equals_one_never_stopped(prompted, tmp_path, monkeypatch):
    """Stopped in the U-Net stage and resumed: the clusters are kept, weights equal bit for bit."""
    look = train.Run.log

    def stop(self, **row):
        look(self, **row)
        if (row["stage"], row["step"]) == ("unet", 2):
            self.stop_signal = signal.SIGINT

    flags = [*TINY, "--data", "histology", "--condition", "prompts", "--clusters", "3",
             "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "log", stop)
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
    cache = train.Latents(prompted / "cache", numbers)
    mean, std, condition = cache.__getitems__(list(range(len(cache))))
    assert condition.bincount().tolist() == [20, 0, 20, 20]
    assert mean.shape == std.shape and len(set(cache.order[condition == 0].tolist())) == 20


def test_samples_by_prompt_and_a_balanced_labelled_set(prompted, tmp_path):
    """--prompt writes --count images of the words; --each-prompt N of every prompt in use, with
    labels from the table; the folder opens as a labelled data set."""
    flags = ["--checkpoint", str(prompted), "--steps", "2", "--device", "cpu"]
    words = "Histology image of cancer tissue, morphology type two"
    assert sample.main(["--prompt", words, "--count", "3", *flags, "--out",
                        str(tmp_path / "a")]) == 0
    rows = list(csv.DictReader(open(tmp_path / "a/samples.csv")))
    assert [(r["prompt"], r["label"], r["seed"]) for r in rows] == [
        (words, "cancer", str(i)) for i in range(3)]
    assert sample.main(["--each-prompt", "2", *flags, "--out", str(tmp_path / "b")]) == 0
    used = {row["prompt"] for row in csv.DictReader(open(prompted / "prompts.csv"))}
    made = data.open_dataset(tmp_path / "b", 32)
    assert sorted(made.columns["prompt"]) == sorted([*used, *used])
    assert all(label in prompt for label, prompt in zip(made.columns["label"],
                                                        made.columns["prompt"]))
    assert sample.main(["--random", "--count", "4", "--guidance", "3", *flags, "--out",
                        str(tmp_path / "c")]) == 0


def test_the_same_prompt_and_seed_give_the_same_image_whatever_the_company(prompted):
    """A prompt's length does not change its neighbours: padding is masked, K is one for all."""
    model, _ = sample.load_model(prompted, torch.device("cpu"))
    short, long = "cancer", model.prompts[0]
    alone = model.sample([short], [5], steps=2, guidance_scale=2.0)
    beside = model.sample([long, short], [4, 5], steps=2, guidance_scale=2.0)
    assert torch.allclose(alone[0], beside[1], atol=1e-5)  # float32 sums in another order
    other = model.sample([long], [5], steps=2)
    assert not torch.allclose(alone[0], other[0], atol=1e-5)  # after four steps they differ little


def test_the_empty_prompt_is_the_null_condition(prompted):
    """At guidance 1 the empty prompt and no condition give one and the same image."""
    model, _ = sample.load_model(prompted, torch.device("cpu"))
    assert torch.equal(model.sample([""], [0], steps=2), model.sample(None, [0], steps=2))


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


def test_clusters_and_classify_print_and_write(prompted, tmp_path, capsys):
    """The two tables of evaluate.py on a prompt run: clusters against the true morphologies, and
    a classifier trained on samples alone."""
    flags = ["--checkpoint", str(prompted), "--seeds", "0", "--device", "cpu"]
    sample.main(["--each-prompt", "2", "--checkpoint", str(prompted), "--steps", "1", "--out",
                 str(tmp_path / "made")])
    evaluate.main(["clusters", *flags])
    table = json.loads((prompted / "clusters.json").read_text())
    assert any("K = 3" in name for name in table)
    assert all(0 <= row["homogeneity"] <= 1 for row in table.values())
    evaluate.main(["classify", *flags, "--cnn-steps", "2", "--turns", "--train",
                   str(tmp_path / "made")])
    table = json.loads((prompted / "classify.json").read_text())
    assert [row["images"] for row in table.values()] == [len(list(csv.DictReader(open(
        prompted / "prompts.csv")))), len(list((tmp_path / "made/images").iterdir()))]
    with pytest.raises(UserError, match="follows prompts"):
        evaluate.main(["resemble", *flags])


def test_outliers_are_left_out_and_named(tmp_path):
    """Black, blank and blurred patches of a colour folder are dropped and listed with a reason."""
    images = data.open_dataset("histology", 64, count=24)
    for i in range(24):
        data.save_png(tmp_path / f"patches/{i:02d}.png", images[i])
    data.save_png(tmp_path / "patches/black.png", torch.full((3, 64, 64), -0.95))
    data.save_png(tmp_path / "patches/white.png", torch.full((3, 64, 64), 0.95))
    data.save_png(tmp_path / "patches/blur.png", torch.nn.functional.avg_pool2d(
        images[3][None], 31, 1, 15)[0])
    flags = [*TINY, "--steps", "1", "--data", str(tmp_path / "patches"), "--size", "64"]
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
    images = data.open_dataset("phantoms", 32, count=12)
    for i in range(12):
        data.save_png(tmp_path / f"in/{i:02d}.png", images[i])
    if table:
        (tmp_path / "in/labels.csv").write_text(table)
    with pytest.raises(UserError, match=says):
        train.main([*TINY, "--data", str(tmp_path / "in"), "--condition", "prompts", *flags,
                    "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_resume_with_other_images_is_refused(tmp_path, monkeypatch):
    """Images that came or went since the start: an error, and split.csv stays as it was."""
    log = train.Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        self.stop_signal = signal.SIGINT
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "log", log_and_stop)
        assert train.main([*TINY, "--out", str(folder)]) == 130
    before = (folder / "split.csv").read_text()
    opened = data.open_dataset
    monkeypatch.setattr(data, "open_dataset", lambda name, size, seed, count, **more: opened(
        name, size, seed, 41, **more))
    with pytest.raises(UserError, match="images differ"):
        train.main(["--resume", "--out", str(folder)])
    assert (folder / "split.csv").read_text() == before


def test_dry_run_prints_the_settings_and_writes_nothing(tmp_path):
    """--dry-run: JSON with every flag resolved, no folder."""
    done = run("train.py", "--dry-run", "--preset", "sd15", "--out", tmp_path / "x")
    settings = json.loads(done.stdout)
    assert settings["prediction"] == "eps" and settings["zero_snr"] is False
    assert settings["size"] == 512 and not (tmp_path / "x").exists()


BAD = [
    ("train.py", ["--data", "/nowhere"], "/nowhere"),
    ("train.py", ["--data", "EMPTY"], "no image"),
    ("train.py", ["--size", "50"], "multiple of 16"),
    ("train.py", ["--embedder", "resnet"], "dino_vits16"),
    ("train.py", ["--embedder", "TEXT"], "TEXT"),
    ("train.py", ["--vae", "TEXT"], "TEXT"),
    ("train.py", ["--preset", "huge"], "tiny"),
    ("train.py", ["--steps", "0"], "0"),
    ("train.py", ["--batch", "8", "--accumulate", "3"], "divisor"),
    ("sample.py", ["--from-image", "TEXT", "--checkpoint", "nowhere"], "nowhere"),
    ("train.py", ["--out", "/proc/run"], "--out"),
    ("train.py", ["--prediction", "eps", "--zero-snr"], "prediction 'v'"),
    ("train.py", ["--device", "tpu"], "tpu"),
    ("sample.py", ["--random"], "python train.py"),
    ("sample.py", ["--random", "--checkpoint", "TEXT"], "model.pt"),
    ("sample.py", [], "--from-image"),
]


@pytest.mark.parametrize("script,arguments,says", BAD, ids=range(len(BAD)))
def test_a_users_mistake_ends_in_one_clear_message(tmp_path, script, arguments, says):
    """Exit code 2, no traceback, the message names what is needed, no run folder is left."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXT").write_text("hello")
    if script == "train.py" and "--steps" not in arguments:
        arguments = [*arguments, "--steps", "1", "--count", "8"]
    done = run(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert says in done.stderr and len(done.stderr) < 3000
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_holds_a_run_is_refused_and_changed_flags_too(finished):
    """No run is overwritten; a resume with other settings says which one differs."""
    with pytest.raises(UserError, match="already holds a run"):
        train.main([*TINY, "--out", str(finished)])
    with pytest.raises(UserError, match="--lr 0.5 differs"):
        train.main([*TINY, "--out", str(finished), "--resume", "--lr", "0.5"])
