"""Atomic files, tables, logs and checkpoints; where a model is found."""
import csv
import gzip
import io
import itertools
import json
import os
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from support.command import UserError, user_errors

CHECKPOINT_VERSION = 3
BOX = Path(__file__).resolve().parent.parent / "weights" / "cxr128.pt"
ABOUT = "the bundled model (weights/README.md): chest X-rays at 128 px, not for clinical use"


def make_folder(path):
    """Make a folder and its parents; raises UserError if that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be created ({error.strerror})",
                        "a writable place is needed", "pass another --out") from error


def next_folder(parent, name):
    """The first of parent/name, parent/name_2, parent/name_3, ... that does not exist."""
    paths = (Path(parent, f"{name}_{i}" if i > 1 else name) for i in itertools.count(1))
    return next(path for path in paths if not path.exists())


@contextmanager
def atomic_file(path, sync=True):
    """A binary file that replaces `path` once it is complete and on the disk.

    sync=False: the system decides when it reaches the disk, which is faster for many files.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"{path} cannot be written ({error.__context__ or error})",
                        "a writable folder with space is needed", "pass another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_atomic(path, obj):
    """torch.save that leaves either the old file or the complete new one."""
    with atomic_file(path) as file:
        torch.save(obj, file)


def write_text_atomic(path, text):
    """Write UTF-8 text that replaces the old file at once."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))  # file names may contain any byte


def write_csv(path, rows):
    """Write rows, column names first, as a file that replaces the old one at once."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomic(path, text.getvalue())


def append_csv(path, rows):
    """Add rows at the end of a table."""
    with user_errors(f"{path} must be writable", "make space there, or pass another --out"):
        with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def read_csv(path):
    """Rows of a CSV file as dicts, column -> text without surrounding spaces.

    UTF-8; comma, semicolon or tab, whichever is most frequent in the first line; also .csv.gz.
    Raises UserError if it cannot be read, or if two columns have the same name.
    """
    open_text = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, restval="", skipinitialspace=True)
            rows = [{name.strip(): cell.strip() for name, cell in row.items() if name}
                    for row in reader]
        if len(set(reader.fieldnames or [])) < len(reader.fieldnames or [""]):
            raise ValueError("columns need different names")
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})", "a CSV file in UTF-8 is needed",
                        "save it as CSV UTF-8") from error
    return rows


def write_json(path, result):
    """Write an object as indented JSON, and print where."""
    write_text_atomic(path, json.dumps(result, indent=2))
    print(f"wrote {path}")


def append_jsonl(path, row):
    """Add one dict as a line of JSON."""
    with user_errors(f"{path} must be writable", "make space there, and start again"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_jsonl(path):
    """The rows of such a file, none if it is missing; a line that was cut short is skipped."""
    rows = []
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def load_checkpoint(path, needs=(), do="make one with: python train.py --data cxr"):
    """Load a file of this project on the CPU; code inside such a file is never run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = [name for name in needs if name not in checkpoint]
        version = str(checkpoint["version"])[:40]
    except Exception:  # torch.load raises all kinds of errors for a damaged or foreign file
        why = "missing, damaged, no checkpoint, or pickled code, which is refused"
    else:
        if version == str(CHECKPOINT_VERSION) and not missing:
            return checkpoint
        why = f"it lacks {', '.join(missing)}"
        if version != str(CHECKPOINT_VERSION):
            why = f"its version is {version}; models of other versions must be trained again"
    raise UserError(f"{path} cannot be read ({why})",
                    f"a model.pt or state.pt of version {CHECKPOINT_VERSION} is needed", do)


def resolve_checkpoint(argument=None, root="runs"):
    """Path of a model.pt: the file or run folder given, or "box" for the bundled model. Without
    an argument: that of the newest run, else the bundled model, with a note."""
    if argument == "box":
        argument = BOX
    if argument is None:
        runs = sorted(Path(root).glob("*/model.pt"), key=os.path.getmtime)
        argument = runs[-1] if runs else BOX
        if not runs:
            print(f"no run in {root}: this is {ABOUT}")
    path = Path(argument)
    if path.is_dir():
        path = path / "model.pt"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "a trained model is needed",
                        "make one with: python train.py --data cxr")
    return path


def note_colour(images):
    """Note that the bundled model knows only X-rays, if an image (3, H, W) in [-1, 1] has colour.
    """
    if any((x.amax(0) - x.amin(0)).max() > 0.1 for x in images):
        print("note: the source has colours; the bundled model renders any input as a chest X-ray")
