"""What a loss is: the arguments of a call, the formulas, and the batch they are reduced over."""
