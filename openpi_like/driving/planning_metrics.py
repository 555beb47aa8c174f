"""Open-loop planning on nuScenes as the field reports it: distance to what the driver did, and collisions.

Two conventions are in use, which differ by a factor of about two and are often mixed up. Both are computed from the
same per-step numbers: "uniad" reads the steps at 1, 2 and 3 s (UniAD, Hu et al. 2023, arXiv 2212.10156), "stp3" the
means of all steps up to there (ST-P3, Hu et al. 2022, arXiv 2207.07601); the average of either is that of its three
numbers. They also differ in what occupies the map: vehicles, or vehicles and pedestrians; that is a matter of the
occupancy that is given.

Rules are those of the code that is shared among these papers, its quirks included; `PlanningRules` says which of them
can be switched off.

Letters: B samples, A steps of half a second, R rows (y ahead), C columns of an occupancy grid.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

SECONDS = (1, 2, 3)
STEPS_PER_S = 2


@dataclasses.dataclass(frozen=True)
class PlanningRules:
    """How plans are judged; the defaults are those of the shared code.

    length, width: of the car, in metres. ahead: how far its middle is ahead of the origin of its frame. cell: edge of a
    grid cell. reach: the grid covers that much to each side.
    invalid_as_zero: steps whose truth is unknown count as hit exactly, in the mean too; else they are left out.
    skip_truth_collisions: a step at which the true plan collides, too, is not counted as one of the model's, and still
        is among those that are divided by; else it is counted.
    """

    length: float = 4.084
    width: float = 1.85
    ahead: float = 0.5
    cell: float = 0.5
    reach: float = 50.0
    invalid_as_zero: bool = True
    skip_truth_collisions: bool = True

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("length", "width", "cell", "reach")}
        if wrong := {name: value for name, value in sizes.items() if not 0 < value < float("inf")}:
            raise ValueError(f"PlanningRules: {wrong}, expected metres above 0")
        if 0 in map(len, self.under_the_car()):
            raise ValueError(
                f"PlanningRules: a car of {self.length:g} x {self.width:g} m covers the middle of no cell of "
                f"{self.cell:g} m, and would never collide; take smaller cells"
            )

    @property
    def cells(self) -> int:
        """Rows, and columns, of the grid."""
        return round(2 * self.reach / self.cell)

    def under_the_car(self) -> tuple[Int[np.ndarray, "R"], Int[np.ndarray, "C"]]:
        """Returns rows and columns of the cells whose middles the car covers, where it stands at the origin."""

        def covered(low: float, high: float) -> np.ndarray:
            first = self.reach - self.cell / 2  # cell i has its middle at i * cell - first
            return np.arange(np.ceil((low + first) / self.cell), np.floor((high + first) / self.cell) + 1).astype(int)

        half = self.length / 2
        return covered(self.ahead - half, self.ahead + half), covered(-self.width / 2, self.width / 2)


def distances(
    plans_BA2: Float[np.ndarray, "B A 2"], truth_BA2: Float[np.ndarray, "B A 2"], valid_BA: Bool[np.ndarray, "B A"]
) -> Float[np.ndarray, "B A"]:
    """Returns how far each waypoint is from the true one, in metres; 0 where that is unknown."""
    apart = np.where(valid_BA[..., None], plans_BA2 - truth_BA2, 0)
    return np.sqrt((apart**2).sum(-1))


def collisions(
    plans_BA2: Float[np.ndarray, "B A 2"],
    occupancy_BARC: Bool[np.ndarray, "B A R C"],
    rules: PlanningRules | None = None,
) -> Bool[np.ndarray, "B A"]:
    """Returns at which steps the car would cover an occupied cell.

    As in the shared code, the car keeps its first heading, positions are cut to whole cells, and what lies beyond the
    grid is looked up at its edge.
    occupancy: rows from behind to ahead, columns from right to left; see `from_shared_code`.
    """
    rules = rules or PlanningRules()
    _check_grid(plans_BA2, occupancy_BARC, rules)
    rows, columns = rules.under_the_car()

    def looked_up(metres: np.ndarray, cells: np.ndarray) -> np.ndarray:
        return np.clip((metres[..., None] / rules.cell + cells).astype(np.int32), 0, rules.cells - 1)

    r = looked_up(plans_BA2[..., 1], rows)[..., :, None]
    c = looked_up(-plans_BA2[..., 0], columns)[..., None, :]
    b, a = np.ogrid[: len(plans_BA2), : plans_BA2.shape[1]]
    return occupancy_BARC[b[..., None, None], a[..., None, None], r, c].any((-2, -1))


def point_collisions(
    plans_BA2: Float[np.ndarray, "B A 2"],
    occupancy_BARC: Bool[np.ndarray, "B A R C"],
    rules: PlanningRules | None = None,
) -> Bool[np.ndarray, "B A"]:
    """As `collisions`, of the waypoints alone, without the car around them; beyond the grid nothing is met."""
    rules = rules or PlanningRules()
    _check_grid(plans_BA2, occupancy_BARC, rules)
    first = plans_BA2.dtype.type(rules.reach - rules.cell / 2)
    r, c = (
        ((metres + first) / plans_BA2.dtype.type(rules.cell)).astype(np.int64)
        for metres in (plans_BA2[..., 1], -plans_BA2[..., 0])
    )
    inside = (r >= 0) & (r < rules.cells) & (c >= 0) & (c < rules.cells)
    b, a = np.ogrid[: len(plans_BA2), : plans_BA2.shape[1]]
    return inside & occupancy_BARC[b, a, np.where(inside, r, 0), np.where(inside, c, 0)]


def from_shared_code(
    occupancy_BARC: Bool[np.ndarray, "B A R C"], *, turned: bool = False
) -> Bool[np.ndarray, "B A R C"]:
    """Returns an occupancy as `collisions` takes it, of the files that are passed around with the shared code.

    turned: that of VAD, with pedestrians, which lies the other way round in both directions.
    """
    flipped = occupancy_BARC[..., ::-1]
    return flipped[..., ::-1, :] if turned else flipped


def _check_grid(plans: np.ndarray, occupancy: np.ndarray, rules: PlanningRules) -> None:
    expected = (*plans.shape[:2], rules.cells, rules.cells)
    if occupancy.shape != expected:
        raise ValueError(f"occupancy of shape {occupancy.shape}, expected {expected}, cells of {rules.cell:g} m")
    if occupancy.dtype != bool or plans.dtype.kind != "f":
        raise ValueError(f"occupancy of {occupancy.dtype} and plans of {plans.dtype}, expected bool and floats")
    _check_finite("plan", plans)


def _check_finite(what: str, x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        b, a, _ = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise ValueError(f"{what} {b} is not finite at step {a}; leave the sample out, and say so")


@dataclasses.dataclass
class PlanningScores:
    """Sums over samples, and the two tables that are made of them."""

    rules: PlanningRules = dataclasses.field(default_factory=PlanningRules)

    def __post_init__(self) -> None:
        steps = SECONDS[-1] * STEPS_PER_S
        self.samples = 0
        self._counted, self._distance, self._collided, self._met = (np.zeros(steps) for _ in range(4))

    def add(
        self,
        plans_BA2: Float[np.ndarray, "B A 2"],
        truth_BA2: Float[np.ndarray, "B A 2"],
        valid_BA: Bool[np.ndarray, "B A"],
        occupancy_BARC: Bool[np.ndarray, "B A R C"],
    ) -> None:
        """Counts some more samples; A is 6. truth: may be NaN where it is not valid.

        Raises:
            ValueError: shapes that do not fit, or numbers that are not finite; nothing has been counted then.
        """
        expected, rules = (len(plans_BA2), len(self._distance), 2), self.rules
        shapes = {"plans": plans_BA2.shape, "truth": truth_BA2.shape, "valid, once for x and y,": (*valid_BA.shape, 2)}
        if problems := [f"{name} {shape}" for name, shape in shapes.items() if shape != expected]:
            raise ValueError(f"{', '.join(problems)}, expected {expected}")
        truth_BA2 = np.where(valid_BA[..., None] | np.isfinite(truth_BA2), truth_BA2, truth_BA2.dtype.type(0))
        _check_finite("truth", truth_BA2)
        away = distances(plans_BA2, truth_BA2, valid_BA)
        collided, met = (of(plans_BA2, occupancy_BARC, rules) for of in (collisions, point_collisions))
        if rules.skip_truth_collisions:
            allowed = ~collisions(truth_BA2, occupancy_BARC, rules)
            collided, met = collided & allowed, met & allowed
        self.samples += len(plans_BA2)
        self._counted += len(plans_BA2) if rules.invalid_as_zero else valid_BA.sum(0)
        for total, new in ((self._distance, away), (self._collided, collided), (self._met, met)):
            total += new.sum(0)

    @property
    def steps(self) -> dict[str, Float32[np.ndarray, "A"]]:
        """By step: "l2" in metres; "collision" and "point_collision", shares of the samples.

        In single precision, as in the shared code: numbers that lie between two printed ones are rounded as there.
        """
        if not self.samples:
            raise ValueError("no samples yet, expected one at least")
        with np.errstate(invalid="ignore"):  # NaN for a step whose truth was never known
            means = {"l2": self._distance / self._counted}
        shares = {"collision": self._collided / self.samples, "point_collision": self._met / self.samples}
        return {name: x.astype(np.float32) for name, x in (means | shares).items()}

    def uniad(self) -> dict[str, dict[str, float]]:
        """Returns metric -> {"1s", "2s", "3s", "avg"}: the steps at these times; metres and percent."""
        table = {}
        for name, x in self.steps.items():
            at, factor = [x[s * STEPS_PER_S - 1] for s in SECONDS], _shown_in(name)
            table[name] = _named([factor * value for value in at], factor * (at[0] + at[1] + at[2]) / np.float32(3))
        return table

    def stp3(self) -> dict[str, dict[str, float]]:
        """Returns metric -> {"1s", "2s", "3s", "avg"}: means of all steps up to these times; metres and percent."""
        table = {}
        for name, x in self.steps.items():
            at, factor = [x[: s * STEPS_PER_S].mean() for s in SECONDS], _shown_in(name)
            table[name] = _named([factor * value for value in at], (at[0] + at[1] + at[2]) / np.float32(3) * factor)
        return table


def _shown_in(name: str) -> np.float32:
    return np.float32(1 if name == "l2" else 100)


def _named(values: list[np.float32], mean: np.float32) -> dict[str, float]:
    return {**{f"{s}s": float(value) for s, value in zip(SECONDS, values, strict=True)}, "avg": float(mean)}


def boxes_overlap(a_N5: Float[np.ndarray, "*N 5"], b_N5: Float[np.ndarray, "*N 5"]) -> Bool[np.ndarray, "*N"]:
    """Returns whether pairs of boxes overlap, whatever their headings; exact, without a grid (separating axes).

    Boxes are (x, y, heading in rad from x, length along it, width); boxes that touch do not overlap.
    """

    def axes(box: np.ndarray) -> np.ndarray:
        c, s = np.cos(box[..., 2]), np.sin(box[..., 2])
        return np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], -2)  # (*N, 2, 2): along, across

    of_a, of_b = axes(a_N5), axes(b_N5)
    apart = (b_N5[..., :2] - a_N5[..., :2])[..., None, :]
    overlap = np.ones(np.broadcast_shapes(a_N5.shape, b_N5.shape)[:-1], bool)
    for own in (of_a, of_b):
        between = np.abs((apart * own).sum(-1))  # (*N, 2), along each axis
        reach = sum(
            (np.abs((own[..., :, None, :] * other[..., None, :, :]).sum(-1)) * box[..., None, 3:] / 2).sum(-1)
            for box, other in ((a_N5, of_a), (b_N5, of_b))
        )
        overlap &= (between < reach).all(-1)
    return overlap


def constant_velocity(velocity_B2: Float[np.ndarray, "B 2"], steps: int = 6) -> Float[np.ndarray, "B A 2"]:
    """Returns plans that go on as now: the least that every planner has to be better than. velocity: m/s."""
    times = np.arange(1, steps + 1) / STEPS_PER_S
    return velocity_B2[:, None] * times[:, None]
