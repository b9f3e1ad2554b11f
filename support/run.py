"""A run: its folder, what a resume needs, signals, and the watch over a stage's losses.

    run = Run("runs/mine", config, resume=True)   # locks the folder; config.json, log.jsonl
    with run.signals_caught():                    # Ctrl-C and SIGTERM save first
        progress = run.begin("vae", steps, upto, model, optimizer, ema)   # loads what was saved
        progress.after_step(loss, norm, rate, images, logs)   # log, save, stop; refuses NaN
        run.finish("vae", model.state_dict())
    run.close()

Run() without a folder writes nothing and still watches the losses. Of several ranks, rank 0 writes;
the others read state.pt, and keep in memory what is finished.
"""
import json
import math
import os
import shlex
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from support.command import StatusLine, UserError
from support.files import (CHECKPOINT_VERSION, append_jsonl, load_checkpoint, make_folder,
                           read_jsonl, save_atomic, write_text_atomic)
from support.pictures import line_chart
from support.ranks import all_ranks, rank

# What a resumed run may have otherwise than the run that it goes on with.
FREE_TO_CHANGE = {"data", "device", "workers", "out", "resume", "dry_run", "torch", "torchvision"}
STATE_ADVICE = "copy it here again, or delete it and lose its steps"


class Stopped(Exception):
    """Ctrl-C or SIGTERM came, and the run was saved: args[0] is the signal's number."""


def lock(folder):
    """Keep a second run out of the folder; returns the open file that does it.

    The kernel holds the lock until this process ends in whatever way, so none is ever stale.
    """
    file = open(folder / "lock", "a+")
    try:
        import fcntl  # Windows has none, and runs without a lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder} is in use by process {file.read()[:20]}: a folder takes one run "
                        "at a time: wait for it, stop it, or pass another --out") from None
    except (ImportError, OSError) as error:
        print(f"note: no lock here ({error}): start no second run in {folder}")
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    return file


