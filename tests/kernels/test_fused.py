"""Profiles compiled: as in torch, optional, and cached without harm."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel

from sgdgp.kernels import fused
from sgdgp.kernels.registry import tile_kernel
from sgdgp.kernels.stationary import Matern32Tile

needs_a_compiler = pytest.mark.skipif(
    fused._compiler() is None, reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    monkeypatch.setattr(fused, "_SMALLEST", 0)
    yield
    fused._library.cache_clear()


def tile(kernel, x: torch.Tensor) -> torch.Tensor:
    form, origin = tile_kernel(kernel), torch.zeros(x.shape[1])
    out, scratch = torch.empty(2, len(x), len(x))
    form.tile(form.left(x, origin), form.right(x, origin), out, [scratch])
    return out


def points(d: int, generator: torch.Generator) -> torch.Tensor:
    """Far and near ones, duplicates, and neighbours."""
    x = torch.randn(40, d, generator=generator)
    x[:10] *= 30.0
    x[20:25], x[25:30] = x[:5], x[5:10] + 1e-3
    return x


@needs_a_compiler
@pytest.mark.parametrize("d", range(12))
def test_compiled_profiles_are_those_of_torch(d, generator, monkeypatch):
    x = points(d, generator)
    kernels = [RBFKernel(), *(MaternKernel(nu) for nu in (0.5, 1.5, 2.5))]
    assert all(tile_kernel(kernel).is_compiled(x) for kernel in kernels)
    compiled = [tile(kernel, x) for kernel in kernels]
    monkeypatch.setenv("SGDGP_COMPILE", "0")
    fused._library.cache_clear()
    assert not fused.serves(Matern32Tile.profile, x)
    for kernel, found in zip(kernels, compiled, strict=True):
        torch.testing.assert_close(found, tile(kernel, x), rtol=1e-4, atol=1e-5)


@needs_a_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("d", [2, 6])
def test_what_is_not_finite_is_left_to_torch(value, d, generator, monkeypatch):
    x = points(d, generator)
    x[7, 1] = value
    compiled = tile(MaternKernel(1.5), x)
    monkeypatch.setattr(fused, "_SMALLEST", 1 << 40)
    expected = tile(MaternKernel(1.5), x)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0, equal_nan=True)


@needs_a_compiler
def test_points_stored_by_columns_are_compiled_too(generator, monkeypatch):
    def uncalled(self, d2, scratch):
        raise AssertionError("this is the profile in torch")

    monkeypatch.setattr(Matern32Tile, "profile", uncalled)
    monkeypatch.setitem(fused.PROFILES, uncalled, 2)
    tile(MaternKernel(1.5), points(2, generator).mT.contiguous().mT)


def test_a_profile_that_is_overridden_is_not_taken_for_its_parents():
    class Squared(Matern32Tile):
        def profile(self, d2, scratch):
            super().profile(d2, scratch)
            d2.square_()

    assert Squared.profile not in fused.PROFILES
    assert Matern32Tile.profile in fused.PROFILES


@needs_a_compiler
def test_many_compile_into_one_cache_and_a_folder_that_takes_nothing_is_no_harm(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fused, "_FLAGS", (("-no-such-flag",), ("-O0", "-fPIC")))
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: fused._compiled() is not None, range(2)))
    (kept,) = (tmp_path / "sgdgp").iterdir()
    assert kept.suffix == ".so"
    broken = tmp_path / "stopped" / "sgdgp" / kept.name
    broken.parent.mkdir(parents=True)
    broken.touch()  # as a machine leaves it that stopped
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "stopped"))
    assert fused._compiled() is not None
    assert broken.stat().st_size > 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file
    assert fused._compiled() is not None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(fused.Path, "home", _no_home)
    assert fused._compiled() is not None


def _no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_is_torch(compiler, tmp_path, monkeypatch):
    if compiler == "false" and shutil.which(compiler) is None:
        pytest.skip("needs a program that fails")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    fused._library.cache_clear()
    assert not fused.serves(Matern32Tile.profile, torch.empty(3, 3))
