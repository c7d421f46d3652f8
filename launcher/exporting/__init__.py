"""What an exported network becomes besides a plain state dict: one file per format, and `registry.py`, which names them.

A format is a function (Exported, folder, options) -> Written: it writes its files and says how they are loaded.
"""
