"""What a client sends: everything that is wrong with it is said, and the rest becomes arrays."""

import reprlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import Float32

from openpi_like.config import near_names
from openpi_like.data.images import decode, encoding
from openpi_like.robots import Camera, Robot

FIELDS = ("images", "state", "prompt", "robot", "seed", "previous", "delay", "entities")
MAX_PIXELS = 4096 * 4096
"""Of an encoded picture, which is small on the wire whatever it becomes."""
_NAMED, _SHOWN = 5, 80  # unknown names that are said, and characters of each


class ObservationError(ValueError):
    """An observation does not fit the robot; the text says everything that is wrong with it."""


def robot_of(observation: Any, robots: Mapping[str, Robot]) -> Robot:
    """Returns the robot that an observation is of.

    Raises:
        ObservationError: it names none of `robots`, or none where there are several.
    """
    if not isinstance(observation, dict):
        raise ObservationError(f"got a {type(observation).__name__}, expected a dict with images, state and prompt")
    name = observation.get("robot")
    if name is None and len(robots) == 1:
        return next(iter(robots.values()))
    known = list(robots)
    if name is None:
        raise ObservationError(f"robot: missing, and this server has several; add one of {', '.join(known)}")
    if not isinstance(name, str) or name not in robots:
        near = near_names(str(name)[:_SHOWN], known)
        raise ObservationError(f"robot: got {reprlib.repr(name)}, this checkpoint has not seen it; {near}")
    return robots[name]


def check_observation(
    observation: Mapping[str, Any], robot: Robot, cameras: Mapping[str, Camera]
) -> dict[str, np.ndarray]:
    """Returns the pictures of an observation by camera, decoded where they are JPEG or PNG.

    cameras: those of the robot that the policy sees.

    Raises:
        ObservationError: lists everything that does not fit.
    """
    pictures, problems = _pictures(observation.get("images"), cameras)
    unknown = [k for k in observation if k not in FIELDS]
    said = [f"{k[:_SHOWN]}: not part of an observation; {near_names(k[:_SHOWN], FIELDS)}" for k in unknown[:_NAMED]]
    problems = said + _more(unknown) + problems + state_problems(robot, observation.get("state"))
    prompt, seed = observation.get("prompt"), observation.get("seed")
    if prompt is None and robot.default_prompt is None:
        problems.append("prompt: missing, and the robot has no default; say what to do")
    elif prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        problems.append(f"prompt: got {reprlib.repr(prompt)}, expected a text that is not empty")
    if seed is not None and not (isinstance(seed, int | np.integer) and 0 <= seed < 2**32):
        problems.append(f"seed: got {reprlib.repr(seed)}, expected an integer in 0 .. 2^32 - 1")
    if problems:
        raise ObservationError(f"observation does not fit robot {robot.name!r}:\n  " + "\n  ".join(problems))
    return pictures


def check_entities(observation: Mapping[str, Any], robot: Robot) -> dict[str, Float32[np.ndarray, "n F"]]:
    """Returns what an observation says of the things around the robot, by slot; as many as there are.

    Raises:
        ObservationError: lists everything that does not fit.
    """
    given, slots = observation.get("entities"), {e.name: e for e in robot.entities}
    if given is None and not slots:
        return {}
    if not isinstance(given, dict):
        raise ObservationError(
            f"entities: got {type(given).__name__}, expected a dict with {', '.join(slots) or 'nothing'}"
        )
    unknown = [name for name in given if name not in slots]
    problems = [f"entities[{reprlib.repr(name)}]: the robot has no such slot" for name in unknown[:_NAMED]] + _more(
        unknown
    )
    found = {}
    for name, slot in slots.items():
        x = given.get(name)
        expected = f"a float array (n, {slot.size}), n up to {slot.count}"
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            problems.append(f"entities[{name!r}]: got {getattr(x, 'dtype', type(x).__name__)}, expected {expected}")
        elif x.ndim != 2 or x.shape[1] != slot.size or len(x) > slot.count:
            problems.append(f"entities[{name!r}]: got shape {x.shape}, expected {expected}")
        elif not np.isfinite(_float32(x)).all():
            problems.append(f"entities[{name!r}]: not finite, or too large for float32; leave such things out")
        else:
            found[name] = _float32(x)
    if problems:
        raise ObservationError("\n  ".join(problems))
    return found


def check_previous(
    observation: Mapping[str, Any], robot: Robot, max_delay: int | None
) -> tuple[np.ndarray, int] | None:
    """Returns what is left of the chunk before, float32 (n, Js), and how much of it is executed meanwhile, if any.

    max_delay: that the policy was trained for, 0 if for none; None where the server takes no such thing.

    Raises:
        ObservationError: lists everything that does not fit.
    """
    actions, delay = observation.get("previous"), observation.get("delay")
    if actions is None and delay is None:
        return None
    size, horizon, problems = robot.robot_action_size, robot.action_horizon, []
    if max_delay is None:
        problems.append("previous, delay: this server was started without --real-time-chunking")
    if robot.plan is not None:
        problems.append(
            "previous, delay: a plan is seen from where it was made, none goes on from another; leave them out"
        )
    if not isinstance(actions, np.ndarray) or actions.dtype.kind != "f":
        got = f"{type(actions).__name__} {getattr(actions, 'dtype', '')}".strip()
        raise ObservationError("\n  ".join([*problems, f"previous: got {got}, expected a float array (n, {size})"]))
    if actions.ndim != 2 or actions.shape[1] != size or not 1 <= len(actions) <= horizon:
        problems.append(f"previous: got shape {actions.shape}, expected (n, {size}), n from 1 to {horizon}")
    elif not np.isfinite(_float32(actions)).all():
        problems.append("previous: not finite, or too large for float32")
    most = min(len(actions), max_delay or horizon) if actions.ndim else 0
    if not isinstance(delay, int | np.integer) or isinstance(delay, bool) or not 0 <= delay <= most:
        why = ", as the policy was trained" if max_delay and most == max_delay else ""
        problems.append(f"delay: got {reprlib.repr(delay)}, expected an integer in 0 .. {most}{why}")
        raise ObservationError("\n  ".join(problems))
    if problems:
        raise ObservationError("\n  ".join(problems))
    return _float32(actions), int(delay)


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinite, and is refused
        return values.astype(np.float32)


