"""``causal_conv1d_cp`` and ``selective_scan_cp``: what one process has, on many ranks."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import distributed_cases as cases
import distributed_faults as faults
import distributed_scan_cases as scans
import pytest
import torch
from distributed_run import check, run

from causal_conv1d import causal_conv1d_cp, causal_conv1d_fn


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_random_cases(ranks, tmp_path):
    """500 in all; out and dx have the bits of the whole call."""
    seeds = {2: range(300), 4: range(1000, 1140), 8: range(2000, 2060)}[ranks]
    check(cases.random_cases, ranks, tmp_path, seeds)


@pytest.mark.parametrize("ranks", [2, 4])
def test_random_scans(ranks, tmp_path):
    check(scans.random_cases, ranks, tmp_path, range(100 * ranks, 100 * ranks + 20))


NCCL = ["nccl", "cpu:gloo,cuda:nccl"]


@pytest.mark.parametrize("backend", NCCL)
@pytest.mark.parametrize("ranks", [1, 2])
def test_nccl(ranks, backend, cuda, request, tmp_path):
    if ranks == 2:
        request.getfixturevalue("second_gpu")
    for function in (cases.random_cases, scans.random_cases):
        check(function, ranks, tmp_path, range(3000, 3100), "cuda", backend=backend)


def test_two_gpus_from_two_threads(second_gpu):
    """In one process; each thread has its own device."""

    def compute(device):
        torch.cuda.set_device(device)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 64, 5000, generator=generator).to(device, torch.bfloat16)
        weight = torch.randn(64, 4, generator=generator).to(device).requires_grad_()
        for _ in range(50):
            out = causal_conv1d_fn(x.requires_grad_(), weight, activation="silu")
            found = [out, *torch.autograd.grad(out.square().sum(), (x, weight))]
        return [tensor.cpu() for tensor in found]

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(compute, ("cuda:0", second_gpu))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nccl_without_synchronisation_and_in_a_graph(ranks, cuda, request, tmp_path):
    if ranks == 2:
        request.getfixturevalue("second_gpu")
    check(cases.without_synchronisation, ranks, tmp_path, backend="nccl")


DIFFERENCES = {
    "batch": "the batch must be the same on every rank, and rank 1 has another than rank 0: 2",
    "dim": "dim must be the same on every rank, and rank 1 has another than rank 0: 4, and 2",
    "width": "the width must be the same",
    "dtype": "the dtype of x must be the same",
    "bias": "whether bias is given must be the same",
    "length": "the length of a shard, unless lengths is given, must be the same",
    "lengths": "lengths must be the same",
    "gradients": "whether gradients are wanted must be the same",
    "an error": "rank 1 raised an error, so no rank goes on",
    "no tensor": "rank 1 raised an error, so no rank goes on",
    "scan": "rank 1 raised an error, so no rank goes on",
}
OWN = {  # what rank 1 says of its own error
    "an error": "weight must be (dim, width) with dim = 4",
    "no tensor": "x must be a tensor, got None",
    "scan": "A must be (dim, dstate) with dim = 4",
}


@pytest.mark.parametrize("how", ["by a collective", "by notes"])
def test_a_difference_between_ranks_is_an_error_on_each(how, tmp_path):
    steps = (faults.differences,)
    if how == "by notes":
        steps = (faults.by_notes, *steps)
    for rank, text in enumerate(run(*steps[:1], 3, tmp_path, *steps[1:])):
        assert ": " in text, text
        lines = dict(line.split(": ", 1) for line in text.splitlines())
        for name, told in DIFFERENCES.items():
            told = OWN.get(name, told) if rank == 1 else told
            assert told in lines[name], (rank, name, lines)


def test_refusals(tmp_path):
    check(faults.refusals, 3, tmp_path)


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path):
    """Within the group's timeout, here some seconds."""
    found = run(faults.one_dies, 4, tmp_path, timeout=5)
    for rank, text in enumerate(found):
        assert text == "" if rank == 1 else text.startswith("RuntimeError"), found


def test_no_rank_waits_for_ever_without_a_check(tmp_path):
    """Gloo ends a process to which more is sent than it waits for; the others have an error."""
    found = run(faults.another_dim_unchecked, 4, tmp_path, timeout=5)
    assert all(text == "" or text.startswith("RuntimeError") for text in found), found


def test_a_call_that_one_rank_makes_alone_is_an_error_there(tmp_path):
    """Within the time limit of the group's store."""
    found = run(faults.by_notes, 3, tmp_path, faults.a_call_of_one_rank, timeout=5)
    told = "every rank must make the same call, and ranks [0, 2] did not make that of rank 1"
    assert [text == "done" for text in found] == [True, False, True], found
    assert told in found[1], found


def test_notes_of_a_group_that_is_gone_are_not_read(tmp_path):
    check(faults.by_notes, 3, tmp_path, faults.groups_of_one_name)


def test_wrong_boundaries(tmp_path):
    check(faults.wrong_boundaries, 2, tmp_path)


def test_boundaries_that_a_gpu_does_not_check_index_nothing_beyond_them():
    """In the scan; here of 600 steps, where the ranks have 1200."""
    from causal_conv1d.distributed.parts import Part, Parts
    from causal_conv1d.distributed.scan import Call, _Part

    part = Part(1, 0, 600, 600)
    call = Call(Parts([Part(0, 0, 0, 600), part], 1), None, False, False)
    tensors = {"u": torch.randn(1, 4, 600), "initial_states": None}
    found = _Part(call, part, tensors, torch.tensor([0, 100, 101, 600]))
    assert found.last.tolist() == [2]


def test_call_forms(tmp_path):
    check(faults.call_forms, 4, tmp_path)


def test_without_a_group():
    with pytest.raises(RuntimeError, match="there is no process group: call torch.distributed"):
        causal_conv1d_cp(torch.randn(1, 4, 5), torch.randn(4, 3))


def test_it_is_imported_when_it_is_asked_for():
    program = """
import sys, torch, causal_conv1d
assert "causal_conv1d.distributed" not in sys.modules
assert causal_conv1d.causal_conv1d_cp and causal_conv1d.selective_scan_cp
torch.distributed.is_available = lambda: False
try:
    causal_conv1d.causal_conv1d_cp(torch.randn(1, 4, 5), torch.randn(4, 3))
except RuntimeError as error:
    assert "built without torch.distributed" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
