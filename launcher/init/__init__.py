"""ghostmask init: a config that fits a folder of images."""
