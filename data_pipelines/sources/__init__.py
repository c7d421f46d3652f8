"""One file per dataset: what lies in data.root, and what a training image and an evaluation image of it are."""
