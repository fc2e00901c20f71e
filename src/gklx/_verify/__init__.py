"""Checking array libraries against each other: what `gklx verify` and `gklx.testing` do.

`places` are the libraries and devices that are here, `calls` runs a function there, `ulps` measures how far results
lie apart, `differences` differentiates numerically, `agreement` makes one message of it for an assertion. The command's
are `executions`, kernel and formulas of each place, `cases`, the losses on many inputs, `definitions`, what must come
out, `checks` with their bounds, and `verify`, whose findings `report` and `junit` write down. `import gklx` imports
none of this.
"""
