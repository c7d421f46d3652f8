"""A DeepSpeed training loop that has never heard of sparsity: world, phases, optimizer, checkpoints, metrics."""
