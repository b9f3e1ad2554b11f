"""dinodiff.py: closed forms, steps, guidance, the manifold, the bundle. Offline, CPU, seconds."""
import math
from dataclasses import replace

import pytest
import torch

import dinodiff
from dino import ViTConfig
from dinodiff import (DinoDiffusion, DinoDiffusionConfig, EmbeddingSampler, NoiseSchedule, Refiner,
                      TokenProjection, ddim_sample, ddpm_sample, dpm_sample, from_bands, guided,
                      slerp, to_bands)
from unet import UNetConfig
from vae import VAEConfig

MU, SIGMA = 1.5, 0.4  # the Gaussian data set of the closed-form tests


def gaussian_model(schedule):
    """The exact prediction for data N(MU, SIGMA^2): E[eps | xt] is linear in xt."""
    def model(x, t):
        a = schedule.alphas_cumprod.double()[t].view(-1, 1)
        eps = (1 - a).sqrt() * (x - a.sqrt() * MU) / (a * SIGMA ** 2 + 1 - a)
        x0 = MU + a.sqrt() * SIGMA ** 2 * (x - a.sqrt() * MU) / (a * SIGMA ** 2 + 1 - a)
        return eps if schedule.prediction == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0
    return model


def start_noise(n=5_000):
    """n draws with mean exactly 0 and deviation exactly 1, so that only the sampler can err."""
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x - x.mean()) / x.std()


@pytest.mark.parametrize("prediction,zero_snr", [("v", True), ("v", False), ("eps", False)])
def test_ddpm_gives_back_a_gaussian(prediction, zero_snr):
    """1,000 DDPM steps with the exact model return mean and deviation to 0.02 (sampling error of
    5,000 draws is 0.004; the rest is discretisation)."""
    torch.manual_seed(0)
    schedule = NoiseSchedule(prediction=prediction, zero_terminal_snr=zero_snr)
    x = ddpm_sample(gaussian_model(schedule), start_noise(), schedule)
    assert abs(x.mean() - MU) < 0.02
    assert abs(x.std() - SIGMA) < 0.02


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps,tolerance", [(50, 0.05), (250, 0.02)])
@pytest.mark.parametrize("prediction,zero_snr", [("v", True), ("eps", False)])
def test_ddim_gives_back_a_gaussian(prediction, zero_snr, steps, tolerance, eta):
    """DDIM's error in the deviation is that of its step size. Without zero SNR the start N(0, 1)
    lacks the mean sqrt(a_T) MU = 0.10, of which DDIM keeps a part: 0.07 allows for it."""
    torch.manual_seed(0)
    schedule = NoiseSchedule(prediction=prediction, zero_terminal_snr=zero_snr)
    x = ddim_sample(gaussian_model(schedule), start_noise(), schedule, steps, eta)
    assert abs(x.std() - SIGMA) < tolerance
    assert abs(x.mean() - MU) < (0.02 if zero_snr else 0.07)


@pytest.mark.parametrize("steps", [1, 7, 30, 1000])
def test_ddim_visits_the_trailing_steps(steps):
    """The model sees exactly the list: `steps` of them, T-1 first, falling, evenly spaced."""
    schedule, seen = NoiseSchedule(), []

    def model(x, t):
        seen.append(t[0].item())
        return torch.zeros_like(x)
    ddim_sample(model, torch.zeros(2, 1), schedule, steps)
    assert seen == schedule.sampling_timesteps(steps)
    assert len(seen) == steps and seen[0] == 999 and min(seen) >= 0
    gaps = [a - b for a, b in zip(seen, seen[1:])]
    assert all(abs(gap - 1000 / steps) <= 1 for gap in gaps)


@pytest.mark.parametrize("prediction,zero_snr", [("v", True), ("v", False), ("eps", False)])
def test_dpm_gains_a_factor_of_four(prediction, zero_snr):
    """Against the exact path of data N(MU, SIGMA^2), second order: twice the steps, a quarter of
    the error (in the limit; 3.5 to 4.6 at these steps). DDIM, of first order, gains two.

    All lists end at the same timestep, and the exact answer is the model's x0 there: the move
    from it to x0 is one step, whatever their number.
    """
    schedule = NoiseSchedule(prediction=prediction, zero_terminal_snr=zero_snr)
    x, last = start_noise(200), 200
    a, b = schedule.alphas_cumprod.double()[[last, -1]]

    def spread(a):  # deviation of xt: on the exact path (xt - sqrt(a) MU) / spread stays the same
        return (a * SIGMA ** 2 + 1 - a).sqrt()
    exact = MU + a.sqrt() * SIGMA ** 2 / spread(a) * (x - b.sqrt() * MU) / spread(b)

    def error(sampler, steps):
        timesteps = torch.linspace(999, last, steps + 1).round().int().tolist()
        made = sampler(gaussian_model(schedule), x, schedule, timesteps=timesteps)
        return (made - exact).abs().mean().item()
    for sampler, low, high in ((dpm_sample, 3.5, 4.6), (ddim_sample, 1.7, 2.3)):
        errors = [error(sampler, steps) for steps in (17, 34, 68)]
        assert low < errors[0] / errors[1] < high and low < errors[1] / errors[2] < high
    assert error(dpm_sample, 17) < error(ddim_sample, 68)


