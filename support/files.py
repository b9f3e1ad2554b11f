"""Atomic files, tables, logs and checkpoints."""
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

from support.command import UserError

CHECKPOINT_VERSION = 4
BOX = Path(__file__).resolve().parent.parent / "weights" / "cxr128.pt"


def next_folder(parent, name):
    """The first of parent/name, parent/name_2, parent/name_3, ... that does not exist."""
    paths = (Path(parent, f"{name}_{i}" if i > 1 else name) for i in itertools.count(1))
    return next(path for path in paths if not path.exists())


@contextmanager
def atomic_file(path, sync=True):
    """A binary file that replaces `path` once it is complete; sync: and on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"{path} cannot be written ({error.__context__ or error})", "a writable "
                        "folder with free space is needed", "pass another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_atomic(path, obj):
    """torch.save that leaves either the old file or the complete new one."""
    with atomic_file(path) as file:
        torch.save(obj, file)


def write_text_atomic(path, text):
    """Write UTF-8 text, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))  # file names may contain any byte


def write_csv(path, rows):
    """Write rows, column names first, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomic(path, text.getvalue())


def append_csv(path, rows):
    """Add rows to a table."""
    with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read_csv(path, errors="strict"):
    """Rows of a CSV file in UTF-8 as dicts, column -> text without surrounding spaces.

    The delimiter may be a comma, semicolon or tab, and the file compressed (.csv.gz). errors:
    "surrogateescape" for tables that write_csv wrote, as file names may contain any byte.
    """
    open_text = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", errors=errors, newline="") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, restval="", skipinitialspace=True)
            return [{name.strip(): cell.strip() for name, cell in row.items() if name}
                    for row in reader]
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})", "a CSV file in UTF-8 is needed",
                        "save it as CSV UTF-8") from error


def write_json(path, result):
    """Write an object as indented JSON, and print where."""
    write_text_atomic(path, json.dumps(result, indent=2))
    print(f"wrote {path}")


def read_jsonl(path):
    """The rows of a file with one JSON object a line."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def load_checkpoint(path, needs=(), do="make one with: python train.py --data cxr"):
    """Load a checkpoint of this project on the CPU. Code inside the file is never executed.

    needs: keys that must exist. do: the advice of the UserError for any other file.
    """
    why = ""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["version"] != CHECKPOINT_VERSION:
            why = f"its version is {str(checkpoint['version'])[:40]}; train it again"
        elif not set(needs) <= checkpoint.keys():
            why = f"it lacks {', '.join(set(needs) - checkpoint.keys())}"
    except Exception:  # torch.load raises all kinds of errors for a damaged or foreign file
        why = "it is missing, damaged, no checkpoint, or contains code"
    if why:
        raise UserError(f"{path} cannot be read ({why})",
                        f"a model.pt or state.pt of version {CHECKPOINT_VERSION} is needed", do)
    return checkpoint


def resolve_checkpoint(argument=None, root="runs"):
    """Path of a model.pt: a file, a run's folder, or "box", the bundled model.

    Without an argument: the newest run's, else the bundled one, with a note.
    """
    runs = sorted(Path(root).glob("*/model.pt"), key=os.path.getmtime)
    if argument is None and not runs:
        print(f"no run in {root}: using the bundled model (weights/README.md): chest X-rays at "
              "128 px, not for clinical use")
    path = Path(argument or (runs[-1] if runs else BOX))
    if argument == "box":
        path = BOX
    elif path.is_dir():
        path = path / "model.pt"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "a trained model is needed",
                        "make one with: python train.py --data cxr")
    return path
