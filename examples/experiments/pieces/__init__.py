"""What the experiments share: running them, their statistics and reports, the losses by name, images and networks."""
