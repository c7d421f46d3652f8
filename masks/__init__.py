"""Which weights stay: one file per method, listed in `masks.registry`."""
