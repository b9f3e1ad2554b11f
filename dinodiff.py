"""DiNO-Diffusion: latent diffusion conditioned on the global tokens of a frozen DiNO ViT.

Papers: DiNO-Diffusion (arXiv 2407.11594); DDPM (Ho 2020); DDIM (Song 2021); DPM-Solver++ (Lu 2022,
arXiv 2211.01095); latent diffusion (Rombach 2022); v-prediction (Salimans & Ho 2022); classifier-
free guidance (Ho & Salimans 2022); zero terminal SNR and rescaled guidance (Lin 2024); min-SNR
weights (Hang 2023).
a_t below is `alphas_cumprod[t]`; a step of a sampler goes from t to s, and u is the t before t.

    forward      xt  = sqrt(a_t) x0 + sqrt(1 - a_t) eps                                  (1)
    target       v   = sqrt(a_t) eps - sqrt(1 - a_t) x0                                  (2)
    back         x0  = sqrt(a_t) xt - sqrt(1 - a_t) v,  eps = sqrt(a_t) v + sqrt(1 - a_t) xt   (3)
    DDIM         xs  = sqrt(a_s) x0 + sqrt(1 - a_s - sigma^2) eps + sigma noise          (4)
    DPM-Solver++ xs  = (4) without noise, of x0 + (l_s - l_t) / (l_t - l_u) / 2 (x0 - x0 at u),
                 l_t = log(a_t / (1 - a_t)) / 2                                          (5)
    guidance     f   = f(null) + guidance_scale (f(context) - f(null)), 1.0 = off        (6)
    rescaled     f  <- f (phi std(f(context)) / std(f) + 1 - phi), phi = guidance_rescale  (6')
    context      c_k = W (token_k - mean_k) / std_k + position_k                         (7)

Instead of (7) the condition may be a prompt that was derived from the image (prompts.py, arXiv
2312.09792), a bare label prompt, or nothing.

Shapes: image (B, 3, H, W) in [-1, 1]; latent x0 (B, C, h, w), about N(0, 1) per channel; global
tokens (B, G, D); context (B, K, context_dim); t (B,) int64 in 0..T-1. A condition is one tensor,
standardised tokens (B, G, D) or prompt ids (B, L) int64, or None for no condition.

    model = DinoDiffusion.from_checkpoint(load_checkpoint("runs/cxr/model.pt"))
    images = model.sample(model.embed(sources), seeds=[0, 1, 2])

Ours, because the paper does not say: the prediction type, the schedule, the standardisation of the
tokens, the number of context tokens, guidance, sampler and steps.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dino import VISION_TRANSFORMERS, ViTConfig, VisionTransformer, conditioning_tokens
from prompts import PromptEncoder, build_prompts, kmeans, vocabulary_of, words_of
from support.mixture import EmbeddingSampler
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

VAE_PIXELS = 2 ** 20  # that the VAE sees at once: four images of 512 px fit any GPU


# ---------------------------------------------------------------------------- noise schedule

def make_betas(kind, T):
    """The share of variance that noise takes over at each step: (T,) float64 in (0, 1).

    A new kind is one more paragraph here, and its word in the error and in --schedule
    (support/settings.py). Raises ValueError.
    """
    if kind == "scaled_linear":  # Stable Diffusion
        return torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, T, dtype=torch.float64) ** 2

    if kind == "linear":  # Ho 2020
        return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)

    if kind == "cosine":  # Nichol & Dhariwal 2021, equation 17
        u = torch.arange(T + 1, dtype=torch.float64) / T
        signal = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)

    raise ValueError(f"schedule '{kind}' is unknown: use scaled_linear, linear or cosine")


class NoiseSchedule:
    """How much of x0 is left at each timestep, and how predictions translate.

    kind: "scaled_linear", "linear" or "cosine", see make_betas. prediction: "v" or "eps".
    zero_terminal_snr rescales so that the last step is pure noise.
    Raises ValueError for unknown words, and where eps would be divided by sqrt(a_T) near zero.
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
                "its root at the first sampling step: use prediction 'v', or zero_terminal_snr "
                "off with kind 'scaled_linear' or 'linear'")
        self.alphas_cumprod = alphas_cumprod.float()  # (T,)

    def roots(self, t, like):
        """sqrt(a_t) and sqrt(1 - a_t) of each sample, shaped to multiply `like`."""
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        a = self.alphas_cumprod[t].view(-1, *[1] * (like.dim() - 1))
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0, noise, t):
        """Equation (1): x0, noise (B, ...), t (B,) int64 -> xt (B, ...)."""
        signal, spread = self.roots(t, x0)
        return signal * x0 + spread * noise

    def target(self, x0, noise, t):
        """What the network should say at t: equation (2), or the noise itself."""
        if self.prediction == "eps":
            return noise
        signal, spread = self.roots(t, x0)
        return signal * noise - spread * x0

    def to_x0_eps(self, output, xt, t):
        """Equation (3): the network's output and xt -> (x0, eps). Never clipped (latents)."""
        signal, spread = self.roots(t, xt)
        if self.prediction == "eps":
            return (xt - spread * output) / signal, output
        return signal * xt - spread * output, signal * output + spread * xt

    def min_snr_weight(self, t, gamma=5.0):
        """Loss weight (B,) of Hang 2023: min(SNR, gamma) / SNR for eps, / (SNR + 1) for v."""
        signal, spread = self.roots(t, t)
        snr = (signal / spread).square()
        return snr.clamp(max=gamma) / (snr + 1 if self.prediction == "v" else snr)

    def sampling_timesteps(self, steps, power=1):
        """`steps` timesteps, T-1 first, the next x0 last: list of falling int.

        power 1: evenly spaced, "trailing" (Lin 2024, table 2). 2: closer and closer towards x0,
        their roots are evenly spaced.
        """
        T = self.num_train_timesteps
        if not 1 <= steps <= T:
            raise ValueError(f"{steps} sampling steps: need 1 to {T}, the number trained with")
        spaced = [round(T * (left / steps) ** power) - 1 for left in range(steps, 0, -1)]
        return [max(t, steps - 1 - i) for i, t in enumerate(spaced)]  # room for those that follow

    def pairs(self, timesteps):
        """(t, a_t, a_s) of each sampling step: s is the list's next entry, never t - T // steps,
        and after the last one comes x0 itself, a_s = 1."""
        a = self.alphas_cumprod.cpu().double().tolist()
        return zip(timesteps, [a[t] for t in timesteps], [a[s] for s in timesteps[1:]] + [1.0])


