"""One YAML file = one complete run; a package so that the files ship in the wheel."""

if __name__ != "ghostmask.configs":
    raise ImportError(
        f"this package is imported as ghostmask.configs, not as {__name__}: two names would be two copies of it"
    )
