"""Texts about a drive, for the stages in which a language model learns to read what is around the car: what there is,
questions about it, and where others will be.

Agents are called by their rows in the slot "agents": agent 1 is the nearest. Every step has one text of each kind,
drawn by the step alone; where there is nothing to ask, the texts are empty.
"""

import math

import numpy as np
from jaxtyping import Float

from openpi_like.driving.annotations import Agent, Annotations
from openpi_like.driving.waypoint_text import format_waypoints

CAPTION_PROMPT = "describe what is around the car"
TEXTS = ("caption", "agent_question", "agent_caption", "question", "answer", "forecast_question", "forecast")
"""Fields of the steps of a dataset."""

_MOVES = 0.5  # m/s


def texts_of(annotations: Annotations, doing: str, rng: np.random.Generator) -> dict[str, str]:
    """Returns all texts of a step but its forecast, for which the future is needed. doing: of the car, in words."""
    agents = annotations.agents
    named = int(rng.integers(len(agents))) if agents else None
    question, answer = _question(agents, doing, rng)
    return {
        "caption": annotations.caption,
        "agent_question": "" if named is None else f"what is agent {named + 1}?",
        "agent_caption": "" if named is None else _caption(agents[named]),
        "question": question,
        "answer": answer,
    }


def forecast_texts(number: int, agent: Agent, future_A2: Float[np.ndarray, "A 2"]) -> dict[str, str]:
    """Returns the question where an agent will be, and the answer.

    number: its row, from 0. future: where it is in 0.5, 1, ... 3 s, in its own frame of now, right and ahead, metres
    (Zhou et al. 2025, arXiv 2503.23463, section 3.4).
    """
    question = f"where will agent {number + 1}, at ({agent.right:z.0f},{agent.ahead:z.0f}), be?"
    return {"forecast_question": question, "forecast": format_waypoints(future_A2)}


def in_frame_of(x: float, y: float, heading: float, xy_A2: Float[np.ndarray, "A 2"]) -> Float[np.ndarray, "A 2"]:
    """Returns places of the world in the frame of one who is at x, y with a heading (rad, from x): right and ahead."""
    c, s = math.cos(heading), math.sin(heading)
    return (xy_A2 - (x, y)) @ np.array([[s, c], [-c, s]])


def _caption(agent: Agent) -> str:
    speed = math.hypot(*agent.velocity)
    does = "stands" if speed < _MOVES else f"drives at {3.6 * speed:.0f} km/h"
    return f"a {agent.kind} at ({agent.right:z.0f},{agent.ahead:z.0f}), it {does}"


def _question(agents: tuple[Agent, ...], doing: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question about the scene and its answer."""
    ahead = [a for a in agents if a.ahead > 0 and abs(a.right) < 2.0]  # wherever its lane leads
    moving = sum(math.hypot(*a.velocity) >= _MOVES for a in agents)
    asked = {
        "how many vehicles are near?": str(len(agents)),
        "how many vehicles near move?": str(moving),
        "how far is the nearest vehicle?": f"{agents[0].distance:.0f} m" if agents else "there is none",
        "is somebody straight ahead?": f"yes, {min(a.ahead for a in ahead):.0f} m ahead" if ahead else "no",
        "is somebody on the left?": "yes" if any(a.right < -2.0 for a in agents) else "no",
        "is somebody on the right?": "yes" if any(a.right > 2.0 for a in agents) else "no",
        "what does the car do?": doing,
    }
    question = list(asked)[int(rng.integers(len(asked)))]
    return question, asked[question]
