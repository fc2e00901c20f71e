"""How a call is run: by a kernel where there is one, else by the formulas."""
