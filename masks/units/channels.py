"""Which whole channels stay: those with the largest mean scores, as many as the network's budget has room for.

A weight between input channel i and output channel o is kept where both are. With A_l kept rows and B_l kept columns of
weight l, K_l places of its kernel and u_l uses of each (1, or with budget=flops the output's pixels),

    cost = sum over l of u_l K_l A_l B_l

is what is held to round(density x cost of all): exactly, not channel by channel. There are few channels (11,456 in
ResNet-50 once those that are added to each other are one), so that every rank has a number for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghostmask.engine.errors import bad_value
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.spans import Spans
from ghostmask.masks.scoring.topk import Budget, hashed, kept_count
from ghostmask.masks.units.coupling import Coupling
from ghostmask.masks.units.shares import layer_shares

BITS = 30
"""Of a channel's score."""
FINE = 2.0**30
"""Integers per 1 in which probabilities are added up: the same bits in any order."""


@dataclass(frozen=True)
class _Tables:
    """On one device: by weight name the numbers of its columns, where it is not depthwise; those of all rows; the
    places of each channel's rows; the numbers of all rows and columns, and whose they are: weight l's rows l's, its
    columns (weights + l)'s; of each weight its cost, and whether it is depthwise."""

    columns: dict[str, Tensor]
    rows: Tensor
    members: Tensor
    numbers: Tensor
    slots: Tensor
    costs: Tensor
    depthwise: Tensor


