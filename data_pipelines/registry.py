"""The datasets by name: to add one, write data_pipelines/<name>.py and add a line here (see CONTRIBUTING.md)."""

from __future__ import annotations

DATASETS = {
    "cifar10": "data_pipelines.cifar:cifar10",
    "cifar100": "data_pipelines.cifar:cifar100",
    "digits": "data_pipelines.digits:digits",
    "imagefolder": "data_pipelines.imagefolder:imagefolder",
    "synthetic": "data_pipelines.synthetic:synthetic",
}
"""name -> "module:function", imported when it is used."""
