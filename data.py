"""Files in and out, once for all scripts: images, data sets, splits, checkpoints, charts, progress.

Every image is (3, size, size) float32 in [-1, 1], grey repeated to three channels; every mask is
(1, size, size) bool. What a user can cause ends as a `UserError` of one line: got, need, do.

    images = open_dataset("cxr", size=64)      # data/cxr/, or generated phantoms: see images.note
    train, test = split_holdout(images, 0.15, seed=0)

A folder holds images at any depth (or in `images/`), with `labels.csv` in it or in its parent and
masks of the same stem in `masks*/` beside it. A link that leaves the folder is not followed.
PatchCamelyon is read as Kaggle gives it (`train/` and `train_labels.csv`) or as its .h5 pair.
"""
import argparse
import atexit
import csv
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from phantoms import (CHEST_LABELS, HISTOLOGY_MORPHOLOGIES, chest_phantoms,
                      histology_phantoms)

CHECKPOINT_VERSION = 1
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # of others, EPS runs a program
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
TABLES = ("labels.csv", "train_labels.csv", "samples.csv")  # ours, Kaggle's PCam, sample.py's
TUMOUR = {"0": "healthy", "1": "cancer"}  # PatchCamelyon's labels
CACHE_BYTES = 1 << 30  # of decoded images, per data set and process
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's


# ---- errors, flags, devices --------------------------------------------------------------------

def one_line(text):
    """The text without line ends, codes that steer a terminal, and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else " " for c in str(text))


class UserError(Exception):
    """What a user can cause and mend: one line in three parts, got, need, do."""

    def __init__(self, *parts):
        super().__init__(one_line(": ".join(map(str, parts))))


@contextmanager
def user_errors(*parts):
    """Turn what damaged files and full disks raise inside into a UserError, which ends in parts."""
    try:
        yield
    except (ValueError, OSError, EOFError) as error:
        raise UserError(error, *parts) from error


def run_script(main):
    """Call main(); what the user caused becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        return main()
    except UserError as error:  # out of a DataLoader worker it carries a traceback: its end only
        text = str(error).rpartition("data.UserError: ")[2].strip()
    except OSError as error:
        text = one_line(f"{error}: a writable place with space is needed: mend it, and start again")
    except (MemoryError, RuntimeError) as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        full = (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or "allocate memory" in str(error))
        if not (lost or full):
            raise
        text = ("another process of this run has ended: all are needed: see what it said, mend "
                "that, and start all again") if lost else (
                "the memory is full: a batch must fit: lower --batch, --vae-batch or "
                "--embedder-batch, --workers, --size or --count, raise --accumulate, or take a "
                "smaller --preset")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def _number(kind, low, high, need):
    """A type for argparse: numbers from low to high."""
    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {need}")
    return parse


positive_int = _number(int, 1, 10**7, "a whole number: pass 1 to 10,000,000")
batch_int = _number(int, 1, 2**16, "a whole number: pass 1 to 65,536")
workers_int = _number(int, 0, 256, "a whole number: pass 0 to 256")
seed_int = _number(int, 0, 2**32, "a whole number: pass 0 to 4,294,967,296")
not_negative_int = _number(int, 0, 2**63 - 1, "a whole number: pass 0 or more")
positive_float = _number(float, 1e-30, 1e30, "a number: pass above 0")
not_negative = _number(float, 0, 1e30, "a number: pass 0 or more")
fraction = _number(float, 0, 1, "a number from 0 to 1: pass e.g. 0.15")
share_above_zero = _number(float, 1e-30, 1, "above 0 and at most 1: pass e.g. 0.6")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one worth showing."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def step_seed(*parts):
    """A 63-bit seed that depends on every part, e.g. (seed, stage, step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def pick_device(name="auto"):
    """The torch.device of that name; "auto" takes CUDA, then MPS, then the CPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found = ["cuda"] * bool(gpus) + ["mps"] * torch.backends.mps.is_available() + ["cpu", *gpus]
    name = found[0] if name == "auto" else name
    if ranks() > 1:  # each its own GPU; torch.distributed knows no "mps"
        name = {"cuda": f"cuda:{os.environ.get('LOCAL_RANK', 0)}", "mps": "cpu"}.get(name, name)
    if name not in found:
        raise UserError(f"no device {name!r}", f"here are {', '.join(found)}", "pass --device "
                        "auto, or start fewer processes")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def autocast_dtype(device, dtype="auto"):
    """torch.bfloat16 or torch.float32; "auto" takes bfloat16 where the chip computes in it."""
    if dtype != "auto":
        return {"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    native, cpu = False, Path("/proc/cpuinfo")  # torch offers no public question about CPUs
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and cpu.exists():
        native = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu.read_text().split())
    return torch.bfloat16 if native else torch.float32


