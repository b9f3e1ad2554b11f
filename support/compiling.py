"""When torch.compile pays: it takes half a minute before it saves a quarter of every step."""
import time

import torch

from support.fast import compile_blocks
from support.ranks import all_ranks

TIMED = 5, 15  # steps between which an eager step is timed


def compile_pays(steps, seconds_per_step, gain=0.25, compile_seconds=40):
    """Whether compiled steps save more than compiling costs; the answer, and why, in one line.

    gain: the share of a step that compiling saves. The defaults are guesses, not measurements.
    """
    saved = steps * seconds_per_step * gain
    pays = saved > compile_seconds
    return pays, (f"torch.compile {'on' if pays else 'off'}: it would save about {saved:.0f} s in "
                  f"{steps} steps, and takes about {compile_seconds:.0f} s")


class Compiler:
    """Compiles the blocks of a model inside its own loop: at once, never, or where it pays.

    wanted: True, False, or None: on CUDA, time some steps, then decide. options: of torch.compile.
    Shapes are static, for the fastest kernels. Once a first step is compiled nothing else is: a
    last batch of another size, or a preview during training, runs uncompiled.
    """

    def __init__(self, model, device, wanted=None, **options):
        self.model = model
        self.options = {"dynamic": False, **options}
        self.done = 0
        self.compiled_at = None
        is_compiled = any(module._compiled_call_impl for module in model.modules())
        self.decides = wanted is None and device.type == "cuda" and not is_compiled
        if wanted and not is_compiled:
            self.compile()

    def compile(self):
        torch.compiler.set_stance("default")
        compile_blocks(self.model, **self.options)
        self.compiled_at = self.done

    def after_step(self, left):
        """Call it after every step; `left` counts the steps that follow."""
        if self.done == self.compiled_at:
            torch.compiler.set_stance("eager_on_recompile")
        self.done += 1
        if not self.decides or self.done not in TIMED:
            return

        torch.cuda.synchronize()
        now = time.perf_counter()
        if self.done == TIMED[1]:
            seconds = (now - self.began) / (TIMED[1] - TIMED[0])
            pays, why = compile_pays(left, max(all_ranks(seconds)))  # ranks decide alike
            print(why)
            if pays:
                self.compile()
        self.began = now
