"""Files in and out, once for all scripts: images, data sets, splits, checkpoints, charts, progress.

Every image is (3, size, size) float32 in [-1, 1], grey repeated to three channels; every mask is
(1, size, size) bool. What a user can cause ends as a `UserError` of one line: got, need, do.

    images = open_dataset("cxr", size=64)      # data/cxr/, or generated phantoms: see images.note
    train, test = split_holdout(images, 0.15, seed=0)

A folder holds images at any depth (or in `images/`), with `labels.csv` in it or in its parent and
masks of the same stem in `masks*/` beside it. A link that leaves the folder is not followed.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import operator
import os
import struct
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch.utils.data import get_worker_info

from phantoms import (CHEST_LABELS, HISTOLOGY_MORPHOLOGIES, chest_phantoms,
                      histology_phantoms)

CHECKPOINT_VERSION = 1
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
CACHE_BYTES = 2 << 30  # decoded images kept in memory, per data set
HEADER_CHECKS = 20_000  # larger sets are not checked when opened
BAD_FILE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError,
            struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError,
            Image.DecompressionBombWarning)  # what Pillow and NumPy raise for damaged files
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito


# ---- errors, flags, devices --------------------------------------------------------------------

class UserError(Exception):
    """What a user can cause and mend: one line in three parts, got, need, do."""

    def __init__(self, *parts):
        super().__init__(": ".join(str(part) for part in parts))


@contextmanager
def user_errors():
    """Turn a ValueError or OSError of the calls inside into a UserError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(error) from error


def run_script(main):
    """Call main(); what the user caused becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        return main()
    except UserError as error:  # out of a DataLoader worker it carries a traceback: last line only
        text = str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")
    except torch.cuda.OutOfMemoryError:
        text = "the GPU's memory is full: a batch must fit: lower --batch, or a smaller --preset"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def _number(text, kind, low, high, need):
    with suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not {need}")


# Types for argparse.
positive_int = partial(_number, kind=int, low=1, high=2**63, need="a whole number: pass 1 or more")
not_negative_int = partial(_number, kind=int, low=0, high=2**63,
                           need="a whole number: pass 0 or more")
positive_float = partial(_number, kind=float, low=1e-30, high=1e30, need="a number: pass above 0")
not_negative = partial(_number, kind=float, low=0, high=1e30, need="a number: pass 0 or more")
fraction = partial(_number, kind=float, low=0, high=1, need="a number from 0 to 1: pass e.g. 0.15")
share_above_zero = partial(_number, kind=float, low=1e-30, high=1,
                           need="above 0 and at most 1: pass e.g. 0.6")


def pick_device(name="auto"):
    """The torch.device of that name; "auto" takes CUDA, then MPS, then the CPU."""
    found = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
             "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind in found if found[kind])
    kind, _, number = name.partition(":")
    if kind not in found or not (number or "0").isdigit() or int(number or 0) >= found[kind]:
        raise UserError(f"there is no device {name!r}",
                        f"this machine has {', '.join(k for k in found if found[k])}",
                        "pass --device auto or cpu")
    return torch.device(name)


def autocast_dtype(device, dtype="auto"):
    """torch.bfloat16 or torch.float32; "auto" takes bfloat16 where the chip computes in it."""
    names = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32,
             "float32": torch.float32}
    native, device = False, torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and Path("/proc/cpuinfo").exists():  # torch has no public question
        words = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
        native = bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    names["auto"] = torch.bfloat16 if native else torch.float32
    if dtype not in names:
        raise UserError(f"dtype {dtype!r} is unknown", "pass --dtype auto, bf16 or fp32")
    return names[dtype]


# ---- images in ---------------------------------------------------------------------------------

def _decode(path):
    """float32 array (H, W) or (H, W, 3) in [0, 1], upright, of the first frame."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}", "an image is needed", "check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd but harmless metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                turn = image.getexif().get(ExifTags.Base.Orientation, 1)
                pixels = _deep_grey(image) if image.mode[0] in "IF" else _eight_bit(image)
    except BAD_FILE as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} cannot be read ({why})", "a whole image file is needed",
                        "replace or remove it") from error
    if turn in (5, 6, 7, 8):  # mirrored on the diagonal, then as 1, 2, 3 and 4
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels, dtype=np.float32)


