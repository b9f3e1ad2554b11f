"""support/command.py: errors of one line, flags, the device, the status line, tables."""
import argparse
import gc
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from support import command
from support.command import UserError
from support.datasets import open_dataset


@pytest.mark.parametrize("error, code, words", [
    (UserError("side 250", "64", "pass 256"), 2, "error: side 250: 64: pass 256\n"),
    (UserError("Caught in worker\nTraceback\nsupport.command.UserError: bad file"), 2,
     "error: bad file\n"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory"), 2, "--batch"),
    (KeyboardInterrupt(), 130, "")])
def test_run_script(capsys, error, code, words):
    """User errors are one line and code 2, Ctrl-C is 130; only user_errors turns other errors."""
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        command.run_script(main)
    text = capsys.readouterr().err
    assert end.value.code == code and words in text and text.count("\n") == (code == 2)
    with pytest.raises(ValueError):
        command.run_script(lambda: int("x"))
    with pytest.raises(UserError, match="invalid literal"), command.user_errors():
        int("x")


def test_a_worker_error_is_one_line(tmp_path, capsys):
    """A bad image met in a DataLoader worker ends a script with one line and code 2."""
    path = tmp_path / "a.png"
    Image.fromarray(np.full((64, 64), 10, np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-30])  # a good header, cut pixels
    loader = torch.utils.data.DataLoader(open_dataset(str(tmp_path), 8), num_workers=1)

    def main():
        return list(loader)

    with pytest.raises(SystemExit) as end:
        command.run_script(main)
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("\n") == 1
    assert text.startswith("error: ") and "a.png" in text and "Traceback" not in text
    del end  # its traceback holds the iterator, whose end waits for its process
    gc.collect()


@pytest.mark.parametrize("kind, good, bad", [
    (command.positive_int, "3", ("0", "-1", "x", "1.5")),
    (command.not_negative_int, "0", ("-1", "x")),
    (command.positive_float, "1e-4", ("0", "nan", "inf")),
    (command.not_negative, "0", ("-1", "nan")),
    (command.share_above_zero, "1", ("0", "1.1")), (command.fraction, "0.15", ("1.1", "-0.1", ""))])
def test_number_flags(kind, good, bad):
    """Each argparse type takes its range and refuses the rest in words."""
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="pass"):
            kind(text)


def test_devices():
    """auto always finds one; absent and unknown devices are user errors."""
    assert command.pick_device("cpu") == torch.device("cpu") and command.pick_device("auto")
    for name in ("tpu", "cuda:99", ""):
        with pytest.raises(UserError, match="--device"):
            command.pick_device(name)
    assert command.autocast_dtype(torch.device("cpu"), "bf16") == torch.bfloat16
    assert command.autocast_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


def test_status_line(monkeypatch, capsys):
    """Into a file: a line per ten seconds and one at the end, with loss, speed and time left."""
    clock = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    status = command.StatusLine(400, "vae")
    for step in range(1, 121):
        clock[0] += 0.125  # exact in binary
        status.update(step, loss=1.0 if step <= 40 else 2.0, images=16)
    label, percent, loss, speed, left = capsys.readouterr().out.split("  ")  # one line in 15 s
    assert (label, percent, speed, left) == ("vae 80/400", "20 %", "128.0 images/s",
                                             "ETA 0:00:40\n")
    assert abs(float(loss.split()[1]) - (2 - 0.98 ** 40)) < 1e-3  # smoothed over 50
    status.update(400)
    assert "400/400  100 %" in capsys.readouterr().out
    resumed = command.StatusLine(10_000, "unet", start=5000)
    clock[0] += 20
    resumed.update(5010)
    assert capsys.readouterr().out == "unet 5010/10000  50 %  ETA 2:46:20\n"  # 4,990 steps of 2 s


def test_status_line_on_a_terminal(monkeypatch):
    """On a terminal the line is drawn over itself, and ends when it is closed."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    status = command.StatusLine(2, "vae")
    status.printed -= 1
    status.update(1, loss=100.0)
    status.update(2)
    status.close()
    assert screen.getvalue().count("\n") == 1 and screen.getvalue().count("\r") == 2


def test_tables_line_up(capsys):
    """Numbers have four digits, intervals two ends, what is missing stays empty."""
    command.print_table({"a": {"Dice": 0.84412, "95 %": [0.8, 0.9]}, "long name": {"Dice": None}})
    assert capsys.readouterr().out.splitlines() == [
        "           Dice    95 %", "a          0.8441  0.8 to 0.9", "long name"]


def test_a_console_of_few_letters_does_not_crash(monkeypatch):
    """What the console's encoding lacks is replaced."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    command.run_script(lambda: print("Röntgen \u2192"))
    sys.stdout.flush()
    assert raw.getvalue().decode() == "R?ntgen ?\n"
