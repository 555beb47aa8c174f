"""Meta-World tasks with Fetch's arm: another look, reach, gripper convention and camera than `SawyerSim` has."""

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from jaxtyping import Float

from openpi_like.robots.metaworld_fetch import METAWORLD_FETCH
from openpi_like.robots.sims.metaworld_scene import fetch_scene
from openpi_like.robots.sims.sawyer import SawyerSim


class MetaWorldFetchSim(SawyerSim):
    """See `Sim`. A seed is a position of the object, the same one as that of Sawyer."""

    robot = METAWORLD_FETCH
    tasks = (
        "button-press",
        "coffee-button",
        "handle-press",
        "plate-slide",
        "window-open",
        "window-close",
        "faucet-open",
        "faucet-close",
        "drawer-open",
        "drawer-close",
        "door-close",
    )  # others are beyond its reach, or not tried
    more_tasks = ()
    view = ((0.6, -0.2, 0.8), (0.0, 0.68, 0.12), 42.0)

    def to_package(self, action: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
        """See `SawyerSim.to_package`. There, 1 closes the gripper."""
        return action * np.array([1, 1, 1, -1], np.float32)

    def from_package(self, action: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
        """See `SawyerSim.to_package`."""
        return self.to_package(action)

    def _build(self, task: str) -> Any:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS, ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        env_class: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]
        make: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"]
        # The package reads the scene from the file that this property of the class names.
        scene = fetch_scene(Path(env_class.model_name.fget(None)))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "scene.xml"
            path.write_text(scene)
            with mock.patch.object(env_class, "model_name", str(path)):
                return make(seed=0)
