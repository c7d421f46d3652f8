"""FFCV: write .beton files, load batches from any position on, augment reproducibly."""

if __name__ != "ghostmask.data_pipelines":
    raise ImportError(
        f"this package is imported as ghostmask.data_pipelines, not as {__name__}: two names would be two copies of it"
    )