@pytest.mark.parametrize("prediction,zero_snr", [("v", True), ("eps", False)])
def test_dpm_starts_as_ddim(prediction, zero_snr):
    """Lists of two steps equal DDIM at eta 0, longer ones leave its path; one step from pure noise
    (log-SNR minus infinity) is the data's mean, and nothing is NaN."""
    schedule = NoiseSchedule(prediction=prediction, zero_terminal_snr=zero_snr)
    model, x = gaussian_model(schedule), start_noise(50)
    for timesteps in ([999, 700, 400, 50], [999], [600, 300, 0]):
        ddim = ddim_sample(model, x, schedule, timesteps=timesteps)
        second = dpm_sample(model, x, schedule, timesteps=timesteps)
        assert second.isfinite().all()
        assert torch.allclose(second, ddim, atol=1e-6) == (len(timesteps) < 3)
    if zero_snr:
        assert torch.allclose(dpm_sample(model, x, schedule, steps=1), torch.full_like(x, MU),
                              atol=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 15, 50, 400, 1000])
def test_timesteps_that_close_in_on_x0(steps):
    """power 2: `steps` of them, T-1 first, strictly falling to 0 or near it, gaps never growing."""
    timesteps = NoiseSchedule().sampling_timesteps(steps, power=2)
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    gaps = [a - b for a, b in zip(timesteps, timesteps[1:])]
    assert all(gap >= 1 for gap in gaps)
    assert all(later <= earlier + 1 for earlier, later in zip(gaps, gaps[1:]))  # rounding
    if steps == 7:
        assert timesteps == [999, 734, 509, 326, 183, 81, 19]


def test_schedules_match_their_definitions():
    """Known ends: scaled linear 0.0047 (root 0.068), linear 4.0e-5; zero SNR 0."""
    last = {kind: NoiseSchedule(kind=kind, zero_terminal_snr=False).alphas_cumprod[-1].item()
            for kind in ("scaled_linear", "linear")}
    assert math.isclose(last["scaled_linear"], 0.0047, rel_tol=0.02)
    assert math.isclose(last["linear"], 4.04e-5, rel_tol=0.01)
    before = NoiseSchedule(zero_terminal_snr=False).alphas_cumprod
    after = NoiseSchedule(zero_terminal_snr=True).alphas_cumprod
    assert after[-1] == 0 and torch.isclose(after[0], before[0])
    assert (after[1:] < after[:-1]).all()
    with pytest.raises(ValueError, match="use prediction 'v'"):  # eps would be divided by 0
        NoiseSchedule(prediction="eps", zero_terminal_snr=True)


@pytest.mark.parametrize("prediction,zero_snr", [("v", True), ("eps", False)])
def test_target_and_back(prediction, zero_snr):
    """to_x0_eps inverts add_noise + target at every t (2e-3: float32 divided by 0.068)."""
    schedule = NoiseSchedule(prediction=prediction, zero_terminal_snr=zero_snr)
    t = torch.arange(0, 1000, 37)
    x0, noise = torch.randn(2, len(t), 4, 3, 3, generator=torch.Generator().manual_seed(1))
    xt = schedule.add_noise(x0, noise, t)
    back, eps = schedule.to_x0_eps(schedule.target(x0, noise, t), xt, t)
    assert torch.allclose(back, x0, atol=2e-3) and torch.allclose(eps, noise, atol=2e-3)


