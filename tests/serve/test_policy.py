"""A checkpoint as a policy: every fault of an observation is named, and actions come back in the robot's own units."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.batch import ActionTokens
from openpi_like.data.images import encode
from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.text import TextTokenizer
from openpi_like.draws import row_keys
from openpi_like.models.chunking import Guidance, soft_mask
from openpi_like.models.flow import draw_noise
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.robots import ActionField, Camera, Gripper, Robot, StateField
from openpi_like.robots.limits import Limits
from openpi_like.serve.batch_sizes import largest_that_pays
from openpi_like.serve.observation import ObservationError
from openpi_like.serve.options import PolicyOptions
from openpi_like.serve.policy import Policy
from openpi_like.train.checkpoints.load import PolicyParts

ARM = Robot(
    name="arm",
    cameras=(Camera("base", "image", 24, 32), Camera("wrist_right", "wrist")),
    state=(StateField("hand", "state", 2, unit="mm"), StateField("gripper", "state", 1, gripper=Gripper(0.0, 80.0))),
    action=(
        ActionField("hand", "action", 2, unit="mm", relative_to="hand", limits=Limits(velocity=100.0)),
        ActionField("gripper", "action", 1, gripper=Gripper(open=-1.0, closed=1.0), limits=Limits(lower=-1.0)),
    ),
    control_hz=10.0,
    action_horizon=3,
    execute_steps=2,
)
CART = dataclasses.replace(ARM, name="cart", cameras=ARM.cameras[:1], default_prompt="roll")


def _stats(names):
    n = len(names)
    return FieldStats(names, (0.5,) * n, (2.0,) * n, (-1.0,) * n, (1.0,) * n, (-3.0,) * n, (3.0,) * n, 10)


class Constant(nnx.Module):
    """A policy that always answers the same normalised actions, and keeps the last observation it was asked for."""

    def __init__(self, config, value):
        self.config, self.value = config, value

    def packed(self):
        return self

    def sample_actions(self, key, observation, *, action_mask):
        noise = 1e-3 * draw_noise(row_keys(key, len(action_mask)), action_mask.shape[1:])
        return jnp.where(action_mask, self.value, 0.0) + noise + 0 * observation["state"].sum()


def _policy(tiny_policy, value=1.0, robots=(ARM, CART), model=None, **options):
    parts = PolicyParts(
        model=Constant(tiny_policy, value) if model is None else model,
        robots=robots,
        normalizations={
            r.name: Normalization(r.name, "zscore", _stats(r.state_names), _stats(r.action_names)) for r in robots
        },
        tokenizer=TextTokenizer(fit_text_tokenizer(["lift"], 280), tiny_policy.prompt_len),
        contract_hash="abc",
        step=7,
        renderer={r.name: "egl" if r is CART else None for r in robots},
    )
    return Policy(parts, PolicyOptions(**options))


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return _policy(tiny_policy)


@pytest.fixture
def observation():
    images = {"base": np.zeros((24, 32, 3), np.uint8), "wrist_right": np.zeros((50, 40, 3), np.uint8)}
    return {"images": images, "state": np.array([100.0, 200.0, 40.0], np.float32), "prompt": "lift", "robot": "arm"}


def test_pictures_are_taken_as_they_are_sent(tiny_policy, observation, monkeypatch):
    """How a dataset stores them is no matter of a client."""
    height, width = tiny_policy.image_size
    sent = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    observation["images"] = {"base": sent, "wrist_right": sent}
    plain = tuple(dataclasses.replace(c, height=None, width=None) for c in ARM.cameras)
    stored = tuple(dataclasses.replace(c, channel_order="bgr", upside_down=True) for c in plain)
    for cameras in (plain, stored):
        policy = _policy(tiny_policy, robots=(dataclasses.replace(ARM, cameras=cameras),))
        seen: dict[str, np.ndarray] = {}

        def sample(weights, words, inputs, mask, options, previous, seen=seen):
            seen.update(inputs["images"])
            return np.zeros(mask.shape, np.float32), {}

        monkeypatch.setattr(policy._function, "compiled", lambda rows, sample=sample: sample)
        policy.infer(observation)
        for name in ("base", "wrist_right"):
            np.testing.assert_array_equal(seen[name][0], sent)


def test_a_temperature_is_for_policies_that_write_tokens(tiny_policy):
    with pytest.raises(ValueError, match=r"temperature=0.5, expected .* for others; this is a Constant"):
        _policy(tiny_policy, temperature=0.5)


def test_actions_are_in_the_robots_own_units(policy, observation):
    actions = policy.infer(observation)["actions"]
    assert actions.dtype == np.float32
    assert actions.shape == (3, 3)  # the robot's horizon and dims, not the model's
    # Normalised 1 is 1 * 2 + 0.5 = 2.5 in model space: 2500 mm from the state, and gripper 2.5 (1 open -> -1, 0 -> 1).
    np.testing.assert_allclose(actions, np.broadcast_to([2600, 2700, -4.0], (3, 3)), atol=15)


def test_requests_draw_different_noise_unless_they_bring_a_seed(policy, observation):
    free = [policy.infer(observation)["actions"] for _ in range(2)]
    assert not np.array_equal(*free)
    seeded = [policy.infer({**observation, "seed": 5})["actions"] for _ in range(2)]
    np.testing.assert_array_equal(*seeded)


@pytest.fixture(scope="module")
def batched(tiny_policy):
    """A real policy, of random weights, that answers up to four requests together."""
    with jax.default_matmul_precision("highest"):
        policy = _policy(tiny_policy, max_batch=4, model=tiny_policy.create(jax.random.key(0)))
        policy.warm_up()
    return policy


def _actions(policy, requests):
    """Answers, or errors."""
    return [getattr(reply, "actions", reply) for reply in policy.sample(requests)]


def _requests(policy, observation, n):
    """Requests of different robots, pictures and states."""
    rng = np.random.default_rng(0)
    requests = []
    for i in range(n):
        robot = ("arm", "cart")[i % 2]
        images = {name: rng.integers(0, 256, image.shape, np.uint8) for name, image in observation["images"].items()}
        images = images if robot == "arm" else {"base": images["base"]}
        state = rng.uniform(0, 80, 3).astype(np.float32)
        requests.append(policy.prepare({**observation, "robot": robot, "images": images, "state": state}, number=i))
    return requests


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(batched, observation):
    """Bit for bit in a batch of the same size, wherever it stands in it; to rounding where the size is another."""
    requests = _requests(batched, observation, 6)
    assert batched.sizes == (1, 2, 4)
    alone = [_actions(batched, [request])[0] for request in requests]
    first = _actions(batched, requests[:4])
    other = _actions(batched, [requests[4], requests[1], requests[5], requests[0]])
    np.testing.assert_array_equal(other[1], first[1])
    np.testing.assert_array_equal(other[3], first[0])
    np.testing.assert_array_equal(_actions(batched, requests[:3])[1], first[1])  # filled up to four
    for got, expected in zip(first, alone, strict=False):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=2e-6 * scale)
        assert np.abs(got - alone[5]).max() > 1e-3 * scale
    for count in (0, 5):
        with pytest.raises(ValueError, match="expected 1 to 4"):
            batched.sample(requests[:count])


@pytest.mark.parametrize(
    ("milliseconds", "most"),
    [
        ({1: 1.76, 2: 3.2, 4: 5.2, 8: 8.2, 16: 15.6}, 8),  # a tiny policy on a processor: 1.03 and 0.98 a request
        ({1: 20.7, 2: 22.0, 4: 27.0, 8: 38.0, 16: 60.0}, 16),  # a device that one request does not fill
        ({1: 10.0, 2: 20.5, 4: 41.0}, 1),
        ({1: 10.0}, 1),
    ],
)
def test_batches_are_no_larger_than_pays(milliseconds, most):
    assert largest_that_pays(milliseconds) == most


def test_devices_share_the_rows_of_a_batch(batched, tiny_policy, observation):
    """Each computes what one device alone would of its rows, bit for bit."""
    with jax.default_matmul_precision("highest"):
        model = tiny_policy.create(jax.random.key(0))
        shared = _policy(tiny_policy, max_batch=7, devices=4, model=model)
        shared.warm_up()
    assert shared.sizes == (1, 4, 8)
    assert shared.most in shared.sizes  # as was measured here
    requests = _requests(batched, observation, 8)
    expected = [action for i in range(0, 8, 2) for action in _actions(batched, requests[i : i + 2])]
    np.testing.assert_array_equal(_actions(shared, requests), expected)
    np.testing.assert_array_equal(_actions(shared, requests[:1])[0], _actions(batched, requests[:1])[0])  # on one alone
    np.testing.assert_array_equal(_actions(shared, requests[:2])[1], _actions(batched, requests[1:2])[0])  # a row each
    for wrong in (0, 1000):
        with pytest.raises(ValueError, match=f"devices={wrong}, "):
            _policy(tiny_policy, devices=wrong)


def test_actions_that_are_not_finite_fail_their_own_request_alone(batched, observation):
    requests = _requests(batched, observation, 2)
    broken = dataclasses.replace(requests[0], row={**requests[0].row, "state": np.full(4, np.nan, np.float32)})
    sound, failed = _actions(batched, [requests[1], broken])
    assert isinstance(failed, FloatingPointError)
    np.testing.assert_array_equal(sound, _actions(batched, requests[::-1])[0])


@pytest.fixture(scope="module")
def chunking(tiny_policy):
    """A real policy that goes on from the chunk before."""
    return _policy(tiny_policy, max_batch=2, model=tiny_policy.create(jax.random.key(0)), real_time_chunking=True)


def test_a_chunk_goes_on_from_the_one_before(tiny_policy, chunking, batched, observation):
    """The old chunk is in the robot's units, and relative to where it is now. On one device, and a row on each."""
    plain = chunking.prepare(observation)
    np.testing.assert_allclose(_actions(chunking, [plain])[0], _actions(batched, [plain])[0], rtol=1e-5)
    old = _actions(chunking, [chunking.prepare({**observation, "seed": 9})])[0]
    request = chunking.prepare({**observation, "previous": old[1:], "delay": 1})
    normalization = chunking._parts.normalizations["arm"]
    expected = normalization.apply_actions(ARM.encode_actions(old[1:], observation["state"]))
    np.testing.assert_array_equal(request.previous.actions[:2, :3], expected)
    np.testing.assert_array_equal(request.previous.weights, [*soft_mask(1, 2, 4)])
    np.testing.assert_array_equal(request.previous.actions[2:], 0)
    got = _actions(chunking, [request, request])
    np.testing.assert_array_equal(got[0], got[1])
    near = lambda actions: np.abs(actions[:2] - old[1:])[0, :2].mean()  # noqa: E731
    assert near(got[0]) < 0.7 * near(_actions(chunking, [plain])[0])
    model = tiny_policy.create(jax.random.key(0))
    shared = _policy(tiny_policy, max_batch=2, devices=2, model=model, real_time_chunking=True)
    np.testing.assert_allclose(_actions(shared, [request] * 2), _actions(chunking, [request]) * 2, rtol=2e-5)
    assert {plain.lane, request.lane} == {(False, False), (True, False)}
    with pytest.raises(ValueError, match="one after the other"):
        _actions(chunking, [plain, request])
    assert (chunking.metadata()["real_time_chunking"], chunking.metadata()["max_delay"]) == (True, 0)


