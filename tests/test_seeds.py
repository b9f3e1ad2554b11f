"""Seeds, and the order in which rows are read."""
from support.seeds import batch_rows, step_seed


def test_a_seed_depends_on_every_part():
    """Equal parts give one seed of 63 bits; any other part another."""
    seeds = {step_seed(*parts) for parts in ((0, "vae", 1), (0, "vae", 2), (1, "vae", 1),
                                             (0, "unet", 1), (0, "vae", 1, 0), (0, "vae", 1, 1))}
    assert len(seeds) == 6 and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert step_seed(0, "vae", 1) == step_seed(0, "vae", 1)


def test_batches_are_epochs_of_permutations():
    """Every row once an epoch, also when the batch is larger than the data; a step's rows do not
    depend on the steps before it."""
    rows = [r for step in range(10) for r in batch_rows(step, 4, 10, seed=1)]
    assert all(sorted(rows[i:i + 10]) == list(range(10)) for i in range(0, 40, 10))
    assert rows[:10] != rows[10:20]
    assert batch_rows(7, 4, 10, seed=1) == rows[28:32]
    assert sorted(batch_rows(0, 7, 3, seed=1)[:3]) == [0, 1, 2]