# ---- several processes, started by torchrun ----------------------------------------------------

def join_ranks():
    """Under torchrun, join the other processes, called ranks; from now on rank 0 alone prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and ranks() == 1:
        dist.init_process_group(timeout=timedelta(days=1))  # rank 0 draws and writes, others wait
        atexit.register(dist.destroy_process_group)
        if rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def ranks():
    """How many processes work together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process among them, from 0; rank 0 writes all files but the cache."""
    return dist.get_rank() if ranks() > 1 else 0


def all_ranks(value=None):
    """What each rank passes, as a list by rank. Every rank must call it, and waits for the rest."""
    values = [value] * ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# ---- images in ---------------------------------------------------------------------------------

def _open_image(path):
    """The Pillow image, its pixels not read yet; ValueError for one that would fill the memory."""
    image = Image.open(path, formats=IMAGE_FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # from twice that, Pillow refuses it
        raise ValueError(f"{image.width:,} x {image.height:,} pixels are too many")
    return image


def _decode(path):
    """Image file -> float32 array (H, W) or (H, W, 3) in [0, 1], upright; its first frame."""
    try:
        with _open_image(path) as image:
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # grey of more than 8 bits
            deep = np.asarray(image, dtype=np.float64)
            high = deep.max()
            if not 0 <= deep.min() <= high < math.inf:
                raise ValueError("grey values below 0 or not finite")
            full = next((2 ** bits - 1 for bits in (10, 12, 14, 16) if high < 2 ** bits), high)
            return np.float32(deep if image.mode == "F" and high <= 1 else deep / full)
        if image.has_transparency_data:
            rgba = np.asarray(image.convert("RGBA")) / np.float32(255)
            return rgba[..., :3] * rgba[..., 3:]  # over black
        return np.asarray(image.convert("L" if image.mode in "1L" else "RGB")) / np.float32(255)
    except Exception as error:  # a damaged file makes Pillow raise nearly any type
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:120]})",
                        "a whole image file is needed", "replace or remove it") from error


def load_image(source, size):
    """Image file, or its uint8 pixels -> (3, size, size) float32 in [-1, 1]; None keeps the side.

    Upright by EXIF, transparent pixels over black, the centre square, resized in float. Deep grey
    is divided by the largest value of the smallest depth (10, 12, 14, 16 bits) that holds its
    maximum, as files of "16 bits" often carry 10 or 12; floats up to 1 stay.
    """
    pixels = np.float32(source) / 255 if isinstance(source, np.ndarray) else _decode(source)
    x = torch.from_numpy(pixels)
    x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    side = min(x.shape[1:])
    top, left = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
    x = x[:, top:top + side, left:left + side]
    if size not in (None, side):
        x = F.interpolate(x[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    return (x * 2 - 1).expand(3, -1, -1).clone()


# ---- files out, and back in --------------------------------------------------------------------

def make_folder(path):
    """Make a folder and its parents; raises UserError if that is not allowed."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror})", "a writable place is needed",
                        "pass another --out") from error


def next_folder(parent, name):
    """The first of parent/name, parent/name_2, parent/name_3, ... that does not exist."""
    paths = (Path(parent, f"{name}_{i}" if i > 1 else name) for i in itertools.count(1))
    return next(path for path in paths if not path.exists())


@contextmanager
def atomic_file(path):
    """A binary file that takes the place of `path` only once it is complete and on the disk."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{os.getpid()}.tmp")  # short: names may be as long as they may be
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError
        why = error if isinstance(error, OSError) else error.__context__
        if not isinstance(why, OSError):
            raise
        raise UserError(f"{path} cannot be written ({why.strerror or why})",
                        "a writable folder with space is needed", "pass another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_atomic(path, obj):
    """torch.save that leaves either the old file or the whole new one."""
    with atomic_file(path) as file:
        torch.save(obj, file)


def write_text_atomic(path, text):
    """Write UTF-8 text so that a reader sees either the old file or the whole new one."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))  # file names may hold any byte