def _eight_bit(image):
    """Grey, colour, palette, CMYK, 1-bit, or transparent and then over black -> [0, 1]."""
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
        return rgba[..., :3] * rgba[..., 3:]
    return np.asarray(image.convert("L" if image.mode in "1L" else "RGB"), dtype=np.float32) / 255


def _deep_grey(image):
    """Grey of more than 8 bits -> [0, 1] by the rule in load_image."""
    deep = image.convert("I") if image.mode.startswith("I;") else image
    deep = np.asarray(deep, dtype=np.float64)
    low, high = float(deep.min()), float(deep.max())
    if not (low >= 0 and math.isfinite(high)):
        raise ValueError(f"grey values from {low:g} to {high:g}, but none below 0 can be scaled")
    tags = getattr(image, "tag_v2", {})
    stated = np.ravel(tags.get(281, 0))[0]  # TIFF MaxSampleValue
    if image.mode == "F" and high <= 1:
        full = 1
    elif stated and stated >= high:
        full = stated
    else:
        full = 2.0 ** next(bits for bits in (10, 12, 14, 16, 24, 32, 128) if high < 2.0 ** bits) - 1
    return 1 - deep / full if tags.get(262) == 0 else deep / full  # TIFF: 0 is white


def _square(pixels, size, nearest=False):
    """(H, W) or (H, W, 3) array in [0, 1] -> centre square (C, size, size), antialiased."""
    x = torch.from_numpy(pixels)
    x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    side = min(x.shape[1:])
    top, left = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
    x = x[:, top:top + side, left:left + side]
    if size not in (None, side):
        how = dict(mode="nearest-exact") if nearest else dict(mode="bicubic", antialias=True)
        x = F.interpolate(x[None], (size, size), **how)[0].clamp(0, 1)
    return x.contiguous()


def load_image(path, size):
    """Read one image file as (3, size, size) float32 in [-1, 1]; size None keeps the side.

    Transparent pixels lie over black, EXIF rotation is applied, animations give their first frame;
    then the centre square is resized in float (bicubic, antialiased), so deep grey keeps its bits.
    Grey of more than 8 bits is divided by TIFF's MaxSampleValue if the file states one that holds
    its values, else by the smallest of 2^10, 2^12, 2^14, 2^16 (24, 32), minus 1, that holds its
    maximum, as files of "16 bits" often carry 10 or 12. Floats within [0, 1] stay as they are.
    Raises: UserError naming the file if it is missing, damaged, too large or has negative values.
    """
    return (_square(_decode(path), size) * 2 - 1).expand(3, -1, -1).clone()


def load_mask(path, size):
    """Read one mask as (1, size, size) bool, cut as load_image does, nearest neighbour.

    True is at least half of the brightest value, so masks of 0/1, of 0/255 and lossy ones all work.
    """
    pixels = _decode(path)
    pixels = pixels if pixels.ndim == 2 else pixels.max(axis=2)
    return _square(pixels, size, nearest=True) >= max(float(pixels.max()) / 2, 1e-9)


# ---- files out, and back in --------------------------------------------------------------------

@contextmanager
def atomic_file(path):
    """A binary file that takes the place of `path` only once it is complete and on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})",
                        "a writable folder with space is needed", "pass another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_folder(path):
    """Make a folder and its parents; raises UserError if that is not allowed."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror})", "a writable place is needed",
                        "pass another --out") from error


def next_folder(parent, name):
    """The first of parent/name, parent/name_2, parent/name_3, ... that does not exist."""
    names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    return next(Path(parent, name) for name in names if not Path(parent, name).exists())


def save_atomic(path, obj):
    """torch.save that leaves either the old file or the whole new one."""
    with atomic_file(path) as file:
        torch.save(obj, file)


def write_text_atomic(path, text):
    """Write UTF-8 text so that a reader sees either the old file or the whole new one."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def append_jsonl(path, row):
    """Add one dict as a line of JSON."""
    with user_errors(), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path):
    """The rows of such a file; none if it is missing; a last line cut short is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"line {number} of {path} is not JSON: delete it") from error
    return rows


