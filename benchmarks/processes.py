"""Runs in processes of their own: one thread each, some at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_ROOT = Path(__file__).resolve().parents[1]
_INTERRUPTED = 130

Job = TypeVar("Job")


def run_module(module: str, *arguments: str) -> int:
    """``python -m module arguments`` in a process of one thread; its exit status."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={
            "PYKEOPS_VERBOSE": "0",  # GPyTorch imports KeOps, which reports on CUDA
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        check=False,
    ).returncode


def run_under_torchrun(count: int, module: str, *arguments: str) -> None:
    """The same in ``count`` processes of one thread that work together, on a CPU.

    Raises:
        RuntimeError: They failed; with what they said.
    """
    launch = ["-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(count), "-m", module]
    finished = subprocess.run(
        [sys.executable, *launch, *arguments],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"{count} processes failed:\n{finished.stderr}")


def failures(
    todo: Sequence[Job], execute: Callable[[Job], int], workers: int
) -> list[Job]:
    """Execute all jobs, some at a time, in their order; those that failed."""
    with ThreadPoolExecutor(workers) as pool:
        statuses = pool.map(execute, todo)
        return [job for job, status in zip(todo, statuses, strict=True) if status]


def exit_status(work: Callable[[], Sequence[str]], kept: str) -> int:
    """What a command ends with: errors in words, and what Ctrl-C leaves.

    Args:
        work: Returns the labels of runs that failed.
        kept: What an interruption leaves, such as "finished runs".

    Returns:
        0; 1 if a run failed; 2 for arguments, data or packages that are missing; 130
        after Ctrl-C.
    """
    try:
        failed = work()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {kept} are kept", file=sys.stderr)
        return _INTERRUPTED
    for label in failed:
        print(f"failed: {label}", file=sys.stderr)
    return 1 if failed else 0