class Channels:
    """Units of a network whose channels hang together as `coupling` says.

    shapes: of its prunable weights; uses: by weight name how often an image uses it, for a budget in multiplications;
    None = each weight counts once.
    """

    def __init__(self, coupling: Coupling, shapes: Mapping[str, torch.Size], uses: Mapping[str, int] | None) -> None:
        self.coupling, self.shapes = coupling, dict(shapes)
        self.count = coupling.count
        self.costs: list[int] = []
        """Of each weight: what one kept row of one kept column costs."""
        for name, shape in shapes.items():
            places = shape[1:].numel() if coupling.columns[name] is None else shape[2:].numel()
            self.costs.append(places * (1 if uses is None else uses.get(name, 0)))
        self._known: dict[torch.device, _Tables] = {}

    def largest(
        self, part: Slice, scores: Tensor, budget: Budget, among: Tensor | None = None, *, wait: bool = True
    ) -> Tensor:
        """Collective: see `masks.scoring.topk.largest`; scores: (n,).

        The channels in the order of the mean score of the weights that make them, in shares of their layers' (with
        constraint=layerwise: of their rank among those of one layer, so that each keeps the same share), as many as the
        budget has room for.
        """
        spans = Spans.channels(part)
        ones = torch.ones_like(scores, dtype=torch.bool) if among is None else among
        sums, numbers = spans.sums(layer_shares(part, scores, among)), spans.sums(ones.float())
        sums, numbers = self.of_channels(sums), self.of_channels(numbers)
        alive = numbers > 0.5
        digits, powers = (sums / numbers.clamp(min=1)).frexp()
        means = torch.ldexp((digits * 2.0**BITS).round(), powers - BITS)  # the sums' own rounding must not decide a tie
        means = torch.where(alive, means, -torch.inf)
        kept = self.chosen(means, budget) & alive
        mask = self.mask(part, spans, kept)
        return mask if among is None else mask & among

    def mask(self, part: Slice, spans: Spans, kept: Tensor) -> Tensor:
        """(n,) bools of this rank's weights whose row and column are kept; kept: (count,) bools."""
        rows, columns = self.of_elements(part, spans, kept.to(torch.uint8))
        return (rows & columns).bool()

    def of_channels(self, of_rows: Tensor) -> Tensor:
        """(count,) float64: the sum over each channel's rows, in one order on every device."""
        padded = torch.cat([of_rows, of_rows.new_zeros(1)])
        total = padded.new_zeros(self.count)
        for column in self._tables(of_rows.device).members.unbind(1):
            total += padded[column]
        return total

    def of_elements(self, part: Slice, spans: Spans, values: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) twice: the values, (count,), of each weight's row and column; 1 for those never removed."""
        values = torch.cat([values, values.new_ones(1)])
        device = values.device
        known = self._tables(device)
        rows = spans.spread(values[known.rows])
        columns = values.new_ones(part.numel)
        for s in part.segments:
            if s.name in known.columns:
                row = values[known.columns[s.name]].repeat_interleave(self.shapes[s.name][2:].numel())
                places = torch.arange(s.offset, s.offset + s.numel, device=device).remainder_(len(row))
                columns[s.start : s.start + s.numel] = row[places]
        return rows, columns

    def columns(self, device: torch.device) -> dict[str, Tensor]:
        """By name the numbers of the input channels of each weight that has other ones than its outputs."""
        return self._tables(device).columns

    def chosen(self, scores: Tensor, budget: Budget) -> Tensor:
        """(count,) bools of the channels that stay; scores: (count,), equal on every rank.

        Raises InputError where not even those that min_per_layer protects have room, or nothing has.
        """
        order = self._order(scores, budget)
        costs = self.prefix_costs(order)
        allowed = kept_count(budget.density, int(costs[-1]))
        number = int((costs[1:] <= allowed).sum())
        needed = self._protected(budget.min_per_layer) if budget.constraint == "global" else 0
        if number < max(1, needed):
            least = int(costs[max(1, needed)])
            what = f"mask.min_per_layer = {budget.min_per_layer} protects" if needed else "one channel needs"
            fix = f"of {int(costs[-1])} it leaves {allowed}, and what {what} costs {least}; give more, or kernel"
            raise bad_value("mask.density", budget.density, fix)
        kept = torch.zeros(self.count, dtype=torch.bool, device=scores.device)
        kept[order[:number]] = True
        return kept

    def check(self, budget: Budget) -> None:
        """Raise the InputError of `chosen` for a budget with which no scores would do."""
        self.chosen(torch.zeros(self.count, dtype=torch.float64), budget)

    def prefix_costs(self, order: Tensor) -> Tensor:
        """(count + 1,) int64: the cost of the network with the first 0, 1, ... of the channels in that order."""
        total = torch.zeros(self.count + 1, dtype=torch.int64, device=order.device)
        for cost, (name, rows) in zip(self.costs, self.coupling.rows.items(), strict=True):
            columns = self.coupling.columns[name]
            kept = self._prefix_counts(rows, order)
            total += cost * kept * (1 if columns is None else self._prefix_counts(columns, order))
        return total

    def expected(self, probabilities: Tensor) -> Tensor:
        """() float64: the mean cost of the network, of whose channels each is there with its probability, (count,).

        Every weight's row and column count as independent, also where they are one channel.
        """
        known = self._tables(probabilities.device)
        whole = torch.cat([probabilities * FINE, probabilities.new_full((1,), FINE)]).round().long()
        sums = torch.zeros(2 * len(self.costs), dtype=torch.int64, device=whole.device)
        rows, columns = (sums.index_add_(0, known.slots, whole[known.numbers]).double() / FINE).chunk(2)
        return (known.costs * rows * torch.where(known.depthwise, 1.0, columns)).sum()

    def removed(self, masks: Mapping[str, Tensor]) -> Tensor:
        """(count,) bools of the channels of which whole masks, by weight name, keep no weight in any row or column."""
        kept = torch.zeros(self.count + 1, dtype=torch.bool)
        for name, mask in masks.items():
            places = mask.cpu().reshape(*mask.shape[:2], -1)
            kept[self.coupling.rows[name][places.any(2).any(1)]] = True
            if (columns := self.coupling.columns[name]) is not None:
                kept[columns[places.any(2).any(0)]] = True
        return ~kept[:-1]

    @torch.no_grad()
    def silence(self, net: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Set batch norms and biases of removed channels to 0 (their variance to 1). No logit changes: what takes these
        channels has weight 0 for them."""
        removed = torch.cat([self.removed(masks), torch.zeros(1, dtype=torch.bool)])
        state = net.state_dict()
        for name, numbers in self.coupling.vectors.items():
            state[name][removed[numbers].to(state[name].device)] = float(name.endswith("running_var"))

    def _order(self, scores: Tensor, budget: Budget) -> Tensor:
        """(count,) int64: the channels, those that stay longest first."""
        order = hashed(torch.arange(self.count, device=scores.device), budget.seed).argsort(descending=True)
        order = order[scores[order].argsort(descending=True, stable=True)]
        places, sizes = self._places(order)
        if budget.constraint == "layerwise":
            return order[((places + 1) / sizes).argsort(stable=True)]
        if budget.min_per_layer:
            return order[(places >= budget.min_per_layer).int().argsort(stable=True)]
        return order

    def _places(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """(count,) twice, of the channels in that order: how many of its layer's come before it, and how many it has.
        Of a layer are those that it is the first to make."""
        origins = self.coupling.origins.to(order.device)[order]
        by_layer = origins.argsort(stable=True)
        sizes = torch.zeros(len(self.shapes), dtype=torch.int64, device=order.device)
        sizes.index_add_(0, origins, torch.ones_like(origins))
        begins = sizes.cumsum(0) - sizes
        places = torch.empty_like(order)
        places[by_layer] = torch.arange(self.count, device=order.device) - begins[origins[by_layer]]
        return places, sizes[origins]

    def _tables(self, device: torch.device) -> _Tables:
        """What the coupling says, there: copied once, so that no step waits for it."""
        if device not in self._known:
            rows = torch.cat(list(self.coupling.rows.values()))
            columns = {n: c.to(device) for n, c in self.coupling.columns.items() if c is not None}
            taken = [torch.zeros(0, dtype=torch.int64) if c is None else c for c in self.coupling.columns.values()]
            each = [*self.coupling.rows.values(), *taken]
            slots = torch.arange(len(each)).repeat_interleave(torch.tensor([len(own) for own in each]))
            depthwise = torch.tensor([c is None for c in self.coupling.columns.values()])
            costs = torch.tensor(self.costs, dtype=torch.float64)
            tensors = (rows, self._rows_of_each(), torch.cat(each), slots, costs, depthwise)
            self._known[device] = _Tables(columns, *(t.to(device) for t in tensors))
        return self._known[device]

    def _protected(self, least: int) -> int:
        sizes = torch.bincount(self.coupling.origins, minlength=len(self.shapes))
        return int(sizes.clamp(max=least).sum())

    def _prefix_counts(self, numbers: Tensor, order: Tensor) -> Tensor:
        """(count + 1,) int64: how many of the numbers are never removed or among the first 0, 1, ... channels."""
        each = torch.bincount(numbers, minlength=self.count + 1).to(order.device)
        return torch.cat([each[-1:], each[order]]).cumsum(0)

    def _rows_of_each(self) -> Tensor:
        """(count, most) int64: the places of each channel's rows among the rows of all weights; filled up with one
        more."""
        numbers = torch.cat(list(self.coupling.rows.values()))
        order = numbers.argsort(stable=True)
        sizes = torch.bincount(numbers, minlength=self.count + 1)[: self.count]
        members = torch.full((self.count, int(sizes.max())), len(numbers))
        places = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        members[numbers[order[: len(places)]], places] = order[: len(places)]
        return members
