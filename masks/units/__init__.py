"""In what units a network is pruned when not weight by weight: N:M blocks, kernels, channels; and what a unit costs."""
