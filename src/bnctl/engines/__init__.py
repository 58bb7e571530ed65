"""Two engines that lift a native model to the normalised graph and apply a plan to it."""
