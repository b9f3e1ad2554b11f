"""DICOM files, behind the package pydicom: one picture of grey or RGB, windowed to [0, 1].

Values are rescaled as the file says and windowed by its own window, else its table of grey values,
else its percentiles. Dense is bright: MONOCHROME1, whose least value is white, is turned round.
"""
import os
from pathlib import Path

import numpy as np
from PIL import Image

DICOM_SUFFIXES = {".dcm", ".dicom", ".dic", ".ima"}
PERCENTILES = (0.5, 99.5)  # window of a file that brings none


def check_size(width, height):
    """Raise ValueError for pixels that would fill the memory; from twice that, Pillow refuses."""
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width:,} x {height:,} pixels are too many")


def is_dicom(path):
    """Whether a file is DICOM by its suffix, or has none (or digits of an id) and the magic word.
    """
    suffix = Path(path).suffix.lower()
    if suffix in DICOM_SUFFIXES:
        return True
    if suffix.strip(".0123456789") or os.path.islink(path) or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def has_pydicom():
    try:
        import pydicom  # noqa: F401
    except ImportError:
        return False
    return True


def open_dicom(path, **options):
    """The pydicom data set of a file with one picture; ValueError for others."""
    import pydicom
    dicom = pydicom.dcmread(path, **options)
    frames = int(dicom.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ValueError(f"it has {frames} frames, one picture is needed")
    check_size(int(dicom.Columns), int(dicom.Rows))
    return dicom


def patient_of(path):
    """The patient's id in the head of a file, or ""."""
    head = open_dicom(path, stop_before_pixels=True)
    return str(head.get("PatientID") or "").strip()


def decode_dicom(path):
    """DICOM file -> (H, W) or (H, W, 3) in [0, 1]; bright is dense, whatever the file says."""
    from pydicom import pixels
    dicom = open_dicom(path)
    values = np.asarray(pixels.pixel_array(dicom))
    if values.ndim == 3:
        return values / np.float32(2 ** int(dicom.BitsStored) - 1)
    if dicom.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"{dicom.PhotometricInterpretation} is neither grey nor RGB")

    # Padding around the picture is neither part of it nor of its range.
    padding = dicom.get("PixelPaddingValue")
    is_padding = np.zeros(values.shape, bool) if padding is None else values == padding
    values = np.asarray(pixels.apply_modality_lut(values, dicom), np.float64)

    shown = _apply_window(values, dicom, is_padding)
    if dicom.PhotometricInterpretation == "MONOCHROME1":  # the least value is white
        shown = 1 - shown
    return np.where(is_padding, 0, shown)


def _apply_window(values, dicom, is_padding):
    """Values -> [0, 1] by the file's window, else its table of grey values, else percentiles."""
    from pydicom import pixels
    center, width = (np.atleast_1d(dicom.get(name, None))[0]
                     for name in ("WindowCenter", "WindowWidth"))
    function = dicom.get("VOILUTFunction") or "LINEAR"
    if center is not None and width is not None and width >= 1:
        center = float(center)
        width = float(width)
        if function == "SIGMOID":
            return 1 / (1 + np.exp(-4 * (values - center) / width))
        if function == "LINEAR":  # counts in whole values (DICOM PS3.3 C.11.2.1.2.1)
            center -= 0.5
            width = max(width - 1, 1e-6)
        return ((values - center) / width + 0.5).clip(0, 1)

    if dicom.get("VOILUTSequence"):
        bits = int(dicom.VOILUTSequence[0].LUTDescriptor[2])
        return pixels.apply_voi_lut(values.astype(np.int64), dicom) / (2.0 ** bits - 1)
    low, high = np.percentile(values[~is_padding], PERCENTILES)
    return ((values - low) / max(high - low, 1e-6)).clip(0, 1)
