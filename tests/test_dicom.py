"""dicom.py: rescale, windows, MONOCHROME1; what is refused, and the package that is needed."""
import sys

import numpy as np
import pytest
import torch

from support.command import UserError
from support.images import image_shape, load_image, scan_folder


def dicom(path, grey, bits=12, **fields):
    """A DICOM file of grey in [0, 1], or of whole values as they are."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    values = grey if grey.dtype.kind in "iu" else np.round(grey * (2 ** bits - 1)).astype(np.uint16)
    file.SOPClassUID = meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    file.PhotometricInterpretation = "MONOCHROME2"
    file.SamplesPerPixel = 1
    file.Rows, file.Columns = values.shape[-2:]
    file.BitsAllocated = 16
    file.BitsStored = bits
    file.HighBit = bits - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    file.PixelData = values.tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


GREY = np.linspace(0, 1, 1024).reshape(32, 32)
WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


@pytest.mark.parametrize("grey, bits, fields", [
    (GREY, 12, WINDOW), (1 - GREY, 12, {**WINDOW, "PhotometricInterpretation": "MONOCHROME1"}),
    (GREY, 12, {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 3072,
                "WindowWidth": 8192}),
    (GREY, 12, {**WINDOW, "PixelPaddingValue": 0}),
    (np.int16(GREY * 4095 - 2048), 16, {"WindowCenter": 0, "WindowWidth": 4096}),
    (GREY, 12, {"WindowCenter": [2048, 100], "WindowWidth": [4096, 1]}),
    (GREY * 0.1, 16, {}), (1 - GREY, 16, {"PhotometricInterpretation": "MONOCHROME1"})])
def test_dicom_is_windowed(tmp_path, grey, bits, fields):
    """Rescale, the file's first window, MONOCHROME1, signed values; percentiles without a window,
    by suffix, or by the magic word in a name without one."""
    want = torch.from_numpy(GREY * 2 - 1)
    limit = 0.002 if fields.get("WindowWidth") else 0.03
    for name in ("x.dcm", "1.2.840.113", "IM0001"):
        x = load_image(dicom(tmp_path / name, grey, bits, **fields), 32)
        assert x.shape == (3, 32, 32) and (x[0] - want).abs().max() < limit
    assert len(scan_folder(tmp_path)[0]) == 3


def test_dicom_that_is_refused(tmp_path, monkeypatch):
    """Several frames, a cut file, and a missing package: one line that says so."""
    frames = dicom(tmp_path / "many.dcm", np.zeros((2, 8, 8), np.uint16), NumberOfFrames=2)
    cut = dicom(tmp_path / "cut.dcm", GREY)
    cut.write_bytes(cut.read_bytes()[:-500])
    with pytest.raises(UserError, match="many.dcm .*2 frames"):
        load_image(frames, 8)
    with pytest.raises(UserError, match="cut.dcm"):
        load_image(cut, 8)
    assert image_shape(frames) == (8, 8)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match="pip install pydicom"):
        load_image(cut, 8)


def test_a_table_of_grey_values(tmp_path):
    """VOI LUT: a table of 12 bits that inverts the grey values."""
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    table.add_new("LUTData", "US", [4095 - i for i in range(4096)])
    x = load_image(dicom(tmp_path / "x.dcm", GREY, VOILUTSequence=[table]), 32)[0]
    assert (x - torch.from_numpy(1 - GREY * 2)).abs().max() < 0.01