OLD = np.zeros((2, 3), np.float32)
SIZES: dict[str, Any] = {"state_dim": 3, "action_dim": 3, "action_horizon": 4, "prompt_len": 8, "vocab_size": 3000}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous": OLD, "delay": 3}, r"delay: got 3, expected an integer in 0 \.\. 2"),
        ({"previous": OLD, "delay": -1}, r"delay: got -1, expected an integer in 0 \.\. 2"),
        ({"previous": OLD}, "delay: got None"),
        ({"delay": 1}, r"previous: got NoneType, expected a float array \(n, 3\)"),
        ({"previous": OLD[:, :2], "delay": 1}, r"previous: got shape \(2, 2\), expected \(n, 3\), n from 1 to 3"),
        ({"previous": np.zeros((4, 3)), "delay": 1}, r"previous: got shape \(4, 3\)"),
        ({"previous": OLD.astype(int), "delay": 1}, "previous: got ndarray int64"),
        ({"previous": OLD * np.nan, "delay": 1}, "previous: not finite"),
    ],
)
def test_a_chunk_before_that_is_none_is_refused(chunking, observation, change, message):
    with pytest.raises(ObservationError, match=message):
        chunking.prepare({**observation, **change})


def test_a_chunk_before_is_refused_where_nothing_takes_it(tiny_policy, policy, observation):
    with pytest.raises(ObservationError, match="started without --real-time-chunking"):
        policy.prepare({**observation, "previous": OLD, "delay": 1})
    other = Constant(Pi0FastConfig.tiny(cameras=("base",), action_tokens=ActionTokens(8), **SIZES), 1.0)
    with pytest.raises(ValueError, match="a Constant cannot go on from a chunk"):
        _policy(tiny_policy, model=other, real_time_chunking=True)
    trained = dataclasses.replace(tiny_policy, max_delay=1).create(jax.random.key(0))
    delayed = _policy(tiny_policy, model=trained, real_time_chunking=True)
    assert delayed.metadata()["max_delay"] == 1
    with pytest.raises(
        ObservationError, match=r"delay: got 2, expected an integer in 0 \.\. 1, as the policy was trained"
    ):
        delayed.prepare({**observation, "previous": OLD, "delay": 2})
    old = np.array([[110.0, 190, 1], [120, 180, -1]], np.float32)
    got = _actions(delayed, [delayed.prepare({**observation, "previous": old, "delay": 1})])[0]
    np.testing.assert_allclose(got[0], old[0], rtol=1e-5)
    with pytest.raises(ValueError, match="schedule='exq'"):
        Guidance(schedule="exq")