def write_csv(path, rows):
    """Write rows (the first names the columns) so that a reader sees a whole file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomic(path, text.getvalue())


def append_jsonl(path, row):
    """Add one dict as a line of JSON."""
    with user_errors(f"{path} must be writable", "make space there, and start again"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_jsonl(path):
    """The rows of such a file, none if it is missing; a line that was cut short is left out."""
    rows = []
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def load_checkpoint(path, needs=(), do="make one with: python train.py --data cxr"):
    """Read a file of this project on the CPU; code inside such a file is never run."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        lacks = [name for name in needs if name not in checkpoint]
        if checkpoint["version"] == CHECKPOINT_VERSION and not lacks:
            return checkpoint
        why = f"its version is {str(checkpoint['version'])[:40]}, it lacks {lacks or 'nothing'}"
    except Exception:  # a damaged or foreign file makes torch.load raise nearly any type
        why = "missing, damaged, cut short, no checkpoint, or pickled code, which is refused"
    raise UserError(f"{path} cannot be read ({why})",
                    f"a whole model.pt or state.pt of version {CHECKPOINT_VERSION} is needed", do)


def resolve_checkpoint(argument=None, root="runs"):
    """Path of a model.pt: the file or run folder named, or else that of the newest run."""
    runs = sorted(Path(root).glob("*/model.pt"), key=os.path.getmtime)
    path = Path(argument or (runs[-1] if runs else Path(root, "*", "model.pt")))
    path = path / "model.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "a trained model is needed",
                        "make one with: python train.py --data cxr")
    return path


def _to_picture(image):
    x = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy())  # (C, H, W) -> (H, W[, 3])


def save_png(path, image):
    """Write (3, H, W) as RGB or (1, H, W) as grey, in [-1, 1], or a Pillow image, as a PNG."""
    picture = image if isinstance(image, Image.Image) else _to_picture(image)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def save_grid(path, rows, captions=None):
    """Write rows of images, each (N, 3 or 1, H, W) in [-1, 1], as one PNG, captions at the left."""
    height, width = rows[0].shape[-2:]
    scale = -(-128 // height)  # small images are repeated to whole multiples, for people to see
    gap, font = 2, ImageFont.load_default(size=14)
    left = max(math.ceil(font.getlength(text)) for text in captions) + 12 if captions else gap
    down, across = height * scale + gap, width * scale + gap
    sides = left + max(map(len, rows)) * across, gap + len(rows) * down
    canvas = Image.new("RGB", sides, "white")
    for y, row in enumerate(rows):
        if captions:
            ImageDraw.Draw(canvas).text((6, (y + 0.5) * down), captions[y], "black", font, "lm")
        for x, image in enumerate(row):
            large = _to_picture(image).resize((width * scale, height * scale), Image.NEAREST)
            canvas.paste(large, (left + x * across, gap + y * down))
    save_png(path, canvas)


def line_chart(path, series, title, xlabel, ylabel, log_y=False):
    """Write a PNG line chart of at most five name -> (xs, ys), from x = 0."""
    lines = {name: [(x, math.log10(max(y, 1e-9)) if log_y else y) for x, y in zip(*xy)]
             for name, xy in series.items()}
    xs, ys = zip(*(sum(lines.values(), []) or [(0, 0)]))
    margin = 0.05 * (max(ys) - min(ys)) or 0.5
    x1, y0, y1 = max(1, *xs), min(ys) - margin, max(ys) + margin
    picture = Image.new("RGB", (1800, 1080), "white")  # halved in the end, so lines are smooth
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=28)

    def place(x, y):
        return 160 + 1580 * x / x1, 960 - 780 * (y - y0) / (y1 - y0)

    for k in range(6):  # grid lines with their values
        x, y = x1 * k / 5, y0 + (y1 - y0) * k / 5
        draw.line([place(x, y0), place(x, y1)], "#dddddd", 2)
        draw.line([place(0, y), place(x1, y)], "#dddddd", 2)
        draw.text((place(x, y)[0], 974), f"{x:g}", "black", font, "ma")
        draw.text((146, place(x, y)[1]), f"{10 ** y if log_y else y:.3g}", "black", font, "rm")
    draw.text((900, 20), title, "black", font, "ma")
    draw.text((160, 166), ylabel, "black", font, "lb")
    draw.text((1740, 1060), xlabel, "black", font, "rd")
    key = 160  # the names, each in the colour of its line
    for colour, (name, points) in zip(COLOURS, lines.items()):
        draw.text((key, 100), name, colour, font, "lm")
        key += font.getlength(name) + 50
        if len(points) > 1:
            draw.line([place(*point) for point in points], colour, 4, "curve")
    save_png(path, picture.reduce(2))


