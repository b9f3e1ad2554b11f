"""Shared fixtures. Tests run on one thread: their tensors are tiny, and on a busy machine threads
contend for cores, which makes the tests many times slower."""
import os
import sys
from functools import lru_cache
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also for scripts that tests start
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "reference"), str(TESTS.parent / "tools")]

import pytest
import torch

torch.set_num_threads(1)

# Flags of the smallest training; use them with the fixture small_networks.
TINY = ["--data", "phantoms", "--count", "12", "--size", "32", "--batch", "2", "--steps", "3",
        "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="session")
def drawn_once():
    """The functions that draw a phantom, with a cache."""
    from support import phantoms
    return {name: lru_cache(maxsize=None)(getattr(phantoms, name))
            for name in ("_chest", "_histology")}


@pytest.fixture(scope="module")
def small_networks(drawn_once):
    """train.py with networks of 0.2 M parameters; phantoms are drawn once."""
    from dataclasses import replace

    import train
    from dino import DINO, DINOConfig, ViTConfig
    from support import phantoms
    from unet import UNetConfig
    from vae import VAEConfig
    small = replace(
        train.PRESETS["tiny"], vae_config=VAEConfig(3, 4, 8, (1, 2, 4), 1),
        unet_config=UNetConfig(4, 4, 8, (1, 1), 1, (False, True), 8, 2), previews=1,
        embedder_batch=2, vae_batch=2, refiner_batch=2, refiner_width=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", small)
        patch.setitem(train.VISION_TRANSFORMERS, "tiny", ViTConfig(8, 48, 2, 3))
        head = DINOConfig(head_dim=32, bottleneck=8, prototypes=16)
        patch.setattr(train, "DINO", lambda vit_config: DINO(vit_config, head))
        for name, draw in drawn_once.items():
            patch.setattr(phantoms, name, draw)
        yield


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory, small_run):
    """A run folder with the small model and its 60 chests of 30 patients. The columns: findings, a
    kind (even, odd), and one that is constant."""
    from support.datasets import open_dataset
    from support.files import load_checkpoint, save_atomic, write_csv
    from support.phantoms import chest_phantoms
    from support.pictures import save_png
    from support.training_set import split_holdout, write_split

    folder = tmp_path_factory.mktemp("labelled")
    images, _, labels = chest_phantoms(60, 32, 0)
    rows = [["file", "finding", "patient", "sick", "kind"]]
    for i, (image, (heart, fluid, *_)) in enumerate(zip(images, labels.tolist())):
        save_png(folder / "images" / f"{i:02d}.png", image.expand(3, -1, -1))
        names = [name for name, shown in (("heart", heart), ("fluid", fluid)) if shown]
        rows.append([f"{i:02d}.png", "|".join(names) or "clear", f"p{i // 2}", "1",
                     "odd" if i % 2 else "even"])
    write_csv(folder / "labels.csv", rows)

    run = folder / "run"
    data = open_dataset(folder, 32)
    write_split(run / "split.csv", data, *split_holdout(data, 0.4, 0))
    save_atomic(run / "model.pt", {**load_checkpoint(small_run / "model.pt"), "training": {
        "data": str(folder), "seed": 0, "count": 2400}})
    return run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run folder with a small model of random weights, its cache and sources: read only."""
    from small_run import write_run
    return write_run(tmp_path_factory.mktemp("runs") / "tokens")
