"""Flags of train.py: presets filled in, a resumed run's settings kept."""
import json

import pytest
import torch

from support import settings
from support.command import UserError
from support.settings import reading_processes, saved_settings, train_settings

PRESETS = {
    "tiny": dict(size=64, embedder="tiny", vae="train", unet="train", embedder_batch=32,
                 embedder_steps=300, vae_batch=4, vae_steps=2000, vae_lr=3e-3, batch=16,
                 unet_steps=1700, lr=1e-3),
    "sd15": dict(size=512, embedder="dino_vitb8", vae="sd15", unet="sd15", embedder_batch=128,
                 embedder_steps=4000, vae_batch=8, vae_steps=20000, vae_lr=1e-4, batch=16,
                 unet_steps=100000, lr=1e-5),
}


def parse(*argv):
    return train_settings(argv, PRESETS, ["dino_vitb8"], ("global", "cls"))


@pytest.fixture
def begun(tmp_path):
    """The folder of a run with --size 32 --seed 3."""
    args = parse("--size", "32", "--seed", "3", "--data", str(tmp_path / "old"),
                 "--out", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    config = {**vars(args), "torch": "2", "depth": {"bits": 12}}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def test_a_preset_fills_in_what_no_flag_sets():
    """Flags win over the preset, --steps caps its steps and no flag's, sd15 means eps."""
    args = parse("--steps", "500", "--vae-steps", "900", "--batch", "4")
    assert (args.size, args.batch, args.lr) == (64, 4, 1e-3)
    assert (args.embedder_steps, args.vae_steps, args.unet_steps) == (300, 900, 500)
    assert (args.prediction, args.zero_snr) == ("v", True)
    assert args.out == "runs/cxr" and args.workers is None and args.uncertain == "ignore"
    args = parse("--preset", "sd15")
    assert (args.prediction, args.zero_snr, args.vae) == ("eps", False, "sd15")
    assert parse("--unet", "sd15").prediction == "eps"
    assert parse("--prediction", "eps").zero_snr is False


def test_a_resume_keeps_the_settings(begun, tmp_path):
    """Flags that are not given are the run's; those that change no result may be given anew."""
    args = parse("--resume", "--out", str(begun), "--device", "cpu", "--workers", "3")
    assert (args.size, args.seed, args.device, args.workers) == (32, 3, "cpu", 3)
    assert args.out == str(begun) and args.resume and not args.dry_run
    with pytest.raises(UserError, match="--size 64 differs from the run's 32"):
        parse("--resume", "--out", str(begun), "--size", "64")
    with pytest.raises(UserError, match="already holds a run"):
        parse("--out", str(begun))


def test_data_may_move_to_another_folder(begun, tmp_path):
    """The same set in a new place; generated images and files are another set."""
    (tmp_path / "new").mkdir()
    moved = parse("--resume", "--out", str(begun), "--data", str(tmp_path / "new"))
    assert moved.data == str(tmp_path / "new")
    with pytest.raises(UserError, match="--data phantoms differs"):
        parse("--resume", "--out", str(begun), "--data", "phantoms")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"size": '])
def test_settings_that_are_damaged(begun, text):
    """One line that names the file."""
    (begun / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
        parse("--resume", "--out", str(begun))


def test_a_dry_run_needs_no_new_folder(begun):
    """It shows what the flags say, whatever lies there."""
    assert parse("--dry-run", "--out", str(begun)).size == 64


def test_saved_settings(begun, tmp_path):
    """Those of the folder, or none."""
    assert saved_settings(begun)["depth"] == {"bits": 12}
    assert saved_settings(tmp_path) == {}


@pytest.mark.parametrize("device,cpus,asked,ranks,expected", [
    ("cuda", 16, None, 1, 16), ("cuda", 16, None, 4, 4), ("cuda", 2, None, 1, 0),
    ("cpu", 16, None, 1, 0), ("cpu", 2, None, 1, 0), ("cpu", 2, 5, 1, 5), ("cuda", 16, 0, 1, 0)])
def test_reading_processes(monkeypatch, device, cpus, asked, ranks, expected):
    """One for each CPU beside a GPU, shared by the ranks of a machine; what is asked for wins."""
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda pid: set(range(cpus)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert reading_processes(asked, torch.device(device)) == expected
