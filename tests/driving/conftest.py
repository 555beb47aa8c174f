"""Simulated cars, made once: a scene takes a while to compile."""

import importlib.util

import pytest

from openpi_like.robots.sims import make_sim


@pytest.fixture(scope="session")
def cars():
    """Returns the simulated robot of a name, "ego_vehicle" or "ego_controls"."""
    if importlib.util.find_spec("highway_env") is None:
        pytest.skip("highway_env is not installed")
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_sim(name)
        return made[name]

    return get
