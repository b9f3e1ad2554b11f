"""What every script needs: one-line errors, number flags, tables, progress."""
import argparse
import re
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta


def one_line(text):
    """The text with line ends and control characters replaced by spaces."""
    return "".join(c if c.isprintable() else " " for c in str(text))


class UserError(Exception):
    """An error that the user can fix: one line in three parts, got, need, do."""

    def __init__(self, *parts):
        super().__init__(one_line(": ".join(map(str, parts))))


class Stopped(Exception):
    """A run was stopped by Ctrl-C or SIGTERM: args[0] is the signal's number."""


@contextmanager
def user_errors(*parts):
    """Inside, ValueError and OSError become a UserError that ends in `parts`."""
    try:
        yield
    except (ValueError, OSError, EOFError) as error:
        raise UserError(error, *parts) from error


def run_script(main):
    """Call main(). A UserError becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        return main()
    except UserError as error:
        # From a DataLoader's process the text begins with a traceback.
        text = str(error).rpartition("support.command.UserError: ")[2].strip()
    except OSError as error:
        text = one_line(f"{error}: a writable folder with free space is needed: make space, or "
                        "pass another --out")
    except (MemoryError, RuntimeError) as error:
        no_memory = r"out of memory|allocate memory|DataLoader worker \(pid"
        if isinstance(error, RuntimeError) and not re.search(no_memory, str(error)):
            raise  # a bug keeps its traceback
        text = "out of memory: a batch must fit: lower --batch, --size or --count"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def number(kind, low=0, high=2 ** 63 - 1):
    """A type for argparse: `kind` (int or float) from low to high."""
    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        need = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r}: need a {need} from {low:g} to {high:g}")
    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None and False."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


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

    A terminal shows it in place; a file gets a line every ten seconds and one at the end.
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
        """`step` steps are done. loss, images: mean and number since the last call."""
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
