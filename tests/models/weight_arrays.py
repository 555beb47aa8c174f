"""Weights as flat arrays: exported in a format, loaded from one, compared."""

import dataclasses
from typing import Any

import numpy as np

from openpi_like.models.arrays import MemoryArrays
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.text_model import TextModelConfig
from openpi_like.models.weights import export_weights, plan_load, read_weights

PREFIX_FIELDS = [f.name for f in dataclasses.fields(TextModelConfig)]
Arrays = dict[str, np.ndarray]


def with_heads(config: Any, num_kv_heads: int, pi05: bool) -> Pi0Config:
    vlm, expert = (dataclasses.replace(g, num_kv_heads=num_kv_heads) for g in (config.backbone.language, config.expert))
    backbone = dataclasses.replace(config.backbone, vlm=vlm)
    return dataclasses.replace(config, pi05=pi05, backbone=backbone, expert=expert)


def paligemma(config: Pi0Config) -> TextModelConfig:
    return TextModelConfig(**{name: getattr(config, name) for name in PREFIX_FIELDS})


def exported(config: Any, weights: Arrays, fmt: str) -> Arrays:
    return {name: make().copy() for name, make in export_weights(config, weights, fmt)}


def loaded(config: Any, arrays: Arrays, **options: Any) -> Arrays:
    source = MemoryArrays(arrays)
    return read_weights(source, plan_load(config, source, **options))


def assert_same(got: Arrays, expected: Arrays) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
