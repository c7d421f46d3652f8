"""Which channels of a network are the same channel? Found by running it once, on no data, and following its tensors.

Every output channel of a layer is an *atom* at first. Atoms that are added to each other (residual connections),
multiplied with each other (squeeze-and-excitation), or made of each other (depthwise convolutions) are joined; what an
operation does that is not known here to leave channels apart fixes them: they are never removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

SAME = {
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "leaky_relu", "mish", "sigmoid",
    "tanh", "softplus", "dropout", "feature_dropout", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "clamp", "clone", "contiguous", "detach",
    "neg", "abs", "square", "float", "to",
}  # fmt: skip
"""Functions of each channel by itself that keep the tensor's dimensions."""
JOINED = {"add", "sub", "mul", "div", "truediv", "maximum", "minimum"}
REDUCED = {"mean", "sum", "amax", "amin"}
RESHAPED = {"flatten", "view", "reshape", "squeeze", "unsqueeze"}
LAYERS = {"conv1d", "conv2d", "conv3d", "linear"}

Atoms = Sequence[int]


class Tracer(TorchFunctionMode):
    """Inside, what runs is followed.

    layers: (weight name, atoms of its rows, of its columns; None: a column belongs to its row) of each use of a weight;
    vectors: (parameter or buffer name, atoms) of what else has a value per channel.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        """names: of parameters and buffers, by id."""
        super().__init__()
        self.names = names
        self.parents: list[int] = []
        self.fixed: set[int] = set()
        self.layers: list[tuple[str, list[int], list[int] | None]] = []
        self.vectors: list[tuple[str, list[int]]] = []
        self._atoms: dict[int, tuple[Tensor, int, list[int]]] = {}
        self._rows: dict[str, list[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in _flat([*args, *kwargs.values()]) if id(t) in self._atoms]
        if not isinstance(out, Tensor):
            if any(isinstance(o, Tensor) for o in _flat([out])):
                self.fix(*tensors)
            return out
        name = func.__name__.strip("_")
        name = name[1:] if name[1:] in JOINED else name  # __iadd__, __radd__
        if not tensors and name in LAYERS:  # what is not followed any more goes into a layer: from there on it is
            self.mark_fixed(args[0], 1 if name != "linear" else args[0].dim() - 1)
            tensors = [args[0]]
        if tensors:
            self._follow(name, out, args, kwargs, tensors)
        return out

    def mark(self, tensor: Tensor, dim: int, atoms: Atoms) -> None:
        """From now on dimension `dim` of the tensor holds these channels."""
        self._atoms[id(tensor)] = (tensor, dim, list(atoms))

    def mark_fixed(self, tensor: Tensor, dim: int) -> None:
        """As mark, with new channels that are never removed."""
        atoms = self.fresh(tensor.shape[dim])
        self.fixed.update(atoms)
        self.mark(tensor, dim, atoms)

    def fresh(self, number: int) -> list[int]:
        """New atoms."""
        first = len(self.parents)
        self.parents += range(first, first + number)
        return self.parents[first:]

    def root(self, atom: int) -> int:
        """The atom that stands for all that are joined with this one: the first of them."""
        while self.parents[atom] != atom:
            self.parents[atom] = self.parents[self.parents[atom]]
            atom = self.parents[atom]
        return atom

    def join(self, one: Atoms, other: Atoms) -> None:
        """They are the same channels, one by one."""
        for a, b in zip(one, other, strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            self.parents[high] = low

    def fix(self, *tensors: Tensor) -> None:
        """The channels of these tensors are never removed."""
        for tensor in tensors:
            if id(tensor) in self._atoms:
                self.fixed.update(self._atoms[id(tensor)][2])

    def _follow(self, name: str, out: Tensor, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        x, dim, atoms = self._atoms[id(tensors[0])]
        if name in LAYERS:
            self._layer(out, x, dim, atoms, args, kwargs)
        elif name in JOINED:
            self._joined(out, [a for a in args if isinstance(a, Tensor)])
        elif name == "batch_norm" and dim == 1:
            self._vectors(_flat([*args[1:], *kwargs.values()]), atoms)
            self.mark(out, dim, atoms)
        elif name in SAME and out.dim() == x.dim() and out.shape[dim] == x.shape[dim]:
            self.mark(out, dim, atoms)
        elif name in REDUCED:
            self._reduced(out, x, dim, atoms, args, kwargs)
        elif name in RESHAPED and dim == 1 and out.shape[:2] == x.shape[:2]:
            self.mark(out, 1, atoms)
        elif name in RESHAPED and dim == 1 and out.shape == (len(x), x[0].numel()):
            self.mark(out, 1, [a for a in atoms for _ in range(x[0, 0].numel())])
        elif name in ("cat", "concat"):
            self._concatenated(out, args, kwargs)
        else:
            self.fix(*tensors)

    def _layer(self, out: Tensor, x: Tensor, dim: int, atoms: list[int], args: Any, kwargs: Any) -> None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        place = 1 if weight.dim() > 2 else x.dim() - 1
        groups = x.shape[place] // weight.shape[1]
        name = self.names.get(id(weight))
        if args[0] is not x or dim != place or (name is None and groups != len(atoms)):
            self.fix(x)
            return
        rows = self._rows.get(name or "")
        if groups not in (1, len(atoms)):
            self.fix(x)
            rows = rows or self.fresh(len(weight))
            self.fixed.update(rows)
        elif groups == 1 and len(atoms) == weight.shape[1]:
            rows = rows or self.fresh(len(weight))
        else:  # depthwise, or one input channel
            made = [a for a in atoms for _ in range(len(weight) // len(atoms))]
            if rows:
                self.join(rows, made)
            rows = rows or made
        if name is not None:
            self._rows[name] = rows
            self.layers.append((name, rows, list(atoms) if groups == 1 else None))
        self._vectors([bias], rows)
        self.mark(out, place, rows)

    def _joined(self, out: Tensor, operands: list[Tensor]) -> None:
        known = [self._atoms[id(t)] for t in operands if id(t) in self._atoms]
        _, dim, atoms = known[0]
        others = [t for t in operands if id(t) not in self._atoms and t.numel() > 1]
        alike = all(t.dim() == out.dim() and d == dim and len(a) == out.shape[dim] for t, d, a in known)
        if others or not alike:
            self.fix(*operands)
            return
        for _, _, other in known[1:]:
            self.join(atoms, other)
        self.mark(out, dim, atoms)

    def _reduced(self, out: Tensor, x: Tensor, dim: int, atoms: list[int], args: Any, kwargs: Any) -> None:
        given = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = {d % x.dim() for d in ([given] if isinstance(given, int) else given or range(x.dim()))}
        if dim in dims:
            self.fix(x)
            return
        below = 0 if out.dim() == x.dim() else sum(d < dim for d in dims)
        self.mark(out, dim - below, atoms)

    def _concatenated(self, out: Tensor, args: Any, kwargs: Any) -> None:
        pieces = list(args[0])
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        known = [self._atoms[id(t)] for t in pieces if id(t) in self._atoms]
        if len(known) < len(pieces) or any(d != dim for _, d, _ in known):
            self.fix(*pieces)
        else:
            self.mark(out, dim, [a for _, _, atoms in known for a in atoms])

    def _vectors(self, tensors: Sequence[Any], atoms: list[int]) -> None:
        for t in tensors:
            if isinstance(t, Tensor) and id(t) in self.names and t.shape == (len(atoms),):
                self.vectors.append((self.names[id(t)], atoms))


def traced(net: nn.Module, image_shape: tuple[int, int, int]) -> Tracer:
    """What became of one batch of two images; `net` stays as it is. Raises what the network raises on meta tensors."""
    state = {n: t.detach().to("meta") for n, t in (*net.named_parameters(), *net.named_buffers())}
    tracer, images = Tracer({id(t): n for n, t in state.items()}), torch.empty(2, *image_shape, device="meta")
    tracer.mark_fixed(images, 1)
    training = {module: module.training for module in net.modules()}
    try:
        net.eval()
        with torch.no_grad(), tracer:
            out = functional_call(net, state, (images,))
    finally:
        for module, was in training.items():
            module.training = was
    tracer.fix(*(t for t in _flat([out]) if isinstance(t, Tensor)))
    return tracer


def _flat(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        nested = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
        found += _flat(list(nested)) if nested is not None else [value]
    return found
