"""ZeRO: the same training run with parameters, gradients and optimizer states cut over the ranks of a group."""
