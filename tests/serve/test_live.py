"""The live page: what it is told, to whom it is shown, and what a real browser makes of it."""

import functools
import json

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from openpi_like.serve.client import PolicyClient, ServerError
from openpi_like.serve.keys import Key, Keys, hash_of
from tests.serve.browser import browsing
from tests.serve.running import Arm, arm_observation, get, serving

# What a robot says is a text, whatever is in it.
PROMPT = "push <img src=x onerror='document.title=1'>"
observation = functools.partial(arm_observation, prompt=PROMPT)


def test_a_page_is_told_what_sessions_do():
    with serving(Arm()) as server, connect(f"ws://127.0.0.1:{server.port}/live") as page:
        told = lambda: json.loads(page.recv(timeout=5))  # noqa: E731
        assert told()["sessions"] == []
        one, other = PolicyClient(port=server.port), PolicyClient(port=server.port)
        for value in (1.0, 2.0):
            one.infer(observation(value))
        other.infer(observation(7.0))
        with pytest.raises(ServerError):
            other.infer({**observation(7.0), "state": np.zeros(2, np.float32)})
        one.infer({"reset": True, "success": True})
        other.close()
        page.send("1")
        page.send("no number")
        while not (said := told())["detail"] or not said["sessions"][1]["gone"]:
            pass
        first, second = said["sessions"]
        assert [first[k] for k in ("number", "requests", "errors", "episodes", "gone", "robot")] == [
            *(1, 2, 0, 1, False, "arm")
        ]
        assert [second[k] for k in ("requests", "errors", "policy")] == [1, 1, "default"]
        assert first["ms"].keys() == {"prepare", "queue", "infer", "total"}
        assert said["server"]["connections"] == 1
        detail = said["detail"]
        assert detail["state"] == [["joints[0]", 2.0], ["joints[1]", 0.5], ["gripper", 1.0]]
        np.testing.assert_allclose(detail["actions"], 2 + np.linspace(0, 1, 4)[:, None] + [0, -1.5, -1], atol=1e-5)
        assert detail["warnings"][-1] == "actions were cut"
        assert detail["cameras"]["base"].startswith("data:image/jpeg;base64,/9j/")
        one.close()


def test_it_is_shown_to_this_machine_or_to_keys_that_may_look():
    keys = Keys([Key("robot", hash_of("r")), Key("person", hash_of("p"), looks=True)])
    with serving(Arm(), keys=keys) as server:
        assert get(server, "/")[0] == 401
        assert get(server, "/", Authorization="Api-Key r") == (403, "this key may not look; add one with --looks\n")
        status, text = get(server, "/", Authorization="Basic YW55Ym9keTpw")  # anybody:p, as browsers send it
        assert status == 200
        assert text.startswith("<!doctype html>")
        assert get(server, "/", Authorization="Basic YW55Ym9keTpw,,")[0] == 401
        live = f"ws://127.0.0.1:{server.port}/live"
        with pytest.raises(InvalidStatus, match="403"):
            connect(live, additional_headers={"Authorization": "Api-Key r"})
        with connect(live, additional_headers={"Authorization": "Api-Key p"}) as page:
            assert json.loads(page.recv())["server"]["ready"]
    with serving(Arm(), host="0.0.0.0") as server:
        assert get(server, "/")[0] == 403
    with serving(Arm()) as server:
        assert get(server, "/")[0] == 200
        assert get(server, "/", Host="rebound.example")[0] == 403


def test_pages_of_others_cannot_use_the_server():
    """A browser runs what any page says, and reaches this machine."""
    with serving(Arm()) as server:
        assert get(server, "/metrics", Host="rebound.example:8000")[0] == 403
        assert get(server, "/healthz", Host="rebound.example:8000")[0] == 200
        own = f"http://127.0.0.1:{server.port}"
        for path in ("/", "/live"):
            url = f"ws://127.0.0.1:{server.port}{path}"
            with pytest.raises(InvalidStatus, match="403"):
                connect(url, origin=Origin("http://elsewhere.example"))
            connect(url, origin=Origin(own)).close()


@pytest.mark.slow
def test_a_browser_shows_sessions_cameras_and_chunks(tmp_path):
    with serving(Arm()) as server, browsing(f"http://127.0.0.1:{server.port}/", tmp_path) as page:
        page.until("document.getElementById('link')?.textContent === ''")
        page.until("!document.getElementById('none').hidden")
        one, other = PolicyClient(port=server.port), PolicyClient(port=server.port)
        for value in range(5):
            one.infer(observation(float(value)))
        page.until("document.querySelectorAll('#sessions tr').length === 2")
        page.until("document.getElementById('prompt').textContent.startsWith('session 1: push <img')")
        page.until("[...document.querySelectorAll('#cameras img')].filter((i) => i.naturalWidth === 32).length === 2")
        assert page.run("document.title") == "policy server"
        assert page.run("document.querySelectorAll('#prompt img').length") == 0
        page.until("document.querySelector('#state td:nth-child(2)').textContent === '4.0000'")
        shown = page.run("[...document.querySelectorAll('#state td')].map((e) => e.textContent)")
        assert shown == ["joints[0]", "4.0000", "joints[1]", "0.50000", "gripper", "1.0000"]
        drawn = (
            "(() => { const c = document.getElementById('chunk'); "
            "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((x) => x).length })()"
        )
        page.until(f"{drawn} > 500")
        other.infer(observation(9.0, prompt="pull"))
        page.run("document.querySelector('[data-number=\"2\"]').dispatchEvent(new MouseEvent('mousedown'))")
        page.until("document.getElementById('prompt').textContent === 'session 2: pull'")
        page.until("document.querySelector('#state td:nth-child(2)').textContent === '9.0000'")
        one.close()
        page.until("document.querySelector('[data-number=\"1\"]').className === 'gone'")
        other.close()
