"""A run survives what happens to it: signals, kill -9, a full disk, a second run, bad numbers.

Each test makes its fault happen, mostly in a child process (a fork, which has torch already), and
then asks whether `--resume` ends bit for bit where a run that was left alone ends.
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from support import cache, run as run_module
from support.command import UserError, run_script
from support.files import load_checkpoint, read_jsonl
from support.run import Run

pytestmark = pytest.mark.usefixtures("small_networks")
STEPS = 3
TINY = ["--data", "phantoms", "--count", "12", "--size", "32", "--batch", "2", "--vae-batch", "2",
        "--embedder-batch", "2", "--steps", str(STEPS), "--grids", "1", "--device", "cpu",
        "--dtype", "float32"]


# ---- tools

class EverLater:
    """In the place of a run's clock: ever more time passes, so every step is saved."""
    now = 1

    def time(self):
        self.now *= 40  # a save may take a twentieth of the time
        return self.now


pipes = {}  # process -> what its output is read from: its disks may be full


def child(folder, *flags, before=lambda: None, argv=TINY):
    """Fork: train in `folder` after before(), which may lay traps. Returns the process id."""
    pipe, output = os.pipe()
    process = os.fork()
    if process:
        os.close(output)
        pipes[process] = open(pipe, errors="replace")
        return process
    code = 99
    try:
        os.close(pipe), os.dup2(output, 1), os.dup2(output, 2), os.close(output)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        run_module.time = EverLater()
        before()
        run_script(lambda: sys.exit(train.main([*argv, *flags, "--out", str(folder)])))
    except SystemExit as end:
        code = end.code
    finally:
        with suppress(OSError):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def end_of(process):
    """(exit code, or minus the signal that ended it; what it wrote)."""
    with pipes.pop(process) as pipe:
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), output


def at_row(stage, step, action):
    """Lay a trap: action(run) right after this row was logged."""
    log = Run.log

    def log_and_act(self, **row):
        log(self, **row)
        if (row["stage"], row["step"]) == (stage, step):
            action(self)
    Run.log = log_and_act


def keep_last_states():
    """Keep a copy of what is saved after the last step of each stage: it is dropped later."""
    save = Run.save

    def save_and_keep(self, stage, step, *rest):
        save(self, stage, step, *rest)
        if step == STEPS:
            shutil.copy(self.folder / "state.pt", f"{self.folder}_{stage}.new")
            os.replace(f"{self.folder}_{stage}.new", f"{self.folder}_{stage}.pt")
    Run.save = save_and_keep


def values(x, name=""):
    """Every tensor and plain value of nested dicts and lists, with its place."""
    if isinstance(x, (dict, list, tuple)):
        for key, item in x.items() if isinstance(x, dict) else enumerate(x):
            yield from values(item, f"{name}.{key}")
    else:
        yield name, x


def content(path):
    """What a checkpoint holds, each value by its place."""
    return dict(values(load_checkpoint(path)))


undisturbed_content = lru_cache(maxsize=None)(content)  # of files that stay as they are


def assert_same_file(mine, theirs):
    """Two checkpoints hold the same tensors, bit for bit, and the same values but for paths."""
    mine, theirs = content(mine), undisturbed_content(theirs)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if torch.is_tensor(value):
            assert torch.equal(value, theirs[name]), name
        elif name.split(".")[-1] not in ("out", "resume", "workers"):
            assert value == theirs[name], name


def rows_of(folder):
    return [{k: v for k, v in row.items() if k != "seconds"}
            for row in read_jsonl(folder / "log.jsonl")]


