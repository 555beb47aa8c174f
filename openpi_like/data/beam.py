"""Statistics and rewriting on Apache Beam, for a corpus that outgrows one machine. Needs the package apache-beam.

It runs the functions of `stats` and `prepare`, with the same results bit for bit. What they read (indexes for the one,
shards for the other) must lie where every worker finds it under one name, and so must the directory that they write.

What a pipeline has found comes back through a file beside what it writes, which is deleted again: runners have no other
way in common.
"""

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from openpi_like.config import from_json
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.normalize import Normalization
from openpi_like.data.prepare import Task, prepare_shard, raise_problems
from openpi_like.data.stats import (
    Accumulator,
    Coverage,
    accumulate,
    blocks_of,
    check_robot,
    counted,
    counts,
    coverage,
    merge,
    moments,
    normalization_json,
    normalization_of,
    warn_degenerate,
)

# ---- Statistics ------------------------------------------------------------------------------------------------------


class _Merge(beam.CombineFn):
    """Merges pairs of accumulators; None has seen nothing."""

    def create_accumulator(self) -> None:
        return None

    def add_input(self, total: Any, part: tuple[Accumulator, Accumulator]) -> Any:
        return part if total is None else merge([total, part])

    def merge_accumulators(self, totals: Iterable[Any]) -> Any:
        seen = [t for t in totals if t is not None]
        return merge(seen) if seen else None

    def extract_output(self, total: Any) -> Any:
        return total


def _coverage_json(covered: tuple[Coverage, Coverage]) -> str:
    return json.dumps([[c.count, c.outside.tolist(), c.largest.tolist()] for c in covered])


def write_normalization(
    datasets: Sequence[EpisodeDataset], out: str, options: Sequence[str] = ()
) -> tuple[Normalization, tuple[Coverage, Coverage]]:
    """Computes and writes statistics; returns them, and how they suit the rows that they come from.

    The file is that of `stats.save_normalization`, and the values are those of `stats.compute_normalization` and
    `stats.compute_coverage`. Dims that do not vary are named in a warning.

    Args:
        out: file to write, on any filesystem that Beam knows.
        options: of the pipeline, e.g. "--runner=DataflowRunner", "--project=...".

    Raises:
        ValueError: the datasets are not all of one robot.
    """
    robot = check_robot(datasets)
    told = _beside(out)
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        parts = pipeline | "parts" >> beam.Create(blocks_of(datasets)) | beam.Reshuffle()
        first = _pass("first", parts, datasets, moments(robot))
        second = _pass("second", parts, datasets, beam.pvalue.AsSingleton(first | beam.Map(counts)))
        normalization = first | "quantiles" >> beam.Map(
            normalization_of, beam.pvalue.AsSingleton(second), robot, counted(datasets)
        )
        _ = (
            normalization
            | "as JSON" >> beam.Map(normalization_json)
            | "statistics" >> _text(out, append_trailing_newlines=False)
        )
        third = _pass("third", parts, datasets, beam.pvalue.AsSingleton(normalization | beam.Map(coverage)))
        _ = third | "coverage as JSON" >> beam.Map(_coverage_json) | "coverage" >> _text(told)
    written = from_json(json.loads(_read(out)))
    warn_degenerate(written)
    return written, _covered(written, told)


def compute_coverage(
    normalization: Normalization, datasets: Sequence[EpisodeDataset], beside: str, options: Sequence[str] = ()
) -> tuple[Coverage, Coverage]:
    """Returns what `stats.compute_coverage` does.

    Args:
        beside: a file, beside which the result is written for a moment, where workers can write.
        options: of the pipeline, see `write_normalization`.

    Raises:
        ValueError: the statistics are not of the datasets' robot.
    """
    normalization.check(check_robot(datasets))
    told = _beside(beside)
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        parts = pipeline | "parts" >> beam.Create(blocks_of(datasets)) | beam.Reshuffle()
        only = _pass("only", parts, datasets, coverage(normalization))
        _ = only | beam.Map(_coverage_json) | _text(told)
    return _covered(normalization, told)


def _pass(name: str, parts: Any, datasets: Sequence[EpisodeDataset], start: Any) -> Any:
    """Adds a pass over all rows to a pipeline; `start` of `stats.accumulate` may be a side input."""
    return (
        parts
        | f"{name} pass" >> beam.Map(accumulate, datasets, start)
        | f"merge {name}" >> beam.CombineGlobally(_Merge())
    )


def _covered(normalization: Normalization, told: str) -> tuple[Coverage, Coverage]:
    state, action = (make() for make in coverage(normalization))
    for covered, (count, outside, largest) in zip((state, action), json.loads(_read(told)), strict=True):
        covered.count, covered.outside, covered.largest = count, np.array(outside), np.array(largest)
    FileSystems.delete([told])
    return state, action


# ---- Rewriting -------------------------------------------------------------------------------------------------------


def write_shards(tasks: Sequence[Task], options: Sequence[str] = ()) -> None:
    """Writes shards as `prepare.write_shards` does.

    options: of the pipeline, see `write_normalization`.

    Raises:
        DatasetError: shards could not be read or written; lists what is wrong with each. The others are done.
    """
    if not tasks:
        return
    told = _beside(str(tasks[0].done))
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        shards = pipeline | "shards" >> beam.Create(tasks) | beam.Reshuffle()
        _ = shards | beam.FlatMap(prepare_shard) | beam.Map(json.dumps) | "problems" >> _text(told)
    problems = [json.loads(line) for line in _read(told).split("\n") if line]
    FileSystems.delete([told])
    raise_problems(problems)


# ---- Files -----------------------------------------------------------------------------------------------------------


def _beside(path: str) -> str:
    """A name that no other pipeline uses."""
    return f"{path}.{uuid.uuid4().hex}"


def _text(path: str, *, append_trailing_newlines: bool = True) -> beam.PTransform:
    """Writes strings to one file."""
    return beam.io.WriteToText(path, shard_name_template="", append_trailing_newlines=append_trailing_newlines)


def _read(path: str) -> str:
    with FileSystems.open(path) as file:
        return file.read().decode()
