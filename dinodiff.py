"""DiNO-Diffusion: latent diffusion conditioned on the global tokens of a frozen DiNO ViT.

Papers: DiNO-Diffusion (arXiv 2407.11594); DDPM (Ho 2020); DDIM (Song 2021); DPM-Solver++ (Lu 2022,
arXiv 2211.01095); latent diffusion (Rombach 2022); v-prediction (Salimans & Ho 2022); classifier-
free guidance (Ho & Salimans 2022); zero terminal SNR and rescaled guidance (Lin 2024).
Below, a_t is `alphas_cumprod[t]`; a sampler steps from t to s, and u is the timestep before t.

    forward      xt  = sqrt(a_t) x0 + sqrt(1 - a_t) eps                                  (1)
    target       v   = sqrt(a_t) eps - sqrt(1 - a_t) x0                                  (2)
    back         x0  = sqrt(a_t) xt - sqrt(1 - a_t) v,  eps = sqrt(a_t) v + sqrt(1 - a_t) xt   (3)
    DDIM         xs  = sqrt(a_s) x0 + sqrt(1 - a_s - sigma^2) eps + sigma noise          (4)
    DPM-Solver++ xs  = (4) without noise, of x0 + (l_s - l_t) / (l_t - l_u) / 2 (x0 - x0 at u),
                 l_t = log(a_t / (1 - a_t)) / 2                                          (5)
    guidance     f   = f(null) + guidance_scale (f(context) - f(null)), 1.0 = off        (6)
    rescaled     f  <- f (phi std(f(context)) / std(f) + 1 - phi), phi = guidance_rescale  (6')
    context      c_k = W (token_k - mean_k) / std_k + position_k                         (7)
    refiner      r   = bands(image - y) / s,  y = decode(z);  image = y + bands^-1(s r)  (8)

Equation (8) is ours. A decoder trained on pixel errors returns a mean, which is blurry. A second,
small diffusion model given y samples the lost residual: (1) to (5) with r in place of x0. Fine
detail is thus random: it looks right and says nothing about a patient.

Instead of (7), the condition can be a prompt derived from the image (prompts.py, arXiv 2312.09792),
a label alone, or nothing.

Shapes: image (B, 3, H, W) in [-1, 1]; latent x0 (B, C, h, w), about N(0, 1) per channel; global
tokens (B, G, D); context (B, K, context_dim); t (B,) int64 in 0..T-1. A condition is a tensor of
standardised tokens (B, G, D) or of prompt ids (B, L) int64, or None.

    model = DinoDiffusion.from_checkpoint(load_checkpoint("runs/cxr/model.pt"))
    images = model.sample(model.embed(sources), seeds=[0, 1, 2])

The paper does not specify these, so they are our choice: prediction type, schedule, standardised
tokens, number of context tokens, guidance, sampler and steps.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dino import VISION_TRANSFORMERS, ViTConfig, VisionTransformer, conditioning_tokens
from prompts import PromptEncoder, all_prompts, kmeans, vocabulary_of, words_of
from support.mixture import EmbeddingSampler
from support.seeds import step_seed
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

PIXELS_AT_ONCE = 2 ** 20  # per VAE call: four images of 512 px


# ---------------------------------------------------------------------------- noise schedule

def make_betas(kind, T):
    """Noise variance added at each step: (T,) float64 in (0, 1). Raises ValueError."""
    if kind == "scaled_linear":  # Stable Diffusion
        return torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, T, dtype=torch.float64) ** 2
    if kind == "linear":  # Ho 2020
        return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    raise ValueError(f"schedule '{kind}' is unknown: use scaled_linear or linear")


class NoiseSchedule:
    """Noise schedule, and the conversions between x0, eps and v.

    kind: "scaled_linear" or "linear". prediction: "v" or "eps". zero_terminal_snr: rescale, so that
    the last step is pure noise. Raises ValueError for unknown names, and if sampling with
    eps-prediction would divide by a sqrt(a_T) near zero.
    """

    def __init__(self, num_train_timesteps=1000, kind="scaled_linear", prediction="v",
                 zero_terminal_snr=True):
        if prediction not in ("v", "eps"):
            raise ValueError(f"prediction '{prediction}' is unknown: use v or eps")
        self.num_train_timesteps = num_train_timesteps
        self.kind = kind
        self.prediction = prediction
        self.zero_terminal_snr = zero_terminal_snr

        alphas_cumprod = torch.cumprod(1 - make_betas(kind, num_train_timesteps), dim=0)
        if zero_terminal_snr:  # Lin 2024, algorithm 1: shift the last root to 0, keep the first
            root = alphas_cumprod.sqrt()
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        if prediction == "eps" and alphas_cumprod[-1] < 1e-5:
            raise ValueError(
                f"eps-prediction with a last alphas_cumprod of {alphas_cumprod[-1]:.1e} divides by "
                "its root at the first sampling step: use prediction 'v', or zero_terminal_snr off")
        self.alphas_cumprod = alphas_cumprod.float()  # (T,)

    def roots(self, t, like):
        """sqrt(a_t) and sigma_t = sqrt(1 - a_t) of each sample, shaped to multiply `like`."""
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        a = self.alphas_cumprod[t].view(-1, *[1] * (like.dim() - 1))
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0, noise, t):
        """Equation (1): x0, noise (B, ...), t (B,) int64 -> xt (B, ...)."""
        sqrt_a, sigma = self.roots(t, x0)
        return sqrt_a * x0 + sigma * noise

    def target(self, x0, noise, t):
        """Training target at t: v of equation (2), or the noise itself."""
        if self.prediction == "eps":
            return noise
        sqrt_a, sigma = self.roots(t, x0)
        return sqrt_a * noise - sigma * x0

    def to_x0_eps(self, output, xt, t):
        """Equation (3): the network's output and xt -> (x0, eps). Never clipped (latents)."""
        sqrt_a, sigma = self.roots(t, xt)
        if self.prediction == "eps":
            return (xt - sigma * output) / sqrt_a, output
        return sqrt_a * xt - sigma * output, sqrt_a * output + sigma * xt

    def loss(self, model, x0, generator, t=None):
        """Squared error of model(xt, t) against the target, at a uniform t for each row of x0
        (B, ...): (B,). The generator, on x0's device, draws noise and t, unless t is given."""
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        if t is None:
            t = torch.randint(self.num_train_timesteps, (len(x0),), generator=generator,
                              device=x0.device)
        prediction = model(self.add_noise(x0, noise, t), t)
        error = (prediction.float() - self.target(x0, noise, t)).square()
        return error.flatten(1).mean(1)  # (B, C, h, w) -> (B,)

    def sampling_timesteps(self, steps, power=1):
        """`steps` timesteps from T-1 down: list of strictly decreasing int.

        power 1: evenly spaced, "trailing" (Lin 2024, table 2). power 2: denser towards x0, with
        evenly spaced square roots.
        """
        T = self.num_train_timesteps
        if not 1 <= steps <= T:
            raise ValueError(f"{steps} sampling steps: need 1 to {T}, the number trained with")
        spaced = [round(T * (left / steps) ** power) - 1 for left in range(steps, 0, -1)]
        return [max(t, steps - 1 - i) for i, t in enumerate(spaced)]  # strictly decreasing

    def pairs(self, timesteps):
        """(t, a_t, a_s) of each sampling step: s is the next timestep in the list; the last step
        ends at x0 itself, a_s = 1."""
        a = self.alphas_cumprod.cpu().double().tolist()
        return zip(timesteps, [a[t] for t in timesteps], [a[s] for s in timesteps[1:]] + [1.0])