def load_optimizer(optimizer, state):
    """Load a saved state; AdamW's moments get the memory layout of their parameters.

    torch keeps the layout of the file, which may come from another device. A fused step walks
    through a parameter and its moments side by side, and would pair the wrong numbers.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(value)


class Run:
    """A folder that holds what was asked, what happened, and everything that a resume needs.

    Raises UserError if the folder cannot be made, is in use, or holds the state of another run.
    """

    def __init__(self, folder=None, config=None, resume=False):
        self.config = config
        self.finished = {}    # stage -> what it left behind: weights, or clusters
        self.state = None     # of the stage that is under way
        self.stop_signal = 0  # the number of a signal that asks for the end
        self.writes = folder is not None and rank() == 0
        if folder is None:
            return
        self.folder = Path(folder)

        # The folder is ours alone, and without what a killed run left half written.
        if self.writes:
            make_folder(self.folder / "cache")
            self.lock = lock(self.folder)
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
        all_ranks()

        # What was saved, the settings, and of the log the rows up to what was saved.
        if resume and (self.folder / "state.pt").exists():
            self._load_state()
        if self.writes:
            write_text_atomic(self.folder / "config.json", json.dumps(config, indent=2))
            rows = "".join(json.dumps(row) + "\n" for row in self.rows() if self._was_saved(row))
            write_text_atomic(self.folder / "log.jsonl", rows)

    def _load_state(self):
        """Read state.pt, and refuse that of a run with other settings."""
        path = self.folder / "state.pt"
        saved = load_checkpoint(path, ("finished", "state"), STATE_ADVICE)
        for name, value in saved.get("config", {}).items():
            if name not in FREE_TO_CHANGE and self.config.get(name, value) != value:
                raise UserError(f"{path} was made with {name} {value}, not {self.config[name]}",
                                "this run's own file is needed", STATE_ADVICE)
        self.finished = saved["finished"]
        self.state = saved["state"]
        if self.state:
            print(f"{self.state['stage']}: goes on after step {self.state['step']}")

    def _was_saved(self, row):
        """Whether a row of the log tells of a step that need not be made again."""
        return row["stage"] in self.finished or row["step"] <= self.steps_done(row["stage"])

    def steps_done(self, stage):
        """How many steps of a stage that is under way are saved."""
        if self.state and self.state["stage"] == stage:
            return self.state["step"]
        return 0

    # ---- what is written while a stage runs

    def begin(self, stage, steps, upto, model, optimizer, ema):
        """A stage begins, or goes on where its state was saved; returns its Progress."""
        return Progress(self, stage, steps, upto, model, optimizer, ema)

    def rows(self):
        """The rows of log.jsonl."""
        return read_jsonl(self.folder / "log.jsonl")

    def log(self, **row):
        """Add a row to log.jsonl."""
        if self.writes:
            self._need_folder()
            append_jsonl(self.folder / "log.jsonl", row)

    def save(self, stage, step, model, optimizer, ema):
        """Keep all that the stage needs to go on after this step."""
        self._hold(stage, step, model, optimizer, ema)
        self._write_state()

    def _hold(self, stage, step, model, optimizer, ema):
        """The state of now: the tensors themselves, no copies of them."""
        self.state = {"stage": stage, "step": step, "model": model.state_dict(),
                      "optimizer": optimizer.state_dict(), "ema": ema}

    def restore(self, stage, model, optimizer, ema):
        """Load what was saved of this stage; returns the number of steps already done."""
        step = self.steps_done(stage)
        if step:
            model.load_state_dict(self.state["model"])
            load_optimizer(optimizer, self.state["optimizer"])
            for name in ema or {}:
                ema[name].copy_(self.state["ema"][name])
            self._hold(stage, step, model, optimizer, ema)  # the file's copy may be gigabytes
        return step

    def finish(self, stage, result):
        """A stage is done: keep its result, drop the rest of its state."""
        self.finished[stage] = result
        self.state = None
        self._write_state()

    def _write_state(self):
        if self.writes:
            self._need_folder()
            save_atomic(self.folder / "state.pt", {
                "version": CHECKPOINT_VERSION, "config": self.config,
                "finished": self.finished, "state": self.state})

    def _need_folder(self):
        """Do not make a deleted folder anew, half of it."""
        if not (self.folder / "config.json").exists():
            raise UserError(f"{self.folder} was moved or deleted", "a run needs its folder",
                            "put it back and pass --resume, or start anew with --out DIR")

    # ---- signals

    @contextmanager
    def signals_caught(self):
        """Inside, Ctrl-C and SIGTERM set a mark: the run saves and stops. A second one ends it."""
        def mark(number, frame):
            self.stop_signal = number
            signal.signal(number, signal.SIG_DFL)
            with suppress(OSError):  # the pipe's other end may have got the same Ctrl-C
                os.write(1, b"\nstopping: saving the state first ...\n")

        signal.signal(signal.SIGINT, mark)
        signal.signal(signal.SIGTERM, mark)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # ---- what people take away

    def write_model(self, checkpoint, name="model.pt"):
        """Write a model's checkpoint with its version and the settings of its training."""
        if self.writes:
            save_atomic(self.folder / name, {
                "version": CHECKPOINT_VERSION, **checkpoint, "training": self.config})

    def draw_curves(self, stages):
        """curves.png: the loss of each stage."""
        if not self.writes:
            return
        series = {}
        for stage in stages:
            rows = [row for row in self.rows() if row["stage"] == stage]
            if rows:
                series[stage] = [row["step"] for row in rows], [row["loss"] for row in rows]
        line_chart(self.folder / "curves.png", series, title="training loss", xlabel="step",
                   ylabel="loss", log_y=True)

    def close(self):
        """The run is complete: give the folder free."""
        if self.writes:
            (self.folder / "lock").unlink()


