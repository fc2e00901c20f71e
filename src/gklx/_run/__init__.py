"""How a call is run: by the row kernel where there is one, else by the formulas."""
