"""Generated images with exact ground truth: chest X-rays with lung masks, H&E patches.

They replace medical images where there are none. They are cartoons: what works on them may fail on
patients.

    images, masks, labels = chest_phantoms(16, size=64, seed=0)  # float32 in [-1, 1]
    images, masks, labels, morphology = histology_phantoms(16, size=96, seed=0)

Image i depends on (seed, i, size) only: each is drawn from its own generator. Stains: Ruifrok and
Johnston 2001, with eosin slightly pinker.
"""
import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from support.seeds import step_seed

CHEST_LABELS = ("cardiomegaly", "effusion", "opacity", "nodule")
HISTOLOGY_MORPHOLOGIES = ("stroma", "lymphoid", "fat", "glands", "muscle", "mucin")
PREVALENCE = 0.35  # of each chest label, independent of the others

# One uniform number per image and name. Lengths in half image sides before scaling, y points down;
# brightness from 0 (air) to 1. From -1 to 1: the sign is the side, -1 is the patient's right.
CHEST_RANGES = dict(
    angle=(-0.06, 0.06), scale=(1.05, 1.28), dx=(-0.06, 0.06), dy=(-0.06, 0.06),
    thorax=(0.62, 0.75), flank=(0.16, 0.40), apex=(-0.80, -0.70), diaphragm=(0.30, 0.54),
    knob=(0.03, 0.08), ratio=(0, 1), tissue=(0.52, 0.62), air=(0.40, 0.50), vessels=(0.25, 0.45),
    breast=(0, 0.07), ribs=(0.09, 0.15), back=(0.25, 0.45), phase=(0, 1), fluid=(-1, 1),
    blob_x=(-1, 1), blob_y=(-0.45, 0.15), blob_radius=(0.18, 0.30),
    nodule_x=(-1, 1), nodule_y=(-0.45, 0), nodule_radius=(0.05, 0.085),
    gamma=(-0.35, 0.35), gain=(0.90, 1.08))


# ---- drawing tools -----------------------------------------------------------------------------