class Progress:
    """One stage of a run under way: told after every step, it shows, logs, saves and stops.

    done: steps made so far, those of earlier runs included. The state is saved every few minutes,
    after step `upto`, and on a signal.
    """

    def __init__(self, run, stage, steps, upto, model, optimizer, ema):
        self.run = run
        self.stage = stage
        self.steps = steps
        self.upto = upto
        self.trained = model, optimizer, ema
        self.done = run.restore(stage, *self.trained)
        self.status = StatusLine(steps, stage, self.done)
        self.look_every = min(10, max(1, steps // 500))  # looking at a loss waits for the GPU
        self.losses = []  # of the steps since the last look
        self.began = self.saved = time.time()
        self.pause = 120  # seconds between two saves

    def after_step(self, loss, norm, rate, images, logs):
        """One step more is done: its loss and gradient norm (scalar tensors), learning rate, number
        of images, and a dict of values for the log. The logged loss is the mean since the last row.

        Raises UserError when a loss or gradient is not finite, Stopped after a signal.
        """
        self.done += 1
        self.losses.append(loss + 0 * norm)  # NaN too where only the gradient is not finite
        if self.done % self.look_every and self.done != self.upto:
            return
        losses, values = self._mean_over_ranks(logs)
        self._refuse_nan(losses, rate)
        self.losses = []

        # What people see, and the row of the log.
        value = sum(losses) / len(losses)
        with suppress(OSError):  # a closed pipe: who watched has gone, the run goes on
            self.status.update(self.done, loss=value, images=images * len(losses))
        self.run.log(stage=self.stage, step=self.done, loss=value, lr=rate,
                     seconds=time.time() - self.began, **values)

        # All ranks stop at the same step.
        stop = max(all_ranks(self.run.stop_signal))
        if stop or self.done == self.upto or time.time() - self.saved > self.pause:
            self._save()
        if stop and self.done < self.steps:
            raise Stopped(stop)
        if self.done == self.upto:
            self.status.close()

    def _mean_over_ranks(self, logs):
        """The losses since the last look, each the mean over ranks, and this rank's values for the
        log: read together, for each reading waits for the GPU."""
        count = len(self.losses)
        shown = [value.float() for value in logs.values()]
        numbers = torch.stack([*self.losses, *shown]).tolist()
        by_rank = all_ranks(numbers[:count])
        means = [sum(losses) / len(losses) for losses in zip(*by_rank)]
        return means, dict(zip(logs, numbers[count:]))

    def _refuse_nan(self, losses, rate):
        """Once a number is not finite, no later one is of use."""
        for step, loss in enumerate(losses, self.done - len(losses) + 1):
            if math.isfinite(loss):
                continue
            good = "none"
            if self.run.writes and (self.run.folder / "state.pt").exists():
                good = self.run.folder / "state.pt"
            remedy = {"embedder": "--dtype float32", "vae": "a lower --vae-lr"}.get(
                self.stage, "a lower --lr")
            raise UserError(f"{self.stage}: the loss or its gradient is {loss} at step {step} "
                            f"(learning rate {rate:.2g})", "a finite one is needed",
                            f"last good state: {good}; start anew with {remedy}")

    def _save(self):
        """Save, at most a twentieth of the time."""
        began = time.time()
        self.run.save(self.stage, self.done, *self.trained)
        self.saved = time.time()
        self.pause = max(self.pause, 20 * (self.saved - began))


# ---- What a run says first and last ------------------------------------------------------------

def print_start(args, run, model, found, device):
    """The first lines: what is trained, on what, where."""
    print(f"{len(found.train)} images to train on, {len(found.test)} held out; {args.size} px; "
          f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"run: {run.folder}")
    parameters = sum(p.numel() for p in model.trained.parameters())
    context, _ = model.context(None, 1)
    print(f"U-Net and projection: {parameters / 1e6:.1f} M parameters; context "
          f"{tuple(context.shape[1:])}; condition {args.condition}; {args.tokens} tokens "
          f"{model.config.token_shape} of embedder {args.embedder}")
    if args.tokens.startswith("patch"):
        print("note: patch tokens hold the layout of the source; the model may copy it")


def print_end(args, run, model, example, minutes):
    """The last lines: what came out, and the command to type next."""
    if torch.cuda.is_available():
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    way = f"--from-image {shlex.quote(str(example))} --count 4"
    if model.prompts:
        way = f"--prompt {shlex.quote(model.prompts[0])} --count 16"
    if args.condition == "none":
        way = "--random --count 16"
    print(f"done in {minutes:.1f} minutes: {run.folder}/model.pt\n"
          f"next: python sample.py --checkpoint {shlex.quote(args.out)} {way}")
