"""Several processes that train or sample together, started by torchrun."""
import atexit
import os
from datetime import timedelta

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
