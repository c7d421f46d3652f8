"""ghostmask: trains sparse networks. What it offers to other programs is imported when it is first asked for.

The folders beside this file are its packages; in a checkout they are links to the folders of the checkout.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

__version__ = "0.1.0"

_LIBRARY: dict[str, str] = {
    "optimizer": "ghostmask.library:optimizer",
    "initialize": "ghostmask.library:initialize",
    "probmask": "ghostmask.library:probmask",
    "gmp": "ghostmask.library:gmp",
    "fixed": "ghostmask.library:fixed",
    "magnitude_masks": "ghostmask.library:magnitude_masks",
    "present_masks": "ghostmask.masks.masked:present_masks",
    "prunable_weights": "ghostmask.masks.prunable:prunable_weights",
    "ShardedOptimizer": "ghostmask.engine.sharding.optimizer:ShardedOptimizer",
    "ParameterGroup": "ghostmask.engine.sharding.placement:ParameterGroup",
    "Reparametrization": "ghostmask.engine.sharding.reparametrization:Reparametrization",
    "Sgd": "ghostmask.engine.sharding.rules:Sgd",
    "Adam": "ghostmask.engine.sharding.rules:Adam",
}
"""public name -> "module:name"; `import ghostmask` itself stays light."""

__all__ = list(_LIBRARY)


def __getattr__(name: str) -> Any:
    """The public object `name` (PEP 562). Raises AttributeError that says what there is, or how to import a package."""
    if name in _LIBRARY:
        module, _, attribute = _LIBRARY[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    message = f"module 'ghostmask' has no attribute {name!r}: it offers {', '.join([*_LIBRARY, '__version__'])}"
    if name.isidentifier() and importlib.util.find_spec(f"ghostmask.{name}"):
        message += f"; {name} is a package of it: import ghostmask.{name}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIBRARY})
