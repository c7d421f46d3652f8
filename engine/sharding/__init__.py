"""Parameters that are functions of sharded state: the optimizer, its slices, DeepSpeed."""
