"""Makes an untrained pi0 of the "small" size of bench_models.py, to measure a server with:

python tests/bench/make_policy.py /tmp/small
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import tyro

from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.siglip import SiglipConfig
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.checkpoints.checkpoint import save_policy
from openpi_like.train.checkpoints.contract import Contract
from openpi_like.train.state import ModelDef
from tests.bench.bench_models import PATCH, SIZES


@dataclasses.dataclass(frozen=True)
class Args:
    """out: run directory. size: of bench_models.py."""

    out: Annotated[Path, tyro.conf.Positional]
    size: str = "small"


def main(args: Args) -> None:
    size = SIZES[args.size]
    config = Pi0Config(
        backbone=PaliGemmaConfig(SiglipConfig(**size["vision"], patch_size=PATCH), GemmaConfig(**size["vlm"])),
        expert=GemmaConfig(**size["expert"]),
        cameras=tuple(c.name for c in SAWYER.cameras),
        image_size=(size["image"], size["image"]),
        state_dim=4,
        action_dim=4,
        action_horizon=SAWYER.action_horizon,
        prompt_len=size["prompt"],
        vocab_size=size["vocab"],
        unroll=True,
    )

    def stats(names: tuple[str, ...]) -> FieldStats:
        n = len(names)
        return FieldStats(names, (0.0,) * n, (1.0,) * n, (-2.0,) * n, (2.0,) * n, (-3.0,) * n, (3.0,) * n, 10)

    normalization = Normalization(SAWYER.name, "zscore", stats(SAWYER.state_names), stats(SAWYER.action_names))
    contract = Contract(
        policy=config,
        robots=(SAWYER,),
        normalizations={SAWYER.name: normalization},
        tokenizer=fit_text_tokenizer(["press the button"], 280),
        renderers={SAWYER.name: None},
    )
    params = jax.device_get(jax.jit(ModelDef(config).init)(jax.random.key(0)))
    print(save_policy(args.out, params, contract=contract, origin="untrained, to measure with"))


if __name__ == "__main__":
    main(tyro.cli(Args))