# ---------------------------------------------------------------------------- samplers

def seeded_noise(generators, shape, like):
    """Noise of `shape` (B, ...): row i from CPU generator i, so an image does not depend on its
    batch. generators None: all of it from the global one."""
    if generators is None:
        return torch.randn(shape, device=like.device, dtype=like.dtype)
    noise = torch.stack([torch.randn(shape[1:], generator=g) for g in generators])
    if like.is_cuda:
        noise = noise.pin_memory()  # from where it is copied without waiting for the GPU
    return noise.to(like.device, like.dtype, non_blocking=True)


def predict_x0_eps(model, x, schedule, t):
    """The network's word on x (B, ...) at one timestep t, as (x0, eps)."""
    batch_t = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
    return schedule.to_x0_eps(model(x, batch_t), x, batch_t)


@torch.no_grad()
def ddim_sample(model, x, schedule, steps=50, eta=0.0, generators=None, timesteps=None):
    """Song 2021, equation 12 (our (4)): x (B, ...) noise -> x0 (B, ...).

    model(x, t) returns the schedule's prediction. eta 0 is deterministic, 1 has DDPM's variance.
    `timesteps` (descending list) overrides `steps`; the step after the last one is x0 itself.
    generators: one CPU generator an image for eta > 0, or None for the global one.
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
def ddpm_sample(model, x, schedule, steps=None, generators=None, timesteps=None):
    """Ho 2020, equations 6-7, with the posterior's variance: x (B, ...) noise -> x0 (B, ...).

    steps defaults to all T. With fewer, neighbours in the list take the place of t and t-1.
    """
    timesteps = timesteps or schedule.sampling_timesteps(steps or schedule.num_train_timesteps)
    for t, a_t, a_s in schedule.pairs(timesteps):
        x0, _ = predict_x0_eps(model, x, schedule, t)
        alpha = a_t / a_s
        x = (math.sqrt(a_s) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - a_s) * x) / (1 - a_t)
        variance = (1 - a_s) / (1 - a_t) * (1 - alpha)  # 0 at the last step
        if variance > 0:
            x = x + math.sqrt(variance) * seeded_noise(generators, x.shape, x)
    return x


def half_log_snr(a):
    """log(sqrt(a) / sqrt(1 - a)), the time that DPM-Solver counts in: a in 0..1 -> -inf..inf."""
    if a in (0.0, 1.0):
        return math.copysign(math.inf, a - 0.5)
    return math.log(a / (1 - a)) / 2


@torch.no_grad()
def dpm_sample(model, x, schedule, steps=15, timesteps=None, order=2):
    """DPM-Solver++ (2M), Lu 2022, algorithm 2 (our (5)): x (B, ...) noise -> x0 (B, ...).

    DDIM holds x0 fixed during a step. This one lets it move on as it did during the step before,
    in a straight line over half_log_snr, which costs no call of the model; order 1 is DDIM itself.
    Steps from pure noise and to x0 are infinitely long in that time, and no line fits them: the
    first, the last, and the one after a start in pure noise are DDIM's. So that the last one is
    short, `steps` timesteps lie closer and closer towards x0: on a Gaussian 15 of them err by less
    than a tenth of DDIM's 50 (evenly spaced, by twice as much).
    """
    timesteps = timesteps or schedule.sampling_timesteps(steps, power=2)
    x0_before = None
    length_before = math.inf  # of the step before, as if the start had come from infinity
    for t, a_t, a_s in schedule.pairs(timesteps):
        x0, _ = predict_x0_eps(model, x, schedule, t)
        length = half_log_snr(a_s) - half_log_snr(a_t)
        middle = x0  # the mean x0 of the step
        if order == 2 and math.isfinite(length) and math.isfinite(length_before):
            middle = x0 + length / length_before / 2 * (x0 - x0_before)

        # Equation (4) with sigma = 0, and the eps that belongs to x and this x0.
        eps = (x - math.sqrt(a_t) * middle) / math.sqrt(1 - a_t)
        x = math.sqrt(a_s) * middle + math.sqrt(1 - a_s) * eps
        x0_before = x0
        length_before = length
    return x


def guided(unet, context, null_context, guidance_scale, mask=None, null_mask=None,
           guidance_rescale=0.0):
    """Equation (6) as a model(x, t): both halves in one pass; 1.0 is the conditional run itself.

    context, null_context: (B, K, context_dim). mask, null_mask: (B, K) bool, which context tokens
    count, for prompts of unequal length; else None. guidance_rescale: phi of equation (6'), Lin
    2024, equations 15 and 16: guidance makes outputs wider, which shows as too much contrast, and
    this takes them back to the width of the conditional run, each image's by itself; 0.0 is off.
    """
    def conditional_model(x, t):
        return unet(x, t, context, mask)

    if guidance_scale == 1.0:
        return conditional_model

    both_contexts = torch.cat([null_context, context])  # (B, K, C) -> (2B, K, C)
    both_masks = None if mask is None else torch.cat([null_mask, mask])

    # Float32, because bf16 would round the difference that guidance multiplies.
    def guided_model(x, t):
        output = unet(torch.cat([x, x]), torch.cat([t, t]), both_contexts, both_masks)
        null, conditional = output.float().chunk(2)
        output = null + guidance_scale * (conditional - null)
        if guidance_rescale:
            width = output.flatten(1).std(1).clamp(min=1e-6)
            narrower = conditional.flatten(1).std(1) / width
            factor = guidance_rescale * narrower + 1 - guidance_rescale
            output = output * factor[:, None, None, None]
        return output

    return guided_model


# ---------------------------------------------------------------------------- the manifold

def lerp(a, b, weight):
    """Straight line between standardised tokens a and b (..., G, D); weight 0 is a, 1 is b."""
    return a + weight * (b - a)


def slerp(a, b, weight):
    """Great circle between a and b (..., G, D), each seen as one vector; lengths are mixed too.

    Source: Shoemake 1985. Falls back to lerp where the two are almost parallel.
    """
    # Directions and lengths.
    u = a.flatten(-2)
    w = b.flatten(-2)
    length_a = u.norm(dim=-1, keepdim=True)
    length_b = w.norm(dim=-1, keepdim=True)
    u = u / length_a.clamp(min=1e-8)
    w = w / length_b.clamp(min=1e-8)

    # A point of the arc between the directions, then its length.
    angle = (u * w).sum(-1, keepdim=True).clamp(-1, 1).acos()
    mixed = (((1 - weight) * angle).sin() * u + (weight * angle).sin() * w) / angle.sin()
    mixed = mixed * lerp(length_a, length_b, weight)
    nearly_parallel = (angle < 1e-3) | (angle > math.pi - 1e-3)
    return torch.where(nearly_parallel, lerp(a, b, weight).flatten(-2), mixed).view_as(a)


def perturb(tokens, amount, generators=None):
    """Standardised tokens (B, G, D) plus noise of `amount` training-set standard deviations."""
    return tokens + amount * seeded_noise(generators, tokens.shape, tokens)


def prototypes(tokens, k, seed=0):
    """K-means centres of standardised training tokens (N, G, D): (k, G, D), typical images."""
    centers, _ = kmeans(tokens.flatten(1).cpu(), k, seed)
    return centers.view(k, *tokens.shape[1:]).to(tokens)


# ---------------------------------------------------------------------------- the condition

class TokenProjection(nn.Module):
    """Standardised global tokens (B, G, D) -> context (B, K, context_dim), equation (7).

    A single context token would make every cross-attention weight 1, and queries and keys would
    get no gradient; so one global token is cut into `pieces` context tokens. With several,
    K = G. Positions start at standard deviation 0.5: standardising removes what told the tokens
    apart, and much smaller positions learn far more slowly. The null context is learned.
    """

    def __init__(self, num_tokens, token_dim, context_dim, pieces=4):
        super().__init__()
        self.pieces = pieces if num_tokens == 1 else 1
        K = num_tokens * self.pieces
        self.proj = nn.Linear(token_dim, context_dim * self.pieces)
        self.positions = nn.Parameter(0.5 * torch.randn(K, context_dim))
        self.null_context = nn.Parameter(torch.zeros(K, context_dim))

    def forward(self, tokens):
        B, G, _ = tokens.shape
        context = self.proj(tokens).view(B, G * self.pieces, -1)  # (B, G, P*C) -> (B, G*P, C)
        return context + self.positions

    def null(self, batch):
        """The context of "no condition": (batch, K, context_dim)."""
        return self.null_context.expand(batch, -1, -1)


# ---------------------------------------------------------------------------- the bundle

@dataclass(frozen=True)
class DinoDiffusionConfig:
    image_size: int = 64                 # pixels, square
    vae: VAEConfig = VAEConfig()
    unet: UNetConfig = UNetConfig()
    vit: ViTConfig = VISION_TRANSFORMERS["tiny"]
    condition: str = "dino"              # dino, prompts, labels, or none (the control)
    tokens: str = "global"               # which tokens condition: see dino.conditioning_tokens
    token_shape: tuple = (5, 192)        # (G, D) of those tokens
    template: str = ""                   # of the prompts: see prompts.py
    labels: tuple = ()                   # what <label> may be
    clusters: int = 0                    # K of K-means on the tokens: what <index> counts
    schedule: str = "scaled_linear"      # see make_betas
    prediction: str = "v"                # v, eps
    zero_terminal_snr: bool = True
    drop_condition: float = 0.1          # share of training samples that see the null context
    min_snr_gamma: float = 0.0           # 0 = off; Hang 2023 takes 5. It harms short runs

    @property
    def prompts(self):
        """Every prompt, in the order of its number `label * clusters + cluster`; without labels, or
        without clusters, that part is 0, and `clusters` counts as 1.

        The label of a prompt is looked up by this number, never read out of its text.
        """
        if self.condition not in ("prompts", "labels"):
            return ()
        pairs = [(label, k) for label in self.labels or [None] for k in range(self.clusters or 1)]
        indices = [k for _, k in pairs] if self.clusters else None
        labels = [label for label, _ in pairs] if self.labels else None
        return tuple(build_prompts(indices, labels, self.template))

    def __post_init__(self):
        if self.vae.latent_channels != self.unet.in_channels:
            raise ValueError(f"the VAE has {self.vae.latent_channels} latent channels, the U-Net "
                             f"takes {self.unet.in_channels}: both must agree, pass another --vae")
        step = self.vae.factor * self.unet.factor
        if self.image_size % step:
            need = math.ceil(self.image_size / step) * step
            raise ValueError(
                f"image side {self.image_size} is not a multiple of {step} (VAE {self.vae.factor} "
                f"x U-Net {self.unet.factor}): pass --size {need}")


class DinoDiffusion(nn.Module):
    """VAE, U-Net, embedder, schedule and projection, with the statistics that join them.

    Two parts are trained here (`trained`: U-Net and projection); VAE and embedder stay frozen.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vae = AutoencoderKL(config.vae).requires_grad_(False).eval()
        self.embedder = VisionTransformer(config.vit).requires_grad_(False).eval()
        self.unet = UNet(config.unet)
        self.schedule = NoiseSchedule(1000, config.schedule, config.prediction,
                                      config.zero_terminal_snr)

        # What turns a condition into context tokens.
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
        self.register_buffer("prompt_counts", counts)  # training images of each
        self.embedding_sampler = None  # set after training

    @property
    def trained(self):
        return nn.ModuleDict({"unet": self.unet, "projection": self.projection})

    # ---- pictures to numbers and back

    def standardise(self, tokens):
        """Raw tokens (B, G, D) -> mean 0 and deviation 1 over the training set, each entry."""
        return (tokens - self.token_mean) / self.token_std

    @torch.no_grad()
    def embed(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> standardised tokens (B, G, D)."""
        return self.standardise(conditioning_tokens(self.embedder, images, self.config.tokens))

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> x0 (B, C, h, w): the mean latent, standardised."""
        return (self.posterior(images)[0] - self.shift) * self.scale

    @torch.no_grad()
    def posterior(self, images):
        """Images -> mean and std (B, C, h, w) of the VAE's latents; VAE_PIXELS at a time."""
        slices = images.split(max(1, VAE_PIXELS // images[0, 0].numel()))
        found = [self.vae.encode(part) for part in slices]
        return torch.cat([x.mean for x in found]), torch.cat([x.std for x in found])

    @torch.no_grad()
    def decode(self, x0):
        """x0 (B, C, h, w) -> images (B, 3, H, W), clipped to [-1, 1]; VAE_PIXELS at a time."""
        pixels = x0.shape[2] * x0.shape[3] * self.config.vae.factor ** 2
        slices = x0.split(max(1, VAE_PIXELS // pixels))
        images = [self.vae.decode(part / self.scale + self.shift) for part in slices]
        return torch.cat(images).clamp(-1, 1)

    # ---- conditions

    def cluster_of(self, tokens):
        """Standardised tokens (B, G, D) -> number of the nearest K-means centre, (B,) int64."""
        return torch.cdist(tokens.flatten(1), self.centers).argmin(1)

    def prompt_ids(self, prompts):
        """List of B str -> the condition of a model that follows prompts, (B, L) int64.

        L is one number whatever the prompts are. Raises ValueError for a prompt with unknown words.
        """
        return self.projection.tokenize(prompts)

    def context(self, condition, batch):
        """Tokens (batch, G, D), prompt ids (batch, L) or None for no condition ->
        context (batch, K, context_dim), and mask (batch, K) bool for prompts or else None.
        """
        if self.prompts:
            return self.projection(self.projection.null(batch) if condition is None else condition)
        if condition is None:
            return self.projection.null(batch), None
        return self.projection(condition), None

    # ---- training

    def loss(self, mean, std, condition, generator):
        """One training step's loss: mean (prediction - target)^2 over uniform t.

        mean, std: (B, C, h, w), the VAE's posterior, drawn anew each step.
        condition: (B, G, D) or (B, L); a part of it, `drop_condition`, is replaced by the null
            condition, so that guidance has both halves. Of no account to an unconditional model.
        generator: of all that is drawn, on mean's device.
        Returns (loss, {}): a dict of values to log, as all losses for `fit` do.
        """
        B = len(mean)
        device = mean.device

        # Latent, noise and timestep.
        z = mean + std * torch.randn(mean.shape, generator=generator, device=device)
        x0 = (z - self.shift) * self.scale
        noise = torch.randn(mean.shape, generator=generator, device=device)
        t = torch.randint(self.schedule.num_train_timesteps, (B,), generator=generator,
                          device=device)

        # Context, or for some images the null context.
        context, mask = self.context(None, B)
        if self.config.condition != "none":
            dropped = torch.rand(B, generator=generator, device=device) < self.config.drop_condition
            null_context, null_mask = context, mask
            context, mask = self.context(condition, B)
            context = torch.where(dropped[:, None, None], null_context, context)
            if mask is not None:
                mask = torch.where(dropped[:, None], null_mask, mask)

        # The error of the prediction.
        prediction = self.unet(self.schedule.add_noise(x0, noise, t), t, context, mask)
        target = self.schedule.target(x0, noise, t)
        error = F.mse_loss(prediction.float(), target, reduction="none")
        error = error.flatten(1).mean(1)  # (B, C, h, w) -> (B,)
        if self.config.min_snr_gamma:
            error = error * self.schedule.min_snr_weight(t, self.config.min_snr_gamma)
        return error.mean(), {}

    # ---- sampling

    @torch.no_grad()
    def sample(self, condition, seeds, steps=50, guidance_scale=1.0, eta=0.0, sampler="ddim",
               batch=64, start=None, strength=1.0, dtype=torch.float32, guidance_rescale=0.0):
        """New images (N, 3, H, W) in [-1, 1], one for each seed, on the model's device.

        condition: standardised tokens (N, G, D), prompt ids (N, L), or None.
        guidance_scale, guidance_rescale: of equations (6) and (6'), see `guided`; without a
            condition of no account.
        start: images (N, 3, H, W); with strength < 1 the sampler begins from them, with the noise
            of the timestep at that share of all T (img2img).
        dtype: torch.bfloat16 puts the U-Net under autocast; all the rest stays float32.
        Image i depends on its seed and condition alone, not on `batch`.
        Raises ValueError for steps outside 1..T, a strength outside (0, 1], an unknown sampler.
        """
        if sampler not in ("ddim", "ddpm", "dpm"):
            raise ValueError(f"sampler '{sampler}' is unknown: use ddim, ddpm or dpm")
        if not 0 < strength <= 1:
            raise ValueError(f"strength {strength}: need more than 0 and at most 1 (all noise)")
        timesteps = self.schedule.sampling_timesteps(steps, power=2 if sampler == "dpm" else 1)
        limit = strength * self.schedule.num_train_timesteps
        timesteps = [t for t in timesteps if t < limit] or timesteps[-1:]
        device = self.shift.device
        side = self.config.image_size // self.config.vae.factor

        images = []
        for first in range(0, len(seeds), batch):
            rows = slice(first, first + batch)

            # Noise, of each image's own seed, or a noisy start image.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            B = len(generators)
            x = seeded_noise(generators, (B, len(self.shift), side, side), self.shift)
            if strength < 1:
                t = torch.full((B,), timesteps[0], device=device)
                x = self.schedule.add_noise(self.encode(start[rows].to(device)), x, t)

            # The model, with both contexts.
            null_context, null_mask = self.context(None, B)
            model = guided(self.unet, null_context, null_context, 1.0, null_mask, null_mask)
            if condition is not None:
                context, mask = self.context(condition[rows].to(device), B)
                model = guided(self.unet, context, null_context, guidance_scale, mask, null_mask,
                               guidance_rescale)

            # Noise to x0; samplers multiply no matrices, so autocast touches the U-Net alone.
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                if sampler == "ddim":
                    x = ddim_sample(model, x, self.schedule, eta=eta, generators=generators,
                                    timesteps=timesteps)
                elif sampler == "ddpm":
                    x = ddpm_sample(model, x, self.schedule, generators=generators,
                                    timesteps=timesteps)
                else:
                    x = dpm_sample(model, x, self.schedule, timesteps=timesteps)
            images.append(self.decode(x))
        return torch.cat(images)

    # ---- plain dictionaries; files are the business of support/files.py

    STATISTICS = ("shift", "scale", "token_mean", "token_std", "centers", "prompt_counts")

    def to_checkpoint(self):
        """Plain dict of tensors and values that `from_checkpoint` and torch.save take."""
        mixture = self.embedding_sampler
        return {
            "config": asdict(self.config),
            "embedder": {"config": asdict(self.config.vit), "model": self.embedder.state_dict()},
            "vae": self.vae.state_dict(),
            "unet": self.unet.state_dict(),
            "projection": self.projection.state_dict(),
            "statistics": {name: getattr(self, name) for name in self.STATISTICS},
            "embedding_sampler": None if mixture is None else mixture.state_dict(),
        }

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The inverse, in eval mode. Raises ValueError if the parts do not fit each other."""
        try:
            # The config; sizes far from the weights' would fill the memory before they are refused.
            raw = dict(checkpoint["config"])
            raw["labels"] = tuple(raw.get("labels", ()))
            for name, kind in (("vae", VAEConfig), ("unet", UNetConfig), ("vit", ViTConfig)):
                raw[name] = kind(**raw[name])
            layers = (raw["vae"].layers_per_block, raw["unet"].layers_per_block, raw["vit"].depth)
            if max(layers) > len(checkpoint["unet"]):
                raise ValueError(f"{max(layers)} layers")

            # Weights and statistics.
            model = cls(DinoDiffusionConfig(**raw))
            model.embedder.load_state_dict(checkpoint["embedder"]["model"])
            for part in ("vae", "unet", "projection"):
                getattr(model, part).load_state_dict(checkpoint[part])
            for name, value in checkpoint["statistics"].items():
                getattr(model, name).copy_(value)
            mixture = checkpoint["embedding_sampler"]
            if mixture is not None:
                shape = (*mixture["means"].shape, *model.config.token_shape)
                model.embedding_sampler = EmbeddingSampler(*shape)
                model.embedding_sampler.load_state_dict(mixture)
        except Exception as error:  # a foreign file raises nearly any type
            raise ValueError(
                "this is not a DiNO-Diffusion model that this version reads "
                f"({' '.join(str(error).split())[:200]}): "
                "need a model.pt written by train.py; train again, or pass --checkpoint") from error
        return model.eval()