def test_pictures_may_be_encoded(policy, observation):
    """PNG is the same picture; JPEG is nearly that."""
    image = np.linspace(0, 255, 24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)
    observation["images"]["base"] = image
    expected = policy.prepare(observation).row["images"]["base"]
    for form, atol in (("png", 0), ("jpeg", 12)):
        got = policy.prepare({**observation, "images": {**observation["images"], "base": encode(image, form)}})
        np.testing.assert_allclose(got.row["images"]["base"].astype(int), expected.astype(int), atol=atol)


def test_metadata_tells_a_robot_what_to_send(policy):
    metadata = policy.metadata()
    assert (metadata["contract"], metadata["step"]) == ("abc", 7)
    assert metadata["weights"] == policy.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", policy.fingerprint)
    assert metadata["robots"]["arm"] == {
        "cameras": {"base": [24, 32], "wrist_right": None},
        "state": [["hand", 2, "mm"], ["gripper", 1, "1"]],
        "action": [["hand", 2, "mm"], ["gripper", 1, "1"]],
        "limits": {
            "lower": (None, None, -1.0),
            "upper": (None,) * 3,
            "velocity": (100.0, 100.0, None),
            "acceleration": (None,) * 3,
            "command": ["absolute"] * 3,
        },
        "control_hz": 10.0,
        "action_horizon": 3,
        "execute_steps": 2,
        "plans": False,
        "entities": {},
        "renderer": None,
    }
    assert metadata["robots"]["cart"]["renderer"] == "egl"


