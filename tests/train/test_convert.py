"""The program that converts weights: there and back with the numbers shown, and what it refuses."""

import dataclasses
import io
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from openpi_like.batch import ActionTokens
from openpi_like.data.fast import FastTokenizer, fit_fast
from openpi_like.data.prompts import FastPrompt
from openpi_like.data.stats import save_normalization
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.models.weights import WeightsError, export_weights, flat_weights, flatten, load_weights, write_openpi
from openpi_like.robots.sawyer import SAWYER
from openpi_like.serve.policy import Policy
from openpi_like.train.checkpoints.checkpoint import save_policy
from openpi_like.train.checkpoints.contract import CheckpointError, Contract, read_contract
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.state import ModelDef
from tests.data.toy import model_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "train" / "convert.py")))


@pytest.fixture(scope="module")
def contract(policy: Pi0Config, contract_of: Callable[[Any], Contract]) -> Contract:
    return dataclasses.replace(contract_of(policy), renderers={SAWYER.name: None})


@pytest.fixture(scope="module")
def params(policy: Pi0Config) -> dict[str, Any]:
    return jax.device_get(jax.jit(ModelDef(policy).init)(jax.random.key(3)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, params: Any, contract: Contract) -> Path:
    directory = tmp_path_factory.mktemp("run")
    save_policy(directory, params, contract=contract, origin="a test")
    return directory


@pytest.fixture
def config_file(tmp_path: Path, policy: Pi0Config) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(
        "from openpi_like.models.pi0 import Pi0Config\nfrom openpi_like.models.gemma import GemmaConfig\n"
        "from openpi_like.models.paligemma import PaliGemmaConfig\nfrom openpi_like.models.siglip import SiglipConfig\n"
        f"from openpi_like.data.prompts import Pi0Prompt\nconfig = {policy!r}\n"
    )
    return str(path)


def convert(program: SimpleNamespace, *args: Any, **options: Any) -> tuple[int, str]:
    text = io.StringIO()
    status = program.main(program.Args(*args, **options), Console(file=text, width=200))
    return status, text.getvalue()


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    got, expected = flatten(got), flatten(expected)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(got[name]), value, err_msg=name)


@pytest.mark.parametrize("to", ["openpi", "lerobot"])
def test_there_and_back(
    program: SimpleNamespace, tmp_path: Path, run: Path, params: Any, contract: Contract, config_file: str, to: str
) -> None:
    status, text = convert(program, run, tmp_path / "out", to)
    assert status == 0
    assert "outputs of the same inputs: largest difference 0 (values up to" in text
    text_model = tmp_path / "text.model"
    text_model.write_bytes(model_of(contract.text_tokenizer()))
    stats = tmp_path / "out" / "assets" / "sawyer" / "norm_stats.json"
    if to == "lerobot":
        stats = tmp_path / "stats.json"
        save_normalization(contract.normalizations["sawyer"], stats)
    status, _ = convert(
        program, tmp_path / "out", tmp_path / "back", "run",
        model=config_file, robots=("sawyer",), norm_stats=(stats,), tokenizer=text_model,
    )  # fmt: skip
    assert status == 0
    parts = load_policy_parts(tmp_path / "back")
    same(flat_weights(parts.model), params)
    again, before = parts.normalizations["sawyer"], contract.normalizations["sawyer"]
    assert (again.state.mean, again.action.q99) == (before.state.mean, before.action.q99)
    assert parts.tokenizer.tokenizer == contract.tokenizer
    assert read_contract(tmp_path / "back" / "checkpoints" / "0").policy == contract.policy


