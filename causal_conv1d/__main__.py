"""``python -m causal_conv1d``: what is installed, whether it computes right, and how fast it is.

Every operation runs on every device that torch can use, and is compared by value with
:mod:`causal_conv1d.reference` in float64. The exit status is 0 if all hold. A machine without a GPU
is fine; a CUDA GPU without kernels is a failure, although torch's operations compute there.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F

from causal_conv1d import _elf, _library, selective_scan_fn, selective_state_update
from causal_conv1d import causal_conv1d_fn as fn
from causal_conv1d import causal_conv1d_update as update
from causal_conv1d import causal_conv1d_varlen_states as varlen_states
from causal_conv1d._installation import description, tick
from causal_conv1d._self_test import OLDEST, describe, is_too_old
from causal_conv1d.reference import (
    TOLERANCE,
    causal_conv1d_ref,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states_ref,
    selective_scan_ref,
    selective_state_update_ref,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("channel-first", "channel-last")
BATCH, DIM, SEQLEN, WIDTH = 3, 70, 259, 4  # no multiple of any vector's length

# -------------------------------------------------------------------------------- what is installed


def driver_version() -> str | None:
    """The newest CUDA that the driver supports, or None without a driver."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def has_cuda() -> bool:
    """Whether torch has the device type cuda, be it for NVIDIA's GPUs or for AMD's."""
    return torch.version.cuda is not None or torch.version.hip is not None


def gpus() -> list[int]:
    """The GPUs that torch can use."""
    if not has_cuda() or not torch.cuda.is_available():
        return []
    return list(range(torch.cuda.device_count()))


def other_devices() -> list[str]:
    """Those of an accelerator other than CUDA; torch 2.5 does not tell which it is."""
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is None or not accelerator.is_available():
        return []
    kind = accelerator.current_accelerator().type
    if kind == "cuda":
        return []
    return [f"{kind}:{index}" for index in range(accelerator.device_count())]


def is_damaged(backend: _library.Backend) -> bool:
    """Whether its file is, be it of use with this torch or not; a build without nvcc has none."""
    return backend.path.exists() and _elf.damage(backend.path) is not None


def report_installation() -> None:
    print(description())
    print(f"torch {torch.__version__}, its ", end="")
    if torch.version.hip is not None:
        print(f"HIP: {torch.version.hip}")
    else:
        print(f"CUDA: {torch.version.cuda or 'none'}, ", end="")
        print(f"the driver's CUDA: {driver_version() or 'no driver'}")
    isa = _library.cpu.text("causal_conv1d_cpu_isa")
    print(f"CPU kernels: loaded, using {isa}, {torch.get_num_threads()} threads")
    print(f"operators: registered through {_library.cpu.registration}")
    kind = _library.cuda.name.upper()
    if _library.cuda.problem is None:
        names = _library.cuda.text("causal_conv1d_cuda_architectures")
        print(f"{kind} kernels: loaded, with code for {names}")
    else:
        mark = f"{tick(False)} " if is_damaged(_library.cuda) else ""
        print(f"{mark}{kind} kernels: not loaded: {_library.cuda.problem}")
    for index in gpus():
        p = torch.cuda.get_device_properties(index)
        oldest = "{}.{}".format(*OLDEST)
        note = f"; too old for the CUDA kernels, which need {oldest}" if is_too_old(index) else ""
        print(
            f"cuda:{index}: {describe(p)}, "
            f"{p.multi_processor_count} SMs, {p.total_memory / 2**30:.1f} GiB{note}"
        )
    if not gpus():
        print("GPUs: none that torch can use")


# ------------------------------------------------------------------------------ whether it is right


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.cpu().double()
    error = torch.linalg.vector_norm(got.detach().cpu().double() - want)
    return (error / torch.linalg.vector_norm(want)).item()


class Inputs:
    """Random arguments in a dtype and layout on a device, the same values for every device."""

    def __init__(self, device, dtype, layout):
        self.device, self.dtype, self.layout = device, dtype, layout
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, *shape):
        values = torch.randn(shape, generator=self.generator).to(self.device, self.dtype)
        if self.layout == "channel-last" and len(shape) == 3:
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        return values

    def integers(self, values):
        return torch.tensor(values, dtype=torch.int32).to(self.device)

    def parameters(self):
        return self.normal(DIM, WIDTH), self.normal(DIM)


