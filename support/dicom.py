"""DICOM files, through the package pydicom: one grey or RGB picture, windowed to [0, 1]."""
import numpy as np

DICOM_SUFFIXES = {".dcm", ".dicom"}


def read_header(path):
    """The pydicom data set of a file, without its pixels."""
    import pydicom
    return pydicom.dcmread(path, stop_before_pixels=True)


def decode_dicom(path):
    """DICOM file -> (H, W) or (H, W, 3) in [0, 1], where dense is bright.

    The file's lookup tables or window apply, else the percentiles 0.5 and 99.5 are black and white.
    Raises ValueError for several frames. Source: DICOM PS3.3 C.11.
    """
    import pydicom
    dicom = pydicom.dcmread(path)
    raw = dicom.pixel_array
    if dicom.SamplesPerPixel == 3 and raw.ndim == 3:
        return raw / (2.0 ** dicom.BitsStored - 1)
    if raw.ndim != 2:
        raise ValueError(f"it has {len(raw)} frames, not one picture")

    values = pydicom.pixels.apply_modality_lut(raw, dicom)
    low, high = np.percentile(values[raw != dicom.get("PixelPaddingValue")], (0.5, 99.5))
    if dicom.get("VOILUTSequence"):
        values = pydicom.pixels.apply_voi_lut(values, dicom)
        low, high = 0, 2.0 ** int(dicom.VOILUTSequence[0].LUTDescriptor[2]) - 1
    elif dicom.get("WindowWidth") is not None:
        with np.errstate(over="ignore"):
            values = pydicom.pixels.apply_voi_lut(values, dicom)
            low, high = pydicom.pixels.apply_voi_lut(np.array([-1e6, 1e6]), dicom)  # its ends
    grey = ((values - low) / max(high - low, 1e-6)).clip(0, 1)
    if dicom.PhotometricInterpretation == "MONOCHROME1":  # zero is white
        grey = 1 - grey
    return np.where(raw == dicom.get("PixelPaddingValue"), 0, grey)
