"""What more weights, demonstrations and steps are worth, on three Sawyer tasks: fourteen runs of a pi0, and a larger
one whose outcome is said before it is begun.

    python train/scaling.py --run runs/scaling

`scaling.py:w96_d180_t1500` is the run of width 96, 180 demonstrations and 1,500 steps. The learning rate falls with the
square root of the width, as Muon's matrices of other sizes want it.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.train.config import TrainConfig
from openpi_like.train.muon import MuonConfig

base = load_run(Path(__file__).with_name("pi0.py"))
(entry,) = base.data.entries

# Width, demonstrations of three tasks together, steps.
RUNS = (
    *((96, d, 1_500) for d in (24, 45, 90, 180)),
    *((96, 180, t) for t in (375, 750, 3_000)),
    *((w, 180, 1_500) for w in (48, 68, 136)),
    *((48, 24, 375), (48, 180, 3_000), (136, 90, 750), (136, 180, 3_000)),
)
LARGER = (192, 360, 6_000)


def run(width: int, demonstrations: int, steps: int) -> TrainConfig:
    """Returns one run: pi0.py with other sizes."""
    vision, vlm, expert = base.model.backbone.vision, base.model.backbone.vlm, base.model.expert

    def wide(part: object, share: float = 1.0) -> object:
        own = round(share * width / 4) * 4
        return dataclasses.replace(part, width=own, mlp_dim=round(own * 8 / 3 / 8) * 8)  # type: ignore[type-var]

    backbone = dataclasses.replace(base.model.backbone, vision=wide(vision), vlm=wide(vlm))
    rate = 5e-3 * (96 / width) ** 0.5
    return dataclasses.replace(
        base,
        run_dir=f"runs/scaling/w{width}_d{demonstrations}_t{steps}",
        model=dataclasses.replace(base.model, backbone=backbone, expert=wide(expert, 2 / 3), flow_draws=2),
        data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, split=f"train[:{demonstrations}]"),)),
        steps=steps,
        optimizer=MuonConfig(
            peak_lr=rate, end_lr=rate / 100, warmup_steps=50, decay_steps=max(steps, 100), weight_decay=1e-4
        ),
        validate_every=steps // 3,
        save_every=steps,
    )


configs = {f"w{w}_d{d}_t{t}": run(w, d, t) for w, d, t in (*RUNS, LARGER)}
