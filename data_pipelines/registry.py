"""The datasets by name: to add one, write data_pipelines/sources/<name>.py and add a line here (CONTRIBUTING.md)."""

from __future__ import annotations

DATASETS = {
    "cifar10": "ghostmask.data_pipelines.sources.cifar:cifar10",
    "cifar100": "ghostmask.data_pipelines.sources.cifar:cifar100",
    "digits": "ghostmask.data_pipelines.sources.digits:digits",
    "imagefolder": "ghostmask.data_pipelines.sources.imagefolder:imagefolder",
    "imagenet": "ghostmask.data_pipelines.sources.imagenet:imagenet",
    "synthetic": "ghostmask.data_pipelines.sources.synthetic:synthetic",
    "webdataset": "ghostmask.data_pipelines.sources.webdataset:webdataset",
}
"""name -> "module:function", imported when it is used."""
