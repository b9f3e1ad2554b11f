"""Where random numbers come from."""
import hashlib


def step_seed(*parts):
    """A 63-bit seed that depends on every part, e.g. (seed, stage, step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