# ---- data sets ---------------------------------------------------------------------------------

@dataclass(eq=False)
class ImageSet:
    """Images by number: `images[i]` is (3, size, size) float32 in [-1, 1], read when asked for."""
    name: str
    note: str  # one line, what and from where
    size: int | None
    files: list  # unique names
    columns: dict  # column of the labels -> list of str, one cell per file
    sources: list | np.ndarray = ()  # what load_image takes, one per file
    masks: dict = field(default_factory=dict)  # kind -> list of mask files, masks or None
    problems: list = field(default_factory=list)  # lines about what was left out
    unreadable: list = field(default_factory=list)  # (path, why) of images that were left out
    official_test: list = field(default_factory=list)  # numbers that MedMNIST keeps for testing
    cache: dict = field(default_factory=dict)  # number -> image

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = self.cache.get(int(i))
        if image is None:
            image = load_image(self.sources[int(i)], self.size)
            if len(self.cache) * image.nbytes < CACHE_BYTES:
                self.cache[int(i)] = image
        return image.clone()

    def batch(self, indices):
        """(B, 3, size, size) of the images with these numbers."""
        return torch.stack([self[i] for i in indices])

    def mask(self, i, kind="masks"):
        """(1, size, size) bool, or None; True: at least half of the brightest, so 0/1 works."""
        source = self.masks[kind][int(i)]
        if isinstance(source, Path):
            x = load_image(source, self.size).amax(0, keepdim=True) + 1
            return x >= max(x.max().item() / 2, 1e-6)
        return source


def _place(name_or_path):
    """The path that a --data means, or None for phantoms."""
    name = str(name_or_path)
    if name in ("cxr", "histology") and Path("data", name).is_dir():
        return Path("data", name)
    return None if name in ("cxr", "histology", "phantoms") else Path(name)


def survey(name_or_path, size, count):
    """(how many images open_dataset will find at most, seconds that loading one takes)."""
    path = _place(name_or_path)
    if path is None:
        return count, 0.0
    files = list_images(path) if path.is_dir() else []
    images = ImageSet("", "", size, files, {}, files) if files else open_dataset(path, size)
    images[0]  # Pillow starts here
    some, began = range(len(images) // 2, len(images), -(-len(images) // 16)), time.monotonic()
    for i in some:
        images[i]
    return len(images), (time.monotonic() - began) / len(some)


def open_dataset(name_or_path, size, seed=0, count=2400, whole=False):
    """Open a folder of images, a MedMNIST .npz, PatchCamelyon's .h5 pair, "cxr" or "histology"
    (data/NAME/ if it is there, else `count` phantoms) or "phantoms" (chests); size None keeps the
    side of each file.

    An image of a folder that cannot be read is left out and listed. `whole` reads all of each file,
    not the head alone: PNGs by their checksums, 0.4 ms a megapixel, others by decoding, 5 to 20 ms.
    """
    name, path = str(name_or_path), _place(name_or_path)
    if path is None:
        return _open_phantoms(name, size or 64, seed, count)
    if name and path.is_dir():
        return _open_folder(path, size, whole)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path, size)
    if path.suffix == ".h5" and path.is_file():
        return _open_h5(path, size)
    raise UserError(f"there is no data set {name}", "a folder of images, a MedMNIST .npz or "
                    "PatchCamelyon's .h5 is needed", "pass --data cxr, histology, phantoms or PATH")