def load_checkpoint(path):
    """Read a model.pt of this project on the CPU; code inside such a file is never run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes torch.load raise nearly any type
        raise UserError(f"{path} cannot be read (missing, cut short, no checkpoint, or pickled "
                        "code, which is refused)", "a model.pt of train.py is needed",
                        "make one with: python train.py --data cxr") from error
    version = checkpoint.get("version") if isinstance(checkpoint, dict) else None
    if version != CHECKPOINT_VERSION:
        raise UserError(f"{path} has checkpoint version {version}", f"version {CHECKPOINT_VERSION} "
                        "is needed", "train again, or use the code that wrote it")
    return checkpoint


def resolve_checkpoint(argument=None, root="runs"):
    """Path of a model.pt: the file or run folder named, or else that of the newest run."""
    if argument is None:
        found = sorted(Path(root).glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
        path = found[-1] if found else Path(root, "*", "model.pt")
    else:
        path = Path(argument, "model.pt") if Path(argument).is_dir() else Path(argument)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "a trained model is needed",
                        "make one with: python train.py --data cxr")
    return path


def _relative(name):
    """A file name from a list as a posix path; refused if it is absolute or holds `..`."""
    path = PurePosixPath(str(name).strip().replace("\\", "/"))
    if PureWindowsPath(path).anchor or ".." in path.parts:
        raise UserError(f"the path {str(name)!r} leaves its folder", "relative names without '..' "
                        "are needed", "correct it")
    return path.as_posix()


def safe_join(root, name):
    """root / name, refused if it is absolute, holds `..` or leaves root through a link."""
    path = Path(root) / _relative(name)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"the path {str(name)!r} is a link out of {root}",
                        "a file inside is needed", "copy it there")
    return path


# ---- pictures out ------------------------------------------------------------------------------

def _save_picture(path, picture):
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def _to_picture(image, scale=1):
    """(3 or 1, H, W) in [-1, 1] -> 8-bit Pillow image, pixels repeated `scale` times."""
    x = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    x = x.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).numpy().copy())


def save_png(path, image):
    """Write (3, H, W) as RGB or (1, H, W) as grey 8-bit PNG; values in [-1, 1]."""
    _save_picture(path, _to_picture(image))


def save_grid(path, rows, captions=None, min_side=128):
    """Write rows of images, each (N, 3 or 1, H, W) in [-1, 1], as one PNG, captions at the left.

    Images below `min_side` pixels are repeated to whole multiples, so that people can see them.
    """
    height, width = rows[0].shape[-2:]
    scale, gap, font = -(-min_side // height), 2, ImageFont.load_default(size=14)
    left = max(math.ceil(font.getlength(text)) for text in captions) + 12 if captions else gap
    down, across = height * scale + gap, width * scale + gap
    sides = left + max(map(len, rows)) * across, gap + len(rows) * down
    canvas = Image.new("RGB", sides, "white")
    for y, row in enumerate(rows):
        if captions:
            ImageDraw.Draw(canvas).text((6, (y + 0.5) * down), captions[y], "black", font, "lm")
        for x, image in enumerate(row):
            canvas.paste(_to_picture(image, scale), (left + x * across, gap + y * down))
    _save_picture(path, canvas)


def _ticks(low, high, log_y=False):
    """Round numbers between low and high."""
    if log_y:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [m * 10.0 ** p for p in powers for m in ((1,) if high / low > 100 else (1, 2, 5))]
        return [mark for mark in marks if low <= mark <= high]
    rough = (high - low) / 6
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(path, series, title, xlabel, ylabel, log_y=False):
    """Write a PNG line chart of name -> (xs, ys); points that cannot be drawn are left out."""
    bend = math.log10 if log_y else float
    lines = {name: [(float(x), bend(y)) for x, y in zip(*xy) if math.isfinite(x)
                    and math.isfinite(y) and (y > 0 or not log_y)] for name, xy in series.items()}
    xs, ys = zip(*(sum(lines.values(), []) or [(0.0, 0.0)]))
    x0, x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    pad = 0.05 * (max(ys) - min(ys)) or 0.5
    y0, y1 = min(ys) - pad, max(ys) + pad
    zoom, width, height = 2, 900, 540  # drawn at twice the size, then halved: smooth lines
    left, right, top, bottom = 80, width - 30, 88, height - 60
    picture = Image.new("RGB", (width * zoom, height * zoom), "white")
    draw = ImageDraw.Draw(picture)

    def text(x, y, words, anchor, points=13):
        font = ImageFont.load_default(size=points * zoom)
        draw.text((x * zoom, y * zoom), words, "#222222", font, anchor)
        return font.getlength(words) / zoom

    def line(points, colour, thick=1):
        draw.line([(x * zoom, y * zoom) for x, y in points], colour, thick * zoom, "curve")

    def place(x, y):
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))

    for x in _ticks(x0, x1):
        line([(place(x, y0)[0], top), place(x, y0)], "#eeeeee")
        text(place(x, y0)[0], bottom + 8, f"{x:g}", "ma")
    for y in _ticks(10 ** y0, 10 ** y1, True) if log_y else _ticks(y0, y1):
        line([place(x0, bend(y)), (right, place(x0, bend(y))[1])], "#eeeeee")
        text(left - 8, place(x0, bend(y))[1], f"{y:.4g}", "rm")
    line([(left, top), (left, bottom), (right, bottom)], "#444444")
    text(width / 2, 12, title, "ma", 18)
    text(left, top - 8, ylabel, "lb")
    text((left + right) / 2, height - 12, xlabel, "md", 14)
    key = left
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        line([(key, 52), (key + 22, 52)], colour, 3)
        key += 50 + text(key + 28, 52, name, "lm", 14)
        spots = [place(*point) for point in points]
        line(spots, colour, 2)
        for x, y in spots if len(spots) <= 40 else []:
            draw.ellipse([zoom * v for v in (x - 3, y - 3, x + 3, y + 3)], colour)
    _save_picture(path, picture.resize((width, height), Image.Resampling.LANCZOS))


# ---- data sets ---------------------------------------------------------------------------------

class ImageSet:
    """Images by number: `images[i]` is (3, size, size) float32 in [-1, 1], decoded when asked for.

    .name .size; .note: one line, what and from where; .files: unique names; .columns: dict of
    column -> list of str, one cell per file; .mask_kinds; .problems: lines about what was left out;
    .official_test: numbers of the images that a MedMNIST file keeps for testing, or None.
    """

    def __init__(self, name, note, size, files, columns, read, masks=None, problems=(),
                 official_test=None):
        self.name, self.note, self.size, self.files, self.columns = name, note, size, files, columns
        self._read, self._masks = read, masks or {}  # functions of the number that can be pickled
        self.mask_kinds, self.problems = tuple(self._masks), list(problems)
        self.official_test = official_test
        self._cache, self._free = {}, CACHE_BYTES

    def __getstate__(self):
        return {**self.__dict__, "_cache": {}, "_free": CACHE_BYTES}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        i = range(len(self))[int(i)]  # negative numbers count from the end; IndexError beyond
        x = self._cache.get(i)
        if x is None:
            x = self._read(i)
            if self._free >= x.nbytes and get_worker_info() is None:  # else each worker holds all
                self._cache[i], self._free = x, self._free - x.nbytes
        return x.expand(3, -1, -1).clone()

    def batch(self, indices):
        """(B, 3, size, size) of the images with these numbers."""
        return torch.stack([self[i] for i in indices])

    def mask(self, i, kind="masks"):
        """(1, size, size) bool, or None if image i has no mask of that kind."""
        if kind not in self._masks:
            raise UserError(f"{self.name} has no masks of the kind {kind!r}",
                            f"it has {', '.join(self.mask_kinds) or 'none'}", "pass one of these")
        return self._masks[kind](range(len(self))[int(i)])


def _read_file(root, files, size, i):
    return _square(_decode(root / files[i]), size) * 2 - 1


def _read_mask(root, files, size, i):
    return load_mask(root / files[i], size) if files[i] else None


def _read_array(array, size, i):
    return _square(array[i].astype(np.float32) / 255, size) * 2 - 1


def _read_phantom(make, part, size, seed, i):
    return make(1, size=size, seed=seed, start=i)[part][0]


def open_dataset(name_or_path, size, seed=0, count=2400):
    """Open a set of images by name or path; images are decoded when asked for.

    "cxr" and "histology" mean data/NAME/ if it is there, else `count` generated phantoms, and
    "phantoms" always generated chests; any other is a folder or a MedMNIST .npz.
    Raises: UserError if it is missing, empty, damaged, or more than 10 % of it is unreadable.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in ("cxr", "histology") and Path("data", name).is_dir():
        return _open_folder(name, Path("data", name), size)
    if name in ("cxr", "histology", "phantoms"):
        return _open_phantoms(name, size, seed, count)
    if path.is_dir():
        return _open_folder(path.resolve().name, path, size)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _open_npz(path, size)
    raise UserError(f"there is no data set {name}", "a folder of images or a MedMNIST .npz is "
                    "needed", "pass --data PATH, or one of cxr, histology, phantoms")


