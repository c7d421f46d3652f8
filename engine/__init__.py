"""A DeepSpeed training loop that has never heard of sparsity: world, phases, optimizer, checkpoints, metrics."""

if __name__ != "ghostmask.engine":
    raise ImportError(
        f"this package is imported as ghostmask.engine, not as {__name__}: two names would be two copies of it"
    )
