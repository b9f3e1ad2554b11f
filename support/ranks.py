"""Several processes that train or sample together, started by torchrun.

Each process, called a rank, computes its share of every batch; gradients are averaged before each
step of the optimizer, so that all ranks hold the same weights. With one process nothing is done.
"""
import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join_ranks():
    """Under torchrun, join the other processes, called ranks; from now on rank 0 alone prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and ranks() == 1:
        dist.init_process_group(timeout=timedelta(days=1))  # rank 0 draws and writes, others wait
        atexit.register(dist.destroy_process_group)
        if rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def ranks():
    """How many processes work together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process among them, from 0; rank 0 writes all files but the cache."""
    return dist.get_rank() if ranks() > 1 else 0


def all_ranks(value=None):
    """What each rank passes, as a list by rank. Every rank must call it, and waits for the rest."""
    values = [value] * ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def rows_of_rank(rows):
    """The rows of a batch that this rank computes: all of them, where it is alone."""
    return rows[rank()::ranks()]


def average_gradients(parameters):
    """Replace each gradient by its mean over all ranks: that of the whole batch."""
    if ranks() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            mean = parameter.grad.contiguous()
            dist.all_reduce(mean)
            parameter.grad.copy_(mean / ranks())


def share_batch_norm(model):
    """On several GPUs, let each batch norm see the batch of all ranks; returns the model."""
    if ranks() > 1 and next(model.parameters()).is_cuda:
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
