"""Checking array libraries against each other: what `gklx verify`, `gklx.testing` and the package's tests share.

All use `ulps`, the distance of results, and `places`: the libraries and devices that are here, and calls of functions
there. The assertions of `gklx.testing` add `differences`, numerical derivatives, and `agreement`, one message for all
deviations. The command adds `executions`, the kernel and the formulas of each place; `cases`, the losses and inputs,
which are those of the tests too; `definitions`, the expected results; `checks` and their bounds; and `report`, which
writes the findings. `import gklx` imports none of this.
"""