def _open_phantoms(name, size, seed, count):
    """Generated chests, each of their exact labels a column of "0" and "1", or histology patches
    with a label (healthy, cancer) and their true morphology."""
    with user_errors():
        if name == "histology":
            images, masks, labels, kinds = histology_phantoms(count, size, seed)
            columns = {"label": [TUMOUR[str(label)] for label in labels.tolist()],
                       "morphology": [HISTOLOGY_MORPHOLOGIES[kind] for kind in kinds.tolist()]}
        else:
            images, masks, labels = chest_phantoms(count, size, seed)
            columns = {label: [str(cell) for cell in column]
                       for label, column in zip(CHEST_LABELS, labels.T.tolist())}
    absent = f"no folder data/{name}/, so " * (name != "phantoms")
    note = f"{absent}{count:,} generated phantoms, not real images ({size} px, seed {seed})"
    return ImageSet(name, note, size, [f"phantom_{i:06d}" for i in range(count)], columns,
                    masks={"masks": masks}, cache=dict(enumerate(images.expand(-1, 3, -1, -1))))


def _open_npz(path, size):
    """A MedMNIST file: SPLIT_images (N, H, W) or (N, H, W, 3) uint8, SPLIT_labels (N, L)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            splits = [s for s in ("train", "val", "test") if f"{s}_images" in archive]
            parts = [archive[f"{split}_images"] for split in splits]
            labels = np.concatenate([archive[f"{split}_labels"] for split in splits])
        images = np.concatenate(parts)
        labels = labels.reshape(len(images), -1).T.tolist()  # (N, L) -> L lists
        if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)):
            raise ValueError(f"images of {images.dtype} and shape {images.shape}")
    except Exception as error:  # a damaged file makes NumPy raise nearly any type
        raise UserError(f"{path} cannot be read ({str(error)[:120]})", "MedMNIST's train_images of "
                        "uint8 and train_labels are needed", "download it again") from error
    files = [f"{split}_{i:06d}" for split, part in zip(splits, parts) for i in range(len(part))]
    columns = {f"label_{j}": [str(cell) for cell in row] for j, row in enumerate(labels)}
    test = [i for i, file in enumerate(files) if file.startswith("test")]
    return ImageSet(path.stem, f"{len(files):,} images from {path}", size, files, columns, images,
                    official_test=test)


class _H5Images:
    """Row i of the array `x` in an .h5 file; opened anew in each process that reads it."""

    def __init__(self, path):
        self.path, self.file, self.owner = path, None, None

    def __getitem__(self, i):
        if self.owner != os.getpid():
            import h5py
            self.file, self.owner = h5py.File(self.path, "r"), os.getpid()
        return self.file["x"][i]

    def __getstate__(self):
        return {"path": self.path, "file": None, "owner": None}


def _open_h5(path, size):
    """PatchCamelyon as published: NAME_x.h5 with x (N, H, W, 3) uint8, NAME_y.h5 with y (N, ...) of
    0 and 1. h5py is asked for only here."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path} is an .h5 file", "the package h5py is needed to read it",
                        "pip install h5py") from error
    stem = path.stem.removesuffix("_x").removesuffix("_y")
    x_path, y_path = (path.with_name(f"{stem}_{part}.h5") for part in "xy")
    try:
        with h5py.File(x_path, "r") as x, h5py.File(y_path, "r") as y:
            shape, kind, labels = x["x"].shape, x["x"].dtype, np.asarray(y["y"]).reshape(-1)
    except Exception as error:  # h5py raises nearly any type for a damaged file
        raise UserError(f"{x_path} and {y_path} cannot be read ({str(error)[:120]})", "a pair "
                        "NAME_x.h5, NAME_y.h5 is needed", "unpack both into one folder") from error
    if len(labels) != shape[0] or len(shape) != 4 or shape[3] != 3 or kind != np.uint8:
        raise UserError(f"{x_path} holds {kind} of shape {tuple(shape)}, {y_path} {len(labels)} "
                        "labels", "RGB images of uint8 and as many labels are needed",
                        "download the pair again")
    cells = [str(int(label)) for label in labels]
    return ImageSet(stem, f"{len(labels):,} images from {x_path}", size,
                    [f"{stem}_{i:06d}" for i in range(len(labels))],
                    {"label": [TUMOUR.get(cell, cell) for cell in cells]}, _H5Images(x_path))


