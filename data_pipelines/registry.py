"""The datasets by name: to add one, write data_pipelines/<name>.py and add a line here (see CONTRIBUTING.md)."""

from __future__ import annotations

DATASETS = {
    "cifar10": "ghostmask.data_pipelines.cifar:cifar10",
    "cifar100": "ghostmask.data_pipelines.cifar:cifar100",
    "digits": "ghostmask.data_pipelines.digits:digits",
    "imagefolder": "ghostmask.data_pipelines.imagefolder:imagefolder",
    "imagenet": "ghostmask.data_pipelines.imagenet:imagenet",
    "synthetic": "ghostmask.data_pipelines.synthetic:synthetic",
    "webdataset": "ghostmask.data_pipelines.webdataset:webdataset",
}
"""name -> "module:function", imported when it is used."""
