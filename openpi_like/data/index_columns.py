"""The columns of an index: which fields of a dataset have one."""

import dataclasses
import math

import numpy as np

from openpi_like.data.schema import Feature, Schema

# Step fields with more values than this (sentence embeddings, point clouds) would dwarf the rest of the index; tables,
# such as of the lanes around a car, may have more.
MAX_STEP_VALUES, MAX_TABLE_VALUES = 256, 1024


@dataclasses.dataclass(frozen=True)
class IndexColumn:
    """A column of the index. folder: "step", "image" or "episode"."""

    folder: str
    feature: Feature
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def column(self) -> str:
        """Name in the index."""
        return f"{self.folder}/{self.feature.key}"


def index_columns(schema: Schema) -> tuple[list[IndexColumn], dict[str, str]]:
    """Returns the columns, and key -> why a field has none."""
    fields: list[IndexColumn] = []
    left_out: dict[str, str] = {}
    for level, features in (("step", schema.steps), ("episode", schema.episode)):
        for key, f in features.items():
            shape = tuple(d for d in f.shape if d is not None)
            most = MAX_TABLE_VALUES if len(shape) == 2 else MAX_STEP_VALUES
            if f.kind == "numeric" and not 0 < math.prod(shape) <= most:
                left_out[key] = f"it has {math.prod(shape)} values, more than {most}"
                if not math.prod(shape):
                    left_out[key] = f"it has no values, its shape is {shape}"
            elif f.kind == "numeric":
                fields.append(IndexColumn(level, f, np.dtype(f.dtype), shape))
            elif f.kind == "text":
                fields.append(IndexColumn(level, f, np.dtype(np.int32), ()))
            elif f.kind == "image" and level == "step":
                fields.append(IndexColumn("image", f, np.dtype(np.int64), (2,)))
            elif f.kind == "image":
                left_out[key] = "images of whole episodes cannot be read here"
            else:
                left_out[key] = f"fields of kind {f.dtype} and shape {f.shape} cannot be read here"
    return fields, left_out


def large_tables(schema: Schema) -> list[str]:
    """Returns the step fields that have a column as tables alone: indexes of before tables had one are without."""
    shapes = {key: tuple(d for d in f.shape if d is not None) for key, f in schema.steps.items() if f.kind == "numeric"}
    return sorted(k for k, s in shapes.items() if len(s) == 2 and MAX_STEP_VALUES < math.prod(s) <= MAX_TABLE_VALUES)


def file_name(key: str) -> str:
    """Returns the name of a column's file."""
    return key.replace("%", "%25").replace("/", "%2F") + ".npy"
