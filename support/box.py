"""The model in the box: weights/cxr128.pt, which comes with the code. Its card: weights/README.md.
"""
import hashlib
from pathlib import Path

from support.command import UserError

BOX = Path(__file__).resolve().parent.parent / "weights" / "cxr128.pt"
BOX_SHA256 = "ec259d38292596ab78aaab9067886d429714b96385758a2539bbb4b13ed90ccb"
ABOUT = ("the model in the box (weights/README.md): chest X-rays at 128 px and nothing else, not "
         "for clinical use")


def find_box():
    """The path of the box; UserError if it is missing, or not the file that this code knows."""
    do = "restore it with: git checkout weights/cxr128.pt, or train: python train.py --data cxr"
    if not BOX.is_file():
        raise UserError(f"there is no {BOX}", "the model in the box is needed", do)
    if hashlib.sha256(BOX.read_bytes()).hexdigest() != BOX_SHA256:
        raise UserError(f"{BOX} was changed (another SHA-256)",
                        "the file of this version is needed", do)
    return BOX


def note_colour(images):
    """Say that the box knows only chests, if one of the images (3, H, W) in [-1, 1] has colour."""
    if any((x.amax(0) - x.amin(0)).max() > 0.1 for x in images):
        print("note: the source has colours: the model in the box knows only chest X-rays, and "
              "makes one of whatever it is shown")
