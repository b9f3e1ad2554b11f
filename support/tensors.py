"""Files of tensors, read and written without executing anything in them.

    read_tensors("weights.safetensors")     # or .bin .pt .pth
    write_safetensors("weights.safetensors", {"weight": torch.zeros(2, 3)})
"""
import json
import math
from pathlib import Path

import numpy as np
import torch

from support.command import one_line
from support.files import atomic_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32}


def read_tensors(path):
    """The dict in a file of weights; ValueError if the file is damaged or holds code."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise all kinds of errors
        raise ValueError(
            f"{path} is not a file of plain tensors ({one_line(error)[:120]}): a complete state "
            "dict without code is needed: download it again, or save it with "
            "torch.save(model.state_dict(), path)") from error
    return content


def read_safetensors(path):
    """All tensors of a .safetensors file: name -> tensor.

    Layout: length of the header (u64, little endian); the header, JSON: name -> dtype, shape and
    byte range; then the raw tensors without gaps.
    """
    tensors = {}
    end = 0
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
    return tensors


def write_safetensors(path, state):
    """Write a dict of tensors in that layout, atomically."""
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