def doubled(*tensors: torch.Tensor) -> Any:
    """Copies in float64 on the CPU (index tensors as they are), for the reference."""
    return [t.detach().cpu().double() if t.is_floating_point() else t.cpu() for t in tensors]


def check_forward(i: Inputs):
    x, (weight, bias) = i.normal(BATCH, DIM, SEQLEN), i.parameters()
    got = fn(x, weight, bias, activation="silu")
    x, weight, bias = doubled(x, weight, bias)
    yield got, causal_conv1d_ref(x, weight, bias, activation="silu")


def check_states(i: Inputs):
    x, (weight, bias) = i.normal(BATCH, DIM, SEQLEN), i.parameters()
    states = i.normal(BATCH, DIM, WIDTH - 1)
    got = fn(x, weight, bias, initial_states=states, return_final_states=True, activation="silu")
    x, weight, bias, states = doubled(x, weight, bias, states)
    want = causal_conv1d_ref(x, weight, bias, states, return_final_states=True, activation="silu")
    yield from zip(got, want, strict=True)


def segments(i: Inputs):
    """seq_idx with sequences of uneven lengths, padding among them."""
    ends = torch.tensor([1, 2, 70, 71, 130, 200, 257])
    ids = torch.bucketize(torch.arange(SEQLEN), ends, right=True)
    ids = ids.masked_fill(ids == 4, -1).repeat(BATCH, 1)
    return ids.to(i.device, torch.int32)


def check_seq_idx(i: Inputs):
    x, (weight, bias), ids = i.normal(BATCH, DIM, SEQLEN), i.parameters(), segments(i)
    got = fn(x, weight, bias, seq_idx=ids, activation="silu")
    x, weight, bias, ids = doubled(x, weight, bias, ids)
    yield got, causal_conv1d_ref(x, weight, bias, seq_idx=ids, activation="silu")


def gradients(i: Inputs, with_all: bool):
    """Gradients of fn and of the reference, plain or with states and seq_idx."""
    x, (weight, bias) = i.normal(BATCH, DIM, SEQLEN), i.parameters()
    inputs = [x, weight, bias]
    dout, dstates, ids = i.normal(BATCH, DIM, SEQLEN), i.normal(BATCH, DIM, WIDTH - 1), segments(i)
    if with_all:
        inputs.append(i.normal(BATCH, DIM, WIDTH - 1))
    results = []
    for function, tensors in (
        (fn, [*inputs, dout, dstates, ids]),
        (causal_conv1d_ref, doubled(*inputs, dout, dstates, ids)),
    ):
        *leaves, dout, dstates, ids = tensors
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        options: dict[str, Any] = {"activation": "silu"}
        if with_all:
            options |= {"initial_states": leaves[3], "return_final_states": True, "seq_idx": ids}
        out = function(*leaves[:3], **options)
        outs, douts = (out, (dout, dstates)) if with_all else ((out,), (dout,))
        results.append(torch.autograd.grad(outs, leaves, douts))
    yield from zip(*results, strict=True)


def check_backward(i: Inputs):
    yield from gradients(i, with_all=False)


def check_backward_all(i: Inputs):
    yield from gradients(i, with_all=True)


def check_update(i: Inputs, cache_seqlens=None, indices=None):
    rows, state_len = (BATCH if indices is None else 7), WIDTH + 1
    weight, bias = i.parameters()
    state = i.normal(rows, DIM, state_len)
    weight64, bias64, state64 = doubled(weight, bias, state)
    indices = None if indices is None else i.integers(indices)
    indices64 = None if indices is None else indices.cpu()
    for step, tokens in enumerate((1, 1, 2, 9)):  # 9: more than the state holds
        x = i.normal(BATCH, DIM, tokens)
        lens = lens64 = None
        if cache_seqlens is not None:
            lens = i.integers([n + step for n in cache_seqlens])
            lens64 = lens.cpu()
        out = update(x, state, weight, bias, "silu", lens, indices)
        x64 = doubled(x)[0]
        want = causal_conv1d_update_ref(x64, state64, weight64, bias64, "silu", lens64, indices64)
        yield out, want
        yield state, state64