def _open_phantoms(name, size, seed, count):
    """Generated chests, or tissue for "histology"; their exact labels become columns."""
    if size < 16:
        raise UserError(f"phantoms of {size} px", "16 or more are needed", "pass --size 64")
    make = histology_phantoms if name == "histology" else chest_phantoms
    small = count * size ** 2 <= 2 ** 25  # draw all now; else draw the labels, at any side
    images, shapes, labels, *hidden = make(count, size=size if small else 16, seed=seed)
    readers = [partial(operator.getitem, part) for part in (images, shapes)] if small else [
        partial(_read_phantom, make, part, size, seed) for part in (0, 1)]
    if name == "histology":
        columns = {"label": [("healthy", "cancer")[label] for label in labels.tolist()],
                   "morphology": [HISTOLOGY_MORPHOLOGIES[kind] for kind in hidden[0].tolist()]}
    else:
        shown = [[label for label, on in zip(CHEST_LABELS, row) if on] for row in labels.tolist()]
        columns = {label: [str(int(label in row)) for row in shown] for label in CHEST_LABELS}
        columns["finding"] = ["|".join(row) or "No Finding" for row in shown]
    absent = "" if name == "phantoms" else f"no folder data/{name}/, so "
    kind = "tissue" if name == "histology" else "chest"
    note = f"{absent}{count:,} generated {kind} phantoms, not real images ({size} px, seed {seed})"
    return ImageSet(name, note, size, [f"phantom_{i:06d}" for i in range(count)], columns,
                    readers[0], {"masks": readers[1]})


