"""How batches come out of .beton files: in which order, decoded and augmented how, on which device."""
