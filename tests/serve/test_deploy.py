"""What stands between a policy and a robot elsewhere: the node of ROS 2, the container, the manifest of Kubernetes."""

import importlib.util
import re
import runpy
import sys
import threading
import time
import tomllib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from tests.serve.running import Stub, get, serving

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "serve" / "deploy"


def parse(arguments):
    """Returns what serve/policy_server.py understands of its command line."""
    spec = importlib.util.spec_from_file_location("policy_server_of_test_deploy", ROOT / "serve" / "policy_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where tyro looks for docstrings
    spec.loader.exec_module(module)
    return tyro.cli(module.Args, args=arguments)


# ---- ROS 2 -----------------------------------------------------------------------------------------------------------


class Ros:
    """As much of rclpy as the node uses: topics by name, callbacks called by `send`, messages kept in `published`."""

    def __init__(self, parameters):
        self.parameters, self.published, ros = parameters, list[Any](), self
        self.topics: dict[str, Any] = {}

        class Node:
            def __init__(self, name):
                self.name = name

            def declare_parameter(self, name, default):
                assert name in ros.parameters or default is not None
                return types.SimpleNamespace(value=ros.parameters.get(name, default))

            def create_subscription(self, kind, topic, callback, depth):
                ros.topics[topic] = callback

            def create_publisher(self, kind, topic, depth):
                return types.SimpleNamespace(publish=lambda message: ros.published.append((time.monotonic(), message)))

            def get_logger(self):
                return types.SimpleNamespace(info=lambda text, **options: None)

            def get_clock(self):
                return types.SimpleNamespace(sleep_for=lambda duration: time.sleep(0.01))

        def module(name, **content):
            made = types.ModuleType(name)
            vars(made).update(content)
            return made

        def message(**fields):
            return types.SimpleNamespace(**fields)

        nothing = lambda *arguments: None  # noqa: E731
        self.modules = {
            "rclpy": module("rclpy", init=nothing, spin=nothing, shutdown=nothing),
            "rclpy.node": module("rclpy.node", Node=Node),
            "sensor_msgs": module("sensor_msgs"),
            "sensor_msgs.msg": module("sensor_msgs.msg", Image=message, JointState=message),
            "std_msgs": module("std_msgs"),
            "std_msgs.msg": module("std_msgs.msg", Float64MultiArray=message),
        }
        self.modules["rclpy"].duration = types.SimpleNamespace(Duration=message)


def _policy(seen):
    def infer(observation):
        seen.append(observation)
        return np.arange(10, dtype=np.float32)[:, None] * [1.0, 0.0] + observation["state"]

    about = {
        "cameras": {"base": [4, 6]},
        "state": [["joints", 2, "rad"]],
        "action": [["joints", 2, "rad"]],
        "control_hz": 20.0,
        "action_horizon": 10,
        "execute_steps": 5,
    }
    return Stub(infer, {"robots": {"my_robot": about}, "real_time_chunking": False, "max_delay": 0})


def test_the_ros_node_turns_messages_into_commands_and_holds_when_they_stop(monkeypatch):
    """Rows of images are padded, colours in either order, joints in any order and in several messages."""
    seen: list[dict] = []
    with serving(_policy(seen)) as server:
        joints = ["shoulder", "elbow"]
        ros = Ros({"port": server.port, "prompt": "push", "joints": joints})
        for name, module in ros.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        node = runpy.run_path(str(ROOT / "serve" / "examples" / "ros2_node.py"))
        ended, failure = threading.Event(), []

        def run():
            try:
                node["main"]()
            except RuntimeError as e:
                failure.append(str(e))
            ended.set()

        threading.Thread(target=run, daemon=True).start()
        picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
        padded = np.pad(picture[..., ::-1].reshape(4, 18), ((0, 0), (0, 2)))
        image = types.SimpleNamespace(encoding="bgr8", height=4, width=6, step=20, data=padded.tobytes())
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            if "joint_states" in ros.topics:
                ros.topics["camera/image_raw"](image)
                ros.topics["joint_states"](types.SimpleNamespace(name=["elbow"], position=[0.5]))
                ros.topics["joint_states"](types.SimpleNamespace(name=["gripper", "shoulder"], position=[9.0, 0.25]))
            time.sleep(0.02)
        with pytest.raises(ValueError, match="encoding 'mono8', expected rgb8 or bgr8"):
            ros.topics["camera/image_raw"](types.SimpleNamespace(encoding="mono8"))
        assert ended.wait(10)
    assert len(failure) == 1
    assert re.fullmatch(r"no new (image|joints) for 0.5 s", failure[0])
    np.testing.assert_array_equal(seen[0]["images"]["base"], picture)
    np.testing.assert_array_equal(seen[0]["state"], np.array([0.25, 0.5], np.float32))
    assert (seen[0]["prompt"], seen[0]["robot"]) == ("push", "my_robot")
    commands = np.array([message.data for _, message in ros.published], np.float64)
    assert len(commands) > 10
    assert set(commands[:, 1]) == {0.5}
    assert {0.25, 1.25, 2.25} <= set(commands[:, 0])
    np.testing.assert_array_equal(commands[-1], commands[-2])  # it holds what was commanded last


# ---- Containers ------------------------------------------------------------------------------------------------------


def test_the_container_installs_what_is_pinned_and_starts_the_server():
    text = (DEPLOY / "Containerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert [s for s in sources if not (ROOT / s).exists()] == []
    assert '"serve/policy_server.py"]' in text
    (command,) = re.findall(r"^CMD \[(.*)\]$", text, re.MULTILINE)
    args = parse([word.strip(' "') for word in command.split(",")])
    assert (args.host, args.port) == ("0.0.0.0", int(re.findall(r"^EXPOSE (\d+)$", text, re.MULTILINE)[0]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
    wanted = [*project["dependencies"], *(r for e in extras.split(",") for r in project["optional-dependencies"][e])]
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    names = {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names - pinned - {"openpi-like"} == set()


def test_the_manifest_asks_the_server_what_it_answers():
    yaml = pytest.importorskip("yaml")
    deployment, service, scaler = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = parse(container["args"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert str(args.checkpoint) == mounts["checkpoint"]
    assert str(args.keys).startswith(mounts["keys"])
    assert args.keys is not None  # it is reachable by others
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"policy": args.port, "metrics": args.metrics_port}
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(args.metrics_port)
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["policy"]  # /metrics is for the inside
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (metric,) = scaler["spec"]["metrics"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {"policy"}
    with serving(_policy([])) as server:
        assert [get(server, probe["path"])[0] for probe in probes.values()] == [200, 200, 200]
        assert f"\n{metric['pods']['metric']['name']} " in get(server, "/metrics")[1]
