"""The modules that the experiments share: running, statistics, reports, losses, images, text and networks."""
