"""What every script needs: errors of one line, number flags, the device, tables, progress."""
import argparse
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch

from support.ranks import ranks


def one_line(text):
    """The text with spaces in place of line ends and control characters."""
    return "".join(c if c.isprintable() else " " for c in str(text))


class UserError(Exception):
    """A mistake that a user can fix: one line in three parts, got, need, do."""

    def __init__(self, *parts):
        super().__init__(one_line(": ".join(map(str, parts))))


@contextmanager
def user_errors(*parts):
    """Inside, errors of damaged files and full disks become a UserError that ends in `parts`."""
    try:
        yield
    except (ValueError, OSError, EOFError) as error:
        raise UserError(error, *parts) from error


class Output:
    """A stream that outlives its reader: `train.py | head` must not end a training."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: closed from the start, by >&-

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # the reader is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_script(main):
    """Call main(). A user's mistake becomes one line and exit code 2, Ctrl-C exit code 130."""
    sys.stdout = Output(sys.stdout)
    sys.stderr = Output(sys.stderr)
    try:
        return main()
    except UserError as error:
        # From a DataLoader's process the text carries a traceback; the message is at its end.
        text = str(error).rpartition("support.command.UserError: ")[2].strip()
    except OSError as error:
        text = one_line(f"{error}: a writable place with space is needed: fix it, and start again")
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_full and not re.search(r"allocate memory|DataLoader worker \(pid", str(error)):
            raise  # a bug keeps its traceback
        text = ("the memory is full: a batch must fit: lower --batch, --size or --count, or take "
                "a smaller --preset, where the script has these flags")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def number(kind, low=0, high=float("inf")):
    """A type for argparse: `kind` (int or float) from low to high."""
    def parse(text):
        with suppress(ValueError, OverflowError):
            value = kind(text)
            if low <= value <= high and abs(value) < float("inf"):
                return value
        limits = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
        kind_name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {kind_name} {limits}")
    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None and False."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def pick_device(name="auto"):
    """The torch.device of that name; "auto" takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available() and ranks() == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and ranks() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each process takes its own GPU
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} ({str(error).splitlines()[0]})",
                        "cpu, or a GPU of this machine",
                        "pass --device auto, or start fewer processes") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def autocast_dtype(device, dtype="auto"):
    """torch.bfloat16 or torch.float32; "auto" takes bfloat16 where the hardware computes in it."""
    if dtype != "auto":
        return {"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    is_native = False
    cpu = Path("/proc/cpuinfo")  # torch cannot be asked about CPUs
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and cpu.exists():
        is_native = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu.read_text().split())
    return torch.bfloat16 if is_native else torch.float32


def print_table(rows):
    """Print {row: {column: value}}; a value is a number, an interval (a list), text or None."""
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
        self.start = start  # steps done by an earlier run
        self.terminal = sys.stdout.isatty()
        self.images = 0
        self.loss = None
        self.began = self.printed = time.monotonic()

    def update(self, step, loss=None, images=0):
        """Show that `step` steps are done, with the loss and the number of images of the last."""
        self.images += images
        if loss is not None:
            self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        now = time.monotonic()
        if step < self.total and now - self.printed < (0.2 if self.terminal else 10):
            return
        self.printed = now

        seconds = max(now - self.began, 1e-9)
        left = round(seconds / max(step - self.start, 1) * (self.total - step))
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        speed = f"  {self.images / seconds:.1f} images/s" if self.images else ""
        line = (f"{self.label} {step}/{self.total}  {100 * step // self.total} %{loss}{speed}"
                f"  ETA {timedelta(seconds=left)}")
        print(f"\r{line}\033[K" if self.terminal else line,  # \033[K clears the rest of the line
              end="" if self.terminal else "\n", flush=True)

    def close(self):
        """End the line on a terminal."""
        if self.terminal:
            print()
