"""The schemas of the catalogue's datasets as published, and what their numbers mean, written down once more."""

from tests.data.oxe_schemas_arms import ARMS
from tests.data.oxe_schemas_franka import FRANKA
from tests.data.oxe_words import Published

PUBLISHED: dict[str, Published] = {**ARMS, **FRANKA}
