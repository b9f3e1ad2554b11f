"""A GPU that is not there: tensors that say cuda:0, hold CPU data, and obey a GPU's rules.

    with pretend("cuda") as waits:               # or "mps"
        train.main([..., "--device", "cuda"])
    waits                                        # Counter: (what, "file.py:line") -> times

A tensor is on the device because its class is OnDevice, and Rules sees every call of torch: it
refuses what the device would refuse, computes on the CPU, and labels the results. Refused are
- NumPy, tensors of two devices in one call, numbers drawn by another device's generator;
- a fused optimizer step over a parameter and moments of another memory layout;
- on "mps" all of float64.
Counted is each call that makes the program wait for the GPU: numbers read, masks as an index, and
copies, but for those from pinned memory to the device with non_blocking=True. Autocast is the CPU's
with CUDA's list of what stays in float32. What torch's C++ does inside one call is not seen; nor is
any kernel.
"""
import collections
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import unet

ROOT = str(Path(__file__).parent.parent)
WAITS = collections.Counter()
PINNED = {}    # address of memory -> a tensor that keeps it
kind = "cuda"  # of device that is pretended

# Calls that may see tensors of two devices; the result is where the first one is.
ACROSS = {"copy_", "to", "type_as", "view_as", "expand_as", "reshape_as", "_foreach_copy_",
          "_has_compatible_shallow_copy_type", "__set__"}
# Calls that need a number from the device, or a shape that depends on numbers there.
READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__format__",
         "__repr__", "__contains__", "is_nonzero", "equal", "allclose", "nonzero", "argwhere",
         "masked_select", "unique", "_unique_impl", "unique_consecutive", "_return_inverse",
         "_return_output", "_return_counts", "bincount", "linalg_eigh", "linalg_eigvalsh",
         "linalg_svdvals", "linalg_svd", "linalg_cholesky"}
# Calls that make a tensor of numbers that lie on the host.
FROM_HOST = {"tensor", "as_tensor", "new_tensor"}
# Calls that CUDA's autocast keeps in float32.
IN_FLOAT32 = {"softmax", "log_softmax", "layer_norm", "group_norm", "mse_loss", "l1_loss", "exp",
              "log", "pow", "__pow__", "sum", "cumsum", "prod", "norm", "normalize", "cdist",
              "logsumexp", "cosine_similarity"}


# ---------------------------------------------------------------------------- tensors

class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # Rules does all

    @property
    def device(self):
        return torch.device(kind, 0)

    @property
    def is_cuda(self):
        return kind == "cuda"

    @property
    def is_cpu(self):
        return False

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {kind}:0 device type tensor to numpy. Use Tensor.cpu() to "
                        "copy the tensor to host memory first.")

    __array__ = numpy

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol):
        """For torch.save: what map_location="cpu" would make of it."""
        with torch._C.DisableTorchFunction():
            plain = self.detach()
        plain.__class__ = torch.Tensor
        return plain.__reduce_ex__(protocol)


class Generator(torch.Generator):
    """A CPU generator that says which device it was made for."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.kind = torch.device(device).type
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return torch.device(self.kind)


def tensors_in(*values):
    """All tensors in nested lists, tuples and dicts, as a list."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def is_ours(device):
    """Whether a device, or its name, is the pretended one."""
    return device is not None and torch.device(device).type == kind


def place():
    """The line of this project that makes a call."""
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__
                     or not frame.f_code.co_filename.startswith(ROOT)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename[len(ROOT) + 1:]}:{frame.f_lineno}" if frame else "?"


def count_wait(what):
    WAITS[what, place()] += 1


def pinned(x):
    """A copy of a CPU tensor in memory that the GPU reads by itself."""
    x = x.clone()
    PINNED[x.untyped_storage().data_ptr()] = x
    return x


def is_pinned(x):
    return x.untyped_storage().data_ptr() in PINNED


# ---------------------------------------------------------------------------- the rules

def refuse_mixtures(name, args, tensors):
    """Tensors of two devices in one call; numbers (0-dim) of the CPU may come along."""
    if name in ACROSS:
        return
    if name in ("__getitem__", "__setitem__", "index_put_"):
        first = isinstance(args[0], OnDevice)
        if not first and any(isinstance(x, OnDevice) for x in tensors_in(args[1])):
            raise RuntimeError("indices should be either on cpu or on the same device as the "
                               "indexed tensor (cpu)")
        tensors = tensors_in(args[0], args[2:])
    joins = name in ("stack", "cat")
    there = [x for x in tensors if isinstance(x, OnDevice)]
    here = [x for x in tensors if not isinstance(x, OnDevice) and (x.dim() or joins)]
    if there and here:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two "
                           f"devices, {kind}:0 and cpu! ({name} at {place()})")


def refuse_generator(generator, device):
    if generator.device.type != device:
        raise RuntimeError(f"Expected a '{device}' device type for generator but found "
                           f"'{generator.device.type}'")


def refuse_layouts(params, grads, *moments):
    """What CUDA's fused AdamW asks of its lists: it walks through them side by side."""
    for p, *others in zip(params, grads, *moments[:2]):
        for other in others:
            if any(n > 1 and a != b for n, a, b in zip(p.shape, p.stride(), other.stride())):
                raise RuntimeError("params, grads, exp_avgs, and exp_avg_sqs must have same dtype, "
                                   f"device, and layout (strides {p.stride()}, {other.stride()})")


def index_waits(tensor, index):
    """Whether tensor[index] waits: a mask must be counted, a list or a CPU tensor copied over."""
    if not isinstance(tensor, OnDevice):
        return False
    parts = index if isinstance(index, tuple) else (index,)
    masks = [x for x in tensors_in(parts) if x.dtype == torch.bool]
    lists = [x for x in parts if isinstance(x, list)]
    return bool(masks or lists) or any(not isinstance(x, OnDevice) for x in tensors_in(parts))


