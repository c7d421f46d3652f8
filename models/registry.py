"""The networks by name: to add one, write it in models/ and add a line here (see CONTRIBUTING.md)."""

from __future__ import annotations

MODELS = {
    "resnet8": "ghostmask.models.cifar_resnet:resnet8",
    "resnet20": "ghostmask.models.cifar_resnet:resnet20",
    "resnet32": "ghostmask.models.cifar_resnet:resnet32",
    "resnet9": "ghostmask.models.resnet9:resnet9",
    "resnet18_cifar": "ghostmask.models.cifar_resnet:resnet18",
    "resnet50_cifar": "ghostmask.models.cifar_resnet:resnet50",
    "vgg19": "ghostmask.models.vgg:vgg19",
    "digits_resnet": "ghostmask.models.cifar_resnet:digits_resnet",
    "conv4": "ghostmask.models.conv4:conv4",
    "resnet18": "ghostmask.models.imagenet_resnet:resnet18",
    "resnet50": "ghostmask.models.imagenet_resnet:resnet50",
}
"""name -> "module:function", imported when it is used; function(num_classes, image_shape) -> nn.Module."""
