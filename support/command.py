"""What every script of this project needs: one-line errors, flags, the device, progress."""
import argparse
import os
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.ranks import ranks


def one_line(text):
    """The text without line ends, codes that steer a terminal, and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else " " for c in str(text))


class UserError(Exception):
    """What a user can cause and mend: one line in three parts, got, need, do."""

    def __init__(self, *parts):
        super().__init__(one_line(": ".join(map(str, parts))))


@contextmanager
def user_errors(*parts):
    """Turn what damaged files and full disks raise inside into a UserError, which ends in parts."""
    try:
        yield
    except (ValueError, OSError, EOFError) as error:
        raise UserError(error, *parts) from error


def run_script(main):
    """Call main(); what the user caused becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        return main()
    except UserError as error:  # out of a DataLoader worker it carries a traceback: its end only
        text = str(error).rpartition("support.command.UserError: ")[2].strip()
    except OSError as error:
        text = one_line(f"{error}: a writable place with space is needed: mend it, and start again")
    except (MemoryError, RuntimeError) as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        full = (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or "allocate memory" in str(error))
        if not (lost or full):
            raise
        text = ("another process of this run has ended: all are needed: see what it said, mend "
                "that, and start all again") if lost else (
                "the memory is full: a batch must fit: lower --batch, --vae-batch or "
                "--embedder-batch, --workers, --size or --count, raise --accumulate, or take a "
                "smaller --preset")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def _number(kind, low, high, need):
    """A type for argparse: numbers from low to high."""
    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {need}")
    return parse

positive_int = _number(int, 1, 10**7, "a whole number: pass 1 to 10,000,000")
batch_int = _number(int, 1, 2**16, "a whole number: pass 1 to 65,536")
workers_int = _number(int, 0, 256, "a whole number: pass 0 to 256")
seed_int = _number(int, 0, 2**32, "a whole number: pass 0 to 4,294,967,296")
not_negative_int = _number(int, 0, 2**63 - 1, "a whole number: pass 0 or more")
positive_float = _number(float, 1e-30, 1e30, "a number: pass above 0")
not_negative = _number(float, 0, 1e30, "a number: pass 0 or more")
fraction = _number(float, 0, 1, "a number from 0 to 1: pass e.g. 0.15")
share_above_zero = _number(float, 1e-30, 1, "above 0 and at most 1: pass e.g. 0.6")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one worth showing."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def pick_device(name="auto"):
    """The torch.device of that name; "auto" takes CUDA, then MPS, then the CPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found = ["cuda"] * bool(gpus) + ["mps"] * torch.backends.mps.is_available() + ["cpu", *gpus]
    name = found[0] if name == "auto" else name
    if ranks() > 1:  # each its own GPU; torch.distributed knows no "mps"
        name = {"cuda": f"cuda:{os.environ.get('LOCAL_RANK', 0)}", "mps": "cpu"}.get(name, name)
    if name not in found:
        raise UserError(f"no device {name!r}", f"here are {', '.join(found)}", "pass --device "
                        "auto, or start fewer processes")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def autocast_dtype(device, dtype="auto"):
    """torch.bfloat16 or torch.float32; "auto" takes bfloat16 where the chip computes in it."""
    if dtype != "auto":
        return {"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    native, cpu = False, Path("/proc/cpuinfo")  # torch offers no public question about CPUs
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and cpu.exists():
        native = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu.read_text().split())
    return torch.bfloat16 if native else torch.float32


class StatusLine:
    """One line of progress: label, step, percent, smoothed loss, images per second, time left.

    A terminal shows it in place; a file gets a line every ten seconds and at the end.
    """

    def __init__(self, total, label, start=0):
        self.total, self.label, self.start = total, label, start  # start: done by an earlier run
        self.terminal, self.images, self.loss = sys.stdout.isatty(), 0, None
        self.began = self.printed = time.monotonic()

    def update(self, step, loss=None, images=0):
        """Say that `step` steps are done, with the loss and the number of images of the last."""
        self.images += images
        if loss is not None:
            self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        now = time.monotonic()
        if step < self.total and now - self.printed < (0.2 if self.terminal else 10):
            return
        self.printed, seconds = now, max(now - self.began, 1e-9)
        left = round(seconds / max(step - self.start, 1) * (self.total - step))
        line = f"{self.label} {step}/{self.total}  {100 * step // self.total} %"
        line += f"  loss {self.loss:.4f}" if self.loss is not None else ""
        line += f"  {self.images / seconds:.1f} images/s" if self.images else ""
        line += f"  ETA {timedelta(seconds=left)}"
        start, end = ("\r", "\033[K") if self.terminal else ("", "\n")  # \033[K: clear the rest
        print(f"{start}{line}", end=end, flush=True)

    def close(self):
        """End the line on a terminal."""
        if self.terminal:
            print()