def assert_same_end(folder, undisturbed):
    """Weights, EMA, optimizer, statistics, sampler, log, split and grid of two runs are equal."""
    assert rows_of(folder) == rows_of(undisturbed)
    assert_same_file(folder / "model.pt", undisturbed / "model.pt")
    assert_same_file(folder / "state.pt", undisturbed / "state.pt")
    for stage in train.STAGES:
        if Path(f"{folder}_{stage}.pt").exists():  # a kill may come between a state and its copy
            assert_same_file(f"{folder}_{stage}.pt", f"{undisturbed}_{stage}.pt")
    for name in ("split.csv", f"grid_{STEPS:06d}.png", "cache/latents.npy", "cache/tokens.npy"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not list(folder.glob(".*.tmp")) and not (folder / "lock").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to, as the others should end. It is made in this process: what
    it has compiled and drawn is there for all forks."""
    folder, began = tmp_path_factory.mktemp("runs") / "undisturbed", time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "time", EverLater())
        patch.setattr(Run, "save", Run.save)  # put back what keep_last_states() changes
        keep_last_states()
        assert train.main([*TINY, "--out", str(folder)]) == 0
    Path(f"{folder}.seconds").write_text(str(time.monotonic() - began))
    return folder


def resume(folder):
    code, output = end_of(child(folder, "--resume", before=keep_last_states))
    assert code == 0, output


# ---- signals

@pytest.mark.parametrize("stage,step,number", [
    ("embedder", 2, signal.SIGTERM), ("vae", STEPS, signal.SIGTERM), ("unet", 1, signal.SIGINT)])
def test_a_signal_saves_and_says_how_to_go_on(undisturbed, tmp_path, stage, step, number):
    """Ctrl-C and SIGTERM at a step of each stage: 130 or 143, one line of advice, and a resumed run
    ends like one that was left alone."""
    folder = tmp_path / "run"

    def before():
        keep_last_states()
        at_row(stage, step, lambda run: os.kill(os.getpid(), number))
    code, output = end_of(child(folder, before=before))
    assert code == 128 + number, output
    assert output.count("stopping:") == 1 and "Traceback" not in output
    assert output.count(f"python train.py --resume --out {folder}") == 1
    resume(folder)
    assert_same_end(folder, undisturbed)


def test_a_signal_to_the_whole_group_spares_the_loaders(undisturbed, tmp_path):
    """A terminal sends Ctrl-C to the processes that read images as well: one message, no traceback,
    code 130; and reading in other processes changes no result."""
    folder = tmp_path / "run"

    def before():
        keep_last_states()
        os.setpgid(0, 0)
        at_row("vae", 2, lambda run: os.killpg(0, signal.SIGINT))
    code, output = end_of(child(folder, "--workers", "2", before=before))
    assert code == 130 and output.count("stopping:") == 1 and "Traceback" not in output, output
    resume(folder)
    assert_same_end(folder, undisturbed)


def test_a_second_signal_ends_at_once_and_spoils_nothing(undisturbed, tmp_path):
    """Twice Ctrl-C while a state is written: dead at once, the state before it is whole."""
    folder = tmp_path / "run"

    def before():
        keep_last_states()
        def impatient(run):
            def write_half(obj, file):
                file.write(b"half")
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            torch.save = write_half
        at_row("vae", 2, impatient)
    assert end_of(child(folder, before=before))[0] == -signal.SIGINT
    assert list(folder.glob(".*.tmp")), "the half state was not on the disk: nothing was tested"
    assert load_checkpoint(folder / "state.pt")["state"]["step"] == 1
    resume(folder)
    assert_same_end(folder, undisturbed)


def test_a_reader_that_goes_away_stops_nothing(tmp_path):
    """`train.py | tee log`, and Ctrl-C ends tee first: the state is saved all the same."""
    folder = tmp_path / "run"

    def before():
        at_row("vae", 2, lambda run: (os.dup2(broken, 1), os.kill(os.getpid(), signal.SIGINT)))
    end, broken = os.pipe()
    os.close(end)
    assert end_of(child(folder, before=before))[0] not in (0, 99)
    assert load_checkpoint(folder / "state.pt")["state"]["step"] == 2


# ---- kill -9

def kill_at_write(number):
    """A trap: kill -9 in the number-th atomic write, its bytes on the disk, its name not yet."""
    replace, left = os.replace, [number]

    def replace_or_die(old, new):
        left[0] -= 1
        if left[0] == 0:
            print(f"killed at {Path(new).name}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
    os.replace = replace_or_die


def test_kill_9_while_a_file_is_written(undisturbed, tmp_path):
    """Killed in the second write of a run, resumed, killed in the fourth, and so on: the same end.
    Settings, log, split, states of all stages, cache, grid and model are among the victims."""
    folder, victims = tmp_path / "run", []
    for number in (1, 2, 5, 6, 8, 7, 9):
        def before(number=number):
            keep_last_states()
            kill_at_write(number)
        code, output = end_of(child(folder, "--resume", before=before))
        assert code == -signal.SIGKILL, output
        victims += [line for line in output.splitlines() if line.startswith("killed at")]
    resume(folder)
    assert_same_end(folder, undisturbed)
    assert {"killed at state.pt"} < set(victims), victims


def test_kill_9_at_random_moments(undisturbed, tmp_path, kills=3, seed=0):
    """Killed at random moments until it is through, resumed each time: the same end."""
    draw, folder, killed = random.Random(seed), tmp_path / "run", 0
    whole = float(Path(f"{undisturbed}.seconds").read_text())
    while killed < kills:
        process = child(folder, "--resume", before=keep_last_states)
        time.sleep(draw.uniform(0.05, 0.8) * whole)
        os.kill(process, signal.SIGKILL)
        if end_of(process)[0] == 0:  # it was through: begin anew
            assert_same_end(folder, undisturbed)
            shutil.rmtree(folder)
        else:
            killed += 1
    resume(folder)
    assert_same_end(folder, undisturbed)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(undisturbed, tmp_path):
    """The same with twenty kills."""
    test_kill_9_at_random_moments(undisturbed, tmp_path, kills=20, seed=1)


# ---- two runs, and a folder that changes

def test_a_folder_takes_one_run_at_a_time(undisturbed, tmp_path):
    """A second run is refused while the first lives and names its process; a killed run's lock, or
    one that names another living process, stops nobody."""
    folder = tmp_path / "run"
    first = child(folder, before=lambda: at_row("vae", 1, lambda run: time.sleep(600)))
    try:
        while not any(row["stage"] == "vae" for row in rows_of(folder)):
            time.sleep(0.05)
        code, output = end_of(child(folder, "--resume"))
    finally:
        os.kill(first, signal.SIGKILL)
        end_of(first)
    assert code == 2 and f"in use by process {first}" in output and "--out" in output
    assert (folder / "lock").read_text() == f"{first}\n"
    (folder / "lock").write_text(f"{os.getpid()}\n")  # as if the number had been given out again
    resume(folder)
    assert rows_of(folder) == rows_of(undisturbed) and not (folder / "lock").exists()


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_folder_that_is_deleted_under_the_run(tmp_path, stage):
    """The run stops with a line that says so, and does not leave half a folder in its place."""
    folder = tmp_path / "run"
    code, output = end_of(child(folder, before=lambda: at_row(
        stage, 1, lambda run: shutil.rmtree(run.folder))))
    assert code == 2 and "was moved or deleted" in output.splitlines()[-1], output
    assert not (folder / "state.pt").exists() and not (folder / "log.jsonl").exists()


# ---- full disks and read-only places

def limit_files(size):
    """No file may grow beyond `size` bytes: writing ends in EFBIG, as on a full disk in ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("stage,size", [("embedder", 10), ("vae", 100_000), ("unet", 2000)])
def test_a_full_disk_leaves_the_last_good_state(undisturbed, tmp_path, stage, size):
    """Too little space for a log row, a cache, a state: one line with what to do, code 2, the state
    before is whole, no half file is left, and with space again the run ends as it should."""
    folder = tmp_path / "run"

    def before():
        keep_last_states()
        at_row(stage, 2, lambda run: limit_files(size))
    code, output = end_of(child(folder, before=before))
    error = output.splitlines()[-1]
    assert code == 2 and "Traceback" not in output, output
    assert error.startswith("error: ") and "File too large" in error and "space" in error
    assert not list(folder.glob(".*.tmp"))
    load_checkpoint(folder / "state.pt")
    resume(folder)
    assert_same_end(folder, undisturbed)


def test_a_disk_that_is_full_for_the_cache(undisturbed, tmp_path):
    """The cache is claimed as a whole before a row is written, not met by SIGBUS half-way."""
    folder = tmp_path / "run"

    def before():
        keep_last_states()
        claim = cache.claim_disk
        cache.claim_disk = lambda path: (limit_files(500), claim(path))
    code, output = end_of(child(folder, before=before))
    assert code == 2 and "make space" in output.splitlines()[-1], output
    resume(folder)
    assert_same_end(folder, undisturbed)


def test_a_real_disk_that_is_full(undisturbed, tmp_path):
    """The same on a file system where the U-Net's next state has no place, where the machine lets a
    test mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount") or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk],
            capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")

    def fill(run):
        free = os.statvfs(disk)
        (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 2 ** 19))
    try:
        folder = disk / "run"
        code, output = end_of(child(folder, before=lambda: at_row("unet", 2, fill)))
        assert code == 2 and "No space left" in output and "Traceback" not in output, output
        assert load_checkpoint(folder / "state.pt")["state"]["stage"] == "unet"
        shutil.copytree(folder, tmp_path / "larger")
    finally:
        subprocess.run(["umount", disk], check=True)
    resume(tmp_path / "larger")
    assert rows_of(tmp_path / "larger") == rows_of(undisturbed)


@pytest.mark.parametrize("place", ["FILE/run", "/proc/run", "FILE"])
def test_places_where_nothing_can_be_written(tmp_path, place):
    """A read-only place and one below a file are refused with what to pass instead."""
    (tmp_path / "FILE").write_text("x")
    with pytest.raises(UserError, match="--out"):
        train.main([*TINY, "--out", place.replace("FILE", str(tmp_path / "FILE"))])


# ---- what a resume finds

@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """A run that was stopped in the VAE's second step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert end_of(child(folder, before=lambda: at_row(
        "vae", 2, lambda run: os.kill(os.getpid(), signal.SIGTERM))))[0] == 143
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of that run to spoil."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