# ---------------------------------------------------------------------------- samplers

def seeded_noise(generators, shape, like):
    """Noise of `shape` (B, ...): row i from CPU generator i, so that an image does not depend on
    its batch; with generators None, from PyTorch's global generator."""
    if generators is None:
        return torch.randn(shape, device=like.device, dtype=like.dtype)
    noise = torch.stack([torch.randn(shape[1:], generator=g) for g in generators])
    return noise.to(like.device, like.dtype)


def predict_x0_eps(model, x, schedule, t):
    """The prediction at x (B, ...) and one timestep t, as (x0, eps)."""
    batch_t = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
    return schedule.to_x0_eps(model(x, batch_t), x, batch_t)


@torch.no_grad()
def ddim_sample(model, x, schedule, steps=50, eta=0.0, generators=None, timesteps=None):
    """Song 2021, equation 12 (our (4)): x (B, ...) noise -> x0 (B, ...).

    model(x, t) returns the schedule's prediction. eta 0 is deterministic, 1 has DDPM's variance.
    timesteps: a decreasing list, overrides steps. generators: for eta > 0, see seeded_noise.
    """
    timesteps = timesteps or schedule.sampling_timesteps(steps)
    for t, a_t, a_s in schedule.pairs(timesteps):
        x0, eps = predict_x0_eps(model, x, schedule, t)
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        x = math.sqrt(a_s) * x0 + math.sqrt(max(1 - a_s - sigma ** 2, 0.0)) * eps
        if sigma > 0:
            x = x + sigma * seeded_noise(generators, x.shape, x)
    return x