def _draw(one, n, size, seed):
    """Stack the results of one(seed, number, size) for n numbers."""
    if n < 1 or size < 16:
        raise ValueError(f"got n={n}, size={size}: need n from 1, size from 16 (below is too "
                         "coarse to draw): pass larger numbers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors here are small: threads would contend for cores
    try:
        return tuple(map(torch.stack, zip(*(one(seed, i, size) for i in range(n)))))
    finally:
        torch.set_num_threads(threads)


def _generator(*key):
    return torch.Generator().manual_seed(step_seed(*key))


def _uniform(g, low, high, *shape):
    return low + (high - low) * torch.rand(*shape, generator=g)


def _axes(size):
    """Pixel centres in [-1, 1]: x (size), y (size, 1)."""
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    return axis, axis[:, None]


def _turn(angle, x, y):
    """Coordinates along and across a direction."""
    cos = torch.as_tensor(angle).cos()
    sin = torch.as_tensor(angle).sin()
    return cos * x + sin * y, cos * y - sin * x


def _noise(g, cells, size, *shape):
    """Smooth noise (*shape, size, size) with one random value per cell."""
    coarse = torch.randn(1, math.prod(shape), cells, cells, generator=g)
    return F.interpolate(coarse, size, mode="bicubic")[0].view(*shape, size, size)


def _soft(f, width=0.04):
    """Smooth inside test: 0 below -width, 1 above width, 1/2 at f = 0."""
    t = (f / (2 * width) + 0.5).clamp(0, 1)
    return t.square() * (3 - 2 * t)


def _both(a, b):
    """Minimum of two implicit functions, corner rounded so that tips leave no stray pixels."""
    return torch.minimum(a, b) - (0.12 - (a - b).abs()).clamp(min=0).square() / 0.48


def _wave(t):
    """1 at whole numbers, 0 half-way between."""
    return 0.5 + 0.5 * (2 * math.pi * t).cos()


# ---- chests ------------------------------------------------------------------------------------

def _chest(seed, number, size):
    """One chest (1, size, size) in [-1, 1], its lung mask (1, size, size) bool and labels (4,)."""
    g = _generator("chest", seed, number)
    values = torch.rand(len(CHEST_RANGES), generator=g).tolist()
    p = SimpleNamespace(**{name: low + (high - low) * value
                           for (name, (low, high)), value in zip(CHEST_RANGES.items(), values)})
    labels = torch.rand(4, generator=g) < PREVALENCE
    cardiomegaly, effusion, opacity, nodule = labels.float().tolist()
    coarse = _noise(g, 10, size)
    fine = _noise(g, 28, size)

    x, y = _axes(size)
    x, y = _turn(p.angle, (x - p.dx) / p.scale, (y - p.dy) / p.scale)
    side = x.abs()        # distance from the midline
    left = _soft(x, 0.1)  # 1 at the patient's left

    # Implicit functions, positive inside. The chest: wall, top, mediastinum, diaphragm.
    off = side - 0.45 * p.thorax  # 0 where lungs and diaphragm peak
    rise = (y - 0.20).clamp(max=0) / ((0.20 - p.apex) * 1.06)
    wall = p.thorax * (1 - (x / p.thorax).square() - rise ** 4) / 2
    top = y - p.apex - 0.9 * off.square()
    knob = p.knob * left * (1 - 50 * (y + 0.36).square()).clamp(min=0)  # aortic arch
    mediastinum = side - 0.14 - knob - 0.15 * y.clamp(min=0)
    dome = (off / (0.55 * p.thorax)).square() * torch.where(off > 0, 0.20, 0.08)
    diaphragm = p.diaphragm + dome - 0.05 * (1 - left) - y
    chest = _both(_both(wall, diaphragm), _both(top, mediastinum))

    # The heart is a tilted superellipse; its width is half the cardiothoracic ratio.
    ratio = 0.58 + 0.12 * p.ratio if cardiomegaly else 0.40 + 0.09 * p.ratio
    width = ratio * p.thorax
    height = 0.32 * (1 + 0.15 * cardiomegaly)
    u = (x - 0.13 * p.thorax) / width
    v = (y - p.diaphragm + 0.5 * height - 0.38 * width * u) / height
    heart = (1 - u.abs() ** 3 - v.abs() ** 3) * width / 3
    lungs = _both(chest, -heart)
    heart = _soft(heart)

    # Soft tissue is denser towards the middle, densest in heart and abdomen.
    flank = p.thorax + p.flank - side
    corner = 2 * (0.3 - flank).clamp(min=0).square()
    body = torch.minimum(flank, y + 0.95 - 0.4 * side.square() - corner)
    body = torch.maximum(body, 0.24 - side)  # neck
    image = 0.03 + _soft(body) * (p.tissue - 0.16 + 0.16 * _soft(body, 0.25))
    image += 0.14 * _soft(body, 0.1) * torch.maximum(heart, 1 - _soft(diaphragm))
    image += p.breast * _soft(0.09 - (side - 0.42).square() - (y - 0.20).square(), 0.05)

    # Findings take air away: they brighten the lungs and leave the mask as it is.
    level = y - p.diaphragm + 0.12 + 0.30 * abs(p.fluid) + 0.42 * off.clamp(min=0)
    airy = 1 - 0.95 * effusion * _soft(level, 0.06) * (x * p.fluid > 0)
    blob_x = math.copysign(0.28 + 0.24 * abs(p.blob_x), p.blob_x)
    blob = 1 - ((x - blob_x).square() + (y - p.blob_y).square()) / p.blob_radius ** 2
    blob = blob.clamp(min=0) * (1.6 + 0.5 * coarse + 0.2 * fine)
    airy *= 1 - opacity * 0.7 * blob.clamp(0, 1)
    nodule_x = math.copysign(0.28 + 0.24 * abs(p.nodule_x), p.nodule_x)
    away = (x - nodule_x).square() + (y - p.nodule_y).square()
    airy *= 1 - nodule * 0.68 * _soft(p.nodule_radius - away / p.nodule_radius)

    # Two fans of vessels leave each hilum, bent by noise.
    dx = side - 0.06
    dy = y + 0.06 - 0.04 * left + 0.05 * coarse
    distance = dx.abs() + dy.abs() + 0.02
    vessels = 0
    for rays, thickness in ((2.5, 0.014), (5.5, 0.008)):
        turn = rays * dy / distance + 0.4 * fine * distance + p.phase
        away = (math.pi * turn).sin().abs() * distance / (3.8 * rays)
        vessels = vessels + _soft(thickness - away, 0.014)
    vessels = p.vessels * vessels.clamp(max=1.2) / (1 + 4 * distance.square())
    hilum = 0.15 / (1 + 90 * ((1.4 * (side - 0.19)).square() + (y + 0.10 - 0.04 * left).square()))
    air = p.air * (1 - vessels + 0.04 * coarse) - hilum
    image -= _soft(lungs) * airy * air * (0.8 + 0.2 * _soft(chest, 0.2))

    # Trachea and bronchi, spine, back ribs (falling outwards), front ribs (rising), collar bones.
    airway = _soft(0.042 - (side - 0.9 * (y + 0.30).clamp(min=0)).abs(), 0.03)
    image -= 0.09 * airway * _soft(-0.14 - y, 0.06)
    spine = _soft(0.085 - side, 0.03) * (1 - 0.4 * heart)
    image += 0.06 * spine * (0.45 + 1.1 * _wave(y / 0.135 + p.phase).clamp(max=0.5))
    back = _wave((y - p.back * (side - 0.1).square()) / 0.16 + p.phase)
    back = _soft(back - 0.58, 0.23) * _soft(mediastinum + 0.02, 0.03)
    front = _wave((y + 0.6 * side) / 0.21 + p.phase)
    front = _soft(front - 0.65, 0.23) * _soft(side - 0.38, 0.15)
    cage = _soft(torch.minimum(wall, diaphragm) + 0.02) * (1 - 0.75 * heart)
    image += p.ribs * cage * (0.4 + 0.6 * airy) * (back + 0.7 * front)  # fade over what is bright
    clavicle = _soft(0.03 - (y + 0.61 + 0.45 * side - 0.3 * side.square()).abs(), 0.02)
    clavicle = clavicle * _soft(torch.minimum(side - 0.07, 0.8 - side), 0.03)
    blade = torch.minimum(side - 0.92 * p.thorax - 0.12 * y, 0.06 - 0.2 * (y + 0.32).abs())
    humerus = 0.025 - (side - 0.92).square() - (y + 0.55).square()
    image += 0.10 * (clavicle + 0.5 * _soft(body) * (_soft(blade, 0.03) + _soft(humerus, 0.015)))

    # The film's contrast and noise.
    image = image.clamp(0, 1)
    image += p.gamma * image * (1 - image)
    noise = torch.randn(size, size, generator=_generator("sensor", seed, number))
    image = image * p.gain + 0.015 * noise
    return (2 * image - 1).clamp(-1, 1)[None], lungs[None] > 0, labels.long()


def chest_phantoms(n, size=64, seed=0):
    """Chest X-rays: images (n, 1, size, size) float32 in [-1, 1], lung masks (n, 1, size, size)
    bool (without heart and mediastinum, with the other findings), labels (n, 4) int64, 0 or 1."""
    return _draw(_chest, n, size, seed)


# ---- histology ---------------------------------------------------------------------------------

def _nuclei(g, angle, count, radius, stretch, chance):
    """Density (size, size) of nuclei on a jittered grid of count x count, drawn with `chance`."""
    size = len(chance)
    axis = _axes(count)[0]
    centres = torch.cartesian_prod(axis, axis) + _uniform(g, -0.85, 0.85, count ** 2, 2) / count
    pixels = ((centres + 1) * (size / 2)).long().clamp(0, size - 1)
    draw, width, length, dark, bend = torch.rand(5, count ** 2, 1, generator=g)
    drawn = draw[:, 0] < chance[pixels[:, 1], pixels[:, 0]]

    # Each nucleus is an ellipse in a window of pixels of its own.
    half = int(1.25 * stretch * radius * size / 2) + 2
    window = torch.cartesian_prod(*[torch.arange(-half, half + 1)] * 2)
    pixels = pixels[drawn, None] + window                                # (nuclei, window, 2)
    x, y = ((pixels + 0.5) * (2 / size) - 1 - centres[drawn, None]).unbind(-1)
    along, across = _turn(angle + bend[drawn] - 0.5, x, y)
    short = radius * (0.75 + 0.5 * width[drawn])
    q = torch.hypot(along / (1 + (stretch - 1) * length[drawn]), across) / short  # 1 at the rim
    value = (0.65 + 0.35 * dark[drawn]) * _soft((1 - q) * short, 0.018)
    value = value * (0.8 + 0.2 * q.clamp(max=1))

    # Where nuclei overlap the densest counts; a margin takes what lies outside.
    wide = size + 2 * half
    index = (pixels[..., 1] + half) * wide + pixels[..., 0] + half
    density = torch.zeros(wide ** 2).scatter_reduce(0, index.flatten(), value.flatten(), "amax")
    return density.view(wide, wide)[half:-half, half:-half]


def _glands(g, size, eosin, wave, nuclei):
    """Rings of cells around white lumens; nuclei at the foot of the cells."""
    x, y = _axes(size)
    gap = torch.full((size, size), 9.0)  # distance from the nearest lumen
    centres = torch.cartesian_prod(*[torch.tensor([-0.6, 0.6])] * 2)
    for cx, cy in centres + _uniform(g, -0.2, 0.2, 4, 2):
        radius = _uniform(g, 0.15, 0.30, 1)
        flat = _uniform(g, 0.75, 1.3, 1)
        gap = torch.minimum(gap, torch.hypot((x - cx) * flat, (y - cy) / flat) - radius)
    gap = gap + 0.03 * wave
    wall = 1 - _soft(-gap, 0.03)
    ring = _soft(0.16 - gap, 0.03)
    foot = _soft(0.05 - (gap - 0.115).abs(), 0.01)
    dots = torch.maximum(nuclei(24, 0.042, 1.5, foot), nuclei(10, 0.026, 3.5, 0.4 * (1 - ring)))
    eosin = eosin * (1 - ring) + 0.24 * ring
    return 0.04 + 0.16 * ring * wall, eosin * wall + 0.03, dots * wall


def _tissue(g, size, kind, wave):
    """Densities (size, size) of haematoxylin, eosin and nuclei in healthy tissue."""
    x, y = _axes(size)
    full = torch.ones(size, size)
    rough = _noise(g, 14, size)
    angle = _uniform(g, -1.5, 1.5, 1)
    across = _turn(angle, x, y)[1]  # across the fibres
    nuclei = partial(_nuclei, g, angle)

    collagen = 0.34 + 0.24 * _wave(5 * across + 0.45 * wave)
    if kind == "stroma":  # wavy collagen, thin fibroblasts
        return 0.04, collagen + 0.06 * rough, nuclei(11, 0.026, 4.0, 0.45 * full)
    if kind == "muscle":  # dense parallel fibres, cigar-shaped nuclei
        eosin = 0.72 + 0.20 * _wave(9 * across + 0.12 * wave) + 0.05 * rough
        return 0.06, eosin, nuclei(11, 0.030, 4.5, 0.5 * full)
    if kind == "lymphoid":  # small round nuclei side by side
        return 0.14, 0.24 + 0.05 * rough, nuclei(22, 0.044, 1.15, 0.9 * full)
    if kind == "mucin":  # pale blue pools with strands
        strand = _wave(2.5 * across + 0.7 * wave).square()
        dots = nuclei(12, 0.038, 1.6, 0.35 * strand)
        return 0.10 + 0.16 * strand, 0.07 + 0.05 * rough.abs(), dots
    if kind == "glands":
        return _glands(g, size, collagen, wave, nuclei)

    # fat: cells of a Voronoi diagram, nuclei on their walls
    seeds = torch.cartesian_prod(*[torch.arange(-2.0, 3)] * 2)
    seeds = 0.62 * (seeds + _uniform(g, -0.38, 0.38, 25, 2))
    distance = torch.hypot(x[..., None] - seeds[:, 0], y[..., None] - seeds[:, 1])
    first, second = distance.topk(2, largest=False).values.unbind(-1)
    wall = _soft(0.05 - (second - first), 0.05)
    return 0.02, 0.05 + 0.5 * wall, nuclei(12, 0.035, 2.0, 0.7 * wall)


def _histology(seed, number, size):
    """One patch (3, size, size) in [-1, 1], its tumour mask (1, size, size), label, morphology."""
    g = _generator("histology", seed, number)
    kind = torch.randint(len(HISTOLOGY_MORPHOLOGIES), (), generator=g)
    cancer, cords, rim = torch.rand(3, generator=g) < torch.tensor([0.5, 0.5, 0.4])
    wave = _noise(g, 6, size)
    rough = _noise(g, 20, size)
    haematoxylin, eosin, nuclei = _tissue(g, size, HISTOLOGY_MORPHOLOGIES[kind], wave)

    # Cancer: in the centre third. Healthy: no tumour, or a rim outside that third (bumps: 0.18).
    x, y = _axes(size)
    centre_x, centre_y = _uniform(g, -0.2, 0.2, 2)
    radius = _uniform(g, 0.40, 0.75, 1)
    direction = _uniform(g, -math.pi, math.pi, 1)
    if cancer:
        tumour = radius - torch.hypot(x - centre_x, y - centre_y)
    elif rim:
        tumour = _turn(direction, x, y)[0] - 0.50 - 0.4 * radius
    else:
        tumour = torch.full((size, size), -1.0)
    tumour = tumour + 0.09 * wave.clamp(-2, 2)

    # Tumour is solid, or cells in cords with stroma between.
    angle = _uniform(g, -1.5, 1.5, 1)
    nest = torch.ones(size, size)
    if cords:
        nest = _soft(_wave(1.7 * _turn(angle, x, y)[1] + 0.25 * wave) - 0.38, 0.23)
    large = _nuclei(g, angle, 13, 0.075, 1.7, 0.95 * (nest > 0.5) * (tumour > 0))
    inside = _soft(tumour)
    haematoxylin = haematoxylin * (1 - inside) + inside * (0.06 + 0.16 * nest)
    eosin = eosin * (1 - inside) + inside * (0.50 - 0.22 * nest + 0.04 * rough)
    nuclei = torch.maximum(nuclei * (1 - inside), large * (0.75 + 0.15 * rough))  # coarse chromatin

    # Light that passes both stains (Beer and Lambert), each varied in colour and strength.
    colours = torch.tensor([[0.65, 0.70, 0.29], [0.10, 0.95, 0.26]])  # optical density of R, G, B
    colours = colours + 0.03 * torch.randn(2, 3, generator=g)
    blue, pink = (colours * _uniform(g, 0.85, 1.15, 2, 1))[..., None, None]
    density = blue * (haematoxylin + 1.3 * nuclei) + pink * eosin * (1 - 0.5 * nuclei)
    image = 0.96 * torch.exp(-density.clamp(min=0))
    image += 0.012 * torch.randn(3, size, size, generator=g)
    return (2 * image - 1).clamp(-1, 1), tumour[None] > 0, cancer.long(), kind


def histology_phantoms(n, size=96, seed=0):
    """H&E patches: images (n, 3, size, size) float32 in [-1, 1], tumour masks (n, 1, size, size)
    bool, labels (n,) int64 (1: tumour in the centre third, the rule of PatchCamelyon), morphology
    (n,) int64: the healthy tissue, an index into HISTOLOGY_MORPHOLOGIES, independent of the label.
    """
    return _draw(_histology, n, size, seed)
