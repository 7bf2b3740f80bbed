"""Free memory: what the machine, containers and the process leave."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpytorch.kernels import RBFKernel

from sgdgp.core import memory
from sgdgp.operators import DenseOperator

GB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 GB free, its process in no group."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {64 * 2**20} kB\n")
    return tmp_path


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_without_limits_it_is_the_machines(machine: Path):
    assert memory.free_memory() == 64 * GB
    (machine / "proc" / "self" / "cgroup").write_text("0::/a/b\n")
    group(machine / "groups" / "a", max="max", current=GB)
    assert memory.free_memory() == 64 * GB


@pytest.mark.parametrize("place", ["a/b", "a", ""])
def test_a_limit_of_any_group_above_holds(machine: Path, place: str):
    (machine / "proc" / "self" / "cgroup").write_text("0::/a/b\n")
    group(machine / "groups" / place, max=8 * GB, current=3 * GB)
    assert memory.free_memory() == 5 * GB
    # Files in the cache are given up when memory is needed.
    group(machine / "groups" / place, stat=f"anon 7\ninactive_file {GB}")
    assert memory.free_memory() == 6 * GB
    assert memory.resolve_budget(None) == 3 * GB


def test_groups_of_version_1_have_other_names(machine: Path):
    (machine / "proc" / "self" / "cgroup").write_text("3:cpu:/a\n4:memory:/a\n")
    place = machine / "groups" / "memory" / "a"
    group(place, limit_in_bytes=2 * GB, usage_in_bytes=3 * GB)
    assert memory.free_memory() == 0
    assert memory.resolve_budget(None) == 1


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_hold(limit: str):
    def limited() -> None:
        import resource

        kind = getattr(resource, limit)
        resource.setrlimit(kind, (40 * GB, 40 * GB))
        memory.free_memory()
        resource.setrlimit(kind, (20 * GB, 40 * GB))
        assert memory.free_memory() < 20 * GB

    child = multiprocessing.get_context("fork").Process(target=limited)
    child.start()
    child.join()
    assert child.exitcode == 0


def test_what_torch_holds_unused_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch):
    for name, found in (
        ("mem_get_info", (24 * GB, 80 * GB)),
        ("memory_reserved", 50 * GB),
        ("memory_allocated", 6 * GB),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert memory.free_memory("cuda") == 68 * GB


def test_what_does_not_fit_is_refused_with_both_numbers():
    memory.check_fits("x: a matrix", 2000, 2000, "give a smaller one")
    words = "x: a matrix needs about 2,001 bytes, 2,000 are available; give a smaller"
    with pytest.raises(MemoryError, match=words):
        memory.check_fits("x: a matrix", 2001, 2000, "give a smaller one")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_what_does_not_fit_is_named_with_the_argument_that_helps(error: Exception):
    with (
        pytest.raises(torch.OutOfMemoryError, match="the factor does not fit"),
        memory.named_if_too_large("the factor"),
    ):
        raise error
    with pytest.raises(RuntimeError, match="other"), memory.named_if_too_large("x"):
        raise RuntimeError("other")


def test_a_kernel_matrix_that_does_not_fit_is_named():
    x = torch.zeros(3_000_000, 1)  # 36 TB
    operator = DenseOperator(RBFKernel(), x)
    with pytest.raises(torch.OutOfMemoryError, match=r"kernel matrix.*memory_budget"):
        operator.matmul(x)


def test_the_package_can_be_imported_without_a_home(tmp_path: Path):
    (tmp_path / "file").write_text("")
    subprocess.run(
        [sys.executable, "-c", "import sgdgp"],
        check=True,
        env={"HOME": str(tmp_path / "file"), "PYTHONPATH": str(Path.cwd())},
    )


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1200)
    assert memory.resolve_budget(None) == 600
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.resolve_budget(None) == 200
    assert memory.resolve_budget(None, "cuda:0") == 600
