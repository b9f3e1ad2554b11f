"""Tests of support/tensors.py: files of tensors, complete and damaged."""
import json
import struct

import numpy as np
import pytest
import torch

from support.tensors import read_tensors, write_safetensors


def by_hand(path, arrays):
    """A .safetensors file from numpy arrays: length, header, bytes."""
    kinds = {"float32": "F32", "float16": "F16", "int64": "I64"}
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        raw = array.tobytes()
        header[name] = {"dtype": kinds[str(array.dtype)], "shape": list(array.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors_round_trip(tmp_path):
    """Every dtype, scalars and empty tensors come back, from files by hand and from our own."""
    path = tmp_path / "w.safetensors"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.float16([0.5, -2]),
              "odd": np.float16([1.0]), "long": np.array(2**40),
              "none": np.zeros((0, 3), np.float32)}
    by_hand(path, arrays)
    tensors = read_tensors(path)
    write_safetensors(path, tensors)
    for found in (tensors, read_tensors(path)):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].numpy().dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)

    state = {"b": torch.tensor([1.5], dtype=torch.bfloat16), "t": torch.rand(3, 2).T}
    write_safetensors(path, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_tensors(path).items())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_refuses_malformed_safetensors(tmp_path):
    """Truncated, over-long, overlapping, mistyped or mis-shaped files are refused."""
    path = tmp_path / "w.safetensors"
    by_hand(path, {"a": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)})
    good = path.read_bytes()

    def with_header(data=bytes(24), **changes):
        header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                  "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]} | changes}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    path.write_bytes(with_header())
    assert set(read_tensors(path)) == {"a", "b"}  # the helper's unchanged file is fine
    for content in (good[:-1], good + b"x", struct.pack("<Q", 2**63) + good[8:],
                    good[:8] + b"x" + good[9:], with_header(dtype="F99"), with_header(shape=[3]),
                    with_header(shape=[4], data_offsets=[8, 24]),
                    with_header(shape=[200], data_offsets=[16, 816])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a file of plain tensors.*download it again"):
            read_tensors(path)
