"""Bad command lines, damaged models and pickled code: one line of advice, exit code 2."""
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dino
import evaluate
import mil
import sample
import train
import unet
import vae
from conftest import TINY
from small_run import write_run
from support import files
from support.command import UserError, run_script
from support.datasets import open_dataset

# Words of a line in capitals are files of the fixture `desk`.
BAD_LINES = [
    (train, "extra", "extra"), (train, "--data /nowhere", "/nowhere"),
    (train, "--data EMPTY", "EMPTY"), (train, "--data BAD.npz", "BAD.npz"),
    (train, "--size 50", "--size"), (train, "--holdout nan", "--holdout"),
    (train, "--embedder TEXT", "TEXT"), (train, "--vae nowhere", "nowhere"),
    (train, "--batch 8 --accumulate 3", "batch 8"),
    (train, "--set nonsense=1", "nonsense"), (train, "--set vae_steps=x", "vae_steps"),
    (train, "--set tokens=all", "tokens"), (train, "--set unet_steps=0", "--init RUN"),
    (train, "--set vae_batch=0", "more than 0"),
    (train, "--init RUN --unet sd15", "one U-Net"), (train, "--seed 1" + 30 * "0", "--seed"),
    (train, "--device tpu", "pass --device auto"),
    (train, "--data RUN/held_out --patient-from (", "--patient-from"),
    (train, "--out TEXT", "--out"), (train, "--out RUN", "--resume"),
    (sample, "--random --steps 1001", "1000"),
    (sample, "--from-image TEXT", "TEXT"),
    (sample, "--random --from-image GOOD.png", "--from-image"),
    (sample, "--random --strength 0.5", "--strength"), (sample, "--from-image EMPTY", "EMPTY"),
    (sample, "--prototypes 25", "25"), (sample, "--from-vector TEXT", "TEXT"),
    (sample, "--random --count 33 --animate", "at most 32"),
    (sample, "--random --out FULL", "pass another --out"),
    (sample, "--random --checkpoint TEXT", "TEXT"),
    (sample, "--random --checkpoint /nowhere", "/nowhere"),
    (sample, "--random --device cuda:99", "pass --device auto"),
    (evaluate, "", "required"), (evaluate, "EMPTY EMPTY", "EMPTY"),
    (evaluate, "RUN/held_out /nowhere", "/nowhere"), (mil, "--data /nowhere", "/nowhere"),
    (mil, "--models nonsense", "nonsense"),
]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with what the command lines name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "samples.csv").write_text("file\n")
    (tmp_path / "TEXT").write_text("hello")
    (tmp_path / "BAD.npz").write_text("hello")
    Image.fromarray(np.full((40, 40), 99, np.uint8)).save(tmp_path / "GOOD.png")
    write_run(tmp_path / "RUN")
    (tmp_path / "RUN" / "config.json").write_text('{"seed": 0}')
    return tmp_path


def error_of(script, argv, monkeypatch, capsys):
    """Run a script's main as `python SCRIPT ARGV` does; (exit code, what it wrote to stderr)."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as end:
        run_script(lambda: script.main(argv))
    return end.value.code, capsys.readouterr().err


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_bad_command_lines(desk, small_networks, monkeypatch, capsys):
    """Each ends with code 2 and a message about its mistake, without a traceback; nothing is
    written or changed."""
    def train_on(*arguments, **settings):
        raise KeyboardInterrupt  # code 130: the line was not refused

    monkeypatch.setattr(train, "fit", train_on)
    before, wrong = content(desk), []
    for script, line, words in BAD_LINES:
        argv = line.split()
        if script is train and "--data" not in argv and argv[0] != "extra":
            argv = [*TINY[:4], *argv]
        if script is sample and "--checkpoint" not in argv:
            argv += ["--checkpoint", "RUN"]
        code, error = error_of(script, argv, monkeypatch, capsys)
        if code != 2 or words not in error or "Traceback" in error:
            wrong.append((line, code, error[-300:]))
        if content(desk) != before:
            wrong.append((line, "changed", sorted(content(desk).keys() ^ before.keys())))
            break
    assert not wrong, "\n".join(map(str, wrong))


class Payload(str):
    """Unpickling this creates a folder of that name."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_no_reader_runs_code(tmp_path):
    """A pickle that would make a folder, given to every reader: refused, and no folder."""
    ran = tmp_path / "ran"
    evil = {"version": files.CHECKPOINT_VERSION, "config": Payload(ran), "model": Payload(ran),
            "encoder.conv_in.weight": Payload(ran), "state_dict": {"x": Payload(ran)}}
    for name in ("model.pt", "weights.pth", "diffusion_pytorch_model.bin"):
        torch.save(evil, tmp_path / name)
        for read in (files.load_checkpoint, dino.load_dino, vae.AutoencoderKL.from_pretrained,
                     unet.UNet.from_pretrained):
            with pytest.raises((UserError, ValueError)):
                read(tmp_path / name)
    np.savez(tmp_path / "set.npz", train_images=np.array([Payload(ran)], object), train_labels=[1])
    with pytest.raises(UserError):
        open_dataset(tmp_path / "set.npz", 8)
    assert not ran.exists()
    with pytest.raises(FileExistsError):  # of the second payload
        torch.load(tmp_path / "model.pt", weights_only=False)
    assert os.path.isdir(ran), "the payload would not have run anyway: nothing was tested"
