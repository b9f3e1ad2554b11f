"""support/seeds.py."""
from support.seeds import batch_rows, step_seed


def test_a_seed_depends_on_every_part():
    """Equal parts give equal seeds of 63 bits; a different part gives another one."""
    seeds = {step_seed(*parts) for parts in ((0, "vae", 1), (0, "vae", 2), (1, "vae", 1),
                                             (0, "unet", 1), (0, "vae", 1, 0), (0, "vae", 1, 1))}
    assert len(seeds) == 6 and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert step_seed(0, "vae", 1) == step_seed(0, "vae", 1)


def test_batches_are_epochs_of_permutations():
    """Every row once per epoch, also if the batch is larger than the data; the rows of a step do
    not depend on the steps before it."""
    rows = [r for step in range(10) for r in batch_rows(step, 4, 10, seed=1)]
    assert all(sorted(rows[i:i + 10]) == list(range(10)) for i in range(0, 40, 10))
    assert rows[:10] != rows[10:20]
    assert batch_rows(7, 4, 10, seed=1) == rows[28:32]
    assert sorted(batch_rows(0, 7, 3, seed=1)[:3]) == [0, 1, 2]