def _open_npz(path, size):
    """A MedMNIST file: SPLIT_images (N, H, W) or (N, H, W, 3) uint8, SPLIT_labels (N, L)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except BAD_FILE as error:
        raise UserError(f"{path} cannot be read ({str(error)[:80]})", "a .npz without pickled "
                        "objects is needed", "download it again") from error
    splits = [split for split in ("train", "val", "test") if f"{split}_images" in arrays]
    parts = [arrays[f"{split}_images"] for split in splits]
    if not parts or any(part.dtype != np.uint8 or part.ndim < 3 or part.shape[3:] not in ((), (3,))
                        or part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}", "train_images (N, H, W) "
                        "or (N, H, W, 3) of uint8 are needed", "pass a flat MedMNIST set")
    files = [f"{split}_{i:06d}" for split, part in zip(splits, parts) for i in range(len(part))]
    columns = {"split": [file.split("_")[0] for file in files]}
    if all(f"{split}_labels" in arrays for split in splits):
        labels = np.concatenate([arrays[f"{split}_labels"].reshape(len(part), -1)
                                 for split, part in zip(splits, parts)])
        for j in range(labels.shape[1]):
            name = "label" if labels.shape[1] == 1 else f"label_{j}"
            columns[name] = [str(value) for value in labels[:, j]]
    counts = ", ".join(f"{split} {len(part):,}" for split, part in zip(splits, parts))
    test = [i for i, split in enumerate(columns["split"]) if split == "test"]
    note = f"{len(files):,} images from {path} ({counts})"
    return ImageSet(path.stem, note, size, files, columns,
                    partial(_read_array, np.concatenate(parts), size), official_test=test or None)


def _some(names):
    return f"{len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _walk(root, home):
    """Sorted names of the images below root; links that leave home are added to the second list."""
    files, outside, home = [], [], home.resolve()
    for folder, folders, names in os.walk(root):
        prefix = Path(folder).relative_to(root).as_posix() + "/"
        prefix = "" if prefix == "./" else prefix
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        outside += [f"{prefix}{name}/" for name in links]
        folders[:] = [d for d in folders if d not in links and not d.startswith((".", "masks"))]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                path = os.path.join(folder, name)
                inside = not os.path.islink(path) or Path(path).resolve().is_relative_to(home)
                (files if inside else outside).append(prefix + name)
    return sorted(files), sorted(outside)


def _find_images(folder):
    """(folder of the images, folder of labels and masks beside it, image names, problems)."""
    folder = Path(folder) if Path(folder).name not in ("", "..") else Path(folder).resolve()
    inner = folder / "images"
    root = inner if inner.is_dir() and not inner.is_symlink() else folder
    home = root.parent if root.name == "images" else root
    files, outside = _walk(root, home)
    problems = [f"links skipped: {_some(outside)}"] if outside else []
    if not files:
        raise UserError("; ".join([f"{folder} holds no image"] + problems), "PNG, JPEG, TIFF, BMP, "
                        "WebP or GIF files are needed", "name another folder, or a link's target")
    return root, home, files, problems


def list_images(folder):
    """Sorted paths of the images of a folder, found as open_dataset finds them."""
    root, _, files, _ = _find_images(folder)
    return [root / file for file in files]


def _name_index(files):
    """Each way to write a file (path or bare name, with or without extension) -> its number.

    Where two files share a way it maps to None; more exact ways win over less exact ones.
    """
    index, paths = {}, [PurePosixPath(file) for file in files]
    for keys in ([path.stem for path in paths], [path.name for path in paths],
                 [path.with_suffix("").as_posix() for path in paths], files):
        level = {}
        for i, key in enumerate(keys):
            level[key] = None if key in level else i
        index.update(level)
    return index


def _find(index, name, prefix="."):
    """Number of the file that a list calls `name` (seen from a folder `prefix` above), or None."""
    name = _relative(name).removeprefix(f"{prefix}/")
    stem, suffix = os.path.splitext(name)
    return index.get(name, index.get(stem) if suffix else None)


def _has_header(path):
    """Whether Pillow knows the format of the file; nothing is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path).close()
            return True
    except BAD_FILE:
        return False