@torch.no_grad()
def ddpm_sample(model, x, schedule, steps=1000, generators=None, timesteps=None):
    """Ho 2020, equations 6-7, with the posterior's variance: x (B, ...) noise -> x0 (B, ...).

    With fewer steps than in training, neighbours in the list replace t and t-1.
    """
    timesteps = timesteps or schedule.sampling_timesteps(steps)
    for t, a_t, a_s in schedule.pairs(timesteps):
        x0, _ = predict_x0_eps(model, x, schedule, t)
        alpha = a_t / a_s
        x = (math.sqrt(a_s) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - a_s) * x) / (1 - a_t)
        variance = (1 - a_s) / (1 - a_t) * (1 - alpha)  # 0 at the last step
        if variance > 0:
            x = x + math.sqrt(variance) * seeded_noise(generators, x.shape, x)
    return x


def half_log_snr(a):
    """lambda, DPM-Solver's time: log(sqrt(a) / sqrt(1 - a)), a in 0..1 -> -inf..inf."""
    if a in (0.0, 1.0):
        return math.copysign(math.inf, a - 0.5)
    return math.log(a / (1 - a)) / 2


@torch.no_grad()
def dpm_sample(model, x, schedule, steps=15, timesteps=None):
    """DPM-Solver++ (2M), Lu 2022, algorithm 2 (our (5)): x (B, ...) noise -> x0 (B, ...).

    DDIM holds x0 fixed during a step; this solver extrapolates it linearly from the previous step,
    over half_log_snr. Steps from pure noise and to x0 are infinitely long in that variable, so the
    first, the last, and the one after pure noise are DDIM steps. Timesteps are denser towards x0,
    to keep the last step short: on a Gaussian, 15 steps err less than a tenth of 50 DDIM steps.
    """
    timesteps = timesteps or schedule.sampling_timesteps(steps, power=2)
    previous_x0 = None
    previous_length = math.inf  # no extrapolation on the first step
    for t, a_t, a_s in schedule.pairs(timesteps):
        x0, _ = predict_x0_eps(model, x, schedule, t)
        length = half_log_snr(a_s) - half_log_snr(a_t)
        extrapolated = x0
        if math.isfinite(length) and math.isfinite(previous_length):
            extrapolated = x0 + length / previous_length / 2 * (x0 - previous_x0)

        # Equation (4) with sigma = 0 and the eps that equation (1) implies.
        eps = (x - math.sqrt(a_t) * extrapolated) / math.sqrt(1 - a_t)
        x = math.sqrt(a_s) * extrapolated + math.sqrt(1 - a_s) * eps
        previous_x0 = x0
        previous_length = length
    return x


SAMPLERS = {"dpm": dpm_sample, "ddim": ddim_sample, "ddpm": ddpm_sample}
DEFAULT_STEPS = {"dpm": 15, "ddim": 50, "ddpm": 1000}


def guided(unet, context, null_context, guidance_scale, mask=None, null_mask=None,
           guidance_rescale=0.0):
    """Equation (6) as a model(x, t), both halves in one batch; 1.0 skips the unconditional half.

    context, null_context: (B, K, context_dim). mask, null_mask: (B, K) bool, True for the context
    tokens to attend to, or None. guidance_rescale: phi of equation (6'), Lin 2024, equations 15
    and 16: guidance inflates the output's deviation, i.e. contrast, and 1 undoes that; 0 is off.
    """
    def conditional_model(x, t):
        return unet(x, t, context, mask)

    if guidance_scale == 1.0:
        return conditional_model

    both_contexts = torch.cat([null_context, context])  # (B, K, C) -> (2B, K, C)
    both_masks = None if mask is None else torch.cat([null_mask, mask])

    def guided_model(x, t):
        output = unet(torch.cat([x, x]), torch.cat([t, t]), both_contexts, both_masks)
        null, conditional = output.float().chunk(2)  # guidance amplifies bf16 rounding
        output = null + guidance_scale * (conditional - null)
        if guidance_rescale:
            ratio = conditional.flatten(1).std(1) / output.flatten(1).std(1).clamp(min=1e-6)
            factor = guidance_rescale * ratio + 1 - guidance_rescale
            output = output * factor[:, None, None, None]
        return output

    return guided_model


