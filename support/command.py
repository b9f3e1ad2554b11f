"""What every script of this project needs: one-line errors, flags, the device, progress.

What a user can cause ends as a `UserError` of one line in three parts: got, need, do.
"""
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


MEMORY_FLAGS = ("--batch, --vae-batch, --embedder-batch, --workers, --size or --count, raise "
                "--accumulate, pass --checkpointing, or take a smaller --preset, as far as this "
                "script has them")


def run_script(main):
    """Call main(); what the user caused becomes one line and exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):  # a console of few letters shows ? for the others
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return main()
    except UserError as error:
        # Out of a DataLoader's process the text carries a traceback: the line is at its end.
        text = str(error).rpartition("support.command.UserError: ")[2].strip()
    except OSError as error:
        text = one_line(f"{error}: a writable place with space is needed: mend it, and start again")
    except (MemoryError, RuntimeError) as error:
        text = _why_stopped(error)
        if text is None:
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def _why_stopped(error):
    """One line for a full memory or a lost process; None for a fault of ours."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return ("another process of this run has ended: all are needed: see what it said, mend "
                "that, and start all again")
    is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if is_full or "allocate memory" in str(error):
        return f"the memory is full: a batch must fit: lower {MEMORY_FLAGS}"
    return None


# ---- flags -------------------------------------------------------------------------------------

def _number(kind, low, high, need):
    """A type for argparse: numbers from low to high."""
    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {need}")
    return parse

def number(kind, low=0, high=float("inf")):
    """A type for argparse: `kind` (int or float) from low to high."""
    need = f"a {'whole ' if kind is int else ''}number from {low:g}" + (
        f" to {high:g}" if high < float("inf") else " up")
    return _number(kind, low, high, need)


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


# ---- the machine -------------------------------------------------------------------------------

def pick_device(name="auto"):
    """The torch.device of that name; "auto" takes CUDA, then MPS, then the CPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found = ["cpu", *gpus]
    if torch.backends.mps.is_available():
        found.insert(0, "mps")
    if gpus:
        found.insert(0, "cuda")
    name = found[0] if name == "auto" else name

    # Of several processes each takes its own GPU; torch.distributed knows no "mps".
    if ranks() > 1:
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
    is_native = False
    cpu = Path("/proc/cpuinfo")  # torch offers no public question about CPUs
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and cpu.exists():
        is_native = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu.read_text().split())
    return torch.bfloat16 if is_native else torch.float32


# ---- what people see ---------------------------------------------------------------------------

def print_table(rows):
    """Print rows {name: {column: value}}; a value is a number, a list (an interval), text or None.
    """
    def text(value):
        if isinstance(value, list):
            return " to ".join(map(text, value))
        if isinstance(value, str):
            return value
        return "" if value is None else f"{value:.4g}"

    heads = dict.fromkeys(column for row in rows.values() for column in row)
    table = [["", *heads]]
    for name, row in rows.items():
        table.append([name, *(text(row.get(head)) for head in heads)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


class StatusLine:
    """One line of progress: label, step, percent, smoothed loss, images per second, time left.

    A terminal shows it in place; a file gets a line every ten seconds and at the end.
    """

    def __init__(self, total, label, start=0):
        self.total = total
        self.label = label
        self.start = start  # steps that an earlier run has done
        self.terminal = sys.stdout.isatty()
        self.images = 0
        self.loss = None
        self.began = self.printed = time.monotonic()

    def update(self, step, loss=None, images=0):
        """Say that `step` steps are done, with the loss and the number of images of the last."""
        self.images += images
        if loss is not None:
            self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        now = time.monotonic()
        pause = 0.2 if self.terminal else 10  # seconds between two lines
        if step < self.total and now - self.printed < pause:
            return
        self.printed = now

        seconds = max(now - self.began, 1e-9)
        left = round(seconds / max(step - self.start, 1) * (self.total - step))
        line = f"{self.label} {step}/{self.total}  {100 * step // self.total} %"
        if self.loss is not None:
            line += f"  loss {self.loss:.4f}"
        if self.images:
            line += f"  {self.images / seconds:.1f} images/s"
        line += f"  ETA {timedelta(seconds=left)}"
        if self.terminal:
            print(f"\r{line}\033[K", end="", flush=True)  # \033[K clears the rest of the line
        else:
            print(line, flush=True)

    def close(self):
        """End the line on a terminal."""
        if self.terminal:
            print()
