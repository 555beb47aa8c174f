"""Ways to plan on the same drives for the same steps, told the nearest vehicles and lines beside six cameras: by flow
matching, as action tokens, in plain digits, by a query, as tokens and by flow matching, and in digits after a decision
in words; and AsyncDriver, a slow part that writes what to do and a fast one that plans, which is driven again with a
slow part that is asked less often, down to never: what it wrote is kept for so many plans, of half a second each.

    python train/study.py configs/driving/policies.py --run runs/driving/policies

Data, statistics and tokenizers, once; controls.py, no_state.py and pooled.py name what they need beside these:

    python data/make_demos.py --robot ego_vehicle --out runs/driving/data --episodes-per-task 60 \\
        --val-episodes-per-task 6
    python data/stats.py --config configs/driving/flow.py
    python data/stats.py --config configs/driving/text.py
    python data/fit_text.py --data runs/driving/data/ego_vehicle_sim/1.0.0 --out runs/driving/text.model \\
        --keys language_instruction subtask caption agent_question agent_caption question answer forecast_question \\
        forecast --waypoints --state-in-prompt --vocab-size 1024
    python data/fit_fast.py configs/driving/fast.py --out runs/driving/fast_tokens --vocab-size 512 --scale 30
"""

from openpi_like.driving.scenarios import PROMPTS
from openpi_like.train.study import Arm, Study

POLICIES = ("flow", "fast", "text", "query", "insulated", "senna", "async_driver")
SHORTER = ("steps=1500", "optimizer.decay_steps=1500", "validate_every=500", "save_every=500")
KEPT = (2, 4, 8, 16, 80)  # plans; the last is all of a drive
SLOW = "configs/driving/scenes.py:async_driver"


def rate(plans: int) -> Arm:
    return Arm(SLOW, same_run="async_driver", serve=("--think-every", str(plans)), beside="async_driver")


study = Study(
    arms={
        **{name: Arm(f"configs/driving/scenes.py:{name}", SHORTER) for name in POLICIES},
        **{f"async_driver, a thought for {n} plans": rate(n) for n in KEPT},
        "async_driver without thoughts": rate(0),
    },
    robot="ego_vehicle",
    tasks=tuple(PROMPTS),
    episodes=10,
    varies=("data",),  # plans are normalised as each policy wants them, and some read a text of the steps too
    also=(
        *("serve/open_loop.py", "--data", "runs/driving/data/ego_vehicle_sim/1.0.0"),
        *("--label", "{arm}", "--out", "{folder}/open_loop/{arm}.jsonl"),
    ),
)
