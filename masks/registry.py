"""The mask methods by name: to add one, write masks/methods/<name>.py and add a line here (see CONTRIBUTING.md)."""

from __future__ import annotations

METHODS = {
    "dense": "ghostmask.masks.methods.dense:Dense",
    "magnitude": "ghostmask.masks.methods.magnitude:Magnitude",
    "gmp": "ghostmask.masks.methods.gmp:GradualMagnitude",
    "dnw": "ghostmask.masks.methods.dnw:Dnw",
    "st3": "ghostmask.masks.methods.st3:St3",
    "feather": "ghostmask.masks.methods.feather:Feather",
    "edge_popup": "ghostmask.masks.methods.edge_popup:EdgePopup",
    "rigl": "ghostmask.masks.methods.rigl:RigL",
    "set": "ghostmask.masks.methods.set:Set",
    "acdc": "ghostmask.masks.methods.acdc:AcDc",
    "probmask": "ghostmask.masks.methods.probmask:ProbMask",
    "str": "ghostmask.masks.methods.str:SoftThresholds",
    "sparse_vd": "ghostmask.masks.methods.sparse_vd:SparseVariationalDropout",
    "l0": "ghostmask.masks.methods.l0:HardConcrete",
    "random": "ghostmask.masks.methods.random_mask:Random",
    "snip": "ghostmask.masks.methods.snip:Snip",
    "grasp": "ghostmask.masks.methods.grasp:Grasp",
    "synflow": "ghostmask.masks.methods.synflow:SynFlow",
    "mlprune": "ghostmask.masks.methods.mlprune:MlPrune",
    "lth": "ghostmask.masks.methods.lth:LotteryTicket",
    "file": "ghostmask.masks.methods.from_file:FromFile",
}
"""name -> "module:class", imported when it is used."""