def test_action_tokens_travel_with_the_weights(
    program: SimpleNamespace, tmp_path: Path, policy: Pi0Config, contract: Contract
) -> None:
    """A pi0-FAST run is served, exported to openpi with its tokenizer, and comes back; a run without one is refused."""
    robot = dataclasses.replace(SAWYER, normalization="quantile")
    drawn = np.random.default_rng(0).integers(-3, 4, (50, robot.action_horizon, robot.action_size))
    fast = fit_fast([drawn], scale=4.0, vocab_size=60)
    shared = {f.name: getattr(policy, f.name) for f in dataclasses.fields(Pi0FastConfig) if hasattr(policy, f.name)}
    tokens = ActionTokens(max_len=40, count=60, skip=0)
    config = Pi0FastConfig(
        **{**shared, "prompt_len": 80, "vocab_size": 400, "prompt_format": FastPrompt(), "action_tokens": tokens}
    )
    normalization = dataclasses.replace(contract.normalizations["sawyer"], mode="quantile")
    written = dataclasses.replace(
        contract,
        policy=config,
        robots=(robot,),
        normalizations={"sawyer": normalization},
        action_tokenizer=fast.files,
    )
    with pytest.raises(CheckpointError, match=r"has action tokens and there is no action tokenizer"):
        save_policy(tmp_path / "no", {}, contract=dataclasses.replace(written, action_tokenizer=None), origin="a test")
    short = dataclasses.replace(config, action_tokens=dataclasses.replace(tokens, max_len=1))
    with pytest.raises(
        CheckpointError, match=r"32 coefficients takes at least \d+ action tokens, the policy has room for 1"
    ):
        save_policy(tmp_path / "no", {}, contract=dataclasses.replace(written, policy=short), origin="a test")
    weights = jax.device_get(jax.jit(ModelDef(config).init)(jax.random.key(3)))
    save_policy(tmp_path / "run", weights, contract=written, origin="a test")

    served = Policy.load(tmp_path / "run")
    images = {"base": np.zeros((64, 64, 3), np.uint8)}
    observation = {"images": images, "state": np.zeros(4, np.float32), "prompt": "press the button"}
    reply = served.infer(observation)
    assert reply["actions"].shape == (robot.action_horizon, robot.action_size)
    np.testing.assert_array_equal(served.infer(observation)["actions"], reply["actions"])  # the likeliest tokens

    status, text = convert(program, tmp_path / "run", tmp_path / "out", "openpi")
    assert status == 0
    assert "outputs of the same inputs: largest difference 0 (values up to" in text
    assert FastTokenizer.load(tmp_path / "out" / "fast_tokenizer").files == fast.files
    assert read_contract(tmp_path / "run" / "checkpoints" / "0") == written


def test_bfloat16_is_compared_with_bfloat16(program: SimpleNamespace, tmp_path: Path, run: Path) -> None:
    status, text = convert(program, run, tmp_path / "half", "lerobot", dtype="bfloat16")
    assert status == 0, text
    assert "largest difference 0 " in text
    half, whole = (tmp_path / "half" / "model.safetensors"), (tmp_path / "whole" / "model.safetensors")
    assert convert(program, run, tmp_path / "whole", "lerobot")[0] == 0
    assert half.stat().st_size < 0.6 * whole.stat().st_size


