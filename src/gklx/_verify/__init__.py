"""Checking array libraries against each other: what `gklx verify` and `gklx.testing` do.

Both use `places`, the libraries and devices that are here; `calls`, which runs a function at a place; and `ulps`, the
distance of results. The assertions of `gklx.testing` add `differences`, numerical derivatives, and `agreement`, one
message for all deviations. The command adds `executions`, the kernel and the formulas of each place; `cases`, the
inputs; `definitions`, the expected results; `checks` and their bounds; and `verify`, which runs them. `report` and
`junit` write the findings. `import gklx` imports none of this.
"""
