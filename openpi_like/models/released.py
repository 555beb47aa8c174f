"""Models by name: the sizes of published weights."""

from collections.abc import Callable
from typing import Any

from openpi_like.config import load_run
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.models.smolvla import SmolVlaConfig
from openpi_like.models.text_model import TextModelConfig

RELEASED: dict[str, Callable[[], Any]] = {
    "pi0": Pi0Config.released,
    "pi05": lambda: Pi0Config.released(pi05=True),
    "pi0_fast": Pi0FastConfig.released,
    "smolvla": SmolVlaConfig.released,
    "paligemma": TextModelConfig.paligemma,
}


def find_model(name: str) -> Any:
    """Returns the config of a model: one of `RELEASED`, or the model of the run in a config file.

    Raises:
        FileNotFoundError: there is no such model, and no such file. ValueError: the file has no config.
    """
    if name in RELEASED:
        return RELEASED[name]()
    config = load_run(name)
    return getattr(config, "model", config)
