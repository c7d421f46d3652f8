"""The networks, mask-free, listed in `models.registry`."""
