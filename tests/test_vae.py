"""Tests of vae.py: parity with diffusers on equal weights, loss, statistics, weight files."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REFERENCE = Path(__file__).parent / "reference"
sys.path.insert(0, str(REFERENCE))

import vae as vae_file  # noqa: E402
from make_diffusers import VAE_CASES, fill_parameters, inputs, layout  # noqa: E402
from vae import (AutoencoderKL, LatentGaussian, VAEConfig, group_norm,  # noqa: E402
                 latent_statistics, read_safetensors, vae_loss)

# 64 channels: with 32 or fewer each is a group of its own, and the norm cancels biases before it
TINY = VAEConfig(base_channels=64, channel_multipliers=(1, 2), layers_per_block=1)


def tiny(seed=0):
    return fill_parameters(AutoencoderKL(TINY), seed)


def write_safetensors(path, tensors):
    """The format by hand, from numpy arrays: length, header, bytes."""
    kinds = {"float32": "F32", "float16": "F16", "int64": "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {"dtype": kinds[str(array.dtype)], "shape": list(array.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("case", VAE_CASES)
@torch.no_grad()
def test_parity_with_diffusers(case):
    """Encoder (with its right-bottom padding), KL and decoder equal diffusers' on equal weights."""
    base, multipliers, layers, (H, W) = VAE_CASES[case]
    stored = np.load(REFERENCE / "diffusers_vae.npz")
    vae = fill_parameters(AutoencoderKL(VAEConfig(3, 4, base, multipliers, layers)), seed=1)
    latent = vae.encode(inputs(2, (2, 3, H, W))[0])
    f = vae.config.factor
    decoded = vae.decode(inputs(3, (2, 4, H // f, W // f))[0])
    # 1e-4: float32 sums in another order differ by about 1e-6; a wrong padding by about 1
    for ours, name in ((latent.mean, "mean"), (latent.logvar, "logvar"), (decoded, "decoded")):
        np.testing.assert_allclose(ours, stored[f"{case}_{name}"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(latent.kl(), stored[f"{case}_kl"], rtol=1e-5)


def test_default_is_stable_diffusions():
    """The default config has the official parameter names, shapes, norms and count."""
    with torch.device("meta"):
        vae = AutoencoderKL()
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert layout(vae) == np.load(REFERENCE / "diffusers_vae.npz")["layout"]


def test_any_number_of_levels():
    """One to four levels: factor, latent side and reconstruction side are right."""
    for levels in (1, 2, 3, 4):
        vae = AutoencoderKL(VAEConfig(1, 3, 4, (1,) * levels, 1))
        mean = vae.encode(torch.zeros(1, 1, 16, 24)).mean
        assert vae.config.factor == 2 ** (levels - 1)
        assert mean.shape == (1, 3, 16 // vae.config.factor, 24 // vae.config.factor)
        assert vae.decode(mean).shape == (1, 1, 16, 24)


def test_refuses_sides_that_do_not_fit():
    """A side off the factor is named with a way out."""
    with pytest.raises(ValueError, match="18 x 15.*multiples of 2.*use 18 x 14"):
        tiny().encode(torch.zeros(1, 3, 15, 18))


def test_narrow_levels_keep_brightness():
    """Below 32 channels a group has four of them: with one channel a group, adding a constant to a
    channel would change nothing behind the norm."""
    assert [group_norm(c).num_groups for c in (4, 16, 32, 48, 128, 512)] == [1, 4, 32, 16, 32, 32]


def test_every_parameter_gets_a_gradient():
    """No parameter is left out of the loss (parameters randomised: branches start at zero)."""
    vae = tiny()
    loss, _ = vae_loss(vae, inputs(1, (2, 3, 8, 8))[0], torch.Generator().manual_seed(0))
    loss.backward()
    for name, p in vae.named_parameters():
        if name.endswith("to_k.bias"):  # adds the same to all scores of a query: softmax drops it
            continue
        assert p.grad is not None and p.grad.abs().max() > 1e-9, name


def test_kl():
    """KL is 0 for N(0, 1), the closed form of two Gaussians elsewhere; logvar is clamped."""
    zeros = torch.zeros(2, 4, 3, 3)
    assert torch.equal(LatentGaussian(zeros, zeros).kl(), torch.zeros(2))
    mean, logvar = inputs(0, (2, 4, 3, 3), (2, 4, 3, 3))
    p = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    closed = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(LatentGaussian(mean, logvar).kl(), closed.sum((1, 2, 3)))
    extreme = LatentGaussian(zeros, torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1) + zeros)
    assert extreme.logvar.min() == -30 and extreme.logvar.max() == 20


def test_sample_is_seeded_and_has_the_right_moments():
    """Equal seeds give equal draws; 40,000 draws have the mean and deviation asked for."""
    latent = LatentGaussian(torch.full((1, 1, 200, 200), 1.5), torch.full((1, 1, 200, 200), -2.0))
    a, b = (latent.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    # standard error of the mean is std / 200 = 0.0018: 0.01 is more than five of them
    assert abs(a.mean() - 1.5) < 0.01 and abs(a.std() - np.exp(-1)) < 0.01


def test_loss_terms():
    """The loss is its parts, weighted; the feature distance is 0 for equal, 4 for opposite ones."""
    vae, x = tiny(), inputs(1, (2, 3, 8, 8))[0]
    loss, parts = vae_loss(vae, x, torch.Generator().manual_seed(0), kl_weight=1e-3)
    y, latent = vae(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, (x - y).abs().mean() + 1e-3 * latent.kl().mean())
    torch.testing.assert_close(parts["kl"], latent.kl().mean())
    same = vae_loss(vae, x, perceptual=lambda images: torch.ones(2, 5))[1]["perceptual"]
    flip = iter([torch.ones(2, 5), -torch.ones(2, 5)])
    opposite = vae_loss(vae, x, perceptual=lambda images: next(flip))[1]["perceptual"]
    assert same == 0 and abs(opposite - 4) < 1e-5
    pixels, extra = vae_loss(vae, x, torch.Generator().manual_seed(0), 0.0,
                             lambda images: images.flatten(1), perceptual_weight=0.5)
    torch.testing.assert_close(pixels, extra["l1"] + 0.5 * extra["perceptual"])


def test_training_lowers_the_loss():
    """Thirty steps on one flat-coloured batch halve the error: zero-initialised branches learn."""
    torch.manual_seed(0)
    vae, x = AutoencoderKL(TINY), inputs(1, (4, 3, 1, 1))[0].expand(4, 3, 8, 8)
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        loss, _ = vae_loss(vae, x, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_latent_statistics():
    """Streamed shift and scale equal those of sampled latents, which become mean 0, deviation 1."""
    scales = torch.tensor([0.1, 1.0, 5.0]).view(1, 3, 1, 1)
    mean = inputs(0, (64, 3, 16, 16))[0] * scales + 2
    std = 0.5 * scales.expand_as(mean)
    shift, scale = latent_statistics((mean[i:i + 10], std[i:i + 10]) for i in range(0, 64, 10))
    torch.testing.assert_close(shift, mean.mean((0, 2, 3)))
    direct = (mean.double().var((0, 2, 3), unbiased=False) + 0.25 * scales.flatten()**2).rsqrt()
    torch.testing.assert_close(scale, direct.float())
    z = LatentGaussian(mean, 2 * std.log()).sample(torch.Generator().manual_seed(0))
    x0 = (z - shift.view(1, 3, 1, 1)) * scale.view(1, 3, 1, 1)
    # 16,384 draws a channel: standard errors are below 0.008
    assert x0.mean((0, 2, 3)).abs().max() < 0.03 and (x0.std((0, 2, 3)) - 1).abs().max() < 0.03
    with pytest.raises(ValueError, match="no latents"):
        latent_statistics([])


def test_loads_files_and_folders_of_every_kind(tmp_path):
    """.safetensors, .bin, a folder and its vae/ give the same net, config read off the shapes."""
    weights = tiny(4).state_dict()
    (tmp_path / "vae").mkdir()
    files = [tmp_path / "w.safetensors", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"]
    for file in files:
        write_safetensors(file, {k: v.numpy() for k, v in weights.items()})
    torch.save({"state_dict": weights}, tmp_path / "w.bin")
    for path in (*files, tmp_path, tmp_path / "vae", tmp_path / "w.bin"):
        loaded = AutoencoderKL.from_pretrained(path)
        assert loaded.config == TINY
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, weights[name])
        assert all(p.requires_grad for p in loaded.parameters())


def test_loads_the_older_attention_names(tmp_path):
    """Files with query, key, value, proj_attn, linear or 1x1 convolutions, load as the new ones."""
    weights = tiny(4).state_dict()
    for conv in (False, True):
        old = {}
        for name, tensor in weights.items():
            for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                                ("to_out.0", "proj_attn")):
                if conv and f".{new}.weight" in name:
                    tensor = tensor[:, :, None, None]
                name = name.replace(f".{new}.", f".{former}.")
            old[name] = tensor
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
        torch.save(old, tmp_path / "old.pt")
        loaded = AutoencoderKL.from_pretrained(tmp_path / "old.pt").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_refuses_weights_of_another_architecture(tmp_path):
    """Missing, unexpected and mis-shaped keys are counted and the first are named."""
    weights = tiny().state_dict()
    weights["decoder.extra.weight"] = torch.zeros(1)
    weights["encoder.conv_out.bias"] = torch.zeros(5)
    del weights["quant_conv.bias"]
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"3 differ, first: decoder.extra.weight is \(1,\) instead "
                       r"of nothing; encoder.conv_out.bias is \(5,\) instead of \(8,\).*pass the"):
        AutoencoderKL.from_pretrained(tmp_path / "w.pt")
    torch.save({"conv_in.weight": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not an autoencoder.*encoder.conv_in.weight"):
        AutoencoderKL.from_pretrained(tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        AutoencoderKL.from_pretrained(tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        AutoencoderKL.from_pretrained(tmp_path / "w.pt")


def test_missing_file_and_missing_network(tmp_path, monkeypatch):
    """A wrong path lists what is accepted; without a network the place of the file is told, and a
    file put there is used."""
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.*or one of sd-vae-ft-mse"):
        AutoencoderKL.from_pretrained(tmp_path / "nothing")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    place = tmp_path / "hub" / "checkpoints" / "vae-sd-vae-ft-mse.safetensors"
    with pytest.raises(FileNotFoundError, match=f"no network.*put https://.* at {place}"):
        AutoencoderKL.from_pretrained("sd-vae-ft-mse")
    write_safetensors(place, {k: v.numpy() for k, v in tiny().state_dict().items()})
    assert AutoencoderKL.from_pretrained("sd-vae-ft-mse").config == TINY


def test_safetensors_round_trip(tmp_path):
    """Every dtype, scalars and empty tensors come back; float16 becomes float32 in read_weights."""
    path = tmp_path / "w.safetensors"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.float16([0.5, -2]),
              "odd": np.float16([1.0]), "long": np.array(2**40),
              "none": np.zeros((0, 3), np.float32)}
    write_safetensors(path, arrays)
    tensors = read_safetensors(path)
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tensors[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
    assert vae_file.read_weights(path)["half"].dtype == torch.float32


def test_refuses_malformed_safetensors(tmp_path):
    """Truncated, over-long, overlapping, gapped, mistyped or mis-shaped files are refused."""
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)})
    good = path.read_bytes()

    def with_header(data=bytes(24), **changes):
        header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                  "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]} | changes}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    path.write_bytes(with_header())
    assert set(read_safetensors(path)) == {"a", "b"}  # the helper's unchanged file is fine
    bad = {"empty": b"", "short": good[:5], "truncated": good[:-1], "longer": good + b"x",
           "huge header": struct.pack("<Q", 2**63) + good[8:],
           "not json": good[:8] + b"x" + good[9:],
           "a list": struct.pack("<Q", 2) + b"[]", "dtype": with_header(dtype="F99"),
           "shape": with_header(shape=[3]), "negative": with_header(shape=[-1, -2]),
           "overlap": with_header(shape=[4], data_offsets=[8, 24]),
           "gap": with_header(bytes(32), data_offsets=[24, 32]),
           "beyond": with_header(shape=[200], data_offsets=[16, 816]),
           "backwards": with_header(data_offsets=[16, 8]), "text": with_header(data_offsets="ab"),
           "no range": with_header(data_offsets=None)}
    for what, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_safetensors(path)
            pytest.fail(what)
