"""The device, and several processes, called ranks, that train or sample together by torchrun.

Each rank computes its share of every batch; gradients are averaged before each step, so that all
have the same weights. With one process the functions about ranks do nothing.
"""
import atexit
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.command import UserError


def join_ranks():
    """Under torchrun, join the other processes; from now on only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and ranks() == 1:
        dist.init_process_group(timeout=timedelta(days=1))  # ranks wait while rank 0 draws previews
        atexit.register(dist.destroy_process_group)
        if rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def ranks():
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The index of this process, from 0; rank 0 writes all files except the cache."""
    return dist.get_rank() if ranks() > 1 else 0


def all_ranks(value=None):
    """List of the values of all ranks. Every rank must call this; it waits for the others."""
    values = [value] * ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def rows_of_rank(rows):
    """The rows of a batch that this rank computes."""
    return rows[rank()::ranks()]


def average_gradients(parameters):
    """Replace each gradient by its mean over all ranks."""
    for parameter in parameters if ranks() > 1 else ():
        if parameter.grad is not None:
            mean = parameter.grad.contiguous()
            dist.all_reduce(mean)
            parameter.grad.copy_(mean / ranks())


def pick_device(name="auto"):
    """The torch.device of that name; "auto" prefers CUDA, then MPS, then the CPU."""
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
                        "a device of this machine is needed",
                        "pass --device auto, or start fewer processes") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def autocast_dtype(device, dtype="auto"):
    """torch.bfloat16 or torch.float32; "auto" is bfloat16 where the hardware supports it."""
    if dtype != "auto":
        return {"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    is_native = False
    cpu = Path("/proc/cpuinfo")  # torch does not tell this about CPUs
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and cpu.exists():
        is_native = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu.read_text().split())
    return torch.bfloat16 if is_native else torch.float32
