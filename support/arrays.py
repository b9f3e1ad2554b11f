"""Images in the arrays of .npz and .h5 files, read one by one: arrays are not held in memory.

    rows = open_member("chestmnist_128.npz", "train_images")      # rows.shape, rows.dtype, rows[i]

What an .npz stores plainly is read where it lies. What is packed is unpacked anew for each row,
from the nearest of the places 1 MiB apart where that was interrupted; their states take 4 % of the
size.
"""
import bisect
import os
import zipfile
import zlib

import numpy as np

STEP = 1 << 20   # unpacked bytes between two places to unpack from
CHUNK = 1 << 16  # packed bytes read at once


class StoredRows:
    """An array at a place of a file, read by rows; not mapped, which would count as memory."""

    def __init__(self, path, offset, shape, dtype):
        self.place = (path, offset, shape, dtype)
        self.offset = offset
        self.shape = shape
        self.dtype = dtype
        self.size = int(np.prod(shape[1:])) * dtype.itemsize  # bytes of a row
        self.file = open(path, "rb")

    def __getitem__(self, i):
        raw = os.pread(self.file.fileno(), self.size, self.offset + int(i) * self.size)
        return np.frombuffer(raw, self.dtype).reshape(self.shape[1:]).copy()

    def __reduce__(self):  # for worker processes: the place, not the pixels
        return StoredRows, self.place


class PackedRows:
    """An array packed by DEFLATE at a place of a file, read by rows; `skip` bytes precede it."""

    def __init__(self, path, offset, packed_size, skip, shape, dtype):
        self.place = (path, offset, packed_size, skip, shape, dtype)
        self.shape = shape
        self.dtype = dtype
        self.end = offset + packed_size
        self.skip = skip
        self.file = open(path, "rb")
        self.states = [(0, offset, zlib.decompressobj(-zlib.MAX_WBITS))]
        self.last = self.states[0]  # (bytes unpacked, place in the file, state), as in states

    def __getitem__(self, i):
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        raw = self._read(self.skip + int(i) * size, size)
        return np.frombuffer(raw, self.dtype).reshape(self.shape[1:]).copy()

    def _read(self, begin, size):
        """Unpacked bytes; goes on from the row before or from the nearest place."""
        nearest = bisect.bisect_right(self.states, begin, key=lambda state: state[0]) - 1
        start = self.states[nearest]
        if start[0] < self.last[0] <= begin:
            start = self.last
        done, at, state = start
        state = state.copy()

        found = []
        while done < begin + size:
            packed = os.pread(self.file.fileno(), min(CHUNK, self.end - at), at)
            unpacked = state.decompress(packed, min(STEP, begin + size - done))
            if not unpacked and (state.eof or not packed):
                raise ValueError("the array is cut short")
            found.append(unpacked[max(begin - done, 0):])
            done += len(unpacked)
            at += len(packed) - len(state.unconsumed_tail)
            if done >= self.states[-1][0] + STEP:
                self.states.append((done, at, state.copy()))
        self.last = (done, at, state)
        return b"".join(found)

    def __reduce__(self):
        return PackedRows, self.place


def open_member(path, name):
    """Array `name` of an .npz file, by rows.

    Raises nearly anything for a damaged file, ValueError for one that holds objects.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                           else np.lib.format.read_array_header_2_0)
            shape, is_fortran, dtype = read_header(file)
            skip = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds objects, which are not read")

    known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if is_fortran or member.compress_type not in known:  # rare, and not by rows
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]

    # The head of a member in the archive: 30 bytes, its name, and what else the packer wrote.
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        head = file.read(30)
    offset = member.header_offset + 30 + sum(np.frombuffer(head[26:30], "<u2").tolist())
    if member.compress_type == zipfile.ZIP_STORED:
        return StoredRows(path, offset + skip, shape, dtype)
    return PackedRows(path, offset, member.compress_size, skip, shape, dtype)


def check_archive(path):
    """Read all of an .npz; raises ValueError if a checksum does not hold."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} does not hold")


class JoinedRows:
    """Several arrays as one, by rows."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.ends = np.cumsum([array.shape[0] for array in arrays]).tolist()

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        k = bisect.bisect_right(self.ends, i)
        return self.arrays[k][i - (self.ends[k - 1] if k else 0)]


class H5Rows:
    """Row i of the array `x` in an .h5 file; opened anew in each process that reads it."""

    def __init__(self, path, count):
        self.path = path
        self.count = count
        self.file = None
        self.process = None

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if self.process != os.getpid():
            import h5py
            self.file = h5py.File(self.path, "r")
            self.process = os.getpid()
        return self.file["x"][i]

    def __reduce__(self):
        return H5Rows, (self.path, self.count)