def moved(x, *rest, device=None, dtype=None, non_blocking=False, copy=False, **layout):
    """Tensor.to in all its forms."""
    for value in rest:
        if isinstance(value, torch.Tensor):
            device = value.device
            dtype = value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            non_blocking = value
        elif value is not None:
            device = value
    was = isinstance(x, OnDevice)
    ours = was if device is None else is_ours(device)
    if was != ours and (was or not (non_blocking and is_pinned(x))):
        count_wait("copy to the host" if was else "copy to the device")

    result = x.to(dtype=dtype or x.dtype, copy=copy, **layout)
    if result is x and was == ours:
        return x
    result = result.clone() if result is x else result
    result.__class__ = OnDevice if ours else torch.Tensor
    return result


class Rules(TorchFunctionMode):
    """Sees each call of torch: refuses, counts, computes on the CPU, labels the results."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name == "__get__":  # an attribute: most calls are
            result = func(*args)
            if isinstance(args[0], OnDevice) and isinstance(result, torch.Tensor):
                result.__class__ = OnDevice
            return result
        kwargs = dict(kwargs or {})
        tensors = tensors_in(args, kwargs)
        on_device = any(isinstance(x, OnDevice) for x in tensors)

        # What is refused.
        refuse_mixtures(name, args, tensors)
        if "_fused_adamw_" in name and on_device:
            refuse_layouts(*args[:4])

        # Moves, in their several names.
        if name in ("to", "type_as", "cpu", "cuda"):
            if name in ("cpu", "cuda"):
                kwargs["device"] = name
            return self.check(moved(*args, **kwargs))
        if name == "pin_memory":
            return pinned(args[0])

        # Where the result will be, and who draws it.
        if name in ACROSS:
            on_device = isinstance(args[0], OnDevice)
        if kwargs.get("device") is not None:
            on_device = is_ours(kwargs["device"])
            kwargs["device"] = "cpu" if on_device else kwargs["device"]
        if kwargs.get("generator") is not None:
            refuse_generator(kwargs["generator"], kind if on_device else "cpu")
        kwargs.pop("pin_memory", None)

        # What waits.
        if on_device and (name in READS or name in FROM_HOST):
            count_wait(name)
        if name in ("__getitem__", "__setitem__") and index_waits(*args[:2]):
            count_wait("index")
        if name == "copy_":
            target, source = args[:2]
            is_async = is_pinned(source) and (True in args[2:] or kwargs.get("non_blocking"))
            if isinstance(target, OnDevice) != isinstance(source, OnDevice) and not is_async:
                count_wait("copy_")

        # The call itself.
        if on_device and name in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
                    for x in args]
        result = func(*args, **kwargs)
        if on_device:
            given = {id(x) for x in tensors}
            for x in tensors_in(result):
                if id(x) not in given:
                    x.__class__ = OnDevice
        return self.check(result)

    def check(self, result):
        """MPS has no float64."""
        if kind == "mps":
            for x in tensors_in(result):
                if isinstance(x, OnDevice) and x.dtype == torch.float64:
                    raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS "
                                    f"framework doesn't support float64 ({place()})")
        return result


# ---------------------------------------------------------------------------- the whole

def in_rules(run):
    """Thread.run under the rules, which each thread has for itself."""
    def run_in_rules(self):
        with Rules():
            run(self)
    return run_in_rules


def checkpoint_in_rules(checkpoint):
    """Activation checkpointing: the backward pass leaves the rules, what it runs anew is in them
    again. Devices are not compared, for memory that C++ has just made has no label yet."""
    def run(function, *args, **options):
        def in_rules_again(*args):
            with ExitStack() as stack:
                if not torch._C._len_torch_function_stack():
                    stack.enter_context(Rules())
                return function(*args)
        return checkpoint(in_rules_again, *args, determinism_check="none", **options)
    return run


def grouped_by_device(group):
    """torch's grouping of tensors for optimizers, by the device that they say they are on."""
    def grouped(lists, with_indices=False):
        groups = {}
        for (_, dtype), found in group(lists, with_indices).items():
            first = next(x for x in found[0][0] if x is not None)
            groups[first.device, dtype] = found
        return groups
    return grouped


class Autocast(torch.autocast):
    """Autocast of the device is the CPU's."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == kind else device_type, *args, **kwargs)


@contextmanager
def pretend(device="cuda"):
    """Inside, torch has one GPU; yields the waits, counted anew."""
    global kind
    kind = device
    WAITS.clear()
    PINNED.clear()
    replaced = [
        (torch, "Generator", Generator),
        (torch, "autocast", Autocast),
        (unet, "checkpoint", checkpoint_in_rules(unet.checkpoint)),
        (torch._C, "_group_tensors_by_device_and_dtype",
         grouped_by_device(torch._C._group_tensors_by_device_and_dtype)),
        (threading.Thread, "run", in_rules(threading.Thread.run))]
    if device == "mps":
        replaced.append((torch.backends.mps, "is_available", lambda: True))
    else:
        replaced += [(torch.cuda, name, lambda *args, value=value, **kwargs: value)
                     for name, value in {"is_available": True, "device_count": 1,
                                         "is_bf16_supported": True, "set_device": None,
                                         "is_current_stream_capturing": False,
                                         "max_memory_allocated": 0, "synchronize": None}.items()]
    if hasattr(torch, "accelerator"):  # since torch 2.6
        replaced.append((torch.accelerator, "current_stream", lambda *args: mock.Mock(
            is_capturing=lambda: False)))

    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new ones
    try:
        with ExitStack() as stack:
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            stack.enter_context(Rules())
            yield WAITS
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
