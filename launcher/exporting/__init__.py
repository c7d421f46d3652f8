"""What an exported network becomes besides a plain state dict: one file per format, named in `registry.py`.

A format is a function (Exported, folder, options) -> Written: it writes its files and says how they are loaded.
"""
