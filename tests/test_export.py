"""Tests of experiments/export.py: what it writes is the model, in other libraries' terms."""
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dino import ViTConfig
from dinodiff import DinoDiffusion, DinoDiffusionConfig, EmbeddingSampler, NoiseSchedule
from experiments import export
from make_diffusers import fill_parameters, inputs
from support.command import UserError
from support.files import CHECKPOINT_VERSION, save_atomic
from support.weights import read_tensors
from unet import UNetConfig
from vae import VAEConfig

CONFIG = DinoDiffusionConfig(
    image_size=32, vae=VAEConfig(3, 4, 32, (1, 2, 1), 1),
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


def run_export(run, folder, capsys):
    """The largest difference that it prints."""
    export.main(SimpleNamespace(run=str(run), folder=str(folder)))
    return float(re.search(r"in \[-1, 1\] is (\S+)", capsys.readouterr().out)[1])


@pytest.mark.parametrize("condition", ["dino", "prompts", "none"])
def test_the_folder_makes_the_same_images(condition, tmp_path, capsys, monkeypatch):
    """The folder alone, read like a published one, samples what the model samples."""
    monkeypatch.setattr(export, "STEPS", 4)
    config = CONFIG
    if condition == "prompts":
        config = replace(config, condition="prompts", labels=("opaque", "clear"),
                         template="a <label> chest")
    elif condition == "none":
        config = replace(config, condition="none")
    make_run(tmp_path / "run", config)
    # float32 sums in another order; without the folding, images differ by more than 0.1
    assert run_export(tmp_path / "run", tmp_path / "out", capsys) < 1e-4
    example = read_tensors(tmp_path / "out" / "example.safetensors")
    assert ("mask" in example) == (condition == "prompts")
    assert example["images"].shape == (4, 3, 32, 32) and example["images"].std() > 0.1


@pytest.mark.parametrize("kind,prediction,zero", [
    ("scaled_linear", "v", True), ("linear", "eps", False)])
def test_scheduler(kind, prediction, zero):
    """Products of 1 - trained_betas, in float32 as there, are the schedule's alphas."""
    schedule = NoiseSchedule(1000, kind, prediction, zero)
    config = export.scheduler_config(schedule)
    alphas = torch.cumprod(1 - torch.tensor(config["trained_betas"]), dim=0)
    torch.testing.assert_close(alphas, schedule.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert config["prediction_type"] == {"v": "v_prediction", "eps": "epsilon"}[prediction]


@pytest.mark.parametrize("change,says", [
    ({"unet": UNetConfig(4, 4, 48, (1, 2), 1, (False, True), 24, 4)}, "norms of"),
    ({"vae": VAEConfig(3, 4, 32, (1, 2, 1), 1, linear=True)}, "linear path")])
def test_refuses_what_diffusers_cannot_have(tmp_path, change, says):
    """Widths that need several numbers of groups; a path beside the networks."""
    model = make_run(tmp_path / "run", replace(CONFIG, **change))
    with pytest.raises(UserError, match=f"{says}.*multiples of 32"):
        export.write_folder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
