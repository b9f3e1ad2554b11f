"""Tests of experiments/export.py: what it writes is the model, in other libraries' terms."""
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "reference"))

from dino import V2_REG, ViTConfig, load_dino
from dinodiff import DinoDiffusion, DinoDiffusionConfig, EmbeddingSampler, NoiseSchedule
from experiments import export
from make_diffusers import fill_parameters, inputs
from support.command import UserError
from support.files import CHECKPOINT_VERSION, save_atomic
from support.tensors import read_tensors
from unet import UNetConfig
from vae import AutoencoderKL, VAEConfig

# The VAE's first level has groups of four, the middle one of one, the last of two channels.
CONFIG = DinoDiffusionConfig(
    image_size=32, vae=VAEConfig(3, 4, 16, (1, 2, 4), 1),
    unet=UNetConfig(4, 4, 32, (1, 2), 1, (False, True), 24, 4),
    vit=ViTConfig(8, 64, 2, 1, 32), tokens="cls4+mean", token_shape=(3, 64))


def make_run(folder, config=CONFIG):
    """A run folder with a model of random weights that does something at every layer."""
    model = DinoDiffusion(config)
    for i, part in enumerate((model.vae, model.unet, model.projection, model.embedder)):
        fill_parameters(part, i)
    model.shift.copy_(torch.tensor([0.1, -0.4, 0.2, 0.0])[:, None, None])
    model.scale.copy_(torch.tensor([0.5, 2.0, 1.0, 1.5])[:, None, None])
    if config.condition == "dino":
        tokens, = inputs(1, (40, *config.token_shape))
        model.embedding_sampler = EmbeddingSampler.fit(tokens, components=2)
    folder.mkdir()
    save_atomic(folder / "model.pt", {"version": CHECKPOINT_VERSION, **model.to_checkpoint()})
    return model.eval()


def run_export(run, folder, capsys, steps=4):
    """The largest difference that it prints."""
    export.main(SimpleNamespace(run=str(run), folder=str(folder), count=2, steps=steps))
    return float(re.search(r"in \[-1, 1\] is (\S+)", capsys.readouterr().out)[1])


@pytest.mark.parametrize("condition", ["dino", "prompts", "none"])
def test_read_back_makes_the_same_images(condition, tmp_path, capsys):
    """The folder alone, read as a published one, samples what the model samples."""
    config = CONFIG
    if condition == "prompts":
        config = replace(config, condition="prompts", labels=("opaque", "clear"),
                         template="a <label> chest")
    elif condition == "none":
        config = replace(config, condition="none")
    make_run(tmp_path / "run", config)
    # float32 sums in another order; images without the folding of the latents differ by above 0.1
    assert run_export(tmp_path / "run", tmp_path / "out", capsys) < 1e-4
    example = read_tensors(tmp_path / "out" / "example.safetensors")
    assert ("mask" in example) == (condition == "prompts")
    assert example["images"].shape == (2, 3, 32, 32) and example["images"].std() > 0.1


@torch.no_grad()
def test_latents_are_standardised(tmp_path, capsys):
    """The exported autoencoder's latents are x0, with equal groups in every norm."""
    model = make_run(tmp_path / "run")
    run_export(tmp_path / "run", tmp_path / "out", capsys, steps=1)
    vae = AutoencoderKL.from_pretrained(tmp_path / "out")
    assert vae.config.widths == [128, 32, 64] and export.norm_groups(vae) == [32]
    x, = inputs(0, (1, 3, 32, 32))
    ours = model.vae.encode(x)
    theirs = vae.encode(x)
    torch.testing.assert_close(theirs.mean, model.encode(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs.std, ours.std * model.scale, rtol=1e-4, atol=0)


@torch.no_grad()
def test_narrow_last_level():
    """Attention's products are scaled as before where its own level is widened."""
    narrow = fill_parameters(AutoencoderKL(VAEConfig(3, 4, 8, (8, 2), 1)), 0)
    assert export.norm_groups(narrow) == [4, 32]
    state, wide = export.one_number_of_groups(narrow.state_dict(), narrow.config)
    vae = AutoencoderKL(wide)
    vae.load_state_dict(state)
    x, = inputs(0, (1, 3, 16, 16))
    torch.testing.assert_close(vae.encode(x).mean, narrow.encode(x).mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind,prediction,zero", [
    ("scaled_linear", "v", True), ("cosine", "v", True), ("linear", "eps", False)])
def test_scheduler(kind, prediction, zero):
    """Products of 1 - trained_betas, in float32 as there, are the schedule's alphas."""
    schedule = NoiseSchedule(1000, kind, prediction, zero)
    config = export.scheduler_config(schedule)
    alphas = torch.cumprod(1 - torch.tensor(config["trained_betas"]), dim=0)
    torch.testing.assert_close(alphas, schedule.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert config["prediction_type"] == {"v": "v_prediction", "eps": "epsilon"}[prediction]


@torch.no_grad()
def test_vit_in_timms_names(tmp_path, capsys):
    """The file for timm gives back the same ViT, registers and all."""
    vit_config = ViTConfig(8, 64, 2, 1, **{**V2_REG, "image_size": 32})
    model = make_run(tmp_path / "run", replace(CONFIG, vit=vit_config))
    run_export(tmp_path / "run", tmp_path / "out", capsys, steps=1)
    vit = load_dino(tmp_path / "out" / "vit" / "model.safetensors")
    x, = inputs(0, (1, 3, 32, 32))
    torch.testing.assert_close(vit(x), model.embedder(x), rtol=0, atol=1e-5)
    arguments = json.loads((tmp_path / "out" / "vit" / "config.json").read_text())
    assert arguments["reg_tokens"] == 4 and arguments["init_values"] == 1.0


def test_refuses_what_diffusers_cannot_have(tmp_path):
    """Widths that need several numbers of groups, and files that are no models, in one line."""
    model = make_run(tmp_path / "run", replace(
        CONFIG, unet=UNetConfig(4, 4, 48, (1, 2), 1, (False, True), 24, 4)))
    with pytest.raises(UserError, match=r"norms of \[16, 32\] groups.*multiples of 32.*preset"):
        export.write_folder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="there is no checkpoint"):
        export.main(SimpleNamespace(run=str(tmp_path / "nothing"), folder=str(tmp_path / "out"),
                                    count=1, steps=1))
