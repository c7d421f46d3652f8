"""The compiled parts: noise, relaxed masks, projection; CPU, CUDA and torch forms."""

KERNELS = ("ghostmask.masks.kernels.relaxed_mask", "ghostmask.masks.kernels.projection")
"""What has a form for each kind of device."""
