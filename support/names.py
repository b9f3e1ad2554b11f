"""Which name in a table means which image file, however the table writes it.

    rows, lost, ambiguous = match_names(files, names)

Names may stand with folders, as Windows' or absolute paths, without suffix or with another, and
hold dots, as UIDs do. What cannot be told apart is left out, and spoils no other.
"""
import os
import re
import unicodedata
from collections import defaultdict
from sys import intern

from support.command import one_line
from support.dicom import DICOM_SUFFIXES
from support.files import text_of
from support.images import IMAGE_SUFFIXES, OTHER_SUFFIXES

FILE_COLUMNS = (  # that name the image, by their letters and digits, best first
    "file", "filename", "filepath", "imageindex", "imagefile", "imagefilename", "imagepath",
    "imageid", "imagename", "image", "imgid", "imgname", "imgpath", "imgfile", "img", "path",
    "dicomid", "dicomfile", "dicompath", "dicom", "sopinstanceuid", "xray", "scan", "scanid", "id",
    "patientid")
SUFFIXES = IMAGE_SUFFIXES | DICOM_SUFFIXES | OTHER_SUFFIXES



def file_columns(names):
    """The columns that may name images, best first."""
    plain = {re.sub("[^a-z0-9]", "", name.lower()): name for name in names}
    return [plain[known] for known in FILE_COLUMNS if known in plain]


def clean_name(name):
    """The name of a file, on a disk or in a table, as folder/file.png, whoever wrote it."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", text_of(os.fsencode(name), "replace"))
    name = re.sub(r"^[A-Za-z]:/", "", name.replace("\\", "/"))
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def split_name(cleaned):
    """A cleaned name as a tuple: its folders, and its bare name without an image's suffix."""
    *folders, name = cleaned.split("/")
    stem, dot, suffix = name.removesuffix(".gz").rpartition(".")
    if dot + suffix.lower() in SUFFIXES:
        name = stem
    return tuple(map(intern, (*folders, name)))


def match_names(files, names, root=""):
    """Which names mean which files, below the folder root.

    Returns (rows, lost, ambiguous): for each file the numbers of its names, a name being there as
    often as it has rows; names that mean no file; names that mean several, which are not guessed.

    A name means the file of its whole path, else that which shares most folders from its end on.
    Where their folders contradict each other, both bare names must be the only ones of their kind.
    """
    numbers = defaultdict(list)
    for number, name in enumerate(names):
        numbers[clean_name(name)].append(number)
    has_blanks = bool(numbers.pop("", ()))
    parts_of = {name: split_name(name) for name in numbers}
    file_parts = [split_name(clean_name(file)) for file in files]

    owner = _match_whole_paths(files, file_parts, parts_of)  # name -> number of its file
    rest = {name: parts for name, parts in parts_of.items() if name not in owner}
    taken = set(owner.values())
    above = tuple(clean_name(str(root)).split("/")) if root else ()
    common = len(os.path.commonprefix([parts[:-1] for parts in parts_of.values()]))

    # Names and files of one bare name are told apart by their folders.
    groups = {parts[-1]: ([], []) for parts in rest.values()}
    for i, parts in enumerate(file_parts):
        if parts[-1] in groups:
            groups[parts[-1]][0].append((i, above + parts))
    for name, parts in rest.items():
        groups[parts[-1]][1].append((name, parts))
    ambiguous = []
    for found, meant in groups.values():
        pairs, unclear = _tell_apart(found, meant)
        ambiguous += unclear
        for i, name, shared in pairs:
            is_only_one = len(found) == len(meant) == 1
            is_same = shared >= min(len(rest[name]) - common, len(file_parts[i]))
            if i not in taken and (is_same or is_only_one):
                owner[name] = i
                taken.add(i)

    rows = [[] for _ in files]
    for name, i in owner.items():
        rows[i] = numbers[name]
    lost = sorted(names[numbers[name][0]] for name in parts_of.keys() - owner - set(ambiguous))
    ambiguous = sorted(names[numbers[name][0]] for name in ambiguous)
    if has_blanks:
        lost.insert(0, "no name")
    return rows, lost, ambiguous


def _match_whole_paths(files, file_parts, parts_of):
    """{name: number of the file whose whole path it is}, with its suffix or else without."""
    by_path = {clean_name(file): i for i, file in enumerate(files)}
    owner = {name: by_path[name] for name in parts_of if name in by_path}
    bare = defaultdict(list)
    for i, parts in enumerate(file_parts):
        bare[parts].append(i)

    taken = set(owner.values())
    for name, parts in parts_of.items():
        same = bare.get(parts, ())
        if name not in owner and len(same) == 1 and same[0] not in taken:
            owner[name] = same[0]
            taken.add(same[0])
    return owner


def _tell_apart(found, meant):
    """Pair files (i, parts) with names (name, parts) of one bare name, by most folders shared.

    Returns ([(i, name, how many parts they share)], names that mean several files).
    """
    pairs = []
    unclear = []
    waiting = [(found, meant, 1)]  # what agrees in its last so many parts
    while waiting:
        found, meant, depth = waiting.pop()
        if len(found) == len(meant) == 1:
            i, whole = found[0]
            name, parts = meant[0]
            pairs.append((i, name, len(os.path.commonprefix([whole[::-1], parts[::-1]]))))
            continue

        by_folder = defaultdict(lambda: ([], []))
        for i, parts in found:
            by_folder[parts[-depth - 1:-depth]][0].append((i, parts))
        for name, parts in meant:
            by_folder[parts[-depth - 1:-depth]][1].append((name, parts))
        ended = by_folder.pop((), ([], []))[1]  # names that have no further folder
        going_on = [group for group in by_folder.values() if group[0] and group[1]]
        waiting += [(*group, depth + 1) for group in going_on]
        if len(found) == len(ended) == 1 and not going_on:
            pairs.append((found[0][0], ended[0][0], depth))
        elif found:
            unclear += [name for name, _ in ended]
    return pairs, unclear


def note_names(problems, what, names):
    """Add a line with the count and the first names, if there are any."""
    if names:
        first = ", ".join(one_line(name) for name in names[:3])
        more = ", ..." if len(names) > 3 else ""
        problems.append(f"{what}: {len(names):,} ({first}{more})")