def _open_folder(name, folder, size):
    """A folder of images with optional labels.csv and masks*/."""
    root, home, found, problems = _find_images(folder)
    files = found if len(found) > HEADER_CHECKS else [f for f in found if _has_header(root / f)]
    if len(files) < len(found):
        problems.append(f"unreadable images left out: {_some(sorted(set(found) - set(files)))}")
        if len(files) < 0.9 * len(found):
            raise UserError(f"{folder}: {problems[-1]}", f"at least 90 % of {len(found):,} must be "
                            "readable", "replace or remove these files")
    columns = {}
    for place in (root, root.parent):
        if not columns and (place / "labels.csv").is_file():
            columns = _read_labels(place / "labels.csv", root, files, problems)
    masks = {}
    for path in sorted(path for path in home.glob("masks*") if path.is_dir()):
        if path.is_symlink():
            problems.append(f"link skipped: {path.name}/")
        else:
            names = _match_masks(path, home, files, problems)
            masks[path.name] = partial(_read_mask, path, names, size)
    note = f"{len(files):,} images from {root}, "
    note += "".join(f"{len(files) - read.args[1].count(None):,} {kind}, "
                    for kind, read in masks.items())
    note += f"labels.csv with {', '.join(columns)}" if columns else "no labels.csv"
    return ImageSet(name, note, size, files, columns, partial(_read_file, root, files, size), masks,
                    problems)


def _match_masks(path, home, files, problems):
    """Name of the mask below `path` with the stem of each image, or None."""
    names, outside = _walk(path, home)
    by_name, images, matched = _name_index(names), _name_index(files), []
    for i, stem in enumerate(os.path.splitext(file)[0] for file in files):
        bare = stem.rsplit("/", 1)[-1]  # enough where one image only is called so
        row = by_name.get(stem, by_name.get(bare) if images[bare] == i else None)
        matched.append(None if row is None else names[row])
    unused = outside + sorted(set(names) - set(matched))
    problems += [f"{path.name}/ without an image: {_some(unused)}"] if unused else []
    return matched


