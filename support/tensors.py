"""Files of tensors, read and written without executing anything in them.

    read_tensors("weights.safetensors")     # or .bin .pt .pth .ckpt, or an index.json of several
    write_safetensors("weights.safetensors", {"weight": torch.zeros(2, 3)})

A damaged file is a ValueError of one line (got, need, do), a missing one a FileNotFoundError.
"""
import argparse
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from support.command import one_line
from support.files import atomic_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32}


def read_tensors(path):
    """What is in a file of weights, or in all files of an index.json: a dict."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".json":
        return read_shards(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # flags, in DINO's files
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except Exception as error:  # a damaged file makes torch.load raise nearly any type
        reason = one_line(error).split(". ")[0][:160]
        raise ValueError(
            f"{path} is not a file of plain tensors ({type(error).__name__}: {reason}): a whole "
            "state dict without code is needed: download it again, or save it with "
            "torch.save(model.state_dict(), path)") from error
    return content


def read_shards(path):
    """All tensors of the files that an index.json names: {"weight_map": {tensor: file}}."""
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(file).name != file or file.endswith(".json") for file in files):
            raise ValueError("it names files of another kind or folder")
    except Exception as error:  # whatever else stands in the file
        raise ValueError(f"{path} is not an index of weights ({error!r}): one as published is "
                         "needed: download it again") from error

    tensors = {}
    for file in files:
        if not (path.parent / file).is_file():
            raise FileNotFoundError(f"{path.parent / file} is missing: all {len(files)} files that "
                                    f"{path.name} names are needed: download it too")
        tensors |= read_tensors(path.parent / file)
    return tensors


def read_safetensors(path):
    """All tensors of a .safetensors file: name -> tensor. Raises ValueError if it is not whole.

    Layout: length of the header (u64, little endian); the header, JSON: name -> dtype, shape and
    byte range; then the raw tensors without gaps.
    """
    tensors = {}
    end = 0
    try:
        data = np.memmap(path, mode="c")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = DTYPES[entry["dtype"]]
            first, stop = entry["data_offsets"]
            if first != end or stop - first != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"the byte range of {name} is wrong")
            raw = torch.from_numpy(data)[start + first:start + stop].clone()
            tensors[name] = raw.view(dtype).reshape(entry["shape"])
            end = stop
        if start + end != len(data):
            raise ValueError(f"{len(data)} bytes where the header needs {start + end}")
    except Exception as error:  # a damaged header raises nearly any type
        raise ValueError(f"{path} is not a whole safetensors file ({error!r}): one as published is "
                         "needed: download it again") from error
    return tensors


def write_safetensors(path, state):
    """Write a dict of tensors as read_safetensors reads them; readers see a whole file."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
