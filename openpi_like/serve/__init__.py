"""Policies for remote robots. `protocol` and `client` need numpy, msgpack and websockets, nothing else."""
