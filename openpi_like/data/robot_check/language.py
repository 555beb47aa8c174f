"""What is the policy told?"""

import collections
import dataclasses

import numpy as np

from openpi_like.data import traps
from openpi_like.data.robot_check.findings import Finding
from openpi_like.data.robot_check.robot_sample import RobotSample

_EXAMPLES = 6  # instructions shown
_LONG = 60  # words: prompts are cut behind about as many tokens


@dataclasses.dataclass(frozen=True)
class Language:
    """See the module."""

    name: str = "Language"
    question: str = "Does every step have an instruction, how many are there, and are they written alike?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        robot = sample.robot
        if robot.language_key is None:
            prompt = robot.default_prompt or ""
            if not prompt.strip():
                return [Finding("suspect", "", "the policy is told nothing", "set default_prompt, or language_key")]
            return [Finding("found", "", f"always {prompt!r}")]
        texts = _told(sample)
        total, (empty, said) = sum(texts.values()), (texts.get("", 0), {t: n for t, n in texts.items() if t})
        key, found = robot.language_key, []
        common = sorted(said, key=lambda t: -said[t])[:_EXAMPLES]
        found.append(Finding("found", key, f"{len(said)} different instructions: " + ", ".join(map(repr, common))))
        if empty:
            advice = "leave these steps out (labelled=True in the selection)"
            advice += " or name another field" if said else "; or set language_key=None and a default_prompt"
            found.append(Finding("suspect", key, f"empty in {empty / total:.1%} of the steps", advice))
        found += Finding.of_trap(traps.instructions(key, said), key)
        if long := [t for t in said if len(t.split()) > _LONG]:
            message = f"{len(long)} instructions have more than {_LONG} words, such as {long[0][:80]!r}"
            found.append(Finding("suspect", key, message, "is this the instruction? a prompt would be cut"))
        return found


def _told(sample: RobotSample) -> dict[str, int]:
    """How many steps have which instruction: the first that is not empty, as `EpisodeDataset.prompts` has it."""
    index, robot, steps = sample.index, sample.robot, sample.sample.steps
    episode = np.searchsorted(np.asarray(index.episode_start), steps, side="right") - 1
    keys = [k for k in (robot.language_key, *robot.language_alternatives) if k is not None]
    ids = np.stack([index.text_ids(k, episode, steps) for k in keys], axis=1)
    tables = [index.text_table(k) for k in keys]
    counts: dict[str, int] = collections.Counter()
    for row, n in zip(*np.unique(ids, axis=0, return_counts=True), strict=True):
        said = (table[i] for table, i in zip(tables, row, strict=True))
        counts[next((t for t in said if t.strip()), "")] += int(n)
    return counts