def watched(model, schedule, watch):
    """The same model(x, t), which also calls watch(x0) with the x0 (B, ...) of each prediction."""
    def watched_model(x, t):
        output = model(x, t)
        watch(schedule.to_x0_eps(output, x, t)[0])
        return output

    return watched_model


# ---------------------------------------------------------------------------- the manifold

def slerp(a, b, weight):
    """Great circle from standardised tokens a to b (..., G, D), each taken as one vector; norms are
    interpolated linearly. weight 0 is a, 1 is b.

    Source: Shoemake 1985. Interpolates linearly where the two are almost parallel.
    """
    u = a.flatten(-2)
    w = b.flatten(-2)
    norm_a = u.norm(dim=-1, keepdim=True)
    norm_b = w.norm(dim=-1, keepdim=True)
    u = u / norm_a.clamp(min=1e-8)
    w = w / norm_b.clamp(min=1e-8)

    # A point on the arc between the directions, then its norm.
    angle = (u * w).sum(-1, keepdim=True).clamp(-1, 1).acos()
    mixed = (((1 - weight) * angle).sin() * u + (weight * angle).sin() * w) / angle.sin()
    mixed = mixed * torch.lerp(norm_a, norm_b, weight)
    nearly_parallel = (angle < 1e-3) | (angle > math.pi - 1e-3)
    return torch.where(nearly_parallel, torch.lerp(a, b, weight).flatten(-2), mixed).view_as(a)


def prototypes(tokens, k, seed=0):
    """K-means centres (k, G, D) of standardised training tokens (N, G, D): typical images."""
    centers, _ = kmeans(tokens.flatten(1).cpu(), k, seed)
    return centers.view(k, *tokens.shape[1:]).to(tokens)


# ---------------------------------------------------------------------------- the condition

class DinoEmbedder(nn.Module):
    """Images -> the raw global tokens of a frozen DiNO ViT.

    To use your own embedder, give it the same interface: `token_shape`, (G, D), and
    `tokens(images, files)`: images (B, 3, H, W) in [-1, 1] and their names in the data set -> raw
    tokens (B, G, D) float32, which DinoDiffusion standardises.
    """

    def __init__(self, config, kind, token_shape):
        super().__init__()
        self.vit = VisionTransformer(config).requires_grad_(False).eval()
        self.kind = kind
        self.token_shape = tuple(token_shape)

    def tokens(self, images, files=None):
        return conditioning_tokens(self.vit, images, self.kind)


class VectorEmbedder(nn.Module):
    """Precomputed tokens, looked up by image name."""

    def __init__(self, token_shape):
        super().__init__()
        self.token_shape = tuple(token_shape)
        self.table = {}  # name of an image in the data set -> (G, D); filled for training only

    def tokens(self, images, files=None):
        missing = [file for file in files or ["this image"] if file not in self.table]
        if missing:
            raise ValueError(f"{len(missing)} images have no vector (first: {missing[0]}): need "
                             "one each: add them to the file, or sample with --from-vector")
        return torch.stack([self.table[file] for file in files]).to(images.device)


class TokenProjection(nn.Module):
    """Standardised global tokens (B, G, D) -> context (B, K, context_dim), equation (7).

    With a single context token every cross-attention weight is 1, and queries and keys get no
    gradient; so one global token becomes `pieces` context tokens. With G > 1, K = G. Positions
    start large, because standardising removes the tokens' distinguishing means.
    """

    def __init__(self, num_tokens, token_dim, context_dim, pieces=4):
        super().__init__()
        self.pieces = pieces if num_tokens == 1 else 1
        K = num_tokens * self.pieces
        self.proj = nn.Linear(token_dim, context_dim * self.pieces)
        self.positions = nn.Parameter(0.5 * torch.randn(K, context_dim))
        self.null_context = nn.Parameter(torch.zeros(K, context_dim))

    def forward(self, tokens, drop=None):
        """tokens (B, G, D), drop (B,) bool: rows that get the null context -> (context, None);
        None stands for the mask that only prompts have."""
        B, G, _ = tokens.shape
        context = self.proj(tokens).view(B, G * self.pieces, -1)  # (B, G, P*C) -> (B, G*P, C)
        context = context + self.positions
        if drop is not None:
            context = torch.where(drop[:, None, None], self.null_context, context)
        return context, None

    def null(self, batch):
        """The null context (batch, K, context_dim), and no mask."""
        return self.null_context.expand(batch, -1, -1), None


# ---------------------------------------------------------------------------- the refiner

