"""What a device computes in by itself: training's precision, and the type that a checkpoint answers in."""

from contextvars import ContextVar
from threading import current_thread
from types import SimpleNamespace

import pytest
import torch

from chats import make_chat
from tinyllava.errors import ConfigError
from tinyllava.inference.chat import Chat, choose_dtype
from tinyllava.model import devices
from tinyllava.model.devices import call_in_thread, check_device, give_back_freed_memory, multiplies_bf16
from tinyllava.parts.folders import saved_dtype
from tinyllava.training.precision import choose_precision


def put_in_gpu(monkeypatch, major: int) -> None:
    """Let torch find a GPU of this compute capability; what it concludes from that is its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))


@pytest.mark.parametrize(("major", "has_bf16"), [(7, False), (8, True), (9, True)])
def test_bf16_is_used_where_a_gpu_multiplies_it_and_not_where_it_is_emulated(monkeypatch, major, has_bf16):
    put_in_gpu(monkeypatch, major)
    assert multiplies_bf16("cuda") is has_bf16
    assert choose_precision("auto") == ("bf16" if has_bf16 else "fp32")
    assert choose_precision("fp16") == "fp16"
    assert choose_dtype("float32", "cuda") == ("bfloat16" if has_bf16 else "float32")
    assert choose_dtype("float16", "cuda") == "float16"


@pytest.mark.parametrize(
    ("capabilities", "used", "has_bf16"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "AVX512", True),
        ({"avx512_bf16": False, "amx_bf16": True}, "AVX512", True),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "AVX512", False),
        ({"avx512_bf16": True, "amx_bf16": True}, "AVX2", False),  # what ATEN_CPU_CAPABILITY=avx2 makes of it
        ({"neon": True}, "DEFAULT", False),
    ],
)
def test_bf16_is_used_where_a_cpu_multiplies_it(monkeypatch, capabilities, used, has_bf16):
    assert torch.cpu.get_capabilities()["architecture"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_bf16("cpu") is has_bf16


@pytest.mark.parametrize("saved", ["float32", "bfloat16", "float16"])
def test_a_cpu_answers_in_float32_whatever_was_saved(tmp_path, saved):
    chat = make_chat(tmp_path, "llama")
    chat.model.to(getattr(torch, saved)).save_pretrained(tmp_path / "saved")
    chat.processor.save_pretrained(tmp_path / "saved")
    assert saved_dtype(tmp_path / "saved") == saved
    assert Chat.open(tmp_path / "saved", device="cpu").dtype == "float32"
    assert Chat.open(tmp_path / "saved", device="cpu", dtype="bfloat16").dtype == "bfloat16"


def test_no_type_is_guessed_for_another_device():
    assert choose_dtype("float32", "mps") == "float32"
    assert choose_dtype("float16", "mps") == "float16"


@pytest.mark.parametrize("name", ["meta", "cuda:77", "nonsense"])
def test_a_device_that_cannot_answer_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"device '{name}': .*this machine's best is"):
        check_device(name)


def test_a_call_in_a_thread_sees_its_callers_context_and_ends_with_its_error():
    variable: ContextVar[int] = ContextVar("number")
    variable.set(3)
    thread, total = call_in_thread(lambda more: (current_thread(), variable.get() + more), 4)
    assert (thread.is_alive(), total) == (False, 7)
    with pytest.raises(ZeroDivisionError):
        call_in_thread(lambda: 1 / 0)


def test_freed_memory_goes_back_where_the_c_library_can(monkeypatch):
    give_back_freed_memory()  # what this system makes of it
    asked = []
    libraries = {"linux": SimpleNamespace(malloc_trim=asked.append), "darwin": None}
    for platform, library in libraries.items():
        monkeypatch.setattr(devices.sys, "platform", platform)
        monkeypatch.setattr(devices.ctypes, "CDLL", lambda name, library=library: library)
        give_back_freed_memory()
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: SimpleNamespace())  # as of musl
    give_back_freed_memory()
    assert asked == [0]
