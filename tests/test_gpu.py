"""On a real GPU: the scripts train and sample in bf16. More is measured by tools/gpu_check.py."""
import pytest
import torch

import sample
import train
from conftest import TINY
from support.files import load_checkpoint, read_jsonl


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_and_sampling_on_a_gpu(small_networks, tmp_path):
    """All stages in bf16 with finite losses and weights; samples are the same twice."""
    run = tmp_path / "run"
    flags = [flag if flag != "float32" else "bf16" for flag in TINY]
    flags[flags.index("cpu")] = "cuda"
    assert train.main([*flags, "--out", str(run)]) == 0
    assert {row["stage"] for row in read_jsonl(run / "log.jsonl")} >= {"vae", "unet"}
    unet = load_checkpoint(run / "model.pt")["unet"]
    assert all(value.isfinite().all() and not value.is_cuda for value in unet.values())
    for name in ("one", "two"):
        assert sample.main(["--random", "--count", "2", "--steps", "3", "--device", "cuda",
                            "--checkpoint", str(run), "--out", str(tmp_path / name)]) == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name / "images").iterdir()}
                for name in ("one", "two"))
    assert len(one) == 2 and one == two
