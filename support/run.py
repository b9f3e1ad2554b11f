"""A run: its folder, what a resume needs, signals, and the watch over a stage's losses.

    run = Run("runs/mine", config, resume=True)   # locks the folder; config.json, log.jsonl
    with run.signals_caught():                    # Ctrl-C and SIGTERM save first
        progress = run.begin("vae", steps, upto, model, optimizer, ema)   # loads the saved state
        progress.after_step(loss, norm, rate, images, logs)   # logs, saves, stops; refuses NaN
        run.finish("vae", model.state_dict())
    run.close()

Run() without a folder writes nothing and still watches the losses. Of several ranks, rank 0 writes;
the others read state.pt.
"""
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from support.command import StatusLine, UserError, user_errors
from support.files import (CHECKPOINT_VERSION, append_jsonl, load_checkpoint, make_folder,
                           read_jsonl, save_atomic, write_text_atomic)
from support.pictures import line_chart
from support.ranks import all_ranks, rank

# Settings that a resumed run may change.
FREE_TO_CHANGE = {"data", "device", "out", "resume", "dry_run", "torch", "torchvision"}
SAVE_SECONDS = 300  # between two saves of the state


class Stopped(Exception):
    """The run was saved after Ctrl-C or SIGTERM: args[0] is the signal's number."""


def lock(folder):
    """Lock the folder until this process ends, however it ends; returns the open file."""
    file = open(folder / ".lock", "a")
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder} is in use by another run", "a folder takes one run at a time",
                        "wait for it, stop it, or pass another --out") from None
    except (ImportError, OSError):
        print(f"note: {folder} cannot be locked here; do not start a second run in it")
    return file


def saved_settings(folder):
    """The settings of the run in that folder, from config.json; {} if it contains no run."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return {}
    with user_errors(f"{path} is damaged", "restore it, or start again with --out DIR"):
        return dict(json.loads(path.read_text()))


class Run:
    """A folder with the settings, the log, and everything that a resume needs.

    Construct it after everything else has been checked, because it overwrites an older run.
    Raises UserError if the folder cannot be made, is in use, or holds the state of another run.
    """

    def __init__(self, folder=None, config=None, resume=False):
        self.config = config
        self.finished = {}    # stage -> its result: weights, or clusters
        self.state = None     # of the stage in progress
        self.stop_signal = 0  # the number of a signal that asks to stop
        self.writes = folder is not None and rank() == 0
        if folder is None:
            return
        self.folder = Path(folder)
        if self.writes:
            make_folder(self.folder / "cache")
            self.lock = lock(self.folder)
        all_ranks()

        # The saved state, the settings, and the log up to the saved step.
        if resume and (self.folder / "state.pt").exists():
            self._load_state()
        if self.writes:
            write_text_atomic(self.folder / "config.json", json.dumps(config, indent=2))
            rows = [json.dumps(row) + "\n" for row in self.rows() if row["stage"] in self.finished
                    or row["step"] <= self.steps_done(row["stage"])]
            write_text_atomic(self.folder / "log.jsonl", "".join(rows))

    def _load_state(self):
        """Read state.pt; refuse that of a run with other settings."""
        path = self.folder / "state.pt"
        do = "restore it, or delete it and lose its steps"
        saved = load_checkpoint(path, ("finished", "state"), do)
        for name, value in saved.get("config", {}).items():
            if name not in FREE_TO_CHANGE and self.config.get(name, value) != value:
                raise UserError(f"{path} was made with {name} {value}, not {self.config[name]}",
                                "the same settings are needed to resume", do)
        self.finished = saved["finished"]
        self.state = saved["state"]
        if self.state:
            print(f"{self.state['stage']}: resumes after step {self.state['step']}")

    def steps_done(self, stage):
        """The number of saved steps of a stage in progress."""
        return self.state["step"] if self.state and self.state["stage"] == stage else 0

    # ---- during a stage

    def begin(self, stage, steps, upto, model, optimizer, ema):
        """Begin or resume a stage; returns its Progress."""
        return Progress(self, stage, steps, upto, model, optimizer, ema)

    def rows(self):
        """The rows of log.jsonl."""
        return read_jsonl(self.folder / "log.jsonl")

    def log(self, **row):
        """Add a row to log.jsonl."""
        if self.writes:
            append_jsonl(self.folder / "log.jsonl", row)

    def save(self, stage, step, model, optimizer, ema):
        """Save everything that the stage needs to resume after this step."""
        self._set_state(stage, step, model, optimizer, ema)
        self._write_state()

    def _set_state(self, stage, step, model, optimizer, ema):
        self.state = {"stage": stage, "step": step, "model": model.state_dict(),
                      "optimizer": optimizer.state_dict(), "ema": ema}

    def restore(self, stage, model, optimizer, ema):
        """Load the saved state of this stage; returns the number of steps done."""
        step = self.steps_done(stage)
        if step:
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
            # A fused step needs moments in the memory layout of their parameter, which another
            # device may have had otherwise.
            for parameter, moments in optimizer.state.items():
                for name in {"exp_avg", "exp_avg_sq"} & moments.keys():
                    moments[name] = torch.empty_like(parameter).copy_(moments[name])
            for name in ema or {}:
                ema[name].copy_(self.state["ema"][name])
            self._set_state(stage, step, model, optimizer, ema)  # frees the copy from the file
        return step

    def finish(self, stage, result):
        """A stage is done: keep its result, drop the rest of its state."""
        self.finished[stage] = result
        self.state = None
        self._write_state()

    def _write_state(self):
        if self.writes:
            save_atomic(self.folder / "state.pt", {
                "version": CHECKPOINT_VERSION, "config": self.config,
                "finished": self.finished, "state": self.state})

    @contextmanager
    def signals_caught(self):
        """Inside, a first Ctrl-C or SIGTERM makes the run save and stop; a second one kills it."""
        def stop(number, frame):
            self.stop_signal = number
            signal.signal(number, signal.SIG_DFL)
            with suppress(OSError, AttributeError):  # print() is not allowed in a handler
                os.write(sys.stderr.fileno(), b"\nstopping: saving the state first ...\n")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- outputs

    def write_model(self, checkpoint, name="model.pt"):
        """Write a model's checkpoint with its version and the settings of its training."""
        if self.writes:
            save_atomic(self.folder / name, {
                "version": CHECKPOINT_VERSION, **checkpoint, "training": self.config})

    def draw_curves(self, stages):
        """curves.png: the loss of each stage."""
        if not self.writes:
            return
        series = {stage: ([], []) for stage in stages}
        for row in self.rows():
            if row["stage"] in series:
                series[row["stage"]][0].append(row["step"])
                series[row["stage"]][1].append(row["loss"])
        series = {stage: line for stage, line in series.items() if line[0]}
        line_chart(self.folder / "curves.png", series, title="training loss", xlabel="step",
                   ylabel="loss", log_y=True)

    def close(self):
        """The run is complete: release the folder."""
        if self.writes:
            self.lock.close()


