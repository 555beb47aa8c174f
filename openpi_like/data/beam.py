"""Statistics and rewriting on Apache Beam, for a corpus that outgrows one machine. Needs the package apache-beam.

It runs the functions of `stats` and `prepare`, with the same results bit for bit. What they read (indexes for the one,
shards for the other) must lie where every worker finds it under one name, and so must the directory `prepare` writes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.normalize import Normalization
from openpi_like.data.prepare import Task, prepare_shard, raise_problems
from openpi_like.data.stats import (
    Accumulator,
    accumulate,
    blocks_of,
    check_robot,
    counts,
    merge,
    moments,
    normalization_json,
    normalization_of,
)


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


def write_normalization(datasets: Sequence[EpisodeDataset], out: str, options: Sequence[str] = ()) -> None:
    """Runs the pipeline and writes the statistics as `stats.save_normalization` does.

    Args:
        out: file to write, on any filesystem that Beam knows.
        options: of the pipeline, e.g. "--runner=DataflowRunner", "--project=...".

    Raises:
        ValueError: the datasets are not all of one robot.
    """
    robot = check_robot(datasets)

    def finish(first: Any, second: Any) -> Normalization:
        return normalization_of(robot, first, second)

    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        parts = pipeline | "parts" >> beam.Create(blocks_of(datasets)) | beam.Reshuffle()
        first = (
            parts
            | "first pass" >> beam.Map(accumulate, datasets, moments(robot))
            | "merge first" >> beam.CombineGlobally(_Merge())
        )
        second = (
            parts
            | "second pass"
            >> beam.Map(lambda part, first: accumulate(part, datasets, counts(first)), beam.pvalue.AsSingleton(first))
            | "merge second" >> beam.CombineGlobally(_Merge())
        )
        (
            first
            | "quantiles" >> beam.Map(finish, beam.pvalue.AsSingleton(second))
            | "as JSON" >> beam.Map(normalization_json)
            | beam.io.WriteToText(out, shard_name_template="", append_trailing_newlines=False)
        )


def write_shards(tasks: Sequence[Task], options: Sequence[str] = ()) -> None:
    """Writes shards as `prepare.write_shards` does, with one more try of all that are missing at the end.

    options: of the pipeline, see `write_normalization`.

    Raises:
        DatasetError: records are damaged or missing; lists those of all shards. The others are done.
    """
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(prepare_shard)
    # What a worker found wrong stays there; here it is found again, and what is done is not done twice.
    raise_problems([problem for task in tasks for problem in prepare_shard(task)])
