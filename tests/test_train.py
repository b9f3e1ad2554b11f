"""train.py and sample.py as a user runs them: tiny sizes, real files, real signals, on a CPU."""
import csv
import json
import os
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
    commands = [line.split("#")[0].split() for block in lines for line in block.splitlines()]
    commands = [c[c.index("python"):] if "python" in c else c for c in commands]
    return [c[2:] for c in commands if c[:2] == ["python", script]]


def test_readme_commands_run(finished, tmp_path, monkeypatch):
    """Every command of the README's blocks does what it says, on the small run and its images."""
    sources = sorted((finished / "held_out").glob("*.png"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cxr").symlink_to(finished)
    places = {"A.png": sources[0], "B.png": sources[1], "x.png": sources[0]}
    small = ["--device", "cpu", "--steps", "2"]
    commands = readme_commands("sample.py")
    assert len(commands) >= 6
    for number, command in enumerate(commands):
        command = [str(sources[0] if a.startswith("runs/cxr/held_out") else places.get(a, a))
                   for a in command]
        assert sample.main([*command, *small, "--out", f"out{number}"]) == 0
    for command in readme_commands("evaluate.py"):
        evaluate.main([*command, *small, "--count", "6", "--seeds", "0"])
        assert (finished / "resemble.json").exists()
    for command in readme_commands("dino.py"):
        done = run("dino.py", *(places.get(a, a) for a in command), cwd=tmp_path)
        assert done.returncode == 0 and (tmp_path / "attention.png").exists(), done.stderr
    trains = readme_commands("train.py")
    assert len(trains) >= 3
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
    monkeypatch.setattr(data, "open_dataset", lambda *a, **k: opened(*a, **{**k, "count": 41}))
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
