"""A run: its folder, what a resume needs, signals, and the watch over a stage's losses.

    run = Run("runs/mine", config, resume=True)   # locks the folder
    with run.signals_caught():                    # Ctrl-C and SIGTERM save first
        progress = Progress(run, "vae", steps, upto, model, optimizer, ema)  # loads what was saved
        progress.after_step(loss, norm, rate, images, logs)   # logs, saves, stops; refuses NaN
        run.finish("vae", model.state_dict())
    run.close()

Run() without a folder writes nothing and still watches the losses. Only rank 0 writes.
"""
import argparse
import json
import math
import os
import shlex
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from support.command import StatusLine, Stopped, UserError, user_errors
from support.files import (CHECKPOINT_VERSION, load_checkpoint, read_jsonl,
                           save_atomic, write_text_atomic)
from support.pictures import line_chart
from support.ranks import all_ranks, rank
from support.speed import ThreadWatch

SAVE_SECONDS = 300  # between two saves of the state


def lock(folder):
    """Lock the folder until this process ends, however it ends; returns the open file."""
    file = open(folder / ".lock", "a")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder} is in use by another run", "a folder takes one run at a time",
                        "wait for it, stop it, or pass another --out") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        print(f"note: {folder} cannot be locked here; do not start a second run in it")
    return file


def resume_flags(parser, argv, out):
    """The flags of argv; with --resume, those left out keep the values of the run in `out`.

    Raises UserError if `out` contains a run and --resume is missing, or if a flag would change a
    setting of that run other than device, compiling and the folder of its images.
    """
    path = Path(out, "config.json")
    with user_errors(f"{path} is damaged", "restore it, or start again with --out DIR"):
        saved = dict(json.loads(path.read_text())) if path.exists() else {}
    args = parser.parse_args(argv)
    if saved and not args.resume:
        raise UserError(f"{out} already contains a run", "a new folder is needed, or --resume",
                        "pass --out DIR or --resume")
    if args.resume and not saved:
        print(f"note: {out} contains no run to resume: this is a new one")

    before = {name: value for name, value in saved.items()
              if name in vars(args) and name not in ("out", "resume", "dry_run")}
    args = parser.parse_args(argv, argparse.Namespace(**before))
    args.out = out
    for name, value in before.items():
        now = getattr(args, name)
        # A folder may have moved; open_training_set checks that the images are the same.
        may_change = name in ("device", "compile") or name == "data" and Path(now).is_dir()
        if now != value and not may_change:
            raise UserError(f"--{name.replace('_', '-')} {now} differs from the run's {value}",
                            "a resumed run keeps its settings",
                            "leave the flag out, or start again with --out DIR")
    return args


class Run:
    """A folder with the settings, the log, and everything that a resume needs.

    Overwrites an older run unless `resume`: validate everything else first. Raises UserError if the
    folder cannot be created or is in use, or if its state is damaged.
    """

    def __init__(self, folder=None, config=None, resume=False, thread_gain=0.0):
        """thread_gain: see support.speed.ThreadWatch."""
        self.config = config
        self.thread_watch = ThreadWatch(thread_gain)
        self.finished = {}    # stage -> its result: weights, or clusters
        self.state = None     # of the stage in progress
        self.stop_signal = 0  # the number of the signal that was caught
        self.writes = folder is not None and rank() == 0
        if folder is None:
            return
        self.folder = Path(folder)
        if self.writes:
            Path(self.folder, "cache").mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder)
        all_ranks()

        # The saved state.
        path = self.folder / "state.pt"
        log_bytes = 0
        if resume and path.exists():
            saved = load_checkpoint(path, ("finished", "state", "log_bytes"),
                                    "restore it, or delete it and lose its steps")
            log_bytes = saved["log_bytes"]
            self.finished = saved["finished"]
            self.state = saved["state"]
            self.thread_watch.gain = saved.get("thread_gain", 0.0)
            if config.get("threads") and saved.get("threads") == 1:  # fell back
                torch.set_num_threads(1)
            if self.state:
                print(f"{self.state['stage']}: resumes after step {self.state['step']}")

        # The settings, and the log as it was then.
        if self.writes:
            write_text_atomic(self.folder / "config.json", json.dumps(config, indent=2))
            with open(self.folder / "log.jsonl", "ab") as file:
                file.truncate(log_bytes)

    def steps_done(self, stage):
        """The number of saved steps of a stage in progress."""
        return self.state["step"] if self.state and self.state["stage"] == stage else 0

    # ---- during a stage

    def log(self, **row):
        """Add a row to log.jsonl."""
        if self.writes:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def save(self, stage, step, model, optimizer, ema):
        """Save everything that the stage needs to resume after this step."""
        self.state = {"stage": stage, "step": step, "model": model.state_dict(),
                      "optimizer": optimizer.state_dict(), "ema": ema}
        self._write_state()

    def restore(self, stage, model, optimizer, ema):
        """Load the saved state of this stage; returns the number of steps done."""
        step = self.steps_done(stage)
        if step:
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
            for name in ema or {}:
                ema[name].copy_(self.state["ema"][name])
            # A fused step needs moments in the memory layout of their parameter.
            for parameter, moments in optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = torch.empty_like(parameter).copy_(moments[name])
        return step

    def finish(self, stage, result):
        """A stage is done: keep its result and drop its state."""
        self.finished[stage] = result
        self.state = None
        self._write_state()

    def _write_state(self):
        if self.writes:
            save_atomic(self.folder / "state.pt", {
                "version": CHECKPOINT_VERSION, "finished": self.finished, "state": self.state,
                "log_bytes": os.path.getsize(self.folder / "log.jsonl"),
                "threads": torch.get_num_threads(), "thread_gain": self.thread_watch.gain})

    @contextmanager
    def signals_caught(self):
        """Inside, a first Ctrl-C or SIGTERM makes the run save and stop; a second one kills it."""
        def stop(number, frame):
            self.stop_signal = number
            signal.signal(number, signal.SIG_DFL)
            with suppress(OSError):  # no print() in a handler; stderr may be closed
                os.write(2, b"\nstopping: saving the state first ...\n")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- outputs

    def write_model(self, checkpoint):
        """model.pt: a checkpoint with its version and the settings of its training."""
        if self.writes:
            save_atomic(self.folder / "model.pt", {
                "version": CHECKPOINT_VERSION, **checkpoint, "training": self.config})

    def draw_curves(self):
        """curves.png: the loss of each stage."""
        if self.writes:
            series = {}
            for row in read_jsonl(self.folder / "log.jsonl"):
                xs, ys = series.setdefault(row["stage"], ([], []))
                xs.append(row["step"])
                ys.append(row["loss"])
            line_chart(self.folder / "curves.png", series, "training loss", "step", "loss", True)

    def close(self):
        """Release the folder."""
        if self.writes:
            self.lock.close()