def check_ring(i: Inputs):
    yield from check_update(i, cache_seqlens=[0, 3, 1003])


def check_indexed(i: Inputs):
    yield from check_update(i, indices=[5, -1, 2])


def check_varlen_states(i: Inputs):
    x = i.normal(40, DIM)
    bounds = i.integers([0, 2, 2, 33, 40])
    got = varlen_states(x, bounds, 4)
    x, bounds = doubled(x, bounds)
    yield got, causal_conv1d_varlen_states_ref(x, bounds, 4)


def scan_inputs(i: Inputs):
    """u, delta, A, B, C, D, z, delta_bias and initial_states."""
    steps, dstate = 70, 16
    in_time, of_state = (BATCH, DIM, steps), (BATCH, 1, dstate, steps)
    u, delta, z = i.normal(*in_time), i.normal(*in_time).abs() / 2, i.normal(*in_time)
    A, D, bias = -i.normal(DIM, dstate).exp(), i.normal(DIM), i.normal(DIM).abs() / 2
    states = i.normal(BATCH, DIM, dstate)
    return [u, delta, A, i.normal(*of_state), i.normal(*of_state), D, z, bias, states]


def check_scan(i: Inputs):
    """out, the last states, and the gradients of u, delta, z and the initial states."""
    inputs, results = scan_inputs(i), []
    douts = i.normal(*inputs[0].shape), i.normal(*inputs[8].shape)
    for function, tensors in (
        (selective_scan_fn, [*inputs, *douts]),
        (selective_scan_ref, doubled(*inputs, *douts)),
    ):
        *leaves, dout, dlast = [tensor.detach().requires_grad_() for tensor in tensors]
        *given, states = leaves
        options = {"delta_softplus": True, "return_last_state": True, "initial_states": states}
        out, last = function(*given, **options)
        wanted = [leaves[k] for k in (0, 1, 6, 8)]
        grads = torch.autograd.grad((out, last), wanted, (dout, dlast.to(last.dtype)))
        results.append((out, last, *grads))
    yield from zip(*results, strict=True)


def check_state_update(i: Inputs):
    u, delta, A, B, C, D, z, bias, state = scan_inputs(i)
    A64, D64, bias64 = doubled(A, D, bias)
    for step in range(3):
        x, dt, b, c, gate = (tensor[..., step] for tensor in (u, delta, B[:, 0], C[:, 0], z))
        (state64,) = doubled(state)
        out = selective_state_update(state, x, dt, A, b, c, D, gate, bias, True)
        x, dt, b, c, gate = doubled(x, dt, b, c, gate)
        yield out, selective_state_update_ref(state64, x, dt, A64, b, c, D64, gate, bias64, True)
        yield state, state64


CHECKS = {
    "fn forward": check_forward,
    "fn backward": check_backward,
    "fn initial and final states": check_states,
    "fn seq_idx": check_seq_idx,
    "fn backward, states, seq_idx": check_backward_all,
    "update": check_update,
    "update of a ring": check_ring,
    "update, indexed": check_indexed,
    "varlen_states": check_varlen_states,
    "selective scan": check_scan,
    "selective_state_update": check_state_update,
}


def worst_error(check, device, dtype, layout) -> float:
    return max(relative_error(got, want) for got, want in check(Inputs(device, dtype, layout)))


def check_device(device: str) -> bool:
    """One line for each operation and layout, with the largest relative error of each dtype."""
    all_good = True
    for name, check in CHECKS.items():
        layouts = LAYOUTS if check is not check_varlen_states else ("",)
        for layout in layouts:
            good, words = True, []
            for dtype in DTYPES:
                dtype_name = str(dtype).removeprefix("torch.")
                try:
                    worst = worst_error(check, device, dtype, layout)
                except Exception as error:  # reported, and the other checks still run
                    good = False
                    words.append(f"{dtype_name} {type(error).__name__}: {error}")
                    continue
                good = good and worst <= TOLERANCE[dtype]
                words.append(f"{dtype_name} {worst:.0e}")
            print(f"  {tick(good)} {name:<29} {layout:<14} {'  '.join(words)}")
            all_good = all_good and good
    if device.startswith("cuda") and _library.self_test is not None:
        problem = _library.self_test.problem(torch.device(device))
        print(f"  {tick(problem is None)} self-test of the kernels {problem or ''}")
        all_good = all_good and problem is None  # else the lines above are about torch's operations
    return all_good