def test_a_writer_that_loses_a_transpose_is_found_out(
    program: SimpleNamespace, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its shapes: q of one head is swapped with that of another."""
    write = program.main.__globals__["write_openpi"]

    def wrong(arrays: Any, directory: Path) -> None:
        def changed() -> Any:
            for name, make in arrays:
                flip = name.endswith("layers/attn/q_einsum_1/w")
                yield name, (lambda make=make: make()[:, ::-1].copy()) if flip else make

        write(changed(), directory)

    monkeypatch.setitem(program.main.__globals__, "write_openpi", wrong)
    status, text = convert(program, run, tmp_path / "out", "openpi")
    assert status == 1
    assert "TOO FAR APART" in text


def test_published_sizes_may_be_changed(
    program: SimpleNamespace, tmp_path: Path, run: Path, params: Any, config_file: str, policy: Pi0Config
) -> None:
    assert convert(program, run, tmp_path / "openpi", "openpi", verify=False)[0] == 0
    status, _ = convert(
        program, tmp_path / "openpi", tmp_path / "lerobot", "lerobot", model=config_file, set=("action_horizon=2",)
    )
    assert status == 0
    same(load_weights(dataclasses.replace(policy, action_horizon=2), tmp_path / "lerobot"), params)
    with pytest.raises(WeightsError, match="got shape"):
        convert(program, tmp_path / "openpi", tmp_path / "x", "lerobot", model=config_file, set=("action_dim=5",))


def test_paligemma_through_three_layouts(
    program: SimpleNamespace, tmp_path: Path, run: Path, policy: Pi0Config, params: Any
) -> None:
    path = tmp_path / "pg.py"
    fields = ("backbone", "cameras", "image_size", "prompt_len", "vocab_size")
    values = ", ".join(f"{f}={getattr(policy, f)!r}" for f in fields)
    path.write_text(
        "from openpi_like.models.paligemma import PaliGemmaConfig\nfrom openpi_like.models.gemma import GemmaConfig\n"
        "from openpi_like.models.text_model import TextModelConfig\n"
        f"from openpi_like.models.siglip import SiglipConfig\nconfig = TextModelConfig({values})\n"
    )
    assert convert(program, run, tmp_path / "openpi", "openpi", verify=False)[0] == 0
    drop = ("llm/.*_1/", "^action_", "^state_")
    steps = [(tmp_path / "openpi", "huggingface", drop), (tmp_path / "huggingface", "big_vision", ())]
    for source, to, left_out in steps:
        status, text = convert(program, source, tmp_path / to, to, model=str(path), drop=left_out)
        assert status == 0
        assert "outputs of the same inputs: largest difference 0 (values up to" in text
    config = program.find_config(program.Args(tmp_path / "x", tmp_path / "y", "run", model=str(path)))
    got = load_weights(config, tmp_path / "big_vision" / "weights.npz")
    same(got, {k: params[k] for k in ("vision", "vlm")})


def test_what_is_missing_is_said_at_once(program: SimpleNamespace, tmp_path: Path, run: Path, config_file: str) -> None:
    with pytest.raises(ValueError, match=r"--robots: missing(.|\n)*--tokenizer: missing"):
        convert(program, tmp_path / "nothing", tmp_path / "out", "run", model=config_file)
    with pytest.raises(
        ValueError, match="--model: missing; expected one of pi0, pi05, pi0_fast, smolvla, paligemma, or a"
    ):
        convert(program, tmp_path / "nothing", tmp_path / "out", "openpi")
    with pytest.raises(ValueError, match="a run knows its own model"):
        convert(program, run, tmp_path / "out", "openpi", model="pi0")
    with pytest.raises(WeightsError, match="no weights at"):
        convert(program, tmp_path / "nothing", tmp_path / "out", "openpi", model=config_file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="full is not empty"):
        convert(program, run, tmp_path / "full", "openpi")


def test_a_policy_that_could_not_be_served_is_refused(
    program: SimpleNamespace, tmp_path: Path, run: Path, contract: Contract, config_file: str
) -> None:
    assert convert(program, run, tmp_path / "openpi", "openpi", verify=False)[0] == 0
    text_model = tmp_path / "text.model"
    text_model.write_bytes(model_of(contract.text_tokenizer()))
    stats = tmp_path / "openpi" / "assets" / "sawyer" / "norm_stats.json"
    serving: dict[str, Any] = {
        "model": config_file, "robots": ("sawyer",), "norm_stats": (stats,), "tokenizer": text_model,
    }  # fmt: skip

    def refuse(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            convert(program, tmp_path / "openpi", tmp_path / "out", "run", **{**serving, **changes})
        assert not (tmp_path / "out").exists()

    refuse(
        r"camera 'base' is not a slot(.|\n)*action_horizon 8, the policy has room for 2",
        set=("cameras=('front',)", "action_horizon=2"),
    )
    refuse(r"norm_stats.json: tokenizer.json \([\d,]+ characters\) cannot be read", tokenizer=stats)
    refuse("not normalised by 'quantile', which these weights", set=("pi05=True",))
    refuse("samples no actions", model="paligemma")
    with pytest.raises(ValueError, match="are for published weights and --to run"):
        convert(program, run, tmp_path / "out", "openpi", robots=("sawyer",))
    with pytest.raises(WeightsError, match="no weight format 'lerobot'; known"):
        convert(program, tmp_path / "nothing", tmp_path / "out", "lerobot", model="paligemma")


def test_imported_weights_do_not_overwrite_a_run(tmp_path: Path, run: Path, params: Any, contract: Contract) -> None:
    with pytest.raises(CheckpointError, match=r"holds steps \[0\] already"):
        save_policy(run, params, contract=contract, origin="again")
    write_openpi(export_weights(contract.policy, flatten(params), "openpi"), tmp_path)
    assert (tmp_path / "params").is_dir()


def test_lerobot_config_of_released_sizes() -> None:
    stored = Pi0Config.released(pi05=True).lerobot_config("float32")
    assert stored is not None
    assert (stored["type"], stored["action_expert_variant"], stored["chunk_size"]) == ("pi05", "gemma_300m", 50)
    assert stored["tokenizer_max_length"] == 200
