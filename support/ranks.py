"""Several processes, called ranks, that train or sample together, started by torchrun.

Each computes its share of every batch; gradients are averaged before each step, so that all hold
the same weights. With one process these functions do nothing.
"""
import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join_ranks():
    """Under torchrun, join the other processes; from now on only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and ranks() == 1:
        dist.init_process_group(timeout=timedelta(days=1))  # others wait while rank 0 draws
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
    """The values of all ranks, as a list. Every rank must call it, and waits for the others."""
    values = [value] * ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def rows_of_rank(rows):
    """The rows of a batch that this rank computes."""
    return rows[rank()::ranks()]


def average_gradients(parameters):
    """Replace each gradient by its mean over all ranks: that of the whole batch."""
    for parameter in parameters if ranks() > 1 else ():
        if parameter.grad is not None:
            mean = parameter.grad.contiguous()
            dist.all_reduce(mean)
            parameter.grad.copy_(mean / ranks())


def share_batch_norm(model):
    """On several GPUs, batch norms use the statistics of the whole batch; returns the model."""
    if ranks() > 1 and next(model.parameters()).is_cuda:
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