def _below(folder, *parts):
    """The path folder/parts; UserError for a link that leaves the folder."""
    path = Path(folder, *parts)
    if path.is_symlink() and not path.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{path} is a link out of its folder", "no path may leave the data folder",
                        "copy what it points to, or pass that as --data")
    return path


def list_images(folder):
    """Sorted paths of the images below a folder, or its images/; not hidden ones, not masks*/."""
    root = _below(folder, "images") if Path(folder, "images").is_dir() else Path(folder)
    paths = [path for path in sorted(root.rglob("*"))
             if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
             and not any(part.startswith((".", "masks")) for part in path.relative_to(root).parts)]
    if not paths:
        raise UserError(f"{folder} holds no image", f"files {' '.join(sorted(IMAGE_SUFFIXES))} are "
                        "needed", "name another folder")
    return paths


def _why_unreadable(path, folder, whole):
    """What is wrong with an image file, in a line; "" if nothing is."""
    try:
        if not _below(folder, path.relative_to(folder)).is_file():
            return "not a file"  # a pipe would be waited for
        with _open_image(path) as image:
            if whole and image.format == "PNG":
                image.verify()
            elif whole:
                _decode(path)
    except Exception as error:  # a damaged file makes Pillow raise nearly any type
        return one_line(error)[:200]
    return ""


def _open_folder(folder, size, whole):
    """A folder of images with optional labels.csv (or train_labels.csv) and masks*/."""
    root = _below(folder, "images") if (folder / "images").is_dir() else folder
    if (folder / "train_labels.csv").is_file() and (folder / "train").is_dir():
        root = _below(folder, "train")  # Kaggle's test/ has no labels
    found, columns, masks, problems, reasons = list_images(root), {}, {}, [], []

    def note_lost(what, names):
        if names:
            some = ", ".join(map(one_line, names[:3])) + ", ..." * (len(names) > 3)
            problems.append(f"{what}: {len(names):,} ({some})")

    status = StatusLine(len(found), "reading")
    with ThreadPool(4) as pool:  # Pillow lets go of Python's lock; more could fill the memory
        for why in pool.imap(lambda path: _why_unreadable(path, folder, whole), found):
            reasons.append(why)
            if whole:
                status.update(len(reasons))
    if whole:
        status.close()
    paths = [path for path, why in zip(found, reasons) if not why]
    unreadable = [(path, why) for path, why in zip(found, reasons) if why]
    note_lost("unreadable, or links out of the folder", [path for path, _ in unreadable])
    if len(paths) < 0.9 * len(found):
        raise UserError(problems[0], "at least 90 % must be readable", "replace or remove them")
    files = [path.relative_to(root).as_posix() for path in paths]
    note = f"{len(files):,} images from {root}, "
    tables = [(place, name) for place in (root, root.parent) for name in TABLES]
    table = next((_below(*path) for path in tables if Path(*path).is_file()), None)
    if table:
        rows = read_table(table)
        matched, lost = _match(files, [row["file"] for row in rows])
        if lost and table.name == "train_labels.csv":
            raise UserError(f"{table} names {len(lost):,} images that {root} has not (first: "
                            f"{lost[0]})", "each id needs its .tif", "unpack the images again, or "
                            "delete those rows")
        bare = [file for file, row in zip(files, matched) if row is None]
        note_lost(f"rows of {table} without an image", lost)
        note_lost(f"images without a row in {table}", bare)
        if len(bare) < len(files):
            columns = {name: ["" if row is None else rows[row][name] for row in matched]
                       for name in rows[0] if name != "file"}
    for place in sorted((root.parent if root.name == "images" else root).glob("masks*/")):
        names = sorted(path.relative_to(place).as_posix()
                       for path in _below(place.parent, place.name).rglob("*.*"))
        matched, lost = _match(files, names)
        note_lost(f"{place.name}/ without an image", lost)
        masks[place.name] = [None if row is None else _below(place, names[row])
                             for row in matched]
        note += f"{len(names) - len(lost):,} {place.name}, "
    note += f"{table.name} with {', '.join(columns)}" if columns else "no labels.csv"
    return ImageSet(folder.resolve().name, one_line(note), size, files, columns, paths, masks,
                    problems, unreadable)


