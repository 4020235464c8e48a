"""Many more clients than places: nothing is lost, who is refused is told when to come again, memory stays."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import httpx2 as httpx
import pytest

from documents import ROOT
from served import serve
from tinyllava.serving import engine
from tinyllava.serving.engine import OwnEngine


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_benchmark", ROOT / "benchmarks" / "serve.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_a_load_of_clients_loses_nothing(toy: Path, benchmark: ModuleType) -> None:
    options = ("--name", "m", "--max-waiting", "6", "--max-running", "4", "--cache-tokens", "2000")
    with serve(toy, *options) as served:
        client = httpx.Client(base_url=served.address, timeout=600, limits=benchmark.NO_LIMITS)
        server = benchmark.Server(served.address, served.process, client)
        benchmark.run_load(server, 8, 1.0, 20)
        before = server.memory_mib
        counts: Counter[str] = Counter()
        while not all(counts[end] for end in ("answered", "429", "left early")):  # few come on a busy machine
            load = benchmark.run_load(server, 24, 4.0, 20)
            counts.update(load.counts)
            assert load.counts["lost"] == 0, load.lost
        served.wait_for("tinyllava_places", 0)
        served.wait_for("tinyllava_running", 0)
        assert server.memory_mib - before < 60
        assert served.metric("tinyllava_kept_tokens") <= 2_000
        client.close()


def test_memory_of_dropped_conversations_is_given_back_at_times(monkeypatch: pytest.MonkeyPatch) -> None:
    given, own = [], object.__new__(OwnEngine)
    own.decoder, own._num_given_back = SimpleNamespace(num_forgotten=0), 0  # type: ignore[assignment]
    monkeypatch.setattr(engine, "give_back_freed_memory", lambda: given.append(own.decoder.num_forgotten))
    for own.decoder.num_forgotten in (0, 99, 100, 150, 199, 230, 329, 330):
        own._give_back()
    assert given == [100, 230, 330]