def state_problems(robot: Robot, state: Any) -> list[str]:
    """Returns a line for everything that is wrong with a state, in the robot's own units."""
    size = robot.robot_state_size
    right = isinstance(state, np.ndarray) and state.dtype.kind == "f" and state.shape == (size,)
    if right and np.isfinite(_float32(state)).all():
        return []
    names = ", ".join(f"{f.name}:{f.size} [{f.unit}]" for f in robot.state)
    if not isinstance(state, np.ndarray):
        return [f"state: got {type(state).__name__}, expected a float array ({size},): {names}"]
    problems = []
    if state.dtype.kind != "f":
        problems.append(f"state: got dtype {state.dtype}, expected float32")
    if state.shape != (size,):
        problems.append(f"state: got shape {state.shape}, expected ({size},): {names}")
    elif state.dtype.kind == "f" and len(bad := np.flatnonzero(~np.isfinite(_float32(state)))):
        problems.append(f"state: not finite, or too large for float32, at {bad.tolist()} of ({names})")
    return problems


def _pictures(images: Any, cameras: Mapping[str, Camera]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns pictures by camera, and what is wrong with them."""
    if not isinstance(images, dict):
        return {}, [f"images: got {type(images).__name__}, expected a dict with cameras {', '.join(cameras)}"]
    unknown = [name for name in images if name not in cameras]
    problems = [
        f"images[{reprlib.repr(name)}]: the robot has no such camera; {near_names(str(name)[:_SHOWN], list(cameras))}"
        for name in unknown[:_NAMED]
    ]
    problems += _more(unknown)
    pictures = {}
    for name, camera in cameras.items():
        if name in images:
            try:
                pictures[name] = _picture(images[name], camera)
            except ObservationError as e:
                problems.append(f"images[{name!r}]: {e}")
        elif not camera.steps_back:  # as at the start of an episode
            got = ", ".join(map(reprlib.repr, list(images)[:_NAMED]))
            problems.append(f"images[{name!r}]: missing; got {got or 'no images'}")
    return pictures, problems


def _more(unknown: Sequence[Any]) -> list[str]:
    return [f"and {len(unknown) - _NAMED} more that are unknown"] if len(unknown) > _NAMED else []


def _picture(image: Any, camera: Camera) -> np.ndarray:
    size = (camera.height or "any", camera.width or "any")
    if isinstance(image, bytes):
        image = _decoded(image)
    if not isinstance(image, np.ndarray):
        raise ObservationError(f"got {type(image).__name__}, expected a uint8 array {(*size, 3)}, or JPEG or PNG bytes")
    if image.dtype != np.uint8:
        raise ObservationError(f"got dtype {image.dtype}, expected uint8 in 0 .. 255, RGB")
    fits = image.ndim == 3 and image.shape[2] == 3 and min(image.shape) > 0
    if not fits or (camera.height is not None and image.shape[:2] != (camera.height, camera.width)):
        raise ObservationError(f"got shape {image.shape}, expected {(*size, 3)}")
    return image


def _decoded(data: bytes) -> np.ndarray:
    """Decodes a JPEG or PNG whose header says a size within `MAX_PIXELS`: nothing is allocated before that is known."""
    form = encoding(data)
    try:
        if form == "jpeg":
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        elif form == "png":
            height, width = _png_size(data)
        else:
            raise ValueError(f"{len(data)} bytes that begin with {data[:4]!r}")
        if not 0 < height * width <= MAX_PIXELS:
            raise ValueError(f"{form} of {height} x {width}, expected at most {MAX_PIXELS} pixels")
        return decode(data)
    except ValueError as e:
        raise ObservationError(f"not a picture, expected JPEG or PNG: {e}") from e


def _png_size(data: bytes) -> tuple[int, int]:
    """Returns height and width of a PNG whose parts are whole.

    Decoders allocate what a part says of its own length, and what a second header says of the size.

    Raises:
        ValueError: it has parts that are cut off or damaged, more than one header, or is animated.
    """
    at, kinds = 8, list[bytes]()
    while kinds[-1:] != [b"IEND"]:
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data) or zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise ValueError(f"png of {len(data)} bytes, of which those from {at} on are damaged or cut off")
        if (
            (kind == b"IHDR") != (not kinds)
            or (kind == b"IHDR" and length != 13)
            or kind in (b"acTL", b"fcTL", b"fdAT")
        ):
            raise ValueError(f"png with a part {kind!r} at {at}, expected one header and one picture")
        kinds.append(kind)
        at = end
    return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])