@pytest.mark.parametrize("damage,says", [
    ("cut", "state.pt cannot be read"), ("bit", "state.pt cannot be read"),
    ("empty", "state.pt cannot be read"), ("version", "its version is 0"),
    ("other settings", "was made with size 64"), ("not a state", "lacks finished, state"),
    ("config", "config.json is damaged"), ("no dict", "config.json is damaged")])
def test_a_damaged_run_is_not_resumed(stopped, damage, says):
    """Cut, flipped, emptied and foreign states and settings each get one error that names the file,
    and nothing of the folder is changed."""
    state, config = stopped / "state.pt", stopped / "config.json"
    content, whole = state.read_bytes(), torch.load(state, weights_only=True)
    if damage in ("cut", "bit", "empty"):
        middle = len(content) // 2
        state.write_bytes({"cut": content[:middle], "empty": b"", "bit": content[:middle] + bytes(
            [content[middle] ^ 1]) + content[middle + 1:]}[damage])
    elif damage in ("config", "no dict"):
        config.write_text(config.read_text()[:100] if damage == "config" else "[1, 2]")
    else:
        torch.save({"version": {**whole, "version": 0}, "not a state": {"version": 2},
                    "other settings": {**whole, "config": {**whole["config"], "size": 64}}}[damage],
                   state)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=says):
        train.main(["--resume", "--out", str(stopped)])
    after = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert {**after, stopped / "lock": b""} == {**before, stopped / "lock": b""}


