"""FFCV: write .beton files, load batches from any position on, augment reproducibly."""