def test_guidance_one_is_the_conditional_run_and_scales_linearly():
    """Scale 1 never calls the null half; scale s is null + s (conditional - null), all channels."""
    calls = []

    def unet(x, t, context, mask=None):
        calls.append(len(context))
        return x * context.mean(dim=(1, 2))[:, None, None, None]
    x, t = torch.randn(2, 4, 3, 3), torch.zeros(2, dtype=torch.long)
    context, null = torch.full((2, 5, 6), 2.0), torch.full((2, 5, 6), 0.5)
    assert torch.equal(guided(unet, context, null, 1.0)(x, t), unet(x, t, context))
    assert torch.allclose(guided(unet, context, null, 3.0)(x, t), x * (0.5 + 3 * 1.5))
    assert torch.allclose(guided(unet, context, null, 0.0)(x, t), x * 0.5)
    assert calls == [2, 2, 4, 4]


def test_rescaled_guidance_has_the_width_of_the_conditional_run():
    """Equation (6'): at phi = 1 each image's deviation is the conditional one's, and the direction
    is that of plain guidance; phi = 0.5 lies half way; 0 changes nothing."""
    def unet(x, t, context, mask=None):
        return x * context.mean(dim=(1, 2))[:, None, None, None] + 0.1
    x, t = torch.randn(2, 4, 3, 3), torch.zeros(2, dtype=torch.long)
    x[1] *= 5
    context, null = torch.full((2, 5, 6), 2.0), torch.full((2, 5, 6), 0.5)
    plain = guided(unet, context, null, 3.0)(x, t)
    full, half, off = (guided(unet, context, null, 3.0, guidance_rescale=phi)(x, t)
                       for phi in (1.0, 0.5, 0.0))
    assert torch.equal(off, plain)
    wanted = unet(x, t, context).flatten(1).std(1)
    assert torch.allclose(full.flatten(1).std(1), wanted)
    assert not torch.allclose(plain.flatten(1).std(1), wanted, rtol=0.1)
    ratio = (wanted / plain.flatten(1).std(1)).view(2, 1, 1, 1)
    assert torch.allclose(full, ratio * plain) and torch.allclose(half, (full + plain) / 2)


def test_slerp_keeps_angle_and_length():
    """Ends are met, the middle of two unit vectors has length 1 and equal angles; antiparallel
    and equal vectors stay finite."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, 8, generator=g)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    unit = [x / x.flatten(1).norm(dim=1)[:, None, None] for x in (a, b)]
    middle = slerp(*unit, 0.5).flatten(1)
    assert torch.allclose(middle.norm(dim=1), torch.ones(3), atol=1e-5)
    cosines = [(middle * end.flatten(1)).sum(1) for end in unit]
    assert torch.allclose(*cosines, atol=1e-5)
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-5) and slerp(a, -a, 0.3).isfinite().all()


def test_embedding_sampler_takes_any_seed():
    tokens = torch.randn(30, 2, 4, generator=torch.Generator().manual_seed(0))
    assert EmbeddingSampler.fit(tokens, seed=2 ** 63 - 1).means.isfinite().all()


def test_embedding_sampler_has_the_moments_of_its_data():
    """4,000 tokens in a 6-dimensional subspace of 24: mean, covariance and subspace come back
    (tolerance: the sampling error of 4,000 draws and 30 % shrinkage between clusters)."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 6, generator=g)).Q
    scores = torch.randn(4000, 6, generator=g) * torch.tensor([3.0, 2.0, 1.5, 1.0, 0.7, 0.5])
    tokens = (scores @ basis.T + 0.3).view(4000, 4, 6)
    sampler = EmbeddingSampler.fit(tokens, max_rank=6)
    drawn = sampler.sample([torch.Generator().manual_seed(s) for s in range(4000)]).flatten(1)
    assert (drawn.mean(0) - tokens.flatten(1).mean(0)).abs().max() < 0.15
    difference = torch.cov(drawn.T) - torch.cov(tokens.flatten(1).T)
    assert difference.norm() / torch.cov(tokens.flatten(1).T).norm() < 0.1
    centred = drawn - sampler.center
    assert (centred - centred @ basis @ basis.T).norm() / centred.norm() < 1e-3
    again = sampler.sample([torch.Generator().manual_seed(3)])
    assert torch.equal(again.flatten(1), drawn[3:4])


def test_token_projection():
    """One token becomes four context tokens, because attention to a single one has no gradient;
    dropped rows get the null context, the others stay."""
    one, five = TokenProjection(1, 8, 6), TokenProjection(5, 8, 6)
    assert one(torch.randn(2, 1, 8))[0].shape == (2, 4, 6) == one.null(2)[0].shape
    tokens = torch.randn(3, 5, 8)
    torch.nn.init.normal_(five.null_context)
    context, _ = five(tokens, torch.tensor([False, True, False]))
    assert context.shape == (3, 5, 6) and torch.equal(context[1:2], five.null(1)[0])
    assert torch.equal(context[::2], five(tokens)[0][::2])


