"""Generated images with exact ground truth: chest X-rays with lung masks, H&E patches, slides.

They stand in where no medical images are at hand, and give what real sets lack: exact masks and
labels, any number of images. They are cartoons: what works on them need not work on patients.

    images, masks, labels = chest_phantoms(16, size=64, seed=0)  # float32 in [-1, 1]
    images, masks, labels, morphology = histology_phantoms(16, size=96, seed=0)
    tiles, foci, labels = slide_phantoms(16, bank, seed=0)  # bank: what the line above returned
    $ python -m support.phantoms    # two PNG files to look at

Image i is a function of (seed, start + i, size) alone, to the last bit: each is drawn by itself
from its own generator, on one thread, so it does not matter how many are made at once. Chests use
+ - * / min max and remainder only, which round alike on all machines. Stains: Ruifrok and Johnston
2001, eosin a little pinker.
"""
import hashlib
from functools import partial
from types import SimpleNamespace

import torch
from torchvision.utils import save_image

CHEST_LABELS = ("cardiomegaly", "effusion", "opacity", "nodule")
HISTOLOGY_MORPHOLOGIES = ("stroma", "lymphoid", "fat", "glands", "muscle", "mucin")
ATYPICAL, TUMOUR = 6, 7  # kinds of patches on slides, besides the six healthy ones
PREVALENCE = 0.35  # of each chest label, independent of the others

# One uniform number per image for each name. Lengths in half image sides before scaling, y down;
# brightness from 0 (air) to 1. Numbers from -1 to 1 choose a side, -1 is the patient's right.
CHEST_RANGES = dict(
    angle=(-0.06, 0.06), scale=(1.05, 1.28), dx=(-0.06, 0.06), dy=(-0.06, 0.06),
    thorax=(0.62, 0.75), flank=(0.16, 0.40), shoulder=(-1.02, -0.88), apex=(-0.80, -0.70),
    waist=(0.10, 0.30), midline=(0.12, 0.16), knob=(0.03, 0.08), diaphragm=(0.30, 0.54),
    drop=(0.14, 0.26), lift=(0.02, 0.08), ratio=(0, 1), heart_x=(0.10, 0.16),
    heart_height=(0.28, 0.36), tilt=(0.25, 0.5), tissue=(0.52, 0.62), air=(0.40, 0.50),
    vessels=(0.25, 0.45), hila=(0.10, 0.20), spine=(0.04, 0.08), bend=(-0.04, 0.04),
    trachea=(0.06, 0.12), breast=(0, 0.07), ribs=(0.09, 0.15), period=(0.145, 0.175), phase=(0, 1),
    back=(0.25, 0.45), front=(0.45, 0.75), clavicle=(0.56, 0.66), bones=(0.07, 0.13),
    fluid_side=(-1, 1), fluid=(0.12, 0.42), meniscus=(0.25, 0.6), blob_side=(-1, 1),
    blob_x=(0.28, 0.52), blob_y=(-0.45, 0.15), blob_radius=(0.18, 0.30), blob=(0.55, 0.85),
    nodule_side=(-1, 1), nodule_x=(0.28, 0.52), nodule_y=(-0.45, 0), nodule=(0.55, 0.8),
    nodule_radius=(0.05, 0.085), second=(-1, 1), second_y=(-0.45, 0),
    gamma=(-0.35, 0.35), gain=(0.90, 1.08), offset=(-0.04, 0.04))


