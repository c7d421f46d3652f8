"""The networks, mask-free, listed in `models.registry`."""

if __name__ != "ghostmask.models":
    raise ImportError(
        f"this package is imported as ghostmask.models, not as {__name__}: two names would be two copies of it"
    )
