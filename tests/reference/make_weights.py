"""Makes weights.npz: outputs of diffusers' and transformers' networks in their own layouts.

Made with diffusers 0.42.1, transformers 5.24.0, torch 2.14.1, Python 3.11, CPU, float32:

    python tests/reference/make_weights.py

No weights are stored, only the names and shapes in each library's file, and its config.json. The
test writes such a file itself; `fill_state` gives it the same values.
"""
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

VAE = {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4,
       "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
UNET = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14,
       "image_size": 84}
DIFFUSERS = {
    "vae_8_groups": ("AutoencoderKL", {**VAE, "norm_num_groups": 8}),
    "unet_4_heads": ("UNet2DConditionModel", {**UNET, "attention_head_dim": 4}),
    "unet_8_groups": ("UNet2DConditionModel", {**UNET, "norm_num_groups": 8}),
}
TRANSFORMERS = {
    "hf_dino": ("ViT", {**VIT, "intermediate_size": 256}),
    "hf_dinov2": ("Dinov2", VIT),
    "hf_registers": ("Dinov2WithRegisters", VIT),
}


def fill_state(shapes, seed=1):
    """Values for a dict of shapes, in the order of the names; activations stay near 1."""
    random = np.random.RandomState(seed)
    state = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.from_numpy(random.standard_normal(tuple(shape))).float()
        if len(shape) == 3:  # tokens and positions
            noise = 0.5 * noise
        elif len(shape) > 1:
            noise = noise / np.sqrt(noise[0].numel())  # 1 / sqrt(fan in)
        else:
            noise = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)  # norms near 1
        state[name] = noise
    return state


def inputs(*shapes):
    """Arrays of the given shapes in [-1, 1]."""
    random = np.random.RandomState(2)
    return [torch.from_numpy(random.uniform(-1, 1, shape)).float() for shape in shapes]


def filled(network):
    """The network with the values of fill_state; the shapes in its file, and its config."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        file, = Path(folder).glob("*.safetensors")
        shapes = {name: list(tensor.shape) for name, tensor in load_file(file).items()}
        save_file(fill_state(shapes), file, metadata={"format": "pt"})
        config = json.loads(Path(folder, "config.json").read_text())
        network = type(network).from_pretrained(folder).eval()
    return network, {"shapes": shapes, "config": config}


def normalise(x):
    """Pixels in [-1, 1], normalised with ImageNet's statistics."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    return ((x + 1) / 2 - mean) / std


@torch.no_grad()
def main():
    import diffusers
    import transformers

    arrays = {}
    for case, (name, options) in DIFFUSERS.items():
        network, files = filled(getattr(diffusers, name)(**options))
        if case.startswith("vae"):
            x, z = inputs((2, 3, 16, 24), (2, 4, 8, 12))
            arrays[f"{case}_mean"] = network.encode(x).latent_dist.mean
            arrays[f"{case}_decoded"] = network.decode(z).sample
        else:
            xt, context = inputs((2, 4, 8, 12), (2, 5, 24))
            arrays[f"{case}_out"] = network(xt, torch.tensor([17, 981]), context).sample
        arrays[case] = json.dumps(files)

    x, = inputs((2, 3, 56, 84))
    for case, (name, options) in TRANSFORMERS.items():
        config = getattr(transformers, f"{name}Config")(**options)
        network, files = filled(getattr(transformers, f"{name}Model")(config))
        keywords = {"interpolate_pos_encoding": True} if name == "ViT" else {}
        tokens = network(normalise(x), **keywords).last_hidden_state
        arrays[f"{case}_out"] = tokens[:, :1 + getattr(config, "num_register_tokens", 0)]
        arrays[case] = json.dumps(files)

    np.savez_compressed(Path(__file__).parent / "weights.npz", **arrays)


if __name__ == "__main__":
    main()