def _generator(*key):
    """Random generator that depends on every part of the key; near keys share nothing."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _draw(one, n, size, seed, start):
    """Stack of what one(seed, number, size) returns for n numbers, on one thread.

    Tensors here are small: threads gain little, and cost up to 100 times on a busy machine.
    """
    if n < 1 or size < 16 or start < 0:
        raise ValueError(f"got n={n}, size={size}, start={start}: need n from 1, size from 16 "
                         "(below is too coarse to draw), start from 0: pass larger numbers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return tuple(map(torch.stack, zip(*(one(seed, start + i, size) for i in range(n)))))
    finally:
        torch.set_num_threads(threads)


def _axes(size):
    """Pixel centres in [-1, 1]: x (size), y (size, 1)."""
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    return axis, axis[:, None]


def _sum_squares(x, y):
    return x.square() + y.square()


def _soft(f, width=0.04):
    """Smooth inside test: 0 below -width, 1 above width, 1/2 at f = 0."""
    t = (f * (0.5 / width) + 0.5).clamp(0, 1)
    return t.square() * (3 - 2 * t)


def _both(a, b, width=0.12):
    """Minimum of two implicit functions, corner rounded so that tips leave no stray pixels."""
    return torch.minimum(a, b) - (width - (a - b).abs()).clamp(min=0).square() / (4 * width)


def _wave(t):
    """Triangle wave of period 1: 1 at whole numbers, 0 half-way between."""
    return (2 * t.remainder(1) - 1).abs()


def _upsample(grid, size):
    """Band-limited noise: Catmull-Rom interpolation, (..., g, g) -> (..., size, size)."""
    g = grid.shape[-1]
    position = (torch.arange(size) + 0.5) * (g / size) - 0.5
    f = position - position.floor()
    weights = (f * (f * (2 - f) - 1) / 2, (f * f * (3 * f - 5) + 2) / 2,
               f * (f * (4 - 3 * f) + 1) / 2, f * f * (f - 1) / 2)
    taps = [((position.floor().long() + k).clamp(0, g - 1), w) for k, w in enumerate(weights, -1)]
    grid = sum(grid[..., i] * w for i, w in taps)
    return sum(grid[..., i, :] * w[:, None] for i, w in taps)


def _chest(seed, number, size):
    """One chest (1, size, size) in [-1, 1], its lung mask (1, size, size) bool and labels (4,)."""
    g = _generator("chest", seed, number)
    uniform = torch.rand(len(CHEST_RANGES) + 4, generator=g)
    p = SimpleNamespace(**{name: lo + (hi - lo) * u
                           for (name, (lo, hi)), u in zip(CHEST_RANGES.items(), uniform)})
    coarse, fine = (_upsample(torch.randn(k, k, generator=g), size) for k in (10, 28))
    labels = uniform[-4:] < PREVALENCE
    cardiomegaly, effusion, opacity, nodule = labels.float()  # all are drawn; 1: shown
    x, y = _axes(size)
    x, y, cos = x - p.dx, y - p.dy, 1 - p.angle.square() / 2
    x, y = (cos * x + p.angle * y) / p.scale, (cos * y - p.angle * x) / p.scale
    side, left = x.abs(), _soft(x, 0.1)  # distance from the midline; 1 at the patient's left

    # Implicit functions, positive inside: lungs = chest wall, diaphragm, top, mediastinum - heart
    off = side - 0.45 * p.thorax  # 0 where lungs and diaphragm peak
    rise = (y - p.waist).clamp(max=0) / ((p.waist - p.apex) * 1.06)
    wall = p.thorax * (1 - _sum_squares(x / p.thorax, rise.square())) / 2
    top = y - p.apex - 0.9 * off * off
    knob = p.knob * left * (1 - 50 * (y + 0.36) * (y + 0.36)).clamp(min=0)  # aortic arch
    mediastinum = side - p.midline - knob - 0.15 * y.clamp(min=0)
    dome = (off / (p.thorax - 0.45 * p.thorax)).square()
    dome = dome * torch.where(off > 0, p.drop, 0.4 * p.drop)
    diaphragm = p.diaphragm + dome - p.lift * (1 - left) - y
    ratio = torch.lerp(0.40 + 0.09 * p.ratio, 0.58 + 0.12 * p.ratio, cardiomegaly)
    width, height = ratio * p.thorax, p.heart_height * (1 + 0.15 * cardiomegaly)  # half axes
    u = (x - p.heart_x * p.thorax) / width
    v = (y - p.diaphragm + 0.5 * height - p.tilt * width * u) / height
    heart = (1 - u.square() * u.abs() - v.square() * v.abs()) * width / 3  # superellipse
    chest = _both(_both(wall, diaphragm), _both(top, mediastinum))
    lungs = _both(chest, -heart)
    lung, heart, above = _soft(lungs), _soft(heart), _soft(diaphragm)

    # Soft tissue: denser inwards, densest in heart and abdomen
    flank = p.thorax + p.flank - side
    corner = 2 * (0.3 - flank).clamp(min=0).square()
    body = torch.minimum(flank, y - p.shoulder - 0.4 * side * side - corner)
    body = torch.maximum(body, 0.24 - side)  # neck
    image = 0.03 + _soft(body) * (p.tissue - 0.16 + 0.16 * _soft(body, 0.25))
    image += 0.14 * _soft(body, 0.1) * torch.maximum(heart, 1 - above)
    image += p.breast * _soft(0.09 - _sum_squares(side - 0.42, y - 0.20), 0.05)

    # Findings take air away: they brighten the lungs and leave the mask as it is
    level = y - p.diaphragm + p.fluid + p.meniscus * off.clamp(min=0)
    airy = 1 - 0.95 * effusion * _soft(level, 0.06) * (x * p.fluid_side > 0)
    blob = _sum_squares(x - p.blob_side.sign() * p.blob_x, y - p.blob_y) / p.blob_radius.square()
    blob = (1 - blob).clamp(min=0) * (1.6 + 0.5 * coarse + 0.2 * fine)
    airy *= 1 - opacity * p.blob * blob.clamp(0, 1)
    at = p.nodule_side.sign() * p.nodule_x
    for shown, cx, cy in ((1, at, p.nodule_y), (p.second > 0, -at, p.second_y)):
        disc = p.nodule_radius - _sum_squares(x - cx, y - cy) / p.nodule_radius
        airy *= 1 - shown * nodule * p.nodule * _soft(disc)

    # Air, with two fans of vessels from each hilum, bent by noise
    dx, dy = side - 0.06, y + 0.06 - 0.04 * left + 0.05 * coarse
    distance, vessels = dx.abs() + dy.abs() + 0.02, 0
    for rays, thickness in ((2.5, 0.014), (5.5, 0.008)):
        ray = _wave(rays * dy / distance + 0.4 * fine * distance + p.phase)
        vessels = vessels + _soft(thickness - (1 - ray) * distance / (2.4 * rays), 0.014)
    vessels = p.vessels * vessels.clamp(max=1.2) / (1 + 4 * distance.square())
    hilum = p.hila / (1 + 90 * _sum_squares(1.4 * (side - 0.19), y + 0.10 - 0.04 * left))
    air = p.air * (1 - vessels + 0.04 * coarse) - hilum
    image -= lung * airy * air * (0.8 + 0.2 * _soft(chest, 0.2))

    # Trachea and bronchi, spine, back ribs falling and front ribs rising sideways, shoulder girdle
    airway = _soft(0.042 - (side - 0.9 * (y + 0.30).clamp(min=0)).abs(), 0.03)
    image -= p.trachea * airway * _soft(-0.14 - y, 0.06)
    spine = _soft(0.085 - (x - p.bend * y).abs(), 0.03) * (1 - 0.4 * heart)
    image += p.spine * spine * (0.45 + 1.1 * _wave(y / 0.135 + p.phase).clamp(max=0.5))
    back = _wave((y - p.back * (side - 0.1) * (side - 0.1)) / p.period + p.phase)
    back = _soft(back - 0.55, 0.15) * _soft(mediastinum + 0.02, 0.03)
    front = _wave((y + p.front * side) / (1.3 * p.period) + p.phase)
    front = _soft(front - 0.60, 0.15) * _soft(side - 0.38, 0.15)
    cage = _soft(torch.minimum(wall, diaphragm) + 0.02) * (1 - 0.75 * heart)
    cage = cage * (0.4 + 0.6 * airy)  # ribs fade over what is bright
    image += p.ribs * cage * (back + 0.7 * front)
    clavicle = _soft(0.03 - (y + p.clavicle + 0.45 * side - 0.3 * side * side).abs(), 0.02)
    clavicle = clavicle * _soft(torch.minimum(side - 0.07, 0.8 - side), 0.03)
    blade = torch.minimum(side - 0.92 * p.thorax - 0.12 * y, 0.06 - 0.2 * (y + 0.32).abs())
    humerus = 0.025 - _sum_squares(side - 0.92, y + 0.55)
    scapula = (_soft(blade, 0.03) + _soft(humerus, 0.015)) * _soft(body)
    image += p.bones * (clavicle + 0.5 * scapula)

    image = image.clamp(0, 1)
    image += p.gamma * image * (1 - image)
    noise = torch.randn(size, size, generator=_generator("sensor", seed, number))
    image = image * p.gain + p.offset + 0.015 * noise
    return (2 * image - 1).clamp(-1, 1)[None], lungs[None] > 0, labels.long()


def chest_phantoms(n, size=64, seed=0, start=0):
    """Chest X-rays number `start` to `start + n - 1` of the endless set `seed`.

    Returns images (n, 1, size, size) float32 in [-1, 1], lung masks (n, 1, size, size) bool
    (without heart and mediastinum, with the other findings), labels (n, 4) int64, 0 or 1.
    Raises ValueError for n < 1, start < 0, size < 16.
    """
    return _draw(_chest, n, size, seed, start)


def _uniform(g, lo, hi, *shape):
    return lo + (hi - lo) * torch.rand(*shape, generator=g)


def _turn(tangent, x, y):
    """Coordinates along and across a direction, given as the tangent of half its angle."""
    norm = 1 + tangent * tangent
    cos, sin = (1 - tangent * tangent) / norm, 2 * tangent / norm
    return cos * x + sin * y, cos * y - sin * x


def _nuclei(g, tangent, count, radius, stretch, chance):
    """Density (size, size) of nuclei on a jittered grid of count x count, kept with `chance`."""
    n, size, axis = count**2, len(chance), _axes(count)[0]
    x, y = (torch.cartesian_prod(axis, axis) + _uniform(g, -0.85, 0.85, n, 2) / count).T
    column, row = (((c + 1) * (size / 2)).long().clamp(0, size - 1) for c in (x, y))
    draw, a, b, dark = torch.rand(4, n, generator=g)
    bent = tangent + 0.25 * torch.randn(n, generator=g)
    keep = draw < chance[row, column]
    x, y, column, row, a, b, dark, bent = (
        value[keep][:, None] for value in (x, y, column, row, a, b, dark, bent))
    half = int(1.25 * stretch * radius * size / 2) + 2  # pixels: a window for each, for speed
    window = torch.cartesian_prod(*[torch.arange(-half, half + 1)] * 2)
    column, row = column + window[:, 0], row + window[:, 1]  # -> (nuclei, window)
    u, v = _turn(bent, (column + 0.5) * (2 / size) - 1 - x, (row + 0.5) * (2 / size) - 1 - y)
    short = radius * (0.75 + 0.5 * a)
    q = _sum_squares(u / (short * (1 + (stretch - 1) * b)), v / short).sqrt()  # 1 at the membrane
    value = (0.65 + 0.35 * dark) * _soft((1 - q) * short, 0.018) * (0.8 + 0.2 * q.clamp(max=1))
    wide = size + 2 * half  # a margin takes what lies outside
    index, density = (row + half) * wide + column + half, torch.zeros(wide * wide)
    density.scatter_reduce_(0, index.flatten(), value.flatten(), "amax")
    return density.view(wide, wide)[half:-half, half:-half]


def _tissue(g, size, kind, wave):
    """Densities (size, size) of haematoxylin, eosin and nuclei in healthy tissue."""
    x, y = _axes(size)
    full, rough = torch.ones(size, size), _upsample(torch.randn(14, 14, generator=g), size)
    tangent = _uniform(g, -0.9, 0.9, 1)
    across, nuclei = _turn(tangent, x, y)[1], partial(_nuclei, g, tangent)  # across the fibres
    if kind == "stroma":  # wavy collagen, thin fibroblasts
        eosin = 0.34 + 0.24 * _wave(5 * across + 0.45 * wave) + 0.06 * rough
        return 0.04, eosin, nuclei(11, 0.026, 4.0, 0.45 * full)
    if kind == "muscle":  # dense parallel fibres, cigar-shaped nuclei
        eosin = 0.72 + 0.20 * _wave(9 * across + 0.12 * wave) + 0.05 * rough
        return 0.06, eosin, nuclei(11, 0.030, 4.5, 0.5 * full)
    if kind == "lymphoid":  # small round nuclei side by side
        return 0.14, 0.24 + 0.05 * rough, nuclei(22, 0.044, 1.15, 0.9 * full)
    if kind == "mucin":  # pale blue pools with strands
        strand = _wave(2.5 * across + 0.7 * wave).square()
        return (0.10 + 0.16 * strand, 0.07 + 0.05 * rough.abs(),
                nuclei(12, 0.038, 1.6, 0.35 * strand))
    if kind == "fat":  # cells of a Voronoi diagram, nuclei on their walls
        seeds = torch.cartesian_prod(*[torch.arange(-2.0, 3)] * 2)
        seeds = 0.62 * (seeds + _uniform(g, -0.38, 0.38, 25, 2))
        distance = _sum_squares(x[..., None] - seeds[:, 0], y[..., None] - seeds[:, 1]).sqrt()
        first, second = distance.topk(2, largest=False).values.unbind(-1)
        wall = _soft(0.05 - (second - first), 0.05)
        return 0.02, 0.05 + 0.5 * wall, nuclei(12, 0.035, 2.0, 0.7 * wall)
    gap = 9 * full  # glands: distance from white lumens; a ring of cells, nuclei at their foot
    centres = torch.cartesian_prod(*[torch.tensor([-0.6, 0.6])] * 2)
    for cx, cy in centres + _uniform(g, -0.2, 0.2, 4, 2):
        radius, flat = _uniform(g, 0.15, 0.30, 1), _uniform(g, 0.75, 1.3, 1)
        lumen = _sum_squares((x - cx) * flat, (y - cy) / flat).sqrt() - radius + 0.03 * wave
        gap = torch.minimum(gap, lumen)
    wall, ring = 1 - _soft(-gap, 0.03), _soft(0.16 - gap, 0.03)
    foot = _soft(0.05 - (gap - 0.115).abs(), 0.01)
    dots = torch.maximum(nuclei(24, 0.042, 1.5, foot), nuclei(10, 0.026, 3.5, 0.4 * (1 - ring)))
    eosin = torch.lerp(0.34 + 0.14 * _wave(5 * across + 0.45 * wave), 0.24 * full, ring)
    return 0.04 + 0.16 * ring * wall, eosin * wall + 0.03, dots * wall


def _histology(seed, number, size):
    """One patch (3, size, size) in [-1, 1], its tumour mask (size, size), label and morphology."""
    g = _generator("histology", seed, number)
    kind = torch.randint(len(HISTOLOGY_MORPHOLOGIES), (), generator=g)
    cancer, cords, rim = torch.rand(3, generator=g) < torch.tensor([0.5, 0.5, 0.4])
    wave, rough = (_upsample(torch.randn(k, k, generator=g), size) for k in (6, 20))
    haematoxylin, eosin, nuclei = _tissue(g, size, HISTOLOGY_MORPHOLOGIES[kind], wave)

    # A cancer patch has its tumour in the centre third. A healthy one has none, or a rim beyond the
    # corners of that third, which lie 0.47 from the middle; bumps reach 0.18 at most.
    x, y = _axes(size)
    middle, radius = _uniform(g, -0.2, 0.2, 2), _uniform(g, 0.40, 0.75, 1)
    tangent = torch.tan(_uniform(g, -1.5, 1.5, 1))  # any direction
    tumour = radius - _sum_squares(x - middle[0], y - middle[1]).sqrt()
    if not cancer:
        tumour = _turn(tangent, x, y)[0] - 0.50 - 0.4 * radius if rim else 0 * tumour - 1
    tumour = tumour + 0.09 * wave.clamp(-2, 2)
    inside, tangent = _soft(tumour), _uniform(g, -0.9, 0.9, 1)
    nest = torch.ones_like(tumour)  # solid, or cells in cords with stroma between
    if cords:
        nest = _soft(_wave(1.7 * _turn(tangent, x, y)[1] + 0.25 * wave) - 0.42, 0.15)
    large = _nuclei(g, tangent, 13, 0.075, 1.7, 0.95 * (nest > 0.5) * (tumour > 0))
    haematoxylin = haematoxylin * (1 - inside) + inside * (0.06 + 0.16 * nest)
    eosin = eosin * (1 - inside) + inside * (0.50 - 0.22 * nest + 0.04 * rough)
    nuclei = torch.maximum(nuclei * (1 - inside), large * (0.75 + 0.15 * rough))  # coarse chromatin

    stain = _uniform(g, 0.85, 1.15, 2, 1)
    colours = torch.tensor([[0.65, 0.70, 0.29], [0.10, 0.95, 0.26]])  # optical density of R, G, B
    first, second = ((colours + 0.03 * torch.randn(2, 3, generator=g)) * stain)[..., None, None]
    density = first * (haematoxylin + 1.3 * nuclei) + second * eosin * (1 - 0.5 * nuclei)
    image = 0.96 * torch.exp(-density.clamp(min=0))
    image += 0.012 * torch.randn(3, size, size, generator=g)
    return (2 * image - 1).clamp(-1, 1), tumour[None] > 0, cancer.long(), kind


def histology_phantoms(n, size=96, seed=0, start=0):
    """H&E patches number `start` to `start + n - 1` of the endless set `seed`.

    Returns images (n, 3, size, size) float32 in [-1, 1], tumour masks (n, 1, size, size) bool,
    labels (n,) int64 (1: tumour in the centre third, the rule of PatchCamelyon) and morphology (n,)
    int64: the healthy tissue, an index into HISTOLOGY_MORPHOLOGIES, independent of the label.
    Raises ValueError for n < 1, start < 0, size < 16.
    """
    return _draw(_histology, n, size, seed, start)


def _slide(pools, seed, number, side):
    """One slide: patch numbers (side, side), -1 beside the tissue; its foci (side, side); label."""
    g = _generator("slide", seed, number)
    cancer, cell = torch.rand((), generator=g) < 0.5, torch.arange(side * side).view(side, side)
    outline, *fields = _upsample(torch.randn(7, 5, 5, generator=g), side)
    tangent = _uniform(g, -0.9, 0.9, 1)
    tissue = 0.85 + 0.12 * outline.clamp(-2, 2) > _sum_squares(*_turn(tangent, *_axes(side))).sqrt()
    kind = torch.stack(fields).argmax(0)  # healthy tissues lie side by side
    stroma, lymphoid = map(HISTOLOGY_MORPHOLOGIES.index, ("stroma", "lymphoid"))
    mixed = torch.where(torch.rand(side, side, generator=g) < 0.5, lymphoid, stroma)

    def count(lo, hi):
        return int(torch.randint(lo, hi + 1, (), generator=g))

    def distance():
        """From each cell to one drawn from the tissue, in patches."""
        middle = torch.multinomial(tissue.flatten().float(), 1, generator=g)
        return _sum_squares(cell // side - middle // side, cell % side - middle % side).sqrt()

    for _ in range(count(3, 6)):  # lymphoid aggregates
        kind = torch.where(distance() < _uniform(g, 1, 3, 1), lymphoid, kind)
    healthy, sick, foci = count(0, 3), count(1, 2), torch.zeros_like(tissue)
    area = _uniform(g, 0.003, 0.009, 1) * tissue.sum()  # of all foci, in patches
    radius = (area / (3.1416 * sick)).sqrt()
    for has_focus in [False] * healthy + [True] * sick * bool(cancer):
        away = distance()
        kind = torch.where(away < radius + _uniform(g, 2.5, 4, 1), mixed, kind)  # reaction
        foci |= tissue & (away < radius) & has_focus
    kind[torch.rand(side, side, generator=g) < 0.003] = ATYPICAL
    kind[foci], tiles = TUMOUR, torch.full((side, side), -1)
    for k, pool in enumerate(pools):
        cells = (kind == k) & tissue
        tiles[cells] = pool[torch.randint(len(pool), (int(cells.sum()),), generator=g)]
    return tiles, foci, cancer.long()


def slide_phantoms(n, bank, side=64, seed=0, start=0):
    """Slides number `start` to `start + n - 1` of the endless set `seed`: mosaics of patches.

    `bank` is what histology_phantoms returned, a few hundred patches or more. Returns tiles
    (n, side, side) int64, numbers in the bank or -1 beside the tissue; foci (n, side, side) bool;
    labels (n,) int64. A tumour slide has one or two round foci in under 1 % of its tissue, of
    patches that are more than a quarter tumour. All slides have lymphoid aggregates, scattered
    single patches with tumour at the rim only (as isolated tumour cells, which leave a lymph node
    negative), and up to three reactions, discs of lymphoid tissue and stroma mixed. Around every
    focus lies one more reaction. This design is ours. It favours models that see neighbours, for
    only they tell the mixture from its parts, and focusing, for reactions are more frequent with
    tumour than without.
    Raises ValueError as histology_phantoms does, and for a bank that lacks a kind of patch.
    """
    _, masks, labels, morphology = bank
    kinds = torch.where(masks.flatten(1).any(1), ATYPICAL, morphology)
    full = masks.flatten(1).float().mean(1) > 0.25
    kinds = torch.where(labels == 1, torch.where(full, TUMOUR, -1), kinds)
    pools = [torch.nonzero(kinds == k)[:, 0] for k in range(TUMOUR + 1)]
    if not all(map(len, pools)):
        raise ValueError(f"got a bank of {len(labels)} patches, {[*map(len, pools)]} of each kind: "
                         "need every kind: pass a bank of 200 or more")
    return _draw(partial(_slide, pools), n, side, seed, start)


def paint_slide(tiles, images, pixels=8):
    """Picture (3, h * pixels, w * pixels) in [-1, 1] of tiles (h, w), rows of images; -1: white."""
    small = torch.nn.functional.adaptive_avg_pool2d(images, pixels)
    small = torch.cat([small, torch.full_like(small[:1], 0.9)])  # so that -1 is the white one
    return small[tiles].permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def main():
    orange = torch.tensor([1.0, 0.6, -1.0]).view(3, 1, 1)
    for draw in (chest_phantoms, histology_phantoms):
        images, masks, *_ = draw(16, size=128)
        edge = torch.nn.functional.max_pool2d(masks.float(), 3, 1, 1) > masks
        sheet = torch.cat([images.expand(-1, 3, -1, -1), torch.where(edge, orange, images)])
        path = f"{draw.__name__}.png"
        save_image(sheet, path, nrow=8, padding=0, normalize=True, value_range=(-1, 1))
        print(f"wrote {path}: 16 phantoms, and again with the edge of the mask")


if __name__ == "__main__":
    main()
