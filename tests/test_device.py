"""The device floor: seeds, number formats, and a promise about torch.compile that holds."""

import random
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gemwright import device


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    """`can_compile` remembers its answer for the whole process; each of these tests wants its own."""
    device.can_compile.cache_clear()
    yield
    device.can_compile.cache_clear()


@pytest.fixture
def cpu_with_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU whose only program is g++ (and clang++, which is what torch takes on a Mac)."""
    for name in ("g++", "clang++"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("GEMWRIGHT_COMPILE", raising=False)
    return tmp_path


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for available, kind in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert device.pick_device() == torch.device(kind)


def test_every_rank_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    taken = []
    for rank in range(5):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        taken.append(device.pick_device().index)
    assert taken == [0, 1, 2, 0, 1]


def test_without_torchrun_there_is_one_rank_that_waits_for_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with device.process_group() as ranks:
        assert ranks == device.Ranks(rank=0, size=1)
        assert ranks.first_says("go") == "go"
        ranks.wait()
        assert not torch.distributed.is_initialized()


def test_a_torchrun_of_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with device.process_group() as ranks:
        assert ranks.size == 1
        assert not torch.distributed.is_initialized()


def scaled(x: torch.Tensor, y: torch.Tensor, factor: float, offset: float | None = None) -> torch.Tensor:
    return x * factor + y if offset is None else x * factor + y + offset


def test_a_fused_kernel_gets_its_constants_by_name_and_the_rest_by_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEMWRIGHT_COMPILE", "0")
    device.fused.cache_clear()
    x, y = torch.randn(3), torch.randn(3)
    assert torch.equal(device.fused(scaled, factor=2.0)(x, y), x * 2 + y)
    assert torch.equal(device.fused(scaled, factor=3.0, offset=1.0)(x, y), x * 3 + y + 1)
    assert torch.equal(device.fused(scaled, offset=None)(x, y, 5.0), x * 5 + y)
    device.fused.cache_clear()


def test_a_kernel_is_fused_once_for_each_set_of_constants(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEMWRIGHT_COMPILE", "0")
    device.fused.cache_clear()
    assert device.fused(scaled, factor=2.0) is device.fused(scaled, factor=2.0)
    assert device.fused(scaled, factor=2.0) is not device.fused(scaled, factor=3.0)
    device.fused.cache_clear()


@pytest.mark.compiled
def test_a_compiled_kernel_agrees_for_every_shape_and_constant():
    device.fused.cache_clear()
    for rows, factor in ((4, 2.0), (9, 2.0), (9, 0.1)):
        x, y = torch.randn(rows, 8), torch.randn(rows, 8)
        torch.testing.assert_close(device.fused(scaled, factor=factor)(x, y), scaled(x, y, factor))
        torch.testing.assert_close(device.fused(scaled)(x, y, factor), scaled(x, y, factor))
    device.fused.cache_clear()


def test_fp32_and_bf16_are_offered_and_fp16_is_not():
    assert device.dtype_of("fp32") is torch.float32
    assert device.dtype_of("bf16") is torch.bfloat16
    assert torch.float16 not in device.DTYPES.values()


def test_one_seed_gives_one_sequence_in_python_and_torch():
    def draw(seed: int) -> tuple[float, list[float]]:
        device.seed_everything(seed)
        return random.random(), torch.rand(3).tolist()

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


@pytest.mark.usefixtures("cpu_with_compiler")
def test_with_a_compiler_and_headers_it_compiles_and_says_nothing(capsys: pytest.CaptureFixture[str]):
    assert device.can_compile()
    assert capsys.readouterr().err == ""


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(
    cpu_with_compiler: Path, capsys: pytest.CaptureFixture[str]
):
    for program in cpu_with_compiler.glob("*++"):
        program.unlink()
    assert not device.can_compile()
    assert not device.can_compile()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no compiler found" in said
    assert "running eagerly" in said


@pytest.mark.usefixtures("cpu_with_compiler")
def test_cxx_names_the_compiler_as_it_does_for_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CXX", "my-compiler")
    assert not device.can_compile()
    assert "my-compiler" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "clang++")
    device.can_compile.cache_clear()
    assert device.can_compile()


def test_without_pythons_headers_it_runs_eagerly_and_names_the_package(
    cpu_with_compiler: Path, capsys: pytest.CaptureFixture[str]
):
    """torch's CPU kernels include Python.h, which a distribution's python3 comes without."""
    (cpu_with_compiler / "Python.h").unlink()
    assert not device.can_compile()
    assert "python3-dev" in capsys.readouterr().err


def test_a_gpu_needs_a_c_compiler(
    cpu_with_compiler: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not device.can_compile()
    assert "gcc or clang" in capsys.readouterr().err
    (cpu_with_compiler / "g++").rename(cpu_with_compiler / "gcc")
    device.can_compile.cache_clear()
    assert device.can_compile()


@pytest.mark.usefixtures("cpu_with_compiler")
def test_compiling_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("GEMWRIGHT_COMPILE", "0")
    assert not device.can_compile()
    assert "GEMWRIGHT_COMPILE=0" in capsys.readouterr().err


@pytest.mark.compiled
def test_where_it_may_compile_a_compiled_function_runs_and_agrees():
    def cap(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 30) * 30

    x = torch.randn(8, 8, device=device.pick_device()) * 100
    torch.testing.assert_close(torch.compile(cap)(x), cap(x))


def linux(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """A Linux that tells of its memory by these files."""
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    monkeypatch.setattr(device, "_MEMORY", folder / "meminfo")
    monkeypatch.setattr(device, "_CONTAINER", folder)


MEMINFO = "MemTotal: 9000 kB\nMemFree: 1000 kB\nMemAvailable: 6000 kB\n"


def test_memory_left_is_what_linux_calls_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    linux(tmp_path, monkeypatch, meminfo=MEMINFO)
    assert device.available_memory("cpu") == 6000 << 10


@pytest.mark.parametrize(
    ("limit", "left"), [("3000000", 1_500_000), ("1000000", 0), ("90000000", 6000 << 10), ("max", 6000 << 10)]
)
def test_a_container_leaves_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int
):
    linux(
        tmp_path, monkeypatch, meminfo=MEMINFO, memory_max=f"{limit}\n", memory_current="2000000\n",
        memory_stat="anon 1500000\nactive_file 200000\ninactive_file 300000\n",
    )  # fmt: skip
    assert device.available_memory("cpu") == left


def test_where_nobody_tells_the_memory_left_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    linux(tmp_path, monkeypatch)
    assert device.available_memory("cpu") is None
    assert device.available_memory("meta") is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells of its memory")
def test_memory_that_is_taken_is_no_longer_left():
    before = device.available_memory("cpu")
    assert before is not None
    assert before > 0


@pytest.mark.gpu
def test_memory_that_is_taken_on_a_gpu_is_no_longer_left():
    before = device.available_memory("cuda")
    taken = torch.ones(64 << 20, device="cuda")
    after = device.available_memory("cuda")
    assert before is not None and after is not None  # noqa: PT018
    assert before - after >= taken.nbytes
