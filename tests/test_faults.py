"""A run survives a second one in its folder, and a flat image."""
import os
import signal

import numpy as np
import pytest
from PIL import Image

import sample
import train
from conftest import TINY
from support.command import UserError
from support.files import load_checkpoint
from support.run import Run


def in_child(work):
    """Fork, and call work() there; the exit code, or minus the signal that killed it."""
    process = os.fork()
    if not process:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_folder_takes_one_run_at_a_time(tmp_path):
    """Another process is refused while a run is alive, and changes nothing; a killed run leaves no
    lock."""
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


def test_one_flat_image(small_networks, tmp_path):
    """A run on one image of one grey value ends with finite weights, and its model samples."""
    image, run = tmp_path / "images" / "a.png", tmp_path / "run"
    image.parent.mkdir()
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save(image)
    assert train.main(["--data", str(image.parent), *TINY[2:], "--holdout", "0",
                       "--out", str(run)]) == 0
    checkpoint = load_checkpoint(run / "model.pt")
    for part in ("vae", "unet", "projection", "refiner", "statistics"):
        for name, value in checkpoint[part].items():
            assert value.isfinite().all(), name
    assert sample.main(["--from-image", str(image), "--steps", "2", "--device", "cpu",
                        "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 0
