"""The mask methods by name: to add one, write masks/<name>.py and add a line here (see CONTRIBUTING.md)."""

from __future__ import annotations

METHODS = {
    "dense": "masks.dense:Dense",
    "magnitude": "masks.magnitude:Magnitude",
    "gmp": "masks.gmp:GradualMagnitude",
    "probmask": "masks.probmask:ProbMask",
}
"""name -> "module:class", imported when it is used."""