@pytest.mark.parametrize("flags,says", [
    (["--size", "64"], "--size 64 differs"),
    (["--embedder", "random"], "--embedder random differs"),
    (["--tokens", "cls"], "--tokens cls differs"), (["--seed", "7"], "--seed 7 differs")])
def test_a_resume_keeps_its_settings(stopped, flags, says):
    """Another image size, embedder, token choice or seed is refused."""
    with pytest.raises(UserError, match=says):
        train.main(["--resume", "--out", str(stopped), *flags])


def test_a_log_row_that_was_cut_is_written_again(undisturbed, stopped):
    """Rows after the saved step and half a row, as a kill leaves them, are not doubled."""
    with open(stopped / "log.jsonl", "a") as log:
        log.write(json.dumps({"stage": "vae", "step": 3, "loss": 9.0}) + '\n{"stage": "v')
    assert end_of(child(stopped, "--resume"))[0] == 0
    assert rows_of(stopped) == rows_of(undisturbed)


# ---- numbers

@pytest.mark.parametrize("stage,flag", [("vae", "--vae-lr"), ("unet", "--lr")])
def test_a_run_that_explodes_says_where(tmp_path, stage, flag):
    """A learning rate of 1e30: the error names step, rate, what to lower and the last good state,
    whose numbers are finite."""
    with pytest.raises(UserError) as error:
        train.main([*TINY, flag, "1e30", "--out", str(tmp_path / "run")])
    for part in (f"{stage}: the loss", "at step", "learning rate 1e+30", f"a lower {flag}"):
        assert part in str(error.value)
    assert str(tmp_path / "run" / "state.pt") in str(error.value)
    for name, value in values(load_checkpoint(tmp_path / "run" / "state.pt")):
        assert not torch.is_tensor(value) or value.isfinite().all(), name


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path):
    """A finite loss whose gradient is infinite spoils the weights: the run stops at that step."""
    model = torch.nn.Linear(1, 1)

    class Zeros:
        def __len__(self):
            return 4

        def __getitems__(self, rows):
            return (torch.zeros(len(rows), 1),)

    def loss_fn(rows, step, generator):
        return ((model(*rows) - model.bias).sum().abs() * (step == 2)).sqrt().sum(), {}
    with pytest.raises(UserError, match="at step 1 "):
        train.fit("test", model, loss_fn, Zeros(), steps=4, batch=1, lr=1e-3,
                  device=torch.device("cpu"))


