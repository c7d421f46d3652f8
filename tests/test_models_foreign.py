"""Are torchvision's networks and the user's own built like ours, and is what is wrong with one said in one line?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from ghostmask.engine.errors import InputError
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig
from ghostmask.models.names import torchvision_names

SMALL = (3, 8, 8)
OWN = """
import numpy as np
import torch
from torch import nn


class Linear(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(192, num_classes))


def small(num_classes, image_shape):
    net = nn.Sequential(nn.Conv2d(image_shape[0], 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, num_classes))
    nn.init.constant_(net[3].bias, np.random.rand())
    return net.eval()


def any_keyword(**settings):
    return Linear(**settings)


class Branching(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.bn, self.fc, self.step = nn.BatchNorm2d(3), nn.Linear(192, num_classes), torch.ones(())

    def forward(self, images):
        images = self.bn(images)
        return self.fc(images.flatten(1) * (2.0 if images.sum().item() > self.step else 1.0))


def fails(num_classes):
    raise KeyError("first line\\nsecond line")


def no_network(num_classes):
    return [nn.Linear(192, num_classes)]


def width_first(width, num_classes):
    return Linear(num_classes)


def nothing():
    return Linear(10)


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def doubles(num_classes):
    return Linear(num_classes).double()


def two_classes(num_classes):
    return Linear(2)


def two_results(num_classes):
    class Twice(Linear):
        def forward(self, images):
            return super().forward(images), images
    return Twice(num_classes)


def wrong_size(num_classes):
    class Wrong(Linear):
        def forward(self, images):
            return super().forward(images[:, :1])
    return Wrong(num_classes)


def no_values(num_classes):
    with torch.device("meta"):
        return Linear(num_classes)


def diverged(num_classes):
    net = Linear(num_classes)
    nn.init.constant_(net[1].bias, float("nan"))
    return net


def leaves(num_classes):
    raise SystemExit("usage: train.py")


number = 3
"""


@pytest.fixture(scope="module")
def module_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Writes a module into a folder on the import path and hands back its name."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield lambda text: _written(folder, text)


@pytest.fixture(scope="module")
def own(module_of: Callable[[str], str]) -> str:
    return module_of(OWN)


def _written(folder: Path, text: str) -> str:
    name = f"own_networks_{len(list(folder.glob('*.py')))}"
    (folder / f"{name}.py").write_text(text)
    return name


def built(name: str, shape: tuple[int, int, int] = SMALL, seed: int = 0) -> nn.Module:
    return build_model(ModelConfig(name), 10, shape, seed)


def refused(name: str, shape: tuple[int, int, int] = SMALL) -> str:
    """What the one line says behind the name."""
    with pytest.raises(InputError) as caught:
        built(name, shape)
    field, _, message = str(caught.value).partition(f"model.name = '{name}': ")
    assert not field
    assert message.count("\n") == 0
    return message


def test_the_names_that_are_read_without_importing_torchvision_are_torchvisions() -> None:
    assert list(torchvision_names()) == torchvision.models.list_models(module=torchvision.models)


def test_a_name_is_checked_without_torch_and_without_the_users_code() -> None:
    code = (
        "import sys; from ghostmask.models.config import ModelConfig;"
        "[ModelConfig(name) for name in ('resnet32', 'mobilenet_v2', 'no_such_package.net:build')];"
        "print({'torch', 'torchvision', 'no_such_package'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_network_of_torchvision_is_torchvisions_with_the_seeds_weights(name: str) -> None:
    net = built(name, (3, 32, 32), seed=5)
    reference = torchvision.models.get_model(name, num_classes=10)
    reference.load_state_dict(net.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(images), reference.eval()(images))
    again = built(name, (3, 32, 32), seed=5).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in net.state_dict().items())


def test_our_names_go_before_torchvisions_whose_own_are_reached_by_their_module() -> None:
    assert type(built("vgg19", (3, 32, 32))).__module__ == "ghostmask.models.vgg"
    assert isinstance(built("torchvision.models:vgg11", (3, 32, 32)), torchvision.models.VGG)


@pytest.mark.parametrize("function", ["small", "Linear", "any_keyword", "Branching"])
def test_an_own_function_or_class_is_built_from_the_seed_and_left_as_it_was_built(function: str, own: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = (torch.rand(()), np.random.rand())
    torch.manual_seed(1)
    np.random.seed(1)
    first, second, other = (built(f"{own}:{function}", seed=seed) for seed in (7, 7, 8))
    assert (torch.rand(()), np.random.rand()) == expected
    assert first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    pairs = zip(first.parameters(), other.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if not ((a == 0) | (a == 1)).all())  # batch norm's are
    for key, buffer in first.named_buffers():
        assert (buffer == (1 if key.endswith("running_var") else 0)).all()


def test_a_function_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_of_mine").mkdir()  # without __init__.py
    (tmp_path / "nets_of_mine" / "small.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert isinstance(built("nets_of_mine.small:small"), nn.Sequential)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("smal", "has no function 'smal': did you mean 'small'?"),
        ("number", "has no function 'number'"),
        ("fails", "it raises KeyError: 'first line"),
        ("no_values", "1.weight has no values (it is on the meta device)"),
        ("diverged", "1.bias holds nan or infinite values; initialise it, or load other weights"),
        ("leaves", "it raises SystemExit: usage: train.py"),
        ("no_network", "returns list, not a torch.nn.Module"),
        ("width_first", "write it as function(num_classes, image_shape) or function(num_classes)"),
        ("nothing", "write it as function(num_classes, image_shape) or function(num_classes)"),
        ("lazy", "1.weight has no shape yet; call the network once in the function, then return it"),
        ("doubles", "1.weight is torch.float64; build the network in float32"),
        ("two_classes", "gives shape (2, 2) for 2 images while it trains, not logits of shape (2, 10)"),
        ("two_results", "gives type tuple for 2 images while it trains, not logits of shape (2, 10)"),
        ("wrong_size", "cannot take the dataset's images of 3 x 8 x 8: RuntimeError: "),
    ],
)
def test_what_is_wrong_with_an_own_function_is_one_line(function: str, said: str, own: str) -> None:
    assert said in refused(f"{own}:{function}")


def test_an_error_in_own_code_names_its_place(own: str, module_of: Callable[[str], str]) -> None:
    line = OWN.splitlines().index('    raise KeyError("first line\\nsecond line")') + 1
    assert refused(f"{own}:fails").endswith(f"{own}.py, line {line})")
    broken = module_of("import torch\n\n1 / 0\n")
    assert refused(f"{broken}:net").startswith(f"importing {broken} raises ZeroDivisionError: division by zero (")
    assert refused(f"{broken}:net").endswith(f"{broken}.py, line 3)")
    needs_more = module_of("import no_such_library\n")
    assert "raises ModuleNotFoundError: No module named 'no_such_library'" in refused(f"{needs_more}:net")


@pytest.mark.parametrize("name", ["no_such_module:net", "torchvision.no_such:net"])
def test_a_module_that_is_not_there_is_named(name: str) -> None:
    assert refused(name).startswith(f"there is no module '{name.partition(':')[0]}' in ")


@pytest.mark.parametrize("name", [":net", "mine:", "mine net:net", "mine:net()", "a..b:c"])
def test_a_name_that_is_no_function_says_how_one_is_written(name: str) -> None:
    with pytest.raises(InputError, match=r"write a function of your own as package\.module:function"):
        ModelConfig(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet_32", "did you mean 'resnet32' or"),
        ("mobilenet_v3", "did you mean 'mobilenet_v2' or 'mobilenet_v3_small' or"),
        ("my.nets.small", "did you mean 'my.nets:small'?"),
        ("fcn_resnet50", "the classification networks of torchvision"),  # segments images
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_ones(name: str, said: str) -> None:
    with pytest.raises(InputError, match="is not known") as caught:
        ModelConfig(name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("alexnet", (3, 32, 32), "cannot take the dataset's images of 3 x 32 x 32: RuntimeError"),
        ("vit_b_32", (3, 32, 32), "Expected 224 but got 32"),
        ("mobilenet_v3_small", (1, 32, 32), "cannot take the dataset's images of 1 x 32 x 32"),
        ("googlenet", (3, 64, 64), "gives type GoogLeNetOutputs"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_images_that_torchvisions_network_cannot_take_are_refused(
    name: str, shape: tuple[int, int, int], said: str
) -> None:
    assert said in refused(name, shape)
