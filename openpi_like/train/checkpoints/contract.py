"""The contract of a policy: everything that serving depends on, with a hash, stored with every checkpoint."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from openpi_like.config import from_json, to_json
from openpi_like.data.assembly import action_token_problems, image_slot_problems
from openpi_like.data.fast import FastFiles, FastTokenizer
from openpi_like.data.normalize import Normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.data.tokenizer import Tokenizer
from openpi_like.robots import Robot, policy_problems

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not of the kind asked for."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """What serving depends on. Its hash is checked when it is read, and sent to every client.

    policy: the model's config. robots and normalizations: by robot. tokenizer: of texts, whole.
    renderers: robot name -> how the training images were rendered, for simulated robots; None for real ones.
    """

    policy: Any
    robots: tuple[Robot, ...]
    normalizations: dict[str, Normalization]
    tokenizer: Tokenizer
    renderers: dict[str, str | None]
    action_tokenizer: FastFiles | None = None

    def hash(self) -> str:
        """Returns the SHA-256 of the contract as canonical JSON."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()

    def text_tokenizer(self) -> TextTokenizer:
        """Returns the tokenizer of the policy's prompts and answers."""
        return TextTokenizer.of_policy(self.tokenizer, self.policy)

    def fast_tokenizer(self) -> FastTokenizer | None:
        """Returns the tokenizer of actions, where the policy has action tokens."""
        return None if self.action_tokenizer is None else FastTokenizer(self.action_tokenizer)

    def sampling_options(self) -> dict[str, Any]:
        """Returns what `sample_actions` of this policy needs besides an observation, by name."""
        return self.policy.sampling_options(self.text_tokenizer(), self.fast_tokenizer())


def contract_problems(contract: Contract, *, drop_cameras: Sequence[str] = ()) -> list[str]:
    """Returns what of robots, statistics and tokenizers does not fit the policy. drop_cameras: it need not see them."""
    policy = contract.policy
    if not hasattr(policy, "action_dim"):
        return [f"{type(policy).__name__} samples no actions; expected a policy, such as Pi0Config"]
    problems = []
    for robot in contract.robots:
        found = policy_problems(robot, policy, drop_cameras=drop_cameras)
        try:
            contract.normalizations[robot.name].check(robot)
        except (KeyError, ValueError) as e:
            found.append(str(e))
        problems += [f"robot {robot.name!r}: {p}" for p in found]
    try:
        tokenizer, action_tokenizer = contract.text_tokenizer(), contract.fast_tokenizer()
    except ValueError as e:
        return [*problems, str(e)]
    if tokenizer.vocab_size > policy.vocab_size:
        problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, the policy knows {policy.vocab_size}")
    problems += action_token_problems(policy, tokenizer, action_tokenizer)
    problems += image_slot_problems(policy, tokenizer)
    problems += policy.tokenizer_problems(tokenizer)
    problems += [
        f"robot {robot.name!r}: {p}"
        for robot in contract.robots
        for p in policy.robot_problems(robot, action_tokenizer)
    ]
    return problems


# ---- Records ---------------------------------------------------------------------------------------------------------


def contract_record(contract: Contract) -> dict[str, Any]:
    """Returns what a checkpoint's record holds of it."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    return {
        "contract": to_json(contract),
        "hash": contract.hash(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
    }


def differences(stored: Contract, contract: Contract) -> str:
    """Returns the names of the fields in which two contracts differ."""
    before, now = to_json(stored), to_json(contract)
    return ", ".join(k for k in now if before[k] != now[k])


def read_record(step_dir: Path) -> dict[str, Any]:
    """Returns the JSON record of one step, with its hash checked.

    Raises:
        CheckpointError: unreadable, of another format, or changed after it was written.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            record = checkpointer.restore(step_dir / "contract")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read the contract of {step_dir}: {e}; the checkpoint is damaged") from e
    lost = {"format", "contract", "hash"} - set(record if isinstance(record, dict) else ())
    if lost:
        raise CheckpointError(f"the contract of {step_dir} lacks {', '.join(sorted(lost))}; the checkpoint is damaged")
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"{step_dir}: format {record['format']!r}, expected {FORMAT}; another version of openpi_like wrote it "
            f"(packages: {record.get('versions', 'not noted')}); use that one"
        )
    digest = hashlib.sha256(json.dumps(record["contract"], sort_keys=True).encode()).hexdigest()
    if digest != record["hash"]:
        raise CheckpointError(
            f"{step_dir}: contract hash {digest[:12]}, expected {record['hash'][:12]}; the contract was changed after "
            "training, so normalisation or robots may not fit the weights: take the original directory"
        )
    return record


def read_contract(step_dir: Path) -> Contract:
    """Returns the contract of one step."""
    return from_json(read_record(step_dir)["contract"])
