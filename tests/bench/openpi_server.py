"""openpi's own server, out of a checkout, for benches that run it in our environment."""

import importlib.util
from pathlib import Path
from typing import Any


def websocket_policy_server(checkout: Path) -> Any:
    """Returns openpi's module `websocket_policy_server`, which needs nothing else of it."""
    path = checkout / "src/openpi/serving/websocket_policy_server.py"
    spec = importlib.util.spec_from_file_location("openpi_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
