"""Files that are whole or not there: atomic writes, tables, logs, checkpoints."""
import codecs
import csv
import gzip
import io
import itertools
import json
import os
import threading
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from support.box import ABOUT, BOX, find_box
from support.command import UserError, user_errors

CHECKPOINT_VERSION = 2  # 1: before the embedder was centred by Sinkhorn-Knopp


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
def atomic_file(path, sync=True):
    """A binary file that takes the place of `path` only once it is complete, and on the disk.

    sync=False: the system brings it to the disk later, which is what thousands of files need.
    """
    path = Path(path)
    make_folder(path.parent)
    # Short, for names may be as long as they may be; another one for each process and thread.
    temporary = path.with_name(f".{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
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


def append_csv(path, rows):
    """Add rows at the end of a table, all at once: a reader, or a kill, finds whole lines."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with user_errors(f"{path} must be writable", "make space there, or pass another --out"):
        with open(path, "ab") as file:
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())


def text_of(raw, errors="strict"):
    """Bytes of a table as text: UTF-8 or UTF-16, and Windows' cp1252 for lines that are neither."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", errors)
    if len(raw) > 3 and not any(raw[1:40:2]) and all(raw[:40:2]):
        return raw.decode("utf-16-le", errors)

    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        pass
    lines = []
    for line in raw.splitlines(keepends=True):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            lines.append(line.decode("cp1252", errors))
    return "".join(lines)


def read_csv(path, columns=None):
    """Rows of a table as a list of dicts, column -> cell, all str without spaces around them.

    Comma, semicolon or tab; UTF-8 with or without BOM, UTF-16, cp1252; also .gz. Columns without a
    name are left out. columns: their names, of a file whose first line is a row like the others.
    Raises UserError for what is no such table, or has two columns of one name.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            text = text_of(file.read()).lstrip("\r\n")

        # The first line shows the delimiter; Excel may give it a line of its own.
        head, _, rest = text.partition("\n")
        if head.lower().startswith("sep="):
            text = rest
        delimiter = max(",;\t", key=head.count)

        lines = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True,
                           delimiter=delimiter)
        names = columns or [name.strip() for name in next(lines, [])]
        rows = []
        for cells in lines:
            if any(cell.strip() for cell in cells[len(names):]):
                raise ValueError(f"line {lines.line_num} has more cells than the first line")
            if cells:
                cells += [""] * (len(names) - len(cells))
                rows.append({name: cell.strip() for name, cell in zip(names, cells) if name})
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})", "a CSV file in UTF-8 is needed",
                        "save it as CSV UTF-8") from error

    known = [name for name in names if name]
    if not known or len(set(known)) < len(known):
        raise UserError(f"{path} has the columns {', '.join(known)[:200] or 'none'}",
                        "columns with names, no two alike, are needed", "correct its first line")
    return rows


def write_json(path, result):
    """Write an object as indented JSON, and say where."""
    write_text_atomic(path, json.dumps(result, indent=2))
    print(f"wrote {path}")


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
        version = str(checkpoint["version"])[:40]
    except Exception:  # a damaged or foreign file makes torch.load raise nearly any type
        why = "missing, damaged, cut short, no checkpoint, or pickled code, which is refused"
    else:
        if version == str(CHECKPOINT_VERSION) and not lacks:
            return checkpoint
        why = f"it lacks {', '.join(lacks)}"
        if version != str(CHECKPOINT_VERSION):
            why = f"its version is {version}; files of other versions must be trained anew"
    raise UserError(f"{path} cannot be read ({why})",
                    f"a whole model.pt or state.pt of version {CHECKPOINT_VERSION} is needed", do)


def resolve_checkpoint(argument=None, root="runs"):
    """Path of a model.pt: the file or run folder named, or "box"; else of the newest run, else of
    the box, which is said."""
    runs = sorted(Path(root).glob("*/model.pt"), key=os.path.getmtime)
    if argument == "box" and not Path("box").exists():
        return find_box()
    if argument is None and not runs and BOX.is_file():
        print(f"no run in {root}: this is {ABOUT}")
        return find_box()
    newest = runs[-1] if runs else Path(root, "*", "model.pt")
    path = Path(argument or newest)
    if path.is_dir():
        path = path / "model.pt"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "a trained model is needed",
                        "make one with: python train.py --data cxr")
    return path
