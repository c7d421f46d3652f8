"""How .beton files are written: what is missing, by which processes, and where an interrupted call goes on."""
