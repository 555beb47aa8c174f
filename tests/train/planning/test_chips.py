"""Peaks of accelerators, found by what jax and topologies call them."""

from types import SimpleNamespace

import pytest

from openpi_like.train.planning.chips import CHIPS, Chip, find_chip


@pytest.mark.parametrize(
    ("said", "name", "tflops"),
    [
        ("v5e", "v5e", 197),
        ("TPU v5 lite", "v5e", 197),
        ("TPU v5", "v5p", 459),
        ("TPU v6 lite", "v6e", 918),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        (SimpleNamespace(device_kind="NVIDIA GeForce RTX 4090"), "rtx4090", 165),
    ],
)
def test_chips_are_found_by_name_kind_and_device(said: object, name: str, tflops: int) -> None:
    chip = find_chip(said)
    assert chip is not None
    assert (chip.name, chip.tflops) == (name, tflops)


@pytest.mark.parametrize("said", ["cpu", "NVIDIA H100", "TPU v9", ""])
def test_chips_of_other_peaks_are_not_taken_for_these(said: str) -> None:
    assert find_chip(said) is None


def test_every_name_is_of_one_chip() -> None:
    names = [n.lower() for c in CHIPS for n in (c.name, *c.kinds)]
    assert len(names) == len(set(names))


def test_between_domains_the_network_of_all_chips_counts() -> None:
    chip = Chip("x", ("X",), 1.0, 1.0, 1.0, link_gbps=100.0, network_gbps=5.0, domain=8)
    assert chip.receive_gbps(8, 1) == 100
    assert chip.receive_gbps(1, 4) == 5  # one chip of each domain
    assert chip.receive_gbps(8, 4) == 40
    assert chip.receive_gbps(64, 2) == 100  # no faster than the links inside
    with pytest.raises(ValueError, match="x: no network is published for it, expected at most 8"):
        Chip("x", ("X",), 1.0, 1.0, 1.0, 100.0, domain=8).receive_gbps(8, 2)
