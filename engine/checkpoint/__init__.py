"""Sharded checkpoints: what is saved, how files appear whole, how tensors are read on other ranks."""