def _huge_png():
    """A few bytes that say they are a picture of 12 GiB."""
    data = bytearray(encode(np.zeros((8, 8, 3), np.uint8), "png"))
    data[16:24] = (65535).to_bytes(4) * 2
    return bytes(data)


def _without(d, key):
    return {k: v for k, v in d.items() if k != key}


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda o: [o], ["got a list, expected a dict"]),
        (lambda o: _without(o, "robot"), ["robot: missing, and this server has several; add one of arm, cart"]),
        (lambda o: {**o, "robot": "card"}, ["got 'card', this checkpoint has not seen it; did you mean 'cart'"]),
        (lambda o: {**o, "images": _without(o["images"], "base")}, ["images['base']: missing; got 'wrist_right'"]),
        (
            lambda o: {**o, "images": {**_without(o["images"], "base"), "bass": o["images"]["base"]}},
            ["images['bass']: the robot has no such camera; did you mean 'base'", "images['base']: missing"],
        ),
        (lambda o: {**o, "images": None}, ["images: got NoneType, expected a dict with cameras base, wrist_right"]),
        (
            lambda o: {**o, "images": {**o["images"], "base": np.zeros((32, 24, 3), np.uint8)}},
            ["images['base']: got shape (32, 24, 3), expected (24, 32, 3)"],
        ),
        (
            lambda o: {**o, "images": {**o["images"], "wrist_right": np.zeros((3, 50, 40), np.uint8)}},
            ["images['wrist_right']: got shape (3, 50, 40), expected ('any', 'any', 3)"],
        ),
        (
            lambda o: {**o, "images": {**o["images"], "base": np.zeros((24, 32, 3), np.float32)}},
            ["images['base']: got dtype float32, expected uint8"],
        ),
        (
            lambda o: {**o, "images": {**o["images"], "base": "png"}},
            ["images['base']: got str, expected a uint8 array"],
        ),
        (
            lambda o: {**o, "images": {**o["images"], "base": b"GIF89a" + bytes(30)}},
            ["images['base']: not a picture, expected JPEG or PNG: 36 bytes that begin with b'GIF8'"],
        ),
        (
            lambda o: {**o, "images": {**o["images"], "base": encode(o["images"]["base"], "jpeg")[:60]}},
            ["images['base']: not a picture, expected JPEG or PNG"],
        ),
        (
            lambda o: {**o, "images": {**o["images"], "base": encode(np.zeros((8, 8, 3), np.uint8), "png")}},
            ["images['base']: got shape (8, 8, 3), expected (24, 32, 3)"],
        ),
        (
            lambda o: {**o, "images": {**o["images"], "base": _huge_png()}},
            ["images['base']: not a picture", "of which those from 8 on are damaged or cut off"],
        ),
        (lambda o: _without(o, "state"), ["state: got NoneType", "hand:2 [mm], gripper:1 [1]"]),
        (lambda o: {**o, "state": np.zeros(4, np.float32)}, ["state: got shape (4,), expected (3,): hand:2 [mm]"]),
        (lambda o: {**o, "state": np.zeros(3, np.int64)}, ["state: got dtype int64, expected float32"]),
        (
            lambda o: {**o, "state": np.array([0, np.nan, np.inf], np.float32)},
            ["state: not finite, or too large for float32, at [1, 2]"],
        ),
        (lambda o: _without(o, "prompt"), ["prompt: missing, and the robot has no default"]),
        (lambda o: {**o, "prompt": "  "}, ["prompt: got '  ', expected a text that is not empty"]),
        (lambda o: {**o, "prompt": "lift " * 50}, ["prompt: prompt 'lift lift", "expected at most prompt_len=8"]),
        (lambda o: {**o, "seed": -1}, ["seed: got -1, expected an integer"]),
        (lambda o: {**o, "promt": "lift"}, ["promt: not part of an observation; did you mean 'prompt'"]),
        (
            lambda o: {"robot": "arm", "images": {}, "state": np.zeros(1), "prompt": 3},
            ["images['base']: missing", "images['wrist_right']: missing", "state: got shape (1,)", "prompt: got 3"],
        ),
    ],
)
def test_everything_wrong_with_an_observation_is_named(policy, observation, change, messages):
    with pytest.raises(ObservationError) as e:
        policy.infer(change(observation))
    for message in messages:
        assert message in str(e.value)
    assert policy.infer(observation)["actions"].shape == (3, 3)


