"""Do other libraries make the same images of a trained model?

    python -m experiments export RUN DIR

RUN is a run's folder or its model.pt. DIR gets vae/, unet/ and scheduler/ for diffusers, vit/ for
timm, projection.safetensors (what makes context of tokens or prompts), and example.safetensors
(noise, contexts, masks for prompts, and the images that came of them here). In diffusers that is

    vae = AutoencoderKL.from_pretrained(DIR + "/vae")
    unet = UNet2DConditionModel.from_pretrained(DIR + "/unet")
    scheduler = DDIMScheduler.from_pretrained(DIR + "/scheduler")
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, context).sample, t, x).prev_sample    # x: the noise
    image = vae.decode(x).sample.clamp(-1, 1)

and in timm VisionTransformer(**arguments), with the arguments in vit/config.json.

Latents are standardised here, but not there: shift and scale go into the 1x1 convolutions beside
the latent. And there one number of groups serves all norms: levels of the autoencoder that have
fewer are widened by channels of zeros, which changes nothing but the file's size.
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dinodiff import DinoDiffusion, ddim_sample, seeded_noise
from support.command import UserError, positive_int, user_errors
from support.files import load_checkpoint, make_folder, resolve_checkpoint, write_text_atomic
from support.tensors import write_safetensors
from unet import UNet
from vae import AutoencoderKL, VAEConfig


def add_flags(parser):
    """Add the flags of this experiment."""
    parser.add_argument("run", help="run folder or model.pt")
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--count", type=positive_int, default=4, help="images of the example")
    parser.add_argument("--steps", type=positive_int, default=20, help="DDIM steps of the example")


def norm_groups(network):
    """Numbers of groups of its GroupNorms, sorted."""
    return sorted({m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)})


# ---- what stands in the files: state dicts and configs ------------------------------------------

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


def one_number_of_groups(state, config):
    """State dict and VAEConfig of the same autoencoder with equally many groups in every norm."""
    with torch.device("meta"):
        vae = AutoencoderKL(config)
        groups = norm_groups(vae)[-1]
        norms = [level.resnets[-1].norm2 for level in vae.encoder.down_blocks]
        widths = [norm.num_channels // norm.num_groups * groups for norm in norms]
        wide = VAEConfig(config.in_channels, config.latent_channels, 1, tuple(widths),
                         config.layers_per_block, norm_groups=groups)
        shapes = {name: tensor.shape for name, tensor in AutoencoderKL(wide).state_dict().items()}

    # New channels are zero before and after every layer: a norm's weight and bias are zero too.
    widened = {}
    for name, tensor in state.items():
        missing = [(0, new - old) for old, new in zip(tensor.shape, shapes[name])]
        widened[name] = F.pad(tensor, sum(reversed(missing), ()))
        if ".to_q." in name:  # products are divided by the root of the width
            widened[name] = widened[name] * (shapes[name][0] / tensor.shape[0]) ** 0.5
    return widened, wide


def vae_config(config, side):
    """config.json of diffusers' AutoencoderKL for images of this side."""
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
        "norm_num_groups": config.norm_groups,
        "scaling_factor": 1.0,
        "sample_size": side,
    }


def unet_config(unet, side):
    """config.json of diffusers' UNet2DConditionModel for latents of this side."""
    config = unet.config
    groups = norm_groups(unet)
    if len(groups) > 1:
        raise UserError(f"this U-Net has norms of {groups} groups", "diffusers has one number of "
                        "them: widths that are multiples of 32 are needed",
                        "train with another --preset")
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
        "attention_head_dim": config.num_heads,  # so diffusers calls the number of heads
        "norm_num_groups": groups[0],
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


def timm_vit(vit):
    """State dict, and arguments of timm's VisionTransformer, for the ViT's own image size."""
    config = vit.config
    state = {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "init_values": 1.0 if config.layer_scale else None,
        "num_classes": 0,
    }
    if config.registers:  # there positions have no row for CLS
        arguments |= {"reg_tokens": config.registers, "no_embed_class": True}
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state, arguments


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
    """Write everything but the example; raises UserError if diffusers cannot have this model."""
    side = model.config.image_size
    latent_side = side // model.config.vae.factor
    state = standardised_latents(model.vae.state_dict(), model.shift.flatten(),
                                 model.scale.flatten())
    vae_state, wide = one_number_of_groups(state, model.config.vae)
    vit_state, vit_arguments = timm_vit(model.embedder)
    projection = {**model.projection.state_dict(), "token_mean": model.token_mean,
                  "token_std": model.token_std}

    stem = "diffusion_pytorch_model.safetensors"
    configs = {"vae/config.json": vae_config(wide, side),
               "unet/config.json": unet_config(model.unet, latent_side),
               "scheduler/scheduler_config.json": scheduler_config(model.schedule),
               "vit/config.json": vit_arguments}
    states = {f"vae/{stem}": vae_state, f"unet/{stem}": model.unet.state_dict(),
              "vit/model.safetensors": vit_state, "projection.safetensors": projection}
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
                        "diffusers has no network with one", "export a run of another --preset")
    folder = Path(args.folder)
    write_folder(model, folder)
    with user_errors():
        example = make_example(model, args.count, args.steps)
    write_safetensors(folder / "example.safetensors", example)
    print(f"wrote {folder}: vae/ unet/ scheduler/ for diffusers, vit/ for timm, "
          "projection.safetensors, example.safetensors")

    difference = largest_difference(folder, example, model.schedule, args.steps)
    print(f"read back, {args.count} images of {args.steps} DDIM steps: the largest difference of a "
          f"pixel in [-1, 1] is {difference:.1e}")
