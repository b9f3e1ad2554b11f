"""A run survives signals, kill -9, a second run in its folder, damaged files and NaN."""
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from conftest import TINY
from support import run as run_module
from support.command import UserError
from support.files import load_checkpoint, read_jsonl
from support.run import Run

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture(autouse=True)
def save_every_step(monkeypatch):
    monkeypatch.setattr(run_module, "SAVE_SECONDS", 0)


def at_row(monkeypatch, stage, step, action):
    """Call action() right after this row was logged."""
    log = Run.log

    def log_and_act(self, **row):
        log(self, **row)
        if (row["stage"], row["step"]) == (stage, step):
            action()
    monkeypatch.setattr(Run, "log", log_and_act)


def in_child(work):
    """Fork, and call work() there; the exit code, or minus the signal that killed it."""
    process = os.fork()
    if not process:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def values(x, name=""):
    """Every tensor and plain value of nested dicts and lists, with its place."""
    if isinstance(x, (dict, list, tuple)):
        for key, item in x.items() if isinstance(x, dict) else enumerate(x):
            yield from values(item, f"{name}.{key}")
    else:
        yield name, x


def assert_same_end(folder, undisturbed):
    """Weights, statistics, sampler, log, split and cache of two runs are equal, bit for bit."""
    rows, expected = ([{**row, "seconds": 0} for row in read_jsonl(path / "log.jsonl")]
                      for path in (folder, undisturbed))
    assert rows == expected
    mine, theirs = (dict(values(load_checkpoint(path / "model.pt")))
                    for path in (folder, undisturbed))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if torch.is_tensor(value):
            assert torch.equal(value, theirs[name]), name
        elif name.split(".")[-1] not in ("out", "resume"):
            assert value == theirs[name], name
    for name in ("split.csv", "cache/latents.npy", "cache/tokens.npy"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not list(folder.rglob("*.tmp"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_networks):
    """A run to which nothing happens, as the others should end."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train.main([*TINY, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("stage,step,number", [
    ("embedder", 2, signal.SIGTERM), ("vae", 3, signal.SIGINT), ("unet", 1, signal.SIGINT)])
def test_a_stopped_run_resumes_exactly(undisturbed, tmp_path, monkeypatch, capsys, stage, step,
                                       number):
    """Ctrl-C or SIGTERM in a stage: exit code 130 or 143, the command to resume; then the resumed
    run ends like one that was never stopped."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_row(patch, stage, step, lambda: signal.raise_signal(number))
        assert train.main([*TINY, "--out", str(folder)]) == 128 + number
    assert f"python train.py --resume --out {folder}" in capsys.readouterr().out
    assert train.main(["--resume", "--out", str(folder)]) == 0
    assert_same_end(folder, undisturbed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
@pytest.mark.parametrize("write", [2, 5, 8])
def test_kill_9_during_a_write(undisturbed, tmp_path, monkeypatch, write):
    """Killed when the bytes of a file are on the disk and its name is not: the older state is
    complete, and the resumed run ends as it should."""
    folder = tmp_path / "run"

    def killed():
        replace, left = os.replace, [write]

        def replace_or_die(old, new):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(old, new)
        os.replace = replace_or_die
        return train.main([*TINY, "--out", str(folder)])
    assert in_child(killed) == -signal.SIGKILL
    assert list(folder.rglob(".*.tmp")), "nothing was half written: nothing was tested"
    if (folder / "state.pt").exists():
        load_checkpoint(folder / "state.pt")
    flags = ["--resume"] if (folder / "config.json").exists() else TINY
    assert train.main([*flags, "--out", str(folder)]) == 0
    assert_same_end(folder, undisturbed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_folder_takes_one_run_at_a_time(tmp_path):
    """Another process is refused while a run lives, and nothing is changed; a run that was killed
    leaves no lock."""
    run = Run(tmp_path, {"size": 1})

    def second():
        with pytest.raises(UserError, match="in use by another run.*--out"):
            Run(tmp_path, {"size": 2})
        return 0
    assert in_child(second) == 0
    assert '"size": 1' in (tmp_path / "config.json").read_text()
    run.close()

    def killed():
        Run(tmp_path / "new", {})
        os.kill(os.getpid(), signal.SIGKILL)
    assert in_child(killed) == -signal.SIGKILL
    Run(tmp_path / "new", {}).close()


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, small_networks):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_row(patch, "vae", 2, lambda: signal.raise_signal(signal.SIGTERM))
        assert train.main([*TINY, "--out", str(folder)]) == 143
    return folder


@pytest.mark.parametrize("damage,says", [
    ("cut", "cannot be read"), ("empty", "cannot be read"), ("version", "its version is 0"),
    ("foreign", "lacks finished, state")])
def test_a_damaged_state_is_refused(stopped_once, tmp_path, damage, says):
    """One error that names the file, and nothing in the folder is changed."""
    folder = Path(shutil.copytree(stopped_once, tmp_path / "run"))
    path = folder / "state.pt"
    state = torch.load(path, weights_only=True)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-999])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"version": {**state, "version": 0},
                    "foreign": {"version": state["version"]}}[damage], path)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=f"state.pt.*{says}|state.pt {says}"):
        train.main(["--resume", "--out", str(folder)])
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_run_that_explodes_stops(tmp_path):
    """A learning rate of 1e30: the error names stage, step and rate; the saved state is finite."""
    with pytest.raises(UserError, match=r"unet: the loss .* at step \d .*learning rate 1e\+30"):
        train.main([*TINY, "--lr", "1e30", "--out", str(tmp_path / "run")])
    for name, value in values(load_checkpoint(tmp_path / "run" / "state.pt")):
        assert not torch.is_tensor(value) or value.isfinite().all(), name


def test_a_gradient_that_is_not_finite_is_not_saved():
    """A finite loss with an infinite gradient: the run stops at that step."""
    model = torch.nn.Linear(1, 1)

    class Zeros:
        def __len__(self):
            return 4

        def __getitems__(self, rows):
            return (torch.zeros(len(rows), 1),)

    def loss_fn(rows, step, generator):
        return ((model(*rows) - model.bias).sum().abs() * (step == 2)).sqrt().sum(), {}
    with pytest.raises(UserError, match="at step 1 "):
        train.fit("test", model, loss_fn, Zeros(), steps=4, batch=1, lr=1e-3,
                  device=torch.device("cpu"))


@pytest.mark.parametrize("count", [1, 5])
def test_tiny_and_flat_datasets(tmp_path, count):
    """One image, or five of one grey value: a run ends with finite numbers, and its model samples.
    """
    (tmp_path / "images").mkdir()
    for i in range(count):
        Image.fromarray(np.full((32, 32), 99, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    run = str(tmp_path / "run")
    assert train.main(["--data", str(tmp_path / "images"), *TINY[2:], "--holdout", "0",
                       "--out", run]) == 0
    for name, value in values(load_checkpoint(tmp_path / "run" / "model.pt")):
        assert not torch.is_tensor(value) or value.isfinite().all(), name
    assert sample.main(["--from-image", str(tmp_path / "images" / "0.png"), "--steps", "2",
                        "--device", "cpu", "--checkpoint", run, "--out",
                        str(tmp_path / "out")]) == 0
