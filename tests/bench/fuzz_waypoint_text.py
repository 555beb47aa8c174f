"""Many texts for the parser of plans: `PYTHONPATH=. python tests/bench/fuzz_waypoint_text.py --texts 100000`.

The laws are those of tests/driving/test_waypoint_text.py: no text crashes it, and no point is read that is not written.
"""

import argparse
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openpi_like.driving.waypoint_text import parse_waypoints
from tests.driving.test_waypoint_text import test_no_text_crashes_and_no_point_is_invented as law
from tests.driving.test_waypoint_text import texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=100_000)
    args = parser.parse_args()
    read = {"texts": 0, "points": 0, "whole": 0}

    @settings(max_examples=args.texts, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(texts, st.integers(0, 7))
    def check(text: str, count: int) -> None:
        law.hypothesis.inner_test(text, count)  # type: ignore[attr-defined]
        parsed = parse_waypoints(text, count)
        for name, more in (("texts", 1), ("points", len(parsed.points)), ("whole", parsed.whole)):
            read[name] += more

    started = time.perf_counter()
    check()
    print(f"{read}, no failure, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
