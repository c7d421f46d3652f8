"""The mask methods by name: to add one, write masks/<name>.py and add a line here (see CONTRIBUTING.md)."""

from __future__ import annotations

METHODS = {
    "dense": "masks.dense:Dense",
    "magnitude": "masks.magnitude:Magnitude",
    "gmp": "masks.gmp:GradualMagnitude",
    "probmask": "masks.probmask:ProbMask",
    "random": "masks.random_mask:Random",
    "snip": "masks.snip:Snip",
    "grasp": "masks.grasp:Grasp",
    "synflow": "masks.synflow:SynFlow",
    "mlprune": "masks.mlprune:MlPrune",
    "lth": "masks.lth:LotteryTicket",
    "file": "masks.from_file:FromFile",
}
"""name -> "module:class", imported when it is used."""
