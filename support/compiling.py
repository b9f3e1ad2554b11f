"""When torch.compile pays: it takes half a minute before it saves a quarter of every step.

    compiler = Compiler(model, device, wanted=None)     # None: on CUDA, if it pays
    for step in range(steps):
        ...                                             # forward, backward, optimiser
        compiler.after_step(left=steps - step - 1)
"""
import time

import torch

from support.fast import compile_blocks
from support.ranks import all_ranks


def compile_pays(steps, seconds_per_step, gain=0.25, compile_seconds=40):
    """Whether compiled steps save more than compiling costs; the answer, and why, in one line.

    gain: the share of a step that compiling saves. The defaults are guesses, not measurements.
    """
    saved = steps * seconds_per_step * gain
    pays = saved > compile_seconds
    return pays, (f"torch.compile {'on' if pays else 'off'}: {steps} steps of {seconds_per_step:.3g}"
                  f" s would save about {saved:.0f} s, compiling takes about {compile_seconds:.0f}")


class Compiler:
    """Compiles the blocks of a model inside its own loop: at once, never, or where it pays.

    wanted: True, False, or None, which times some steps on CUDA and decides. Shapes are static, so
    kernels are the fastest; once the first step is compiled nothing else is: a last batch of another
    size, or a preview during training, runs as it would without this class. options: of
    torch.compile.
    """

    def __init__(self, model, device, wanted=None, warm_up=5, timed=10, **options):
        self.model = model
        self.options = {"dynamic": False, **options}
        self.done = 0
        self.times = {}
        self.timed = warm_up, warm_up + timed
        self.compiled_at = None
        is_compiled = any(module._compiled_call_impl for module in model.modules())
        self.may_compile = wanted is None and device.type == "cuda" and not is_compiled
        if wanted and not is_compiled:
            self.compile()

    def compile(self):
        set_stance("default")
        compile_blocks(self.model, **self.options)
        self.compiled_at = self.done

    def after_step(self, left):
        """Call it after every step; `left` counts the steps that follow."""
        self.done += 1
        if self.done - 1 == self.compiled_at:
            set_stance("eager_on_recompile")
        if not self.may_compile or self.done not in self.timed:
            return

        torch.cuda.synchronize()
        self.times[self.done] = time.perf_counter()
        if self.done == self.timed[1]:
            first, last = self.timed
            seconds = (self.times[last] - self.times[first]) / (last - first)
            pays, why = compile_pays(left, max(all_ranks(seconds)))  # ranks decide alike
            print(why)
            if pays:
                self.compile()


def set_stance(name):
    """torch.compiler.set_stance, where PyTorch is recent enough (2.6) to have it."""
    if hasattr(torch.compiler, "set_stance"):
        torch.compiler.set_stance(name)