def test_a_default_prompt_and_a_single_robot_may_be_left_out(tiny_policy, observation):
    policy = _policy(tiny_policy, robot="cart")
    actions = policy.infer({"images": {"base": observation["images"]["base"]}, "state": observation["state"]})
    assert actions["actions"].shape == (3, 3)


def test_a_view_of_the_past_may_be_missing(tiny_policy, observation):
    """As at the start of an episode; the view of now may not."""
    wrist = dataclasses.replace(ARM.cameras[1], steps_back=3)
    policy = _policy(tiny_policy, robots=(dataclasses.replace(ARM, cameras=(ARM.cameras[0], wrist)),))
    now = {"base": observation["images"]["base"]}
    assert policy.infer({**observation, "images": now})["actions"].shape == (3, 3)
    with pytest.raises(ObservationError, match=r"images\['base'\]: missing"):
        policy.infer({**observation, "images": {"wrist_right": observation["images"]["wrist_right"]}})


def test_a_robot_that_the_checkpoint_has_not_seen_is_refused(tiny_policy):
    with pytest.raises(ValueError, match="trained for arm, cart, not for robot 'aloha'"):
        _policy(tiny_policy, robot="aloha")


def test_actions_that_are_not_finite_are_never_sent(tiny_policy, observation):
    with pytest.raises(FloatingPointError, match="not finite"):
        _policy(tiny_policy, value=np.nan).infer(observation)


