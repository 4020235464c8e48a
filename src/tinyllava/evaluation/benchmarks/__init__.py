"""The table of benchmarks: one file each, one line each; listing the names imports no torch.

Paper: section 4.1.3. The nine of Tables 3 and A1 come first, the further protocols after them.
"""

from tinyllava.errors import look_up
from tinyllava.evaluation.benchmark import Benchmark
from tinyllava.evaluation.benchmarks import (
    gqa,
    llava_w,
    mmbench,
    mme,
    mmvet,
    pope,
    scienceqa,
    starter,
    textvqa,
    vqav2,
)
from tinyllava.parts.user_code import is_reference, loaded_values, recall_as, run_value

PAPER_BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": vqav2.BENCHMARK,
    "gqa": gqa.BENCHMARK,
    "scienceqa": scienceqa.BENCHMARK,
    "textvqa": textvqa.BENCHMARK,
    "pope": pope.BENCHMARK,
    "mmvet": mmvet.BENCHMARK,
    "llava-w": llava_w.BENCHMARK,
    "mme": mme.BENCHMARK,
    "mmbench": mmbench.BENCHMARK,
}

BENCHMARKS: dict[str, Benchmark] = {
    **PAPER_BENCHMARKS,
    "vqav2-test": vqav2.TEST,
    "vqav2-val": vqav2.VAL,
    "textvqa-no-ocr": textvqa.WITHOUT_OCR,
    "pope-pooled": pope.POOLED,
    "mmvet-own-prompt": mmvet.OWN_PROMPT,
    "llava-w-own-prompt": llava_w.OWN_PROMPT,
    "mmbench-judge": mmbench.WITH_JUDGE,
    "starter": starter.BENCHMARK,
    "starter-small": starter.SMALL,
    "starter-whole": starter.WHOLE,
}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name, or a user's: as ``FILE.py:NAME``, or by its name once its code ran.

    Raises:
        UnknownNameError: no such benchmark.
        ConfigError: the user's code fails, or its value is no benchmark.
    """
    if is_reference(name):
        run_value(name)
        return recall_as(name, Benchmark)
    return look_up(known_benchmarks(), name, "benchmark")


def known_benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name: the package's, and those of a user's code that has run."""
    own = {value.name: value for value in loaded_values() if isinstance(value, Benchmark)}
    return {**own, **BENCHMARKS}
