"""What a robot's perception, or a simulator, says of the things around it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entities:
    """Things around the robot that a perception, or a simulator, says in numbers: vehicles, lanes.

    name: the slot the model sees. key: of a field (count, size) of RLDS steps; numbers of about 1 in size, which are
    not normalised. mask_key: of a field (count,), above 0 where there is a thing; None: at every row.
    """

    name: str
    key: str
    count: int
    size: int
    mask_key: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1:
            raise ValueError(f"Entities {self.name!r}: count {self.count} and size {self.size}, expected at least 1")
