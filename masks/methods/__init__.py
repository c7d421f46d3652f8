"""The mask methods: one file each, named in masks/registry.py."""