# ---- Thoughts --------------------------------------------------------------------------------------------------------


class Thinks(Constant):
    """Writes the first word of the prompt, and acts by how large its id is."""

    def think(self, observation, **options):
        ids = observation["prompt"][:, 1:3]
        return ids, jnp.broadcast_to(jnp.array([True, False]), ids.shape)

    def sample_actions(self, key, observation, *, action_mask):
        said = jnp.where(observation["thought_mask"], observation["thought"], 0).sum(1)[:, None, None]
        return super().sample_actions(key, observation, action_mask=action_mask) + jnp.where(action_mask, said, 0)


def test_what_a_policy_wrote_is_said_and_can_be_acted_by_again(tiny_policy, observation):
    config = dataclasses.replace(tiny_policy, action_tokens=ActionTokens(max_len=6, count=20, skip=0), thought_len=2)
    policy = _policy(config, model=Thinks(config, 1.0), max_batch=2, think_every=4)
    assert (policy.thinks, policy.think_every, policy.metadata()["think_every"]) == (True, 4, 4)
    first = policy.prepare({**observation, "seed": 3})
    (reply,) = policy.sample([first])
    word = int(first.row["prompt"][1])
    assert reply.thought.ids[reply.thought.mask].tolist() == [word]
    assert reply.thought.text == policy._parts.tokenizer.decode([word]).strip()
    other = dataclasses.replace(reply.thought, ids=reply.thought.ids + 1000)
    again, moved = (policy.prepare({**observation, "seed": 3}, thought=t) for t in (reply.thought, other))
    assert first.lane != again.lane == moved.lane
    same, further = policy.sample([again, moved])
    np.testing.assert_array_equal(same.actions, reply.actions)
    # A thousand more, normalised, are 2000 m in model space.
    np.testing.assert_allclose((further.actions - same.actions)[:, :2], np.full((3, 2), 2e6), rtol=1e-3)
    assert further.thought.text == "(1 id without text)"
    assert not any("thought" in line for reply in (same, further) for line in reply.warnings)
    full, ended = (np.array([word, last], np.int32) for last in (word, policy._parts.tokenizer.tokenizer.eos_id))
    whole = [dataclasses.replace(other, ids=ids, mask=np.ones(2, bool)) for ids in (full, ended)]
    cut, complete = policy.sample([policy.prepare({**observation, "seed": 3}, thought=t) for t in whole])
    assert any("thought: cut at thought_len=2 tokens, before its end" in line for line in cut.warnings)
    assert not any("thought" in line for line in complete.warnings)
    assert further.thought.ids.tolist() == other.ids.tolist()
    assert not policy.no_thought.mask.any()  # before action tokens nothing stands
    plain = _policy(tiny_policy)
    assert not plain.thinks
    assert "think_every" not in plain.metadata()
