"""Do other libraries make the same images of a trained model?

    python -m experiments export RUN DIR

RUN is a run's folder or its model.pt. DIR gets vae/, unet/ and scheduler/ for diffusers,
projection.safetensors (tokens or prompts -> context), and example.safetensors (noise, contexts,
masks for prompts, and the images sampled from them here). In diffusers that is

    vae = AutoencoderKL.from_pretrained(DIR + "/vae")
    unet = UNet2DConditionModel.from_pretrained(DIR + "/unet")
    scheduler = DDIMScheduler.from_pretrained(DIR + "/scheduler")
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, context).sample, t, x).prev_sample    # x: the noise
    image = vae.decode(x).sample.clamp(-1, 1)

Latents are standardised here, but not there: shift and scale are folded into the 1x1 convolutions
next to the latent. diffusers has one number of groups for all norms of a network, so widths must
be multiples of 32.
"""
import json
from pathlib import Path

import torch
from torch import nn

from dinodiff import DinoDiffusion, ddim_sample, seeded_noise
from support.command import UserError, number, user_errors
from support.files import load_checkpoint, make_folder, resolve_checkpoint, write_text_atomic
from support.tensors import write_safetensors
from unet import UNet
from vae import AutoencoderKL


def add_flags(parser):
    """Add the flags of this experiment."""
    parser.add_argument("run", help="run folder or model.pt")
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--count", type=number(int, 1), default=4, help="images to sample")
    parser.add_argument("--steps", type=number(int, 1), default=20, help="DDIM steps")


def norm_groups(network, name):
    """The number of groups of all GroupNorms of a network; UserError if they differ."""
    groups = sorted({m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)})
    if len(groups) > 1:
        raise UserError(f"the {name} has norms of {groups} groups", "diffusers has one number of "
                        "groups: widths that are multiples of 32 are needed",
                        "train with another --preset")
    return groups[0]


# ---- contents of the files: state dicts and configs ---------------------------------------------

def standardised_latents(state, shift, scale):
    """The VAE's state dict with x0 = (z - shift) * scale as its latent; shift, scale (C,)."""
    state = dict(state)
    mean_scale = torch.cat([scale, torch.ones_like(scale)])[:, None, None, None]
    weight = state["quant_conv.weight"]
    bias = state["quant_conv.bias"]
    state["quant_conv.weight"] = weight * mean_scale
    mean, logvar = bias.chunk(2)
    state["quant_conv.bias"] = torch.cat([(mean - shift) * scale, logvar + 2 * scale.log()])

    weight = state["post_quant_conv.weight"]  # z = x0 / scale + shift
    state["post_quant_conv.weight"] = weight / scale[:, None, None]
    state["post_quant_conv.bias"] = state["post_quant_conv.bias"] + weight[:, :, 0, 0] @ shift
    return state


def vae_config(vae, side):
    """config.json of diffusers' AutoencoderKL for images of this side."""
    config = vae.config
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.layers_per_block,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": norm_groups(vae, "autoencoder"),
        "scaling_factor": 1.0,
        "sample_size": side,
    }


def unet_config(unet, side):
    """config.json of diffusers' UNet2DConditionModel for latents of this side."""
    config = unet.config
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in config.attention_levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.layers_per_block,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.num_heads,  # diffusers' name for the number of heads
        "norm_num_groups": norm_groups(unet, "U-Net"),
        "sample_size": side,
    }


def scheduler_config(schedule):
    """scheduler_config.json of diffusers' DDIMScheduler with the same noise at every timestep."""
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


# ---- writing, and the check ---------------------------------------------------------------------

@torch.no_grad()
def make_example(model, count, steps):
    """Noise, context, mask (prompts only) and images of `count` samples without guidance."""
    seeds = list(range(count))
    condition = None
    if model.prompts:
        condition = model.prompt_ids([model.prompts[i % len(model.prompts)] for i in seeds])
    elif model.embedding_sampler is not None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        condition = model.embedding_sampler.sample(generators)
    context, mask = model.context(condition, count)

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    side = model.config.image_size // model.config.vae.factor
    shape = (count, model.config.vae.latent_channels, side, side)
    example = {
        "noise": seeded_noise(generators, shape, model.shift),
        "context": context,
        "images": model.sample(condition, seeds, steps),
    }
    if mask is not None:
        example["mask"] = mask.int()
    return example


def write_folder(model, folder):
    """Write everything but the example; raises UserError if diffusers cannot load this model."""
    side = model.config.image_size
    latent_side = side // model.config.vae.factor
    vae_state = standardised_latents(model.vae.state_dict(), model.shift.flatten(),
                                     model.scale.flatten())
    projection = {**model.projection.state_dict(), "token_mean": model.token_mean,
                  "token_std": model.token_std}

    stem = "diffusion_pytorch_model.safetensors"
    configs = {"vae/config.json": vae_config(model.vae, side),
               "unet/config.json": unet_config(model.unet, latent_side),
               "scheduler/scheduler_config.json": scheduler_config(model.schedule)}
    states = {f"vae/{stem}": vae_state, f"unet/{stem}": model.unet.state_dict(),
              "projection.safetensors": projection}
    for name in configs:
        make_folder((folder / name).parent)
    for name, config in configs.items():
        write_text_atomic(folder / name, json.dumps(config, indent=2) + "\n")
    for name, state in states.items():
        write_safetensors(folder / name, state)


@torch.no_grad()
def largest_difference(folder, example, schedule, steps):
    """Sample the example with what is in the folder: largest difference of a pixel in [-1, 1]."""
    vae = AutoencoderKL.from_pretrained(folder).eval()
    unet = UNet.from_pretrained(folder).eval()
    mask = example["mask"].bool() if "mask" in example else None

    def model(x, t):
        return unet(x, t, example["context"], mask)
    images = vae.decode(ddim_sample(model, example["noise"], schedule, steps)).clamp(-1, 1)
    return (images - example["images"]).abs().max().item()


def main(args):
    path = resolve_checkpoint(args.run)
    with user_errors():
        model = DinoDiffusion.from_checkpoint(load_checkpoint(path))
    if model.config.vae.stem > 1:
        raise UserError(f"the autoencoder of {path} has a stem of {model.config.vae.stem} pixels",
                        "diffusers has no such network", "export a run of another --preset")
    folder = Path(args.folder)
    write_folder(model, folder)
    with user_errors():
        example = make_example(model, args.count, args.steps)
    write_safetensors(folder / "example.safetensors", example)
    print(f"wrote {folder}: vae/ unet/ scheduler/ for diffusers, "
          "projection.safetensors, example.safetensors")

    difference = largest_difference(folder, example, model.schedule, args.steps)
    print(f"read back, {args.count} images of {args.steps} DDIM steps: the largest difference of a "
          f"pixel in [-1, 1] is {difference:.1e}")