class Progress:
    """One stage in progress: logs, saves and stops after a step.

    done: steps so far, including those of earlier runs. The state is saved every few minutes, after
    step `upto`, and on a signal.
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
        self.began = self.saved = self.looked = time.time()

    def after_step(self, loss, norm, rate, images, logs):
        """Record a step: loss and gradient norm (scalar tensors), learning rate, number of images,
        and more values for the log. The logged loss is the mean since the last row.

        Raises UserError when a loss or gradient is not finite, Stopped after a signal.
        """
        self.done += 1
        self.losses.append(loss + 0 * norm)  # NaN too if only the gradient is not finite
        if self.done % self.look_every and self.done != self.upto:
            return

        # Read all values at once; the loss is the mean over steps and ranks.
        values = [torch.stack(self.losses).mean(), *logs.values()]
        mean, *logged = torch.stack([value.float() for value in values]).tolist()
        means = all_ranks(mean)
        mean = sum(means) / len(means)
        steps = len(self.losses)
        images *= steps
        self.losses = []
        if not math.isfinite(mean):
            raise UserError(f"{self.stage}: the loss or its gradient is {mean} at step {self.done} "
                            f"(learning rate {rate:.2g})", "a finite one is needed",
                            "start again with a lower learning rate or --dtype float32")

        self.status.update(self.done, loss=mean, images=images)
        self.run.thread_watch.look(self.stage, steps, time.time() - self.looked)
        self.run.log(stage=self.stage, step=self.done, loss=mean, lr=rate,
                     seconds=time.time() - self.began, threads=torch.get_num_threads(),
                     **dict(zip(logs, logged)))

        # All ranks stop at the same step.
        stop = max(all_ranks(self.run.stop_signal))
        if stop or self.done == self.upto or time.time() - self.saved > SAVE_SECONDS:
            self.run.save(self.stage, self.done, *self.trained)
            self.saved = time.time()
        if stop and self.done < self.steps:
            raise Stopped(stop)
        if self.done == self.upto:
            self.status.close()
        self.looked = time.time()


def print_start(preset, run, model, dataset, device):
    """The first lines: what is trained, on what, where."""
    parameters = sum(p.numel() for p in model.trained.parameters())
    context, _ = model.null_context(1)
    print(f"{len(dataset.train)} images to train on, {len(dataset.test)} held out; "
          f"{model.config.image_size} px; {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; run: {run.folder}\n"
          f"U-Net and projection: {parameters / 1e6:.1f} M parameters; context "
          f"{tuple(context.shape[1:])}; condition {model.config.condition}; tokens "
          f"{model.config.token_shape} of embedder {preset.embedder}")


def print_end(run, model, example, minutes):
    """The last lines: the result, and the command to run next."""
    if torch.cuda.is_available():
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    source = f"--from-image {shlex.quote(str(example))} --count 4"
    if model.prompts:
        source = f"--prompt {shlex.quote(model.prompts[0])} --count 16"
    elif model.config.condition == "none" or not model.config.vit:
        source = "--random --count 16"
    print(f"done in {minutes:.1f} minutes: {run.folder}/model.pt\n"
          f"next: python sample.py --checkpoint {shlex.quote(str(run.folder))} {source}")
