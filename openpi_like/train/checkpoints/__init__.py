"""Checkpoints: the contract, saving and restoring, what a run starts from, what serving loads, looking into them."""
