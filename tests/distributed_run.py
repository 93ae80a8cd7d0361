"""Runs a function on several ranks; a server that has imported torch forks them."""

import contextlib
import datetime
import multiprocessing
import os
import time
import traceback

import pytest
import torch
import torch.distributed as dist


def run(function, ranks, folder, *args, timeout=60, backend="gloo"):
    """The text that function(*args) returns on each rank, or its error's; "" if a rank died."""
    if not dist.is_available():
        pytest.skip("torch is without distributed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor"])
    # A new store each time: a file that is left from a run is taken for one of this run.
    store = str(folder / f"store{time.monotonic_ns()}")
    results = [folder / f"{store}.{rank}" for rank in range(ranks)]
    given = (function, ranks, store, timeout, backend, args)
    workers = [
        context.Process(target=_main, args=(rank, str(result), *given))
        for rank, result in enumerate(results)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + 10 * timeout
    for worker in workers:
        worker.join(max(end - time.monotonic(), 0))
    late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
    assert not late, f"ranks {late} hang"
    return [result.read_text() if result.exists() else "" for result in results]


def check(function, ranks, folder, *args, backend="gloo"):
    """As run; each rank must come through."""
    found = run(function, ranks, folder, *args, backend=backend)
    assert found == ["done"] * ranks, "\n".join(found)


def _main(rank, result, function, ranks, store, timeout, backend, args):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    method = f"file://{store}"
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, method, limit, rank=rank, world_size=ranks)
    try:
        text = function(*args) or "done"
    except Exception:
        text = traceback.format_exc()
    with open(result, "w") as file:
        file.write(text)
    with contextlib.suppress(RuntimeError):  # of ranks that died
        dist.barrier()  # a process that ends early takes its connections from the others
    os._exit(0)  # threads of Gloo that are still there may abort a process that ends otherwise
