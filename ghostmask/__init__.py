"""ghostmask: trains sparse networks. The folders beside this one are its packages (relative symbolic links)."""
