"""The compiled parts: noise, relaxed masks, projection; CPU, CUDA and torch forms."""
