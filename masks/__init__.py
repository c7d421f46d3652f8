"""Which weights stay: one file per method, listed in `masks.registry`."""

if __name__ != "ghostmask.masks":
    raise ImportError(
        f"this package is imported as ghostmask.masks, not as {__name__}: two names would be two copies of it"
    )
