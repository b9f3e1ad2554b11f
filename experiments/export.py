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
be multiples of 32. The refiner is not exported.
"""
import json
from pathlib import Path

import torch
from torch import nn

from dinodiff import DinoDiffusion, ddim_sample, seeded_noise
from support.command import UserError, number, user_errors
from support.files import load_checkpoint, resolve_checkpoint, write_text_atomic
from support.weights import write_safetensors
from unet import UNet
from vae import AutoencoderKL


def add_flags(parser):
    parser.add_argument("run", help="run folder or model.pt")
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--count", type=number(int, 1), default=4, help="images to sample")
    parser.add_argument("--steps", type=number(int, 1), default=20, help="DDIM steps")


# ---- contents of the files: state dicts and configs ---------------------------------------------

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
    """The part of config.json that diffusers' VAE and U-Net share; side: of images or latents."""
    groups = sorted({m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)})
    if len(groups) > 1:
        raise UserError(f"norms of {groups} groups", "diffusers has one number of groups: widths "
                        "that are multiples of 32 are needed", "train with another --preset")
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
        condition = model.embedding_sampler.sample([torch.Generator().manual_seed(seed)
                                                    for seed in seeds])
    context, mask = (model.null_context(count) if condition is None else model.context(condition))
    side = model.config.image_size // model.config.vae.factor
    shape = (count, model.config.vae.latent_channels, side, side)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    example = {
        "noise": seeded_noise(generators, shape, model.shift),
        "context": context,
        "images": model.sample(condition, seeds, steps, sampler="ddim", refine=False),
    }
    return example if mask is None else {**example, "mask": mask.int()}


def write_folder(model, folder):
    """Write everything but the example; raises UserError if diffusers cannot load this model."""
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
    example = make_example(model, args.count, args.steps)
    write_safetensors(folder / "example.safetensors", example)
    difference = largest_difference(folder, example, model.schedule, args.steps)
    print(f"wrote {folder}; read back, {args.count} images of {args.steps} DDIM steps: the largest "
          f"difference of a pixel in [-1, 1] is {difference:.1e}")
