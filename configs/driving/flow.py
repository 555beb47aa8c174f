"""Flow matching that drives: six cameras, the car's state and a command in words to six waypoints, in the simulator.

    python train/train.py configs/driving/flow.py

What the other policies of this folder are compared with; policies.py says how what they need is made.
"""

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.ego_vehicle import EGO_VEHICLE, VIEWS
from openpi_like.train.config import TrainConfig
from openpi_like.train.muon import MuonConfig

STEPS = 3_000

config = TrainConfig(
    run_dir="runs/driving/flow",
    model=Pi0Config.tiny(
        cameras=VIEWS,
        image_size=(48, 80),
        state_dim=17,
        action_dim=2,
        action_horizon=6,
        prompt_len=24,
        vocab_size=1024,
        flow_draws=4,
    ),
    data=DataConfig(entries=(MixtureEntry(robot=EGO_VEHICLE, path="runs/driving/data/ego_vehicle_sim/1.0.0"),)),
    stats="runs/driving/stats",
    tokenizer="runs/driving/text.model",
    batch_size=32,
    steps=STEPS,
    optimizer=MuonConfig(peak_lr=5e-3, end_lr=5e-5, warmup_steps=50, decay_steps=STEPS, weight_decay=1e-4),
    ema_decay=0.99,
    validate_every=STEPS // 3,
    save_every=STEPS // 3,
)