def _match(files, names):
    """(for each file the number of the name that means it, or None; names that mean no file): by
    stem or, where two files or two names share a stem, by the whole relative path."""
    stems = [[Path(name).stem for name in group] for group in (files, names)]
    is_unique = all(len(set(group)) == len(group) for group in stems)
    file_keys, name_keys = stems if is_unique else (files, names)
    rows = {key: row for row, key in enumerate(name_keys)}
    matched = [rows.get(key) for key in file_keys]
    used = set(matched)
    return matched, [name for row, name in enumerate(names) if row not in used]


def read_table(path, errors="strict"):
    """Rows of a CSV with a column `file`, as dicts; comma or semicolon, BOM and CRLF are fine.
    Kaggle's PatchCamelyon has `id` in its place, and labels 0 and 1 that become words."""
    rows = []
    try:
        text = Path(path).read_text("utf-8-sig", errors)
        table = csv.DictReader(io.StringIO(text), restval="", strict=True, skipinitialspace=True,
                               delimiter=";" if ";" in text.partition("\n")[0] else ",")
        table.fieldnames = [name.strip() for name in table.fieldnames or []]
        names = [name for name in table.fieldnames if name]  # a comma at a line's end names none
        for row in table:
            if any(map(str.strip, row.pop(None, []))):
                raise ValueError(f"line {table.line_num} has more cells than the first line")
            rows.append({name: row[name].strip() for name in names})
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error})", "a CSV file in UTF-8 is needed",
                        "save it as CSV UTF-8") from error
    if Path(path).name == "train_labels.csv" and "file" not in names and "id" in names:
        names = ["file"]
        for row in rows:
            row["file"] = row.pop("id")
            row["label"] = TUMOUR.get(row.get("label"), row.get("label", ""))
    if "file" not in names or len(set(names)) < len(names):
        raise UserError(f"{path} has the columns {', '.join(names)[:200] or 'none'}",
                        "one must be called file, no two alike", "correct its first line")
    for file, count in Counter(row["file"] for row in rows).items():
        if count > 1:
            raise UserError(f"{path} has {count} rows for {file or 'no name'}", "one is needed",
                            "delete one")
    return rows


def labels_of(path):
    """Cells of the row that names an image, in a labels.csv beside it or up to two above, or {}."""
    path = Path(path).absolute()
    for table in (place / "labels.csv" for place in path.parents[:3]):
        if table.is_file():
            rows, file = read_table(table), path.relative_to(table.parent).as_posix()
            row = _match([file.removeprefix("images/")], [row["file"] for row in rows])[0][0]
            if row is not None:
                return {name: cell for name, cell in rows[row].items() if name != "file"}
    return {}


# ---- hold-out ----------------------------------------------------------------------------------

def image_groups(dataset, group_column=None):
    """The group of each image (default column: Patient ID, patient or group), or else its name."""
    if group_column and group_column not in dataset.columns:
        raise UserError(f"there is no column {group_column!r}", f"{dataset.name} has "
                        f"{', '.join(dataset.columns) or 'none'}", "pass another --group-column")
    default = (name for name in dataset.columns if name.lower().replace("_", "").replace(" ", "")
               in ("patientid", "patient", "group"))
    cells = dataset.columns.get(group_column or next(default, None), [""] * len(dataset))
    return [cell or file for cell, file in zip(cells, dataset.files)]


def split_holdout(dataset, holdout, seed, group_column=None):
    """(train, test) numbers as int64 tensors; images of one group are never parted.

    `holdout` is a fraction, met by a hash of seed and group, so that images added later move no
    other, or a CSV that read_split reads: its test images are held out with their whole groups.
    MedMNIST brings its own test part, which takes the place of any fraction above 0.
    """
    groups, part = image_groups(dataset, group_column), None
    with suppress(ValueError):
        part = float(str(holdout))
    if part is None:
        held = {groups[i] for i in read_split(holdout, dataset)[1]}
    elif not 0 <= part < 1:
        raise UserError(f"--holdout {holdout}", "from 0 to below 1 is needed", "pass e.g. 0.15")
    elif part and dataset.official_test:
        held = {groups[i] for i in dataset.official_test}
    else:
        shares = {group: int(hashlib.sha256(os.fsencode(f"{seed}/{group}")).hexdigest()[:16], 16)
                  / 16 ** 16 for group in groups}
        count = sum(share < part for share in shares.values())
        count = max(1, min(count, len(shares) - 1)) if part else 0  # someone on either side
        held = set(sorted(shares, key=shares.get)[:count])
    out = torch.tensor([group in held for group in groups])
    if out.all():
        raise UserError(f"--holdout {holdout} holds out all {len(groups):,} images",
                        "some must be left for training", "hold out less, or change --group-column")
    return torch.nonzero(~out)[:, 0], torch.nonzero(out)[:, 0]