def _read_table(path):
    """Column names, and rows as dicts, of a CSV: comma or semicolon, BOM and CRLF are fine."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        header = text.split("\n", 1)[0]
        rows = list(csv.reader(io.StringIO(text), strict=True,
                               delimiter=";" if header.count(";") > header.count(",") else ","))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error})", "a CSV file in UTF-8 is needed",
                        "save it as CSV UTF-8") from error
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    names = ["file" if cell.lower() == "file" else cell for cell in (rows or [[]])[0]]
    if "file" not in names or len(set(names)) < len(names):
        raise UserError(f"{path} has the columns {', '.join(names) or 'none'}",
                        "one must be called file, and no two alike", "correct its first line")
    return names, [dict(zip(names, row + [""] * len(names))) for row in rows[1:]]


def _read_labels(path, root, files, problems):
    """Columns of labels.csv in the order of `files`; what does not match goes to `problems`."""
    names, rows = _read_table(path)
    index, matched, lost = _name_index(files), {}, []
    for row in rows:
        i = _find(index, row["file"], root.relative_to(path.parent).as_posix())
        if i is None:
            lost.append(row["file"])
        elif i in matched:
            raise UserError(f"{path} has two rows for {files[i]}", "one is needed", "delete one")
        else:
            matched[i] = row
    if not matched:
        problems.append(f"{path} not used: none of its {len(rows):,} rows names an image here")
        return {}
    empty = [file for i, file in enumerate(files) if i not in matched]
    problems += [f"rows of labels.csv without an image: {_some(lost)}"] if lost else []
    problems += [f"images without a row in labels.csv: {_some(empty)}"] if empty else []
    return {name: [matched[i][name] if i in matched else "" for i in range(len(files))]
            for name in names if name != "file"}


@lru_cache(maxsize=8)
def _rows_by_name(path):
    rows = {}
    for row in _read_table(path)[1]:
        name = _relative(row.pop("file"))
        rows.setdefault(os.path.splitext(name)[0], row)
        rows[name] = row
    return rows


def labels_of(path):
    """Cells of the row that names an image, in a labels.csv beside it or up to two above, or {}."""
    path = Path(path).absolute()
    for place in path.parents[:3]:
        if (place / "labels.csv").is_file():
            rows, inside = _rows_by_name(place / "labels.csv"), path.relative_to(place).as_posix()
            for name in (inside, inside.removeprefix("images/"), path.name):
                row = rows.get(name, rows.get(os.path.splitext(name)[0]))
                if row is not None:
                    return dict(row)
    return {}


# ---- hold-out, outliers ------------------------------------------------------------------------

def image_groups(dataset, group_column=None):
    """The group of each image, a list of str; an image without one is a group of its own.

    Default column: the first of patientid, patient, group; case, spaces and _ do not matter.
    """
    if group_column is None:
        plain = {"".join(filter(str.isalnum, name)).lower(): name for name in dataset.columns}
        group_column = plain.get("patientid", plain.get("patient", plain.get("group")))
    elif group_column not in dataset.columns:
        raise UserError(f"there is no column {group_column!r}", f"{dataset.name} has "
                        f"{', '.join(dataset.columns) or 'none'}", "pass another --group-column")
    cells = dataset.columns[group_column] if group_column else [""] * len(dataset)
    return [cell or file for cell, file in zip(cells, dataset.files)]


def _share(seed, group):
    """A number in [0, 1) that depends on the seed and the group only."""
    digest = hashlib.sha256(f"{seed}/{group}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2 ** 64


def split_holdout(dataset, holdout, seed, group_column=None):
    """(train, test) numbers as int64 tensors; images of one group are never parted.

    `holdout` is a fraction, or a text or CSV file (column `file`) of names to hold out; whoever
    shares a group with a named image goes with it. A fraction is met by a hash of seed and group,
    so images added later move no other; above 0, at least one group is held out. MedMNIST brings
    its own test part, which takes the place of any fraction above 0.
    """
    groups, part = image_groups(dataset, group_column), None
    with suppress(TypeError, ValueError):
        part = float(holdout)
    if part is None:
        held = {groups[i] for i in _held_out(dataset, Path(holdout))}
    elif not 0 <= part < 1:
        raise UserError(f"--holdout {holdout} is not from 0 to below 1", "pass e.g. 0.15")
    elif part and dataset.official_test:
        held = {groups[i] for i in dataset.official_test}
    else:
        order = sorted((_share(seed, group), group) for group in set(groups))
        count = sum(share < part for share, group in order)
        count = max(1, min(count, len(order) - 1)) if part else 0  # someone on either side
        held = {group for share, group in order[:count]}
    out = torch.tensor([group in held for group in groups])
    if out.all():
        raise UserError(f"--holdout {holdout} holds out all {len(dataset):,} images "
                        f"({len(set(groups)):,} groups)", "some must be left for training",
                        "hold out less, or pass another --group-column")
    return torch.nonzero(~out)[:, 0], torch.nonzero(out)[:, 0]


def _held_out(dataset, path):
    """Numbers of the images that a file of names holds out; a column `split` must say test."""
    with user_errors():
        names = path.read_text(encoding="utf-8-sig").split("\n")
    if "file" in names[0].strip().lower().replace(";", ",").split(","):
        names = [row["file"] for row in _read_table(path)[1] if row.get("split", "test") == "test"]
    index = _name_index(dataset.files)
    found = {name.strip(): _find(index, name) for name in names if name.strip()}
    unknown = [name for name, i in found.items() if i is None]
    if unknown or not found:
        raise UserError(f"{path} names {_some(unknown)} that are not in {dataset.name}",
                        "names of its images are needed, one a line", "correct it")
    return list(found.values())


def write_split(path, dataset, train, test, group_column=None):
    """Write who is held out: a CSV of file, split (train or test), group."""
    groups, table = image_groups(dataset, group_column), io.StringIO()
    rows = [[dataset.files[i], split, groups[i]]
            for split, part in (("train", train), ("test", test)) for i in part.tolist()]
    csv.writer(table, lineterminator="\n").writerows([["file", "split", "group"]] + rows)
    write_text_atomic(path, table.getvalue())


def read_split(path, dataset):
    """(train, test) numbers as int64 tensors; images that the file does not name are in neither."""
    numbers, parts = {file: i for i, file in enumerate(dataset.files)}, {"train": [], "test": []}
    for row in _read_table(path)[1]:
        if row["file"] not in numbers or row.get("split") not in parts:
            raise UserError(f"{path} has {row['file']!r} ({row.get('split')}), {dataset.name} has "
                            "not", "the images of that run are needed", "pass its --data")
        parts[row["split"]].append(numbers[row["file"]])
    return tuple(torch.tensor(sorted(part), dtype=torch.int64) for part in parts.values())


def find_outliers(dataset, dark=0.2, pale=0.9, grey=0.03, blurred=40.0):
    """Histology patches that show nothing, as a list of (file, reason, value).

    black: mean brightness (HSV value) below `dark`; blank: above `pale` and mean saturation below
    `grey`; out of focus: variance of the Laplacian (of grey in 0..255) below `blurred`.
    Source: the idea of arXiv:2312.09792, section 2; the limits are ours. Not meant for X-rays.
    """
    kernel = torch.tensor([[[[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]]])
    outliers = []
    for i, file in enumerate(dataset.files):
        x = (dataset[i] + 1) / 2
        value = x.amax(0)
        brightness = value.mean().item()
        saturation = (1 - x.amin(0) / value.clamp(min=1e-3)).mean().item()
        sharpness = F.conv2d(x.mean(0)[None, None] * 255, kernel).var().item()
        if brightness < dark:
            outliers.append((file, "black", brightness))
        elif brightness > pale and saturation < grey:
            outliers.append((file, "blank", saturation))
        elif sharpness < blurred:
            outliers.append((file, "out of focus", sharpness))
    return outliers


# ---- progress ----------------------------------------------------------------------------------

class StatusLine:
    """One line of progress: label, step, percent, smoothed loss, images per second, time left.

    A terminal shows it in place; a file gets a line every `interval` seconds and at the end.
    `start` is the number of steps that an earlier run had done.
    """

    def __init__(self, total, label, start=0, interval=10.0):
        self.total, self.label, self.start, self.interval = total, label, start, interval
        self.terminal = sys.stdout.isatty()
        self.began = self.printed = time.monotonic()
        self.images, self.loss, self.weight, self.width = 0, 0.0, 0.0, 0

    def update(self, step, loss=None, images=0):
        """Say that `step` steps are done, with the loss and the number of images of the last."""
        self.images += images
        if loss is not None:  # dividing by the weight takes the zero start out of the mean
            self.loss, self.weight = 0.98 * self.loss + 0.02 * loss, 0.98 * self.weight + 0.02
        now = time.monotonic()
        if step < self.total and now - self.printed < (0.2 if self.terminal else self.interval):
            return
        self.printed, seconds = now, max(now - self.began, 1e-9)
        speed = self.images / seconds
        minutes, rest = divmod(round(seconds / max(step - self.start, 1) * (self.total - step)), 60)
        clock = f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"
        line = "  ".join([f"{self.label} {step}/{self.total}", f"{100 * step // self.total} %"]
                         + [f"loss {self.loss / max(self.weight, 1e-9):.4f}"] * (self.weight > 0)
                         + [f"{speed:.{0 if speed >= 10 else 1}f} images/s"] * (self.images > 0)
                         + [f"ETA {clock}"])
        print(f"\r{line:<{self.width}}" if self.terminal else line, flush=True,
              end="" if self.terminal else "\n")
        self.width = len(line)

    def close(self):
        """End the line on a terminal."""
        if self.terminal and self.width:
            print(flush=True)
