"""Training and serving of vision-language-action (VLA) policies in JAX.

The subpackages are imported on their own, so that a robot which only asks a remote policy for actions
(`openpi_like.serve.client`) loads neither jax nor a simulator.
"""

__version__ = "0.1.0"
