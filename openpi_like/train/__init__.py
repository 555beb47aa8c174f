"""The training loop's parts: state, step, optimiser, sharding, checkpoints, metrics, validation."""
