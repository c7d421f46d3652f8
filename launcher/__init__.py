"""How a run starts: command line, configuration tree, wiring of the other packages."""