@pytest.mark.parametrize("kind,flags", [
    ("one", ["--holdout", "0"]), ("constant", []), ("two", ["--holdout", "0"])])
def test_tiny_and_flat_data_sets(tmp_path, kind, flags):
    """One image, two, or only images of one grey value: a run ends, every number of it is finite,
    a batch larger than the set repeats it, and the model samples."""
    count = {"one": 1, "two": 2, "constant": 5}[kind]
    pixels = np.random.default_rng(0).integers(0, 255, (count, 32, 32), np.uint8)
    for i in range(count):
        image = np.full((32, 32), 99, np.uint8) if kind == "constant" else pixels[i]
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    argv = ["--data", str(tmp_path / "in"), *TINY[2:], "--batch", "7", *flags,
            "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    for name, value in values(load_checkpoint(tmp_path / "run" / "model.pt")):
        assert not torch.is_tensor(value) or value.isfinite().all(), name
    sources = [["--from-image", str(tmp_path / "in" / "0.png")]] + [["--random"]] * (kind != "one")
    for i, source in enumerate(sources):
        assert sample.main([*source, "--steps", "2", "--device", "cpu", "--checkpoint",
                            str(tmp_path / "run"), "--out", str(tmp_path / f"out{i}")]) == 0
    if kind == "one":
        with pytest.raises(UserError, match="sampler"):
            sample.main(["--random", "--device", "cpu", "--checkpoint", str(tmp_path / "run")])
        with pytest.raises(UserError, match="--holdout"):  # nobody would be left to train on
            train.main(["--data", str(tmp_path / "in"), "--out", str(tmp_path / "new")])


@pytest.mark.parametrize("ask", [
    lambda: torch.zeros(10 ** 14), lambda: np.zeros(10 ** 15), lambda: bytearray(10 ** 15),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))])
def test_memory_that_is_full_names_the_flags(capsys, ask):
    """Of the GPU or of the machine: one line that says which flags to lower, code 2."""
    with pytest.raises(SystemExit) as end:
        run_script(ask)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    for flag in ("--batch", "--vae-batch", "--embedder-batch", "--size", "--accumulate"):
        assert flag in error


def test_a_loader_that_is_killed_is_named_as_memory(tmp_path):
    """The system kills a process that reads images when memory is full: one line, no traceback."""
    def kill_a_loader(run):
        loaders = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(loaders[0]), signal.SIGKILL)
    code, output = end_of(child(tmp_path / "run", "--workers", "2", "--vae-steps", "40",
                                before=lambda: at_row("vae", 1, kill_a_loader)))
    assert code == 2 and "--workers" in output.splitlines()[-1] and "Traceback" not in output


def test_other_runtime_errors_are_not_hidden():
    """Only memory errors become advice: a mistake of ours keeps its traceback."""
    with pytest.raises(RuntimeError, match="shape"):
        run_script(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))


# ---- long runs

def resident_memory():
    """Bytes of this process in memory, after freed pages went back to the system."""
    import ctypes
    import gc
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_soak(undisturbed, tmp_path):
    """SOAK_MINUTES (default 30) of training, then 1,000 samples in ten calls: memory at the end
    within 5 % of what it was after the first minute."""
    minutes, marks = float(os.environ.get("SOAK_MINUTES", 30)), []
    began, log = time.monotonic(), Run.log

    def look(what):
        marks.append(resident_memory())
        print(f"{(time.monotonic() - began) / 60:.1f} minutes, {what}: {marks[-1] / 2**20:.1f} MiB",
              flush=True)

    def log_and_look(self, **row):
        log(self, **row)
        seconds = time.monotonic() - began
        if seconds > 60 * (len(marks) + 1):
            look(f"{row['stage']} {row['step']}")
        if seconds > 60 * minutes:
            self.stop_signal = signal.SIGTERM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log_and_look)
        assert train.main([*TINY, "--embedder-steps", "300", "--vae-steps", "300", "--unet-steps",
                           "10000000", "--grids", "10000", "--out", str(tmp_path / "run")]) == 143
    for i in range(10):
        assert sample.main(["--random", "--count", "100", "--steps", "10", "--seed", str(100 * i),
                            "--device", "cpu", "--checkpoint", str(undisturbed), "--out",
                            str(tmp_path / f"out{i}")]) == 0
        look(f"{100 * (i + 1)} samples")
    assert marks[-1] < 1.05 * marks[0], marks
