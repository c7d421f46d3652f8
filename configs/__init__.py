"""One YAML file = one complete run; a package so that the files ship in the wheel."""
