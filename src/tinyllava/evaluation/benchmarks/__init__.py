"""The table of benchmarks: one file, one line each; listing the names imports no torch."""

from tinyllava.evaluation.benchmark import Benchmark

_ALL: tuple[Benchmark, ...] = ()

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
