"""A run survives signals, kill -9, a second run in its folder, and images without content."""
import os
import signal

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
    log = Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        if (row["stage"], row["step"]) == (stage, step):
            signal.raise_signal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        assert train.main([*TINY, "--out", str(folder)]) == 128 + number
    assert f"python train.py --resume --out {folder}" in capsys.readouterr().out
    assert train.main(["--resume", "--out", str(folder)]) == 0
    assert_same_end(folder, undisturbed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
@pytest.mark.parametrize("write", [2, 8])
def test_kill_9_during_a_write(undisturbed, tmp_path, write):
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


def test_one_flat_image(tmp_path):
    """A run on one image of one grey value ends with finite numbers, and its model samples."""
    image, run = tmp_path / "images" / "a.png", tmp_path / "run"
    image.parent.mkdir()
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save(image)
    assert train.main(["--data", str(image.parent), *TINY[2:], "--holdout", "0",
                       "--out", str(run)]) == 0
    for name, value in values(load_checkpoint(run / "model.pt")):
        assert not torch.is_tensor(value) or value.isfinite().all(), name
    assert sample.main(["--from-image", str(image), "--steps", "2", "--device", "cpu",
                        "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 0
