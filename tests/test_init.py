"""train.py --init, the bundled model, and packed models."""
import numpy as np
import pytest
import torch
from PIL import Image
from small_run import make

import hubconf
import pack
import sample
import train
from dinodiff import DinoDiffusion
from support.command import UserError
from support.files import BOX, load_checkpoint, save_atomic

FLAGS = ["--data", "phantoms", "--count", "12", "--batch", "2", "--device", "cpu"]
SET = ["--set", "unet_steps=2", "vae_batch=2", "previews=1", "refiner_steps=0"]


def train_from(init, out, *flags, settings=()):
    """The content of the model.pt that came of it."""
    flags = [*FLAGS, *map(str, flags), *SET, *settings]
    assert train.main(["--init", str(init), "--out", str(out), *flags]) == 0
    return load_checkpoint(out / "model.pt")


def distance(a, b):
    return sum((a[name].float() - b[name].float()).abs().sum().item() for name in a)


def test_training_starts_from_the_other_model(small_run, tmp_path):
    """With almost no learning rate, weights and statistics do not change."""
    before = load_checkpoint(small_run / "model.pt")
    after = train_from(small_run, tmp_path / "same", "--lr", 1e-12)
    for part in ("unet", "projection", "vae", "statistics"):
        assert distance(before[part], after[part]) < 1e-3, part
    assert distance(before["embedder"], after["embedder"]) == 0
    assert after["config"] == before["config"]

    moved = train_from(small_run, tmp_path / "moved", "--lr", 1e-2)
    assert distance(before["unet"], moved["unet"]) > 0.1


def test_stable_diffusion_is_known_by_its_file(small_run, tmp_path):
    """A folder of diffusers trains as `sd15` by name does; a run of ours keeps what it predicts."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    content = load_checkpoint(small_run / "model.pt")
    content["config"]["prediction"] = "eps"
    save_atomic(tmp_path / "eps.pt", content)
    for unet, prediction in (("sd15", "eps"), (tmp_path, "eps"), (small_run, "v"), ("train", "v"),
                             (tmp_path / "eps.pt", "eps")):
        for flags in (["--unet", str(unet)], ["--set", f"unet={unet}"]):
            preset = train.choose_preset(train.parse([*flags, "--dry-run"]), None)
            assert preset.prediction == prediction
    with pytest.raises(UserError, match="no weights"):
        (tmp_path / "empty").mkdir()
        train.choose_preset(train.parse(["--unet", str(tmp_path / "empty"), "--dry-run"]), None)


def test_a_colour_run_does_not_take_a_grey_refiner(small_run, tmp_path):
    """It would make all samples grey."""
    settings = ["refiner_steps=1", "vae_steps=1", "refiner_width=8"]
    grey = train_from(small_run, tmp_path / "grey", settings=settings)
    colour = train_from(tmp_path / "grey", tmp_path / "colour", "--data", "histology", "--vae",
                        "train", settings=settings)
    assert [x["config"]["refiner"]["out_channels"] for x in (grey, colour)] == [4, 12]


def test_the_embedder_can_be_fine_tuned(small_run, tmp_path):
    """After a few steps it is close to that of --init; token statistics are remeasured."""
    before = load_checkpoint(small_run / "model.pt")
    after = train_from(small_run, tmp_path / "run", "--embedder", "tiny",
                       settings=["embedder_steps=3", "embedder_batch=4"])
    key = "vit.patch_embed.proj.weight"
    was, now = (x["embedder"][key] for x in (before, after))
    assert 0 < (now - was).abs().max() < 0.01 < was.std()
    assert distance(before["statistics"], after["statistics"]) > 0


@pytest.mark.parametrize("flags, said", [
    (["--size", "48"], "image_size 32, this run has 48"),
    (["--condition", "none"], "condition dino, this run has none"),
    (["--set", "tokens=cls"], "tokens global, this run has cls"),
    (["--set", "prediction=eps"], "prediction v, this run has eps"),
])
def test_a_mismatch_is_refused(small_run, tmp_path, flags, said):
    """In one line, before a folder is there."""
    with pytest.raises(UserError, match=said):
        train.main(["--init", str(small_run), "--out", str(tmp_path / "run"), *FLAGS, *flags])
    assert not (tmp_path / "run").exists()


# ---- the box -----------------------------------------------------------------------------------

def test_the_bundled_model_samples_from_a_clean_clone(monkeypatch, tmp_path, capsys):
    """Without a run or flags, samples go to samples/; a photograph gets a note."""
    monkeypatch.chdir(tmp_path)
    assert BOX.stat().st_size < 30e6
    photograph = np.random.default_rng(0).integers(0, 255, (140, 150, 3), np.uint8)
    Image.fromarray(photograph).save("x.png")
    flags = ["--from-image", "x.png", "--count", "2", "--steps", "2", "--device", "cpu"]
    assert sample.main(flags) == 0
    printed = capsys.readouterr().out
    assert "not for clinical use" in printed and "chest X-ray" in printed
    assert len(list((tmp_path / "samples" / "reconstruct" / "images").glob("*.png"))) == 2
    assert sample.main(["--prototypes", "3", "--steps", "2", "--device", "cpu"]) == 0
    assert len(list((tmp_path / "samples" / "prototype" / "images").glob("*.png"))) == 3
    assert hubconf.cxr128().config.image_size == 128
    assert not hubconf.dino_cxr().training


def test_packed_models_sample_the_same(small_run, tmp_path):
    """Half precision, no paths of the run, prototypes instead of the cache."""
    path = tmp_path / "p" / "model.pt"
    pack.main([str(small_run), str(path), "--prototypes", "6"])
    packed = load_checkpoint(path)
    assert packed["unet"]["conv_in.weight"].dtype == torch.float16
    assert packed["prototypes"].shape == (6, 5, 12) and "data" not in packed["training"]
    seen = DinoDiffusion.from_checkpoint(load_checkpoint(small_run / "model.pt"))
    again = DinoDiffusion.from_checkpoint(packed)
    images = [m.sample(None, [3], steps=2) for m in (seen, again)]
    assert (images[0] - images[1]).abs().mean() < 0.02
    assert len(make(tmp_path / "p", tmp_path / "out", "--prototypes", "4")) == 4
