"""HDF5 files as robomimic has them: episodes `data/demo_0`, ..., splits in `mask`. LIBERO and RoboCasa add texts."""

import dataclasses
import json
import math
import re
from collections import Counter
from typing import Any

from openpi_like.data.layouts.hdf5_tree import Hdf5
from openpi_like.data.storage import RecordError


@dataclasses.dataclass(frozen=True)
class RobomimicForm:
    """See `Form`. Attributes of the file, of `data` and of the episode are fields of the episode, as are its name and
    that of the file, `env_name` of `env_args`, and `language_instruction`, where LIBERO and RoboCasa have it."""

    version: str = "robomimic_hdf5"
    expects: str = "'data/demo_0', ... (robomimic, LIBERO)"
    one_episode: bool = False
    steps: str = "actions"

    def claims(self, file: Hdf5) -> bool:
        return "data" in file

    def problem(self, file: Hdf5) -> str | None:
        if "data" not in file or not hasattr(file["data"], "keys"):
            return "it has no group 'data', which files of robomimic have"
        data = file["data"]
        if not len(data):
            return "its group 'data' is empty, expected demo_0, ..."
        if "env_args" not in data.attrs:
            return (
                "its group 'data' has no attribute 'env_args', the JSON with 'env_name' that robomimic writes; make "
                "demonstrations of robosuite into robomimic's with its convert_robosuite.py and "
                "dataset_states_to_obs.py, or add it with h5py: file['data'].attrs['env_args'] = "
                '\'{"env_name": "my_task", "env_kwargs": {"control_freq": 20}}\''
            )
        try:
            rate = _control_freq(data.attrs)
        except RecordError as e:
            return str(e)
        if rate is None or (isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < math.inf):
            return None
        return (
            f"its 'env_args' say control_freq {json.dumps(rate)}, expected how many steps are in a second, a number "
            "above 0; write it, or take it away where nobody knows it, with h5py: file['data'].attrs['env_args']"
        )

    def splits(self, file: Hdf5) -> dict[str, list[str]]:
        everything = sorted(file["data"], key=natural)
        if "mask" not in file:
            return {"train": [f"data/{name}" for name in everything]}
        masks = file["mask"]
        try:
            chosen = {split: sorted((_name(n) for n in masks[split][()]), key=natural) for split in masks}
        except (TypeError, AttributeError) as e:
            raise RecordError(f"its group 'mask' has something other than lists of names: {e}", resumable=False) from e
        twice = {
            split: [name for name, count in Counter(names).items() if count > 1] for split, names in chosen.items()
        }
        if problems := [f"mask {split!r} names {', '.join(of)} more than once" for split, of in twice.items() if of]:
            raise RecordError(f"its {'; its '.join(problems)}; write each name once", resumable=False)
        named = {"all": everything, **chosen}
        return {split: [f"data/{name}" for name in names] for split, names in named.items()}

    def rate(self, file: Hdf5) -> float | None:
        rate = _control_freq(file["data"].attrs)
        return None if rate is None else float(rate)

    def left_out(self, key: str) -> str | None:
        if key.startswith("next_obs/"):
            return "observations of the step after, which `obs` has too,"
        return "the simulator's state, which has another size in every scene," if key == "states" else None

    def shows(self, key: str) -> bool:
        return key.startswith("obs/") and key.endswith(("_image", "_rgb"))

    def attributes(self, file: Hdf5, path: str) -> dict[str, Any]:
        data, demo = file["data"], file[path]
        found: dict[str, Any] = {"file_name": file.filename.rpartition("/")[2], "demo": path.rpartition("/")[2]}
        texts = {
            "env_name": _json(data.attrs, "env_args").get("env_name"),
            "language_instruction": _json(demo.attrs, "ep_meta").get("lang")
            or _json(data.attrs, "problem_info").get("language_instruction"),
        }
        # LIBERO has the words of some instructions one by one.
        found |= {key: "".join(text) for key, text in texts.items() if text}
        return {**found, **file.attrs, **data.attrs, **demo.attrs}

    def problems(self, attributes: dict[str, Any], steps: int) -> list[str]:
        if "num_samples" not in attributes:
            return [
                f"it has no attribute 'num_samples'; if its {steps} steps are all of it, add it with h5py: "
                "demo.attrs['num_samples'] = len(demo['actions'])"
            ]
        if attributes["num_samples"] != steps:
            return [f"attribute num_samples is {attributes['num_samples']}, but 'actions' has {steps} steps"]
        return []


def natural(name: str) -> list[str | int]:
    """Returns by what names are sorted so that demo_2 comes before demo_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _name(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _control_freq(attributes: Any) -> Any:
    """Returns what `env_args` say of the rate, None for nothing. Raises RecordError."""
    kwargs = _json(attributes, "env_args").get("env_kwargs")
    return kwargs.get("control_freq") if isinstance(kwargs, dict) else None


def _json(attributes: Any, name: str) -> dict[str, Any]:
    """Returns an attribute that is an object of JSON; nothing where it is not there. Raises RecordError."""
    try:
        found = json.loads(attributes.get(name, "{}"))
    except (ValueError, TypeError) as e:
        raise RecordError(f"its attribute {name!r} is not JSON: {e}; write it again", resumable=True) from e
    if not isinstance(found, dict):
        raise RecordError(f"its attribute {name!r} is JSON, but not an object; write it again", resumable=True)
    return found