# ----------------------------------------------------------------------------------- how fast it is


def cpu_time(function) -> float:
    """The best of some calls: other work on the machine only ever adds time."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 12 and sum(times) < 0.3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def gpu_time(function) -> float:
    """GPU time of a call, without the host's: calls in a CUDA graph, between two events."""
    calls = 5
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(times[1:])


def speeds_of(device: str, dtype, layout: str, shape) -> list[float]:
    """Seconds for a copy, forward, forward and backward, and F.conv1d with SiLU."""
    dim = shape[1]
    x = torch.randn(shape, device=device).to(dtype)
    if layout == "channel-last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight = torch.randn(dim, WIDTH, device=device).to(dtype)
    bias = torch.randn(dim, device=device).to(dtype)
    dout = torch.randn_like(x)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]

    def forward_backward():
        return torch.autograd.grad(fn(*leaves, activation="silu"), leaves, dout)

    def conv1d_silu():
        z = F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=dim)
        return F.silu(z[..., : shape[2]])

    measure = cpu_time if device == "cpu" else gpu_time
    with torch.no_grad():
        copy = measure(x.clone)  # into new memory, as the others
        forward = measure(lambda: fn(x, weight, bias, activation="silu"))
        conv1d = measure(conv1d_silu)
    return [copy, forward, measure(forward_backward), conv1d]


def report_speeds(device: str) -> None:
    # On the CPU below 32 MiB a tensor, from where on malloc's fresh pages would be what is timed.
    shape = (1, 1024, 4096) if device == "cpu" else (8, 2048, 2048)
    unit, name = (1e-3, "ms") if device == "cpu" else (1e-6, "us")
    print(f"  Times in {name}: (batch, dim, seqlen) = {shape}, width {WIDTH}, bias and SiLU.")
    print("  'of copy': the time that a copy of the bytes read and written takes, over this time.")
    print(
        f"  {'':<24} {'copy':>8} {'forward':>8} {'of copy':>8} {'fwd+bwd':>8} {'of copy':>8} "
        f"{'F.conv1d+silu':>14} {'/ forward':>10}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            copy, forward, both, conv1d = speeds_of(device, dtype, layout, shape)
            # Forward reads x and writes out; backward reads x and dout and writes dx.
            print(
                f"  {str(dtype).removeprefix('torch.'):<10}{layout:<14} {copy / unit:8.2f} "
                f"{forward / unit:8.2f} {copy / forward:8.2f} {both / unit:8.2f} "
                f"{2.5 * copy / both:8.2f} {conv1d / unit:14.2f} {conv1d / forward:10.1f}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m causal_conv1d", description=__doc__)
    parser.add_argument("--no-speed", action="store_true", help="leave the table of speeds out")
    arguments = parser.parse_args()
    report_installation()
    good = not is_damaged(_library.cuda)
    by_kernels, by_torch = ["cpu"], other_devices()
    of_cuda = [f"cuda:{index}" for index in gpus()]
    if _library.cuda.problem is None:
        by_kernels += of_cuda
    else:
        by_torch += of_cuda
        if of_cuda:
            good = False
            print(
                f"{tick(False)} torch can use a GPU, but there are no CUDA kernels for it (see "
                f"above), so torch's operations compute there"
            )
    for device in by_kernels + by_torch:
        print(f"\n{device}: largest relative error against the reference in float64")
        good = check_device(device) and good
        if device in by_kernels and not arguments.no_speed:
            print(f"\n{device}: speed")
            if device != "cpu":
                torch.cuda.set_device(device)
            try:
                report_speeds(device)
            except RuntimeError as problem:
                good = False
                print(f"  {tick(False)} {problem}")
    print(f"\n{tick(good)} {'all checks hold' if good else 'NOT all checks hold'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