def mix_squares(x):
    """Haar transform of every four channels (B, 4C, h, w), its own inverse. Written as sums,
    because autocast would round a matrix product."""
    a, b, c, d = x.unflatten(1, (-1, 4)).unbind(2)
    bands = [a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]
    return torch.stack(bands, dim=2).flatten(1, 2) / 2


def to_bands(image):
    """Orthonormal Haar bands, (B, C, H, W) -> (B, 4C, H/2, W/2): the sum of each 2 x 2 square, and
    three differences."""
    return mix_squares(F.pixel_unshuffle(image, 2))


def from_bands(bands):
    """The inverse of to_bands."""
    return F.pixel_shuffle(mix_squares(bands), 2)


class Refiner(nn.Module):
    """Equation (8): samples the residual of a decoded image.

    An unconditional U-Net gets the bands of the noisy residual and of the decoded image. Each band
    is scaled to deviation 1 over the training set, so that the loss weighs fine and coarse detail
    alike. Few sampling steps return too little of it, about 0.9 of the deviation, so each band has
    a gain, measured on training images. Grey images have C = 1 here.
    """

    STEPS = 16  # of DPM-Solver++; see docs/results.md

    def __init__(self, config):
        """config: UNetConfig with 8C channels in and 4C out, for images of C channels."""
        super().__init__()
        self.unet = UNet(config)
        self.channels = config.out_channels // 4
        self.register_buffer("residual_std", torch.ones(config.out_channels, 1, 1))
        self.register_buffer("decoded_std", torch.ones(config.out_channels, 1, 1))
        self.register_buffer("gain", torch.ones(config.out_channels, 1, 1))
        self.register_buffer("no_context", torch.zeros(1, 1, config.context_dim))

    def to_channels(self, images):
        """(B, 3, H, W) -> (B, C, H, W): the mean over colours if C is 1."""
        return images if self.channels == 3 else images.mean(1, keepdim=True)

    @torch.no_grad()
    def measure(self, batches):
        """Set both deviations from pairs (image, decoded), each (B, 3, H, W) in [-1, 1]."""
        pairs = [(to_bands(self.to_channels(image - decoded)), to_bands(self.to_channels(decoded)))
                 for image, decoded in batches]
        residuals, decoded = (torch.cat(bands) for bands in zip(*pairs))
        self.residual_std.copy_(residuals.std((0, 2, 3)).clamp(min=1e-4)[:, None, None])
        self.decoded_std.copy_(decoded.std((0, 2, 3)).clamp(min=1e-4)[:, None, None])

    def model(self, decoded):
        """The U-Net as a model(rt, t), given the decoded images (B, 3, H, W)."""
        condition = to_bands(self.to_channels(decoded)) / self.decoded_std
        context = self.no_context.expand(len(decoded), -1, -1)
        return lambda rt, t: self.unet(torch.cat([rt, condition], dim=1), t, context)

    def loss(self, image, decoded, schedule, generator):
        """Equation (2) on residuals: image, decoded (B, 3, H, W) in [-1, 1] -> a scalar."""
        r = to_bands(self.to_channels(image - decoded)) / self.residual_std
        return schedule.loss(self.model(decoded), r, generator).mean()

    @torch.no_grad()
    def calibrate(self, batches, schedule):
        """After training, set the gain: the true residual's deviation over the sampled one's, from
        pairs (image, decoded) as for `measure`."""
        true = []
        sampled = []
        for image, decoded in batches:
            true.append(to_bands(self.to_channels(image - decoded)) / self.residual_std)
            sampled.append(self.sample(decoded, schedule, list(range(len(decoded)))))
        true, sampled = (torch.cat(bands).std((0, 2, 3)) for bands in (true, sampled))
        self.gain.copy_((true / sampled.clamp(min=1e-4))[:, None, None])

    @torch.no_grad()
    def sample(self, decoded, schedule, seeds, steps=STEPS, dtype=torch.float32):
        """The residual's bands (B, 4C, H/2, W/2), scaled, of decoded images (B, 3, H, W)."""
        generators = [torch.Generator().manual_seed(step_seed("refiner", seed)) for seed in seeds]
        B, _, H, W = decoded.shape
        r = seeded_noise(generators, (B, 4 * self.channels, H // 2, W // 2), decoded)
        model = self.model(decoded)

        def cast_model(rt, t):
            with torch.autocast(rt.device.type, dtype, enabled=dtype == torch.bfloat16):
                return model(rt, t).float()

        return dpm_sample(cast_model, r, schedule, steps)

    def refine(self, decoded, schedule, seeds, steps=STEPS, dtype=torch.float32):
        """Decoded images (B, 3, H, W) in [-1, 1] plus sampled detail, with one seed per image."""
        r = self.sample(decoded, schedule, seeds, steps, dtype)
        detail = from_bands(r * self.gain * self.residual_std)
        return (self.to_channels(decoded) + detail).clamp(-1, 1).expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------- the bundle

@dataclass(frozen=True)
class DinoDiffusionConfig:
    image_size: int = 64                 # pixels, square
    vae: VAEConfig = VAEConfig()
    unet: UNetConfig = UNetConfig()
    vit: ViTConfig = VISION_TRANSFORMERS["tiny"]  # None: tokens come from a file of vectors
    refiner: UNetConfig = None           # None: no refiner
    condition: str = "dino"              # dino, prompts, labels, or none (the control)
    tokens: str = "global"               # see dino.conditioning_tokens
    token_shape: tuple = (5, 192)        # (G, D) of those tokens
    template: str = ""                   # of the prompts: see prompts.py
    labels: tuple = ()                   # values of <label> in the template
    clusters: int = 0                    # K of K-means on the tokens, for <index>
    schedule: str = "scaled_linear"      # see make_betas
    prediction: str = "v"                # v, eps
    zero_terminal_snr: bool = True
    drop_condition: float = 0.1          # share of training samples with the null context
    guidance_scale: float = 1.0          # of samples, unless another is given

    @property
    def prompts(self):
        """Every prompt, in the order of prompts.all_prompts."""
        if self.condition not in ("prompts", "labels"):
            return ()
        return all_prompts(self.labels, self.clusters, self.template)

    def __post_init__(self):
        if self.vae.latent_channels != self.unet.in_channels:
            raise ValueError(f"the VAE has {self.vae.latent_channels} latent channels, the U-Net "
                             f"takes {self.unet.in_channels}: both must agree, pass another --vae")
        step = self.vae.factor * self.unet.factor
        if self.refiner:
            step = math.lcm(step, 2 * self.refiner.factor)
        if self.image_size % step:
            need = math.ceil(self.image_size / step) * step
            raise ValueError(
                f"image side {self.image_size} is not a multiple of {step} (VAE {self.vae.factor} "
                f"x U-Net {self.unet.factor}, refiner): pass --size {need}")


class DinoDiffusion(nn.Module):
    """VAE, U-Net, embedder, refiner, schedule and projection, with the training set's statistics.

    VAE and embedder are frozen; U-Net and projection (`trained`) and the refiner learn by `loss`.
    """

    STATISTICS = ("shift", "scale", "token_mean", "token_std", "centers", "prompt_counts")

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vae = AutoencoderKL(config.vae).requires_grad_(False).eval()
        self.embedder = VectorEmbedder(config.token_shape)
        if config.vit:
            self.embedder = DinoEmbedder(config.vit, config.tokens, config.token_shape)
        self.unet = UNet(config.unet)
        self.refiner = Refiner(config.refiner) if config.refiner else None
        self.schedule = NoiseSchedule(1000, config.schedule, config.prediction,
                                      config.zero_terminal_snr)

        # Condition -> context tokens.
        self.prompts = config.prompts
        if self.prompts:
            longest = max(len(words_of(prompt)) for prompt in self.prompts)
            self.projection = PromptEncoder(vocabulary_of(self.prompts), config.unet.context_dim,
                                            max_words=longest)
        else:
            self.projection = TokenProjection(*config.token_shape, config.unet.context_dim)

        # Statistics of the training set.
        C = config.vae.latent_channels
        G, D = config.token_shape
        self.register_buffer("shift", torch.zeros(C, 1, 1))  # x0 = (z - shift) * scale
        self.register_buffer("scale", torch.ones(C, 1, 1))
        self.register_buffer("token_mean", torch.zeros(G, D))
        self.register_buffer("token_std", torch.ones(G, D))
        self.register_buffer("centers", torch.zeros(config.clusters, G * D))  # of K-means
        counts = torch.zeros(len(self.prompts), dtype=torch.int64)
        self.register_buffer("prompt_counts", counts)  # training images of each prompt
        self.embedding_sampler = None  # fitted after training, see support/mixture.py

    @property
    def trained(self):
        """U-Net and projection as one module, for the optimiser and the EMA."""
        return nn.ModuleDict({"unet": self.unet, "projection": self.projection})

    # ---- embedding, encoding, decoding

    def standardise(self, tokens):
        """Raw tokens (B, G, D) -> each entry with mean 0, deviation 1 over the training set."""
        return (tokens - self.token_mean) / self.token_std

    @torch.no_grad()
    def embed(self, images, files=None):
        """Images (B, 3, H, W) in [-1, 1] -> standardised tokens (B, G, D)."""
        return self.standardise(self.embedder.tokens(images, files))

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> x0 (B, C, h, w): the mean latent, standardised."""
        return (self.posterior(images)[0] - self.shift) * self.scale

    @torch.no_grad()
    def posterior(self, images):
        """Images -> mean and std (B, C, h, w) of their latents, PIXELS_AT_ONCE per VAE call."""
        slices = images.split(max(1, PIXELS_AT_ONCE // images[0, 0].numel()))
        posteriors = [self.vae.encode(part) for part in slices]
        return torch.cat([x.mean for x in posteriors]), torch.cat([x.std for x in posteriors])

    @torch.no_grad()
    def decode(self, x0):
        """x0 (B, C, h, w) -> images (B, 3, H, W), clipped to [-1, 1]."""
        pixels = x0.shape[2] * x0.shape[3] * self.config.vae.factor ** 2
        slices = x0.split(max(1, PIXELS_AT_ONCE // pixels))
        images = [self.vae.decode(part / self.scale + self.shift) for part in slices]
        return torch.cat(images).clamp(-1, 1)

    @torch.no_grad()
    def refine(self, decoded, seeds, steps=Refiner.STEPS, dtype=torch.float32):
        """Decoded images (B, 3, H, W) plus sampled detail, with one seed per image; unchanged if
        there is no refiner."""
        if self.refiner is None:
            return decoded
        at_once = max(1, PIXELS_AT_ONCE // decoded[0, 0].numel())
        slices = [slice(i, i + at_once) for i in range(0, len(decoded), at_once)]
        return torch.cat([self.refiner.refine(decoded[rows], self.schedule, seeds[rows], steps,
                                              dtype) for rows in slices])

    # ---- conditions

    def cluster_of(self, tokens):
        """Standardised tokens (B, G, D) -> index of the nearest K-means centre, (B,) int64."""
        return torch.cdist(tokens.flatten(1), self.centers).argmin(1)

    def prompt_ids(self, prompts):
        """List of B prompts -> ids (B, L) int64, L fixed; ValueError for unknown words."""
        return self.projection.tokenize(prompts)

    def context(self, condition, drop=None):
        """Tokens (B, G, D) or prompt ids (B, L) -> context (B, K, context_dim), and mask (B, K)
        bool for prompts, else None. drop (B,) bool: rows that get the null context."""
        return self.projection(condition, drop)

    def null_context(self, batch):
        """Context and mask without a condition, as `context` returns them."""
        if self.prompts:
            return self.projection(self.projection.null(batch))
        return self.projection.null(batch)

    # ---- training

    def loss(self, mean, std, condition, generator, t=None):
        """Loss of one training step, mean (prediction - target)^2 at uniform t: a scalar.

        mean, std: (B, C, h, w), the VAE's posterior, from which a latent is drawn.
        condition: (B, G, D) or (B, L); a share `drop_condition` of the rows gets the null context,
            which guidance needs. Ignored by an unconditional model.
        generator: source of all randomness, on mean's device.
        t: (B,) int64, in place of uniform ones.
        """
        B = len(mean)
        z = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        x0 = (z - self.shift) * self.scale

        if self.config.condition == "none":
            context, mask = self.null_context(B)
        else:
            drop = torch.rand(B, generator=generator, device=mean.device)
            context, mask = self.context(condition, drop < self.config.drop_condition)

        def model(xt, t):
            return self.unet(xt, t, context, mask)

        return self.schedule.loss(model, x0, generator, t).mean()

    # ---- sampling

    @torch.no_grad()
    def sample(self, condition, seeds, steps=None, guidance_scale=None, eta=0.0, sampler="dpm",
               batch=64, start=None, strength=1.0, dtype=torch.float32, guidance_rescale=0.0,
               refine=True, watch=None):
        """New images (N, 3, H, W) in [-1, 1], one per seed, on the model's device.

        condition: standardised tokens (N, G, D), prompt ids (N, L), or None.
        steps: default in DEFAULT_STEPS. eta: for ddim only.
        guidance_scale, guidance_rescale: see `guided`; ignored without a condition. The scale's
            default is the config's.
        start: images (N, 3, H, W) to start from (img2img) if strength < 1, with the noise of
            timestep strength * T - 1.
        dtype: torch.bfloat16 runs U-Net and refiner under autocast; the rest stays float32.
        watch: called with the predicted x0 (B, C, h, w) of every step of every batch.
        Image i depends on its seed and condition only, not on `batch`. Raises ValueError for
        settings out of range, or if seeds, conditions and start images differ in number.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler '{sampler}' is unknown: use {', '.join(SAMPLERS)}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength {strength}: need more than 0 and at most 1 (all noise)")
        for name, rows in ("condition", condition), ("start", start):
            if rows is not None and len(rows) != len(seeds):
                raise ValueError(f"{name} has {len(rows)} rows for {len(seeds)} seeds: need one "
                                 "per image: repeat it, or pass more seeds")
        steps = steps or DEFAULT_STEPS[sampler]
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        timesteps = self.schedule.sampling_timesteps(steps, power=2 if sampler == "dpm" else 1)
        first = max(0, int(strength * self.schedule.num_train_timesteps) - 1)
        timesteps = [first] + [t for t in timesteps if t < first]
        device = self.shift.device
        side = self.config.image_size // self.config.vae.factor

        images = []
        for first in range(0, len(seeds), batch):
            rows = slice(first, first + batch)

            # Noise from each image's own seed, or a noisy start image.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            B = len(generators)
            x = seeded_noise(generators, (B, len(self.shift), side, side), self.shift)
            if strength < 1:
                t = torch.full((B,), timesteps[0], device=device)
                x = self.schedule.add_noise(self.encode(start[rows].to(device)), x, t)

            # The model, with guidance.
            null_context, null_mask = self.null_context(B)
            context, mask = null_context, null_mask
            scale = 1.0
            if condition is not None:
                context, mask = self.context(condition[rows].to(device))
                scale = guidance_scale
            model = guided(self.unet, context, null_context, scale, mask, null_mask,
                           guidance_rescale)
            if watch:
                model = watched(model, self.schedule, watch)

            # Noise to x0; samplers contain no matmuls, so autocast touches the U-Net alone.
            options = {} if sampler == "dpm" else {"generators": generators}
            if sampler == "ddim":
                options["eta"] = eta
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                x = SAMPLERS[sampler](model, x, self.schedule, timesteps=timesteps, **options)

            # x0 to pixels.
            decoded = self.decode(x)
            images.append(self.refine(decoded, seeds[rows], dtype=dtype) if refine else decoded)
        return torch.cat(images)

    # ---- checkpoints; file I/O is in support/files.py

    def to_checkpoint(self):
        """A dict of tensors and plain values, for `from_checkpoint` and torch.save."""
        mixture = self.embedding_sampler
        return {
            "config": asdict(self.config),
            "embedder": self.embedder.state_dict(),
            "vae": self.vae.state_dict(),
            "unet": self.unet.state_dict(),
            "projection": self.projection.state_dict(),
            "refiner": None if self.refiner is None else self.refiner.state_dict(),
            "statistics": {name: getattr(self, name) for name in self.STATISTICS},
            "embedding_sampler": None if mixture is None else mixture.state_dict(),
        }

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The inverse of to_checkpoint, in eval mode. Raises ValueError for a malformed dict."""
        try:
            raw = dict(checkpoint["config"])
            raw["labels"] = tuple(raw["labels"])
            kinds = {"vae": VAEConfig, "unet": UNetConfig, "vit": ViTConfig, "refiner": UNetConfig}
            for name, kind in kinds.items():
                raw[name] = kind(**raw[name]) if raw[name] else None

            model = cls(DinoDiffusionConfig(**raw))
            for part in ("vae", "unet", "projection", "embedder", "refiner"):
                if getattr(model, part) is not None:
                    getattr(model, part).load_state_dict(checkpoint[part])
            for name, value in checkpoint["statistics"].items():
                getattr(model, name).copy_(value)
            mixture = checkpoint["embedding_sampler"]
            if mixture is not None:
                shape = (*mixture["means"].shape, *model.config.token_shape)
                model.embedding_sampler = EmbeddingSampler(*shape)
                model.embedding_sampler.load_state_dict(mixture)
        except Exception as error:  # a malformed file can raise anything
            raise ValueError(
                f"not a DiNO-Diffusion model of this version ({' '.join(str(error).split())[:150]})"
                ", need a model.pt of train.py: train again, or pass --checkpoint") from error
        return model.eval()
