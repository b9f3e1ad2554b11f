"""Does diffusers make the same images of a trained model?

    python -m experiments export RUN DIR

RUN is a run's folder or its model.pt. DIR gets vae/, unet/ and scheduler/ for diffusers,
projection.safetensors (tokens or prompts -> context), and example.safetensors (noise, context, mask
for prompts, and the images sampled from them here). In diffusers that is

    vae = AutoencoderKL.from_pretrained(DIR + "/vae")
    unet = UNet2DConditionModel.from_pretrained(DIR + "/unet")
    scheduler = DDIMScheduler.from_pretrained(DIR + "/scheduler")
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, context).sample, t, x).prev_sample    # x: the noise
    image = vae.decode(x).sample.clamp(-1, 1)

Latents are standardised here, but not there: shift and scale are folded into the 1x1 convolutions
next to the latent. The refiner is not exported.
"""
import json
from pathlib import Path

import torch
from torch import nn

from dinodiff import DinoDiffusion, ddim_sample, seeded_noise
from support.command import UserError, user_errors
from support.files import load_checkpoint, resolve_checkpoint, write_text_atomic
from support.weights import write_safetensors
from unet import UNet
from vae import AutoencoderKL

COUNT = 4   # images of the example
STEPS = 20  # of DDIM


def add_flags(parser):
    parser.add_argument("run", help="run folder or model.pt")
    parser.add_argument("folder", help="where to write")


def standardised_latents(state, shift, scale):
    """The VAE's state dict with x0 = (z - shift) * scale as its latent; shift, scale (C,)."""
    state = dict(state)
    mean_scale = torch.cat([scale, torch.ones_like(scale)])[:, None, None, None]
    state["quant_conv.weight"] = state["quant_conv.weight"] * mean_scale
    mean, logvar = state["quant_conv.bias"].chunk(2)
    state["quant_conv.bias"] = torch.cat([(mean - shift) * scale, logvar + 2 * scale.log()])

    weight = state["post_quant_conv.weight"]  # z = x0 / scale + shift
    state["post_quant_conv.weight"] = weight / scale[:, None, None]
    state["post_quant_conv.bias"] = state["post_quant_conv.bias"] + weight[:, :, 0, 0] @ shift
    return state


def network_config(network, side):
    """The entries that the VAE and the U-Net share; side: of images or latents."""
    groups = sorted({m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)})
    has_extras = isinstance(network, AutoencoderKL) and (
        network.config.stem > 1 or network.config.linear)
    if len(groups) > 1 or has_extras:
        raise UserError(f"norms of {groups} groups, or a stem or linear path, which diffusers does "
                        "not have", "widths that are multiples of 32 are needed, without these",
                        "export a run of another --preset")
    return {
        "block_out_channels": list(network.config.widths),
        "layers_per_block": network.config.layers_per_block,
        "norm_num_groups": groups[0],
        "in_channels": network.config.in_channels,
        "sample_size": side,
    }


def vae_config(vae, side):
    levels = len(vae.config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "out_channels": vae.config.in_channels,
        "latent_channels": vae.config.latent_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": 1.0,
        **network_config(vae, side),
    }


def unet_config(unet, side):
    kinds = ["CrossAttn" if has else "" for has in unet.config.attention_levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "out_channels": unet.config.out_channels,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "cross_attention_dim": unet.config.context_dim,
        "attention_head_dim": unet.config.num_heads,  # diffusers' name for the number of heads
        **network_config(unet, side),
    }


def scheduler_config(schedule):
    """A DDIMScheduler with the same noise at every timestep."""
    alphas = schedule.alphas_cumprod.double().cpu()
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "trained_betas": (1 - alphas / before).tolist(),
        "prediction_type": {"v": "v_prediction", "eps": "epsilon"}[schedule.prediction],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    }


def write_folder(model, folder):
    """Write everything but the example; UserError if diffusers does not have such networks."""
    side = model.config.image_size
    configs = {
        "vae/config.json": vae_config(model.vae, side),
        "unet/config.json": unet_config(model.unet, side // model.config.vae.factor),
        "scheduler/scheduler_config.json": scheduler_config(model.schedule),
    }
    stem = "diffusion_pytorch_model.safetensors"
    states = {
        f"vae/{stem}": standardised_latents(model.vae.state_dict(), model.shift.flatten(),
                                            model.scale.flatten()),
        f"unet/{stem}": model.unet.state_dict(),
        "projection.safetensors": {**model.projection.state_dict(),
                                   "token_mean": model.token_mean, "token_std": model.token_std},
    }
    for name, config in configs.items():
        write_text_atomic(folder / name, json.dumps(config, indent=2) + "\n")
    for name, state in states.items():
        write_safetensors(folder / name, state)


@torch.no_grad()
def main(args):
    with user_errors():
        model = DinoDiffusion.from_checkpoint(load_checkpoint(resolve_checkpoint(args.run)))
    folder = Path(args.folder)
    write_folder(model, folder)

    # Noise, context and images of the example, without guidance.
    generators = [torch.Generator().manual_seed(seed) for seed in range(COUNT)]
    side = model.config.image_size // model.config.vae.factor
    noise = seeded_noise(generators, (COUNT, model.config.vae.latent_channels, side, side),
                         model.shift)
    condition = None
    context, mask = model.null_context(COUNT)
    if model.embedding_sampler is not None:
        condition = model.embedding_sampler.sample(generators)
        context, mask = model.context(condition)
    images = model.sample(condition, range(COUNT), STEPS, 1.0, sampler="ddim", refine=False)
    example = {"noise": noise, "context": context, "images": images}
    if mask is not None:
        example["mask"] = mask.int()
    write_safetensors(folder / "example.safetensors", example)

    # The folder alone must make the same images.
    vae = AutoencoderKL.from_pretrained(folder).eval()
    unet = UNet.from_pretrained(folder).eval()
    x0 = ddim_sample(lambda x, t: unet(x, t, context, mask), noise, model.schedule, STEPS)
    difference = (vae.decode(x0).clamp(-1, 1) - images).abs().max().item()
    print(f"wrote {folder}; read back, {COUNT} images of {STEPS} DDIM steps: the largest "
          f"difference of a pixel in [-1, 1] is {difference:.1e}")