def write_split(path, dataset, train, test, group_column=None):
    """Write who is held out: a CSV of file, split (train or test), group."""
    groups = image_groups(dataset, group_column)
    rows = [[dataset.files[i], split, groups[i]]
            for split, part in (("train", train), ("test", test)) for i in part.tolist()]
    write_csv(path, [["file", "split", "group"]] + rows)


def read_split(path, dataset):
    """(train, test) numbers, int64, from a CSV of file and split; without split all are test."""
    split = {row["file"]: row.get("split", "test")
             for row in read_table(path, "surrogateescape")}  # as write_text_atomic wrote it
    unknown = sorted(set(split) - set(dataset.files))
    if unknown:
        raise UserError(f"{path} names {', '.join(unknown[:3])}, which {dataset.name} has not",
                        "names as in split.csv are needed", "correct it, or pass that run's --data")
    sides = [split.get(file) for file in dataset.files]
    return tuple(torch.tensor([i for i, side in enumerate(sides) if side == part],
                              dtype=torch.int64) for part in ("train", "test"))


def find_outliers(images, dark=0.2, pale=0.9, grey=0.05, blurred=150.0):
    """Of histology patches (B, 3, H, W) in [-1, 1] those that show nothing: a str each, or "".

    Seen at 64 pixels a side. "black": mean brightness (HSV value) below `dark`. "out of focus":
    variance of the Laplacian, of grey in 0..255, below `blurred`. "blank": brighter than `pale`,
    mean saturation below `grey` and few edges (4 x `blurred`), for fat is bright and pale as well.
    Source: the idea of arXiv:2312.09792; the limits are ours. Not meant for X-rays.
    """
    x = F.adaptive_avg_pool2d((images + 1) / 2, 64)
    value = x.amax(1)
    brightness = value.mean((1, 2))
    saturation = (1 - x.amin(1) / value.clamp(min=1e-3)).mean((1, 2))
    kernel = x.new_tensor([[[[0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    edges = F.conv2d(x.mean(1, keepdim=True) * 255, kernel).flatten(1).var(1)
    return ["black" if b < dark else "blank" if b > pale and s < grey and e < 4 * blurred else
            "out of focus" if e < blurred else ""
            for b, s, e in zip(brightness.tolist(), saturation.tolist(), edges.tolist())]


# ---- progress ----------------------------------------------------------------------------------

class StatusLine:
    """One line of progress: label, step, percent, smoothed loss, images per second, time left.

    A terminal shows it in place; a file gets a line every ten seconds and at the end.
    """

    def __init__(self, total, label, start=0):
        self.total, self.label, self.start = total, label, start  # start: done by an earlier run
        self.terminal, self.images, self.loss = sys.stdout.isatty(), 0, None
        self.began = self.printed = time.monotonic()

    def update(self, step, loss=None, images=0):
        """Say that `step` steps are done, with the loss and the number of images of the last."""
        self.images += images
        if loss is not None:
            self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        now = time.monotonic()
        if step < self.total and now - self.printed < (0.2 if self.terminal else 10):
            return
        self.printed, seconds = now, max(now - self.began, 1e-9)
        left = round(seconds / max(step - self.start, 1) * (self.total - step))
        line = f"{self.label} {step}/{self.total}  {100 * step // self.total} %"
        line += f"  loss {self.loss:.4f}" if self.loss is not None else ""
        line += f"  {self.images / seconds:.1f} images/s" if self.images else ""
        line += f"  ETA {timedelta(seconds=left)}"
        start, end = ("\r", "\033[K") if self.terminal else ("", "\n")  # \033[K: clear the rest
        print(f"{start}{line}", end=end, flush=True)

    def close(self):
        """End the line on a terminal."""
        if self.terminal:
            print()
