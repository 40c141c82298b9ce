"""Runs side by side, each in a process of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

IMPORTED = ["atoll.commands.train", "atoll.jobs.split", "atoll.base.load", "atoll.tasks.evaluate", "bitsandbytes", "matplotlib.pyplot"]


def fresh_processes(jobs: int) -> ProcessPoolExecutor:
    """A pool that takes a new process for every task.

    Imports take longer than some runs; a fork of a process that has them does not. They are named by modules that are found without this
    script's folder, which the server of forks does not look into.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)