class Progress:
    """One stage in progress: called after every step, it prints, logs, saves and stops.

    done: steps made so far, including those of earlier runs. The state is saved every few minutes,
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
        self.look_every = min(10, max(1, steps // 500))  # reading a loss waits for the GPU
        self.losses = []  # of the steps since the last look
        self.began = self.saved = time.time()

    def after_step(self, loss, norm, rate, images, logs):
        """Record a step: its loss and gradient norm (scalar tensors), learning rate, number of
        images, and a dict of values for the log. The logged loss is the mean since the last row.

        Raises UserError when a loss or gradient is not finite, Stopped after a signal.
        """
        self.done += 1
        self.losses.append(loss + 0 * norm)  # NaN too if only the gradient is not finite
        if self.done % self.look_every and self.done != self.upto:
            return

        # Read all values at once; losses are means over ranks.
        values = torch.stack([*self.losses, *(value.float() for value in logs.values())]).tolist()
        by_rank = all_ranks(values[:len(self.losses)])
        losses = [sum(losses) / len(losses) for losses in zip(*by_rank)]
        logged = dict(zip(logs, values[len(self.losses):]))
        self.losses = []
        for step, value in enumerate(losses, self.done - len(losses) + 1):
            if not math.isfinite(value):
                raise UserError(f"{self.stage}: the loss or its gradient is {value} at step {step} "
                                f"(learning rate {rate:.2g})", "a finite one is needed",
                                "start again with a lower learning rate or --dtype float32")

        mean = sum(losses) / len(losses)
        self.status.update(self.done, loss=mean, images=images * len(losses))
        self.run.log(stage=self.stage, step=self.done, loss=mean, lr=rate,
                     seconds=time.time() - self.began, **logged)

        # All ranks stop at the same step.
        stop = max(all_ranks(self.run.stop_signal))
        if stop or self.done == self.upto or time.time() - self.saved > SAVE_SECONDS:
            self.run.save(self.stage, self.done, *self.trained)
            self.saved = time.time()
        if stop and self.done < self.steps:
            raise Stopped(stop)
        if self.done == self.upto:
            self.status.close()


def print_start(preset, run, model, dataset, device):
    """The first lines: what is trained, on what, where."""
    print(f"{len(dataset.train)} images to train on, {len(dataset.test)} held out; "
          f"{model.config.image_size} px; {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; run: {run.folder}")
    parameters = sum(p.numel() for p in model.trained.parameters())
    context, _ = model.null_context(1)
    print(f"U-Net and projection: {parameters / 1e6:.1f} M parameters; context "
          f"{tuple(context.shape[1:])}; condition {model.config.condition}; tokens "
          f"{model.config.token_shape} of embedder {preset.embedder}")


def print_end(run, model, example, minutes):
    """The last lines: the result, and the command to run next."""
    if torch.cuda.is_available():
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    source = f"--from-image {shlex.quote(str(example))} --count 4"
    if model.prompts:
        source = f"--prompt {shlex.quote(model.prompts[0])} --count 16"
    elif model.config.condition == "none":
        source = "--random --count 16"
    print(f"done in {minutes:.1f} minutes: {run.folder}/model.pt\n"
          f"next: python sample.py --checkpoint {shlex.quote(str(run.folder))} {source}")
