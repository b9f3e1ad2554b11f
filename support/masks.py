"""Masks of a folder's images, by folder and name: masks/NAME.png, masks/NAME_lung.gif, and so on.

    masks = find_masks(root, files, beside, problems)      # {kind: a list of paths or None a file}

Left and right lungs (Montgomery: ManualMask/leftMask, rightMask) are two files of one mask.
"""
import re
from collections import defaultdict
from pathlib import Path

from support.images import MASK_FOLDER, path_below
from support.names import match_names, note_names

SIDE = re.compile("left|right", re.IGNORECASE)
SIDE_FOLDER = re.compile("(left|right)[ _-]?(masks?|lungs?)?", re.IGNORECASE)
MASK_WORDS = re.compile(r"[ _-](masks?|msk|lungs?|left|right|seg|segmentation)$", re.IGNORECASE)


def find_masks(root, files, beside, problems):
    """{kind: for each file a list of its mask files, or None}, from folders named like masks.

    A kind is the folder's name; mask, ManualMask, leftMask and rightMask, and masks that lie beside
    their images as NAME_mask, are all "masks".
    """
    base = root.parent if root.name == "images" else root
    kinds = defaultdict(list)  # kind -> (path, name to compare with the files, name to show)
    for place in sorted(base.glob("*/")):
        if not MASK_FOLDER.fullmatch(place.name):
            continue
        plain = re.sub("left|right|manual|[^a-z]", "", place.name.lower())
        kind = "masks" if plain == "mask" else place.name
        for path in sorted(path_below(base, place.name).rglob("*.*")):
            if not path.name.startswith("."):
                name = path.relative_to(place)
                shared = [part for part in name.parts if not SIDE_FOLDER.fullmatch(part)]
                path = path_below(base, path.relative_to(base))
                kinds[kind].append((path, "/".join(shared), name.as_posix()))
    for path in beside:
        name = path.relative_to(root).as_posix()
        kinds["masks"].append((path_below(root, name), name, name))

    return {kind: _match_masks(kind, sorted(masks), files, problems)
            for kind, masks in kinds.items()}


def _match_masks(kind, masks, files, problems):
    """For each file a list of its masks, or None; left and right are joined, others not guessed."""
    rows, lost, ambiguous = match_names(files, [name for _, name, _ in masks])

    # Names that mean no file may say what they are: NAME_mask, NAME_lung, NAME_left.
    used = {number for numbers in rows for number in numbers}
    rest = [number for number in range(len(masks)) if number not in used]
    bare = []
    for number in rest:
        path = Path(masks[number][1])
        stem = path.stem
        while MASK_WORDS.search(stem):
            stem = MASK_WORDS.sub("", stem)
        bare.append(path.with_stem(stem or path.stem).as_posix())
    more, _, _ = match_names(files, bare)

    found = []
    unclear = []
    for i, numbers in enumerate(rows):
        numbers = numbers or [rest[k] for k in more[i]]
        sides = [number for number in numbers if SIDE.search(masks[number][2])
                 or SIDE.search(masks[number][0].parent.name)]
        used.update(numbers)
        chosen = sides or numbers
        if len(chosen) > 1 and not sides:
            unclear.append(files[i])
            chosen = []
        found.append([masks[number][0] for number in chosen] or None)
    note_names(problems, f"{kind}/ without an image",
               [shown for number, (_, _, shown) in enumerate(masks) if number not in used])
    note_names(problems, f"images with several masks in {kind}/, of which none is taken", unclear)
    return found