CONFIG = DinoDiffusionConfig(
    image_size=32, vae=VAEConfig(base_channels=8, channel_multipliers=(1, 2), layers_per_block=1),
    unet=UNetConfig(base_channels=32, channel_multipliers=(1, 2), layers_per_block=1,
                    attention_levels=(False, True), context_dim=12, num_heads=2),
    vit=ViTConfig(8, 16, 4, 2, 32, normalise="per_image"), token_shape=(5, 16))


def random_model(**changes):
    """A model whose U-Net and refiner are random: zero-initialised outputs would hide everything.
    """
    torch.manual_seed(0)
    model = DinoDiffusion(replace(CONFIG, **changes)).eval()
    for network in (model.unet, model.refiner):
        for p in network.parameters() if network else ():
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


def pictures(n, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_image_of_a_seed_does_not_depend_on_the_batch(model):
    """Seeds 4..8 sampled together, alone, and in another order: the same images (1e-4: sums of
    convolutions are ordered differently for other batch sizes)."""
    tokens = model.embed(pictures(5))
    for settings in (dict(), dict(sampler="ddpm"),
                     dict(sampler="ddim", eta=1.0, guidance_scale=2.0)):
        together = model.sample(tokens, [4, 5, 6, 7, 8], steps=4, **settings)
        split = model.sample(tokens, [4, 5, 6, 7, 8], steps=4, batch=2, **settings)
        alone = model.sample(tokens[3:4], [7], steps=4, **settings)
        assert torch.allclose(together, split, atol=1e-4)
        assert torch.allclose(together[3:4], alone, atol=1e-4)
        assert not torch.allclose(together[0], together[1], atol=1e-2)
    for wrong in (dict(condition=tokens, seeds=[0]), dict(condition=tokens[:1], seeds=[0] * 70)):
        with pytest.raises(ValueError, match="rows for"):
            model.sample(**wrong, guidance_scale=2.0)


def test_a_model_brings_its_guidance_along(model, monkeypatch):
    """Without a scale, samples have the config's; a given one, even 0, comes first."""
    tokens = model.embed(pictures(1))
    plain, guided_more, without = (model.sample(tokens, [0], 3, scale) for scale in (1, 2.5, 0))
    monkeypatch.setattr(model, "config", replace(model.config, guidance_scale=2.5))
    assert torch.equal(model.sample(tokens, [0], 3), guided_more)
    assert torch.equal(model.sample(tokens, [0], 3, 1), plain)
    assert torch.equal(model.sample(tokens, [0], 3, 0), without)
    assert not torch.allclose(plain, guided_more, atol=1e-3)


def test_strength_keeps_more_or_less_of_the_start(model):
    """img2img at a low strength stays near the decoded start, at a high one it does not."""
    x = pictures(2)
    tokens, plain = model.embed(x), model.decode(model.encode(x))
    far = [(model.sample(tokens, [0, 1], steps=50, start=x, strength=s) - plain).abs().mean()
           for s in (0.02, 0.9)]
    assert far[0] < far[1]
    with pytest.raises(ValueError, match="strength"):
        model.sample(tokens, [0, 1], strength=0.0)


@pytest.mark.parametrize("steps", (1, 15))
def test_strength_is_where_sampling_starts(model, monkeypatch, steps):
    """The first of the steps is strength * T - 1, however few there are."""
    called = []
    monkeypatch.setattr(model.unet, "forward", lambda x, t, *context: (called.append(int(t[0])),
                                                                      0 * x)[1])
    for strength in (0.6, 0.8, 1.0):
        called.clear()
        model.sample(model.embed(pictures(1)), [0], steps, 1, start=pictures(1), strength=strength)
        assert called[0] == 1000 * strength - 1 and called == sorted(called, reverse=True)


def test_other_samplers_are_refused(model):
    tokens = model.embed(pictures(2))
    with pytest.raises(ValueError, match="use dpm, ddim, ddpm"):
        model.sample(tokens, [0, 1], sampler="euler")


def test_the_vae_works_in_slices(model, monkeypatch):
    """Five images or latents, two at a time: the VAE sees 2, 2 and 1, and results are the same."""
    images, x0 = pictures(5), torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = [*model.posterior(images), model.decode(x0)]
    sizes, encode, decode = [], model.vae.encode, model.vae.decode
    monkeypatch.setattr(dinodiff, "PIXELS_AT_ONCE", 2 * 32 * 32 + 1)
    monkeypatch.setattr(model.vae, "encode", lambda x: (sizes.append(len(x)), encode(x))[1])
    monkeypatch.setattr(model.vae, "decode", lambda z: (sizes.append(len(z)), decode(z))[1])
    sliced = [*model.posterior(images), model.decode(x0)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(sliced, whole))
    assert sizes == [2, 2, 1, 2, 2, 1]


def test_checkpoint_round_trip(model, tmp_path):
    """A bundle written and read with weights_only=True gives the same tokens and samples."""
    model.token_mean.copy_(torch.randn(5, 16))
    model.embedding_sampler = EmbeddingSampler.fit(torch.randn(40, 5, 16))
    torch.save(model.to_checkpoint(), tmp_path / "model.pt")
    other = DinoDiffusion.from_checkpoint(torch.load(tmp_path / "model.pt", weights_only=True))
    assert other.config == CONFIG
    tokens = model.embed(pictures(2))
    assert torch.equal(tokens, other.embed(pictures(2)))
    assert torch.equal(model.sample(tokens, [0, 1], steps=3), other.sample(tokens, [0, 1], steps=3))
    drawn = [m.embedding_sampler.sample([torch.Generator().manual_seed(0)]) for m in (model, other)]
    assert torch.equal(*drawn) and drawn[0].isfinite().all()
    with pytest.raises(ValueError, match="not a DiNO-Diffusion model"):
        DinoDiffusion.from_checkpoint({"config": {"image_size": 32}})


def test_every_trained_parameter_gets_a_gradient(model):
    """U-Net, projection, positions and null context learn; VAE and embedder are frozen."""
    x = pictures(16)
    posterior = model.vae.encode(x)
    loss = model.loss(posterior.mean, posterior.std, model.embed(x),
                      torch.Generator().manual_seed(0))
    loss.backward()
    trained = dict(model.trained.named_parameters())
    missing = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
    assert all(not p.requires_grad for p in [*model.vae.parameters(), *model.embedder.parameters()])
    model.zero_grad()


def test_unconditional_model_ignores_tokens():
    """--condition none: the loss is the same whatever the tokens are."""
    torch.manual_seed(0)
    model = DinoDiffusion(replace(CONFIG, condition="none"))
    mean = torch.randn(4, 4, 16, 16)
    losses = [model.loss(mean, 0 * mean, tokens, torch.Generator().manual_seed(1))
              for tokens in (torch.zeros(4, 5, 16), torch.randn(4, 5, 16))]
    assert torch.equal(*losses)


def test_prompts_condition_as_ids():
    """Prompts become ids (B, L) of one L; samples follow them, and all parts of the encoder learn
    from `loss`."""
    model = random_model(condition="prompts", labels=("cancer", "healthy"), clusters=2,
                         template="tissue of <label>, type <index>")
    ids = model.prompt_ids([*model.prompts, "cancer"])
    assert ids.shape == (5, 6) and ids.dtype == torch.int64
    one, other = model.sample(ids[3:], [4, 4], steps=2, guidance_scale=2.0)
    assert not torch.allclose(one, other)

    mean = torch.randn(4, 4, 16, 16)
    model.loss(mean, 0 * mean, ids[:4], torch.Generator().manual_seed(0)).backward()
    missing = [name for name, p in model.projection.named_parameters()
               if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


# ---- the refiner

REFINER = UNetConfig(in_channels=8, out_channels=4, base_channels=16, channel_multipliers=(1, 2),
                     layers_per_block=1, attention_levels=(False, False), context_dim=16,
                     num_heads=2)


def test_bands_are_orthonormal_and_come_back():
    """Haar bands keep the sum of squares; a flat image has one band; the inverse is exact."""
    image = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    bands = to_bands(image)
    assert bands.shape == (2, 12, 4, 3)
    assert torch.allclose(bands.square().sum(), image.square().sum())
    assert torch.allclose(from_bands(bands), image, atol=1e-6)
    flat = to_bands(torch.ones(1, 1, 4, 4))
    assert torch.equal(flat[0, :, 0, 0], torch.tensor([2.0, 0.0, 0.0, 0.0]))


def test_refined_images_have_the_spectrum_of_their_texture(monkeypatch):
    """x = y + Gaussian texture whose bands have known deviations, doubled where y is bright, and
    the exact prediction for it: variance of each band, on each side, comes back within 5 %."""
    refiner, schedule = Refiner(REFINER), NoiseSchedule()
    g = torch.Generator().manual_seed(0)
    band_std = torch.tensor([0.08, 0.05, 0.04, 0.02])[:, None, None]
    decoded = torch.full((64, 3, 16, 16), -0.5)
    decoded[..., 8:] = 0.5
    local = 1.0 + (to_bands(decoded[:, :1])[:, :1] > 0)  # (B, 1, 8, 8): deviation is 1, or 2
    texture = from_bands(band_std * local * torch.randn(64, 4, 8, 8, generator=g))
    images = decoded + texture
    refiner.measure([(images, decoded)])

    # For r ~ N(0, s^2): E[v | rt] = sqrt(a) sigma (1 - s^2) / (a s^2 + sigma^2) rt.
    s = local * band_std / refiner.residual_std

    def exact(x, t, context):
        rt, condition = x.chunk(2, dim=1)
        assert torch.equal(condition, to_bands(decoded[:, :1]) / refiner.decoded_std)
        sqrt_a, sigma = schedule.roots(t, rt)
        return sqrt_a * sigma * (1 - s ** 2) / (sqrt_a ** 2 * s ** 2 + sigma ** 2) * rt

    monkeypatch.setattr(refiner.unet, "forward", exact)
    refined = refiner.refine(decoded, schedule, list(range(64)), steps=50)
    assert torch.equal(refined[:, 0], refined[:, 2])
    bands = to_bands((refined - decoded)[:, :1])
    for side, factor in ((slice(0, 4), 1), (slice(4, 8), 2)):
        variance = bands[..., side].var((0, 2, 3))
        assert torch.allclose(variance, (factor * band_std[:, 0, 0]) ** 2, rtol=0.05), variance

    # A network that returns too little detail is compensated by the gain, band by band.
    shrink = torch.tensor([1.0, 0.9, 0.8, 0.7])[:, None, None]
    s = s * shrink
    refiner.calibrate([(images, decoded)], schedule)
    torch.testing.assert_close(refiner.gain, 1 / shrink, rtol=0.05, atol=0)
    bands = to_bands((refiner.refine(decoded, schedule, list(range(64, 128))) - decoded)[:, :1])
    variance = bands.square().mean((0, 2, 3))
    assert torch.allclose(variance, 2.5 * band_std[:, 0, 0] ** 2, rtol=0.05), variance


def test_every_parameter_of_the_refiner_gets_a_gradient():
    """But for those that one constant context token cannot reach: queries and keys of it."""
    torch.manual_seed(0)
    refiner = Refiner(REFINER)
    for p in refiner.unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    refiner.loss(pictures(4), pictures(4, 1), NoiseSchedule(),
                 torch.Generator().manual_seed(0)).backward()
    missing = [name for name, p in refiner.named_parameters()
               if p.grad is None or not p.grad.abs().sum() > 0]
    assert all("attn2" in name or "norm2" in name for name in missing), missing


def test_a_bundle_refines_by_seed(model):
    """Samples of a model with a refiner: the decoder's image plus detail that depends on the seed
    alone; refine=False is the decoder; a checkpoint keeps it."""
    whole = random_model(refiner=REFINER)
    whole.refiner.residual_std.fill_(0.05)
    tokens = whole.embed(pictures(3))
    soft = whole.sample(tokens, [1, 2, 3], steps=2, refine=False)
    sharp = whole.sample(tokens, [1, 2, 3], steps=2)
    assert torch.allclose(sharp, whole.refine(soft, [1, 2, 3]), atol=1e-6)
    assert torch.allclose(sharp[1:2], whole.sample(tokens[1:2], [2], steps=2), atol=1e-4)
    assert 0.005 < (sharp - soft.mean(1, keepdim=True)).std() < 0.5
    again = DinoDiffusion.from_checkpoint(whole.to_checkpoint())
    assert torch.equal(again.sample(tokens, [1, 2, 3], steps=2), sharp)
    assert torch.equal(model.refine(soft, [1, 2, 3]), soft)  # a model that has none


def test_bf16_stays_near_float32(model):
    """With dtype bfloat16 the U-Net alone is rounded: images agree to a grey level on average, and
    are float32."""
    tokens = model.embed(pictures(2))
    whole, half = (model.sample(tokens, [0, 1], steps=3, sampler="dpm", dtype=dtype)
                   for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    assert 0 < (whole - half).abs().mean() < 2 / 255
