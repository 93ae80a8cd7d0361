"""The custom operator for ONNX Runtime, on the CPU: docs/onnxruntime.md."""

import concurrent.futures
import os
import random
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import c_library as c
import numpy as np
import pytest
import torch
from c_library import ONNXRUNTIME_INCLUDE, ROOT
from helpers import assert_close, randn
from tolerances import OUT

import causal_conv1d
from causal_conv1d.reference import causal_conv1d_ref

if not ONNXRUNTIME_INCLUDE:
    pytest.skip("needs CAUSAL_CONV1D_ONNXRUNTIME_INCLUDE", allow_module_level=True)
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
helper = onnx.helper

OWN, STANDARD, MICROSOFT = "causal_conv1d", "", "com.microsoft"
OPSETS = {OWN: {"": 17, OWN: 1}, STANDARD: {"": 27}, MICROSOFT: {"": 21, MICROSOFT: 1}}
TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float64: onnx.TensorProto.DOUBLE,
}
INPUTS = ("input", "weight", "bias", "past_state")


@pytest.fixture(scope="module")
def library(c_library):
    return str(c_library / "lib" / "libcausal_conv1d_onnxruntime.so")


def make_model(given, dtype, domain, outputs=2, **attributes):
    """CausalConvWithState between float32 tensors, which are converted to dtype and back."""
    types = TYPES[dtype]
    names = [name if name in given else "" for name in INPUTS]
    nodes = [helper.make_node("Cast", [name], [f"{name}_"], to=types) for name in given]
    own = [name and f"{name}_" for name in names]
    found = ["output_", "present_state_"][:outputs]
    nodes.append(helper.make_node("CausalConvWithState", own, found, domain=domain, **attributes))
    floats = onnx.TensorProto.FLOAT
    nodes += [helper.make_node("Cast", [name], [name[:-1]], to=floats) for name in found]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, floats, None) for name in given],
        [helper.make_tensor_value_info(name[:-1], floats, None) for name in found],
    )
    opsets = [helper.make_opsetid(*opset) for opset in OPSETS[domain].items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def make_session(library, model, threads=1, **settings):
    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        setattr(options, name, value)
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    if not isinstance(model, (str, os.PathLike)):
        model = model.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def make_arguments(shape, width, dtype, bias, state, seed=0):
    """By the operator's names, of numbers that dtype has."""
    batch, dim, seqlen = shape
    found = {
        "input": randn(*shape, dtype=dtype, seed=seed),
        "weight": randn(dim, 1, width, dtype=dtype, seed=seed + 1, scale=width**-0.5),
    }
    if bias:
        found["bias"] = randn(dim, dtype=dtype, seed=seed + 2)
    if state:
        found["past_state"] = randn(batch, dim, width - 1, dtype=dtype, seed=seed + 3)
    return found


def run(session, arguments):
    feed = {name: value.float().numpy() for name, value in arguments.items()}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def call(function, arguments, activation):
    """One of this package's functions with the operator's arguments."""
    return function(
        arguments["input"],
        arguments["weight"][:, 0],
        arguments.get("bias"),
        initial_states=arguments.get("past_state"),
        return_final_states=True,
        activation=None if activation == "none" else activation,
    )


def assert_right(found, arguments, activation):
    """Near the reference, and bitwise what torch's operator gives."""
    dtype = arguments["input"].dtype
    out, state = found[0].to(dtype), found[1].to(dtype)
    doubles = {name: value.double() for name, value in arguments.items()}
    expected, expected_state = call(causal_conv1d_ref, doubles, activation)
    assert_close(out, expected, OUT[dtype], allow_zero=expected.numel() == 0, name="output")
    assert torch.equal(state, expected_state.to(dtype)), "present_state must be exact copies"
    own, _ = call(causal_conv1d.causal_conv1d_fn, arguments, activation)
    assert torch.equal(out, own)


# ------------------------------------------------------------------------------------------ values


def random_case(seed):
    """A shape and options; every fourth is large enough to be run in parts."""
    choose = random.Random(seed)
    width = choose.choice((1, 2, 3, 4, 4, 7, 40))
    if seed % 4 == 0:
        shape = (choose.randint(1, 5), choose.randint(500, 1500), choose.choice((1, 5, 17, 90)))
    else:
        shape = (choose.randint(1, 3), choose.randint(1, 70), choose.choice((1, 2, 16, 17, 50)))
    return {
        "shape": shape,
        "width": width,
        "dtype": choose.choice((torch.float32, torch.float16, torch.bfloat16)),
        "bias": choose.random() < 0.6,
        "state": choose.random() < 0.6,
        "seed": 10 * seed,
    }, choose.choice(("none", "silu", "swish"))


@pytest.mark.parametrize("domain", (OWN, STANDARD), ids=("own", "standard"))
@pytest.mark.parametrize("seed", range(32))
def test_random(seed, domain, library):
    options, activation = random_case(seed)
    arguments = make_arguments(**options)
    model = make_model(arguments, options["dtype"], domain, activation=activation)
    assert_right(run(make_session(library, model, 3), arguments), arguments, activation)


@pytest.mark.parametrize("seqlen", (0, 1, 2, 5))
@pytest.mark.parametrize("state", (False, True))
def test_shorter_than_the_state(state, seqlen, library):
    arguments = make_arguments((2, 3, seqlen), 6, torch.float32, True, state)
    model = make_model(arguments, torch.float32, OWN, activation="silu")
    assert_right(run(make_session(library, model), arguments), arguments, "silu")


@pytest.mark.parametrize("shape", ((0, 3, 4), (2, 0, 4)))
def test_nothing_to_do(shape, library):
    arguments = make_arguments(shape, 4, torch.float32, True, True)
    found = run(make_session(library, make_model(arguments, torch.float32, OWN)), arguments)
    assert found[0].shape == shape and found[1].shape == (*shape[:2], 3)


def test_without_present_state(library):
    arguments = make_arguments((2, 3, 5), 4, torch.float32, True, True)
    both = make_session(library, make_model(arguments, torch.float32, OWN))
    one = make_session(library, make_model(arguments, torch.float32, OWN, outputs=1))
    (found,) = run(one, arguments)
    assert torch.equal(found, run(both, arguments)[0])


@pytest.mark.parametrize("dims", (["batch", 3, 5], None))
def test_shapes_before_the_run(dims, library, tmp_path):
    """ONNX Runtime knows the output's shape if it knows the input's, and no wrong one if not."""
    model = make_model(INPUTS, torch.float32, OWN)
    value = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, dims)
    model.graph.input[0].CopyFrom(value)
    path = tmp_path / "optimized.onnx"
    make_session(library, model, optimized_model_filepath=str(path))
    found = onnx.load(path).graph.output[0].type.tensor_type
    assert found.HasField("shape") is (dims is not None)
    assert [dim.dim_param or dim.dim_value for dim in found.shape.dim] == (dims or [])


@pytest.mark.parametrize("given", (INPUTS, INPUTS[:2]), ids=("all", "required"))
def test_as_onnx_defines_it(given, library):
    """The reference implementation of the onnx package gives the same for the same model."""
    arguments = make_arguments((2, 5, 9), 4, torch.float32, True, True)
    arguments = {name: arguments[name] for name in given}
    model = make_model(given, torch.float32, STANDARD, activation="swish")
    feed = {name: value.numpy() for name, value in arguments.items()}
    expected = ReferenceEvaluator(model).run(None, feed)
    for found, value in zip(run(make_session(library, model), arguments), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_token_by_token(dtype, library):
    """The bits of a whole sequence, from chunks of 1 to 20 tokens that hand on the state."""
    arguments = make_arguments((2, 70, 60), 4, dtype, True, True)
    session = make_session(library, make_model(arguments, dtype, OWN, activation="silu"))
    whole, last = run(session, arguments)
    outs, start, step = [], 0, dict(arguments)
    for length in (1, 1, 2, 16, 17, 20, 1, 2):
        step["input"] = arguments["input"][:, :, start : start + length]
        out, step["past_state"] = run(session, step)
        outs.append(out)
        start += length
    assert start == 60
    assert torch.equal(torch.cat(outs, dim=-1), whole)
    assert torch.equal(step["past_state"], last)


# -------------------------------------------------------------------------------- errors, threads


@pytest.mark.parametrize(
    "name, shape, message",
    (
        ("input", (3, 5), r"input must be \(batch_size, channels, length\), got \(3, 5\)"),
        ("weight", (2, 1, 4), r"weight must be \(channels, 1, k\) with channels = 3 .*\(2, 1, 4\)"),
        ("weight", (3, 4), r"weight must be .* got \(3, 4\)"),
        ("weight", (3, 2, 4), r"weight must be .* got \(3, 2, 4\)"),
        ("weight", (3, 1, 0), r"weight must be .* k >= 1, got \(3, 1, 0\)"),
        ("bias", (4,), r"bias must be \(channels\) = \(3\), got \(4\)"),
        ("past_state", (2, 3, 4), r"past_state must be .* = \(2, 3, 3\), got \(2, 3, 4\)"),
    ),
)
def test_bad_shapes(name, shape, message, library):
    arguments = make_arguments((2, 3, 5), 4, torch.float32, True, True)
    session = make_session(library, make_model(arguments, torch.float32, OWN))
    with pytest.raises(Exception, match=f"INVALID_ARGUMENT.*CausalConvWithState: {message}"):
        run(session, arguments | {name: torch.ones(shape)})
    run(session, arguments)


def test_bad_activation(library):
    model = make_model(INPUTS, torch.float32, OWN, activation="relu")
    with pytest.raises(Exception, match="activation must be 'none', 'silu' or 'swish', got 'relu'"):
        make_session(library, model)


@pytest.mark.parametrize("name, value", (("ndim", 2), ("state_window", 1)))
def test_more_than_onnx_has(name, value, library):
    """What com.microsoft's operator can do besides is refused, not left out."""
    model = make_model(INPUTS, torch.float32, OWN, **{name: value})
    with pytest.raises(Exception, match=f"{name} must be {value - 1}, got {value}"):
        make_session(library, model)
    make_session(library, make_model(INPUTS, torch.float32, OWN, **{name: value - 1}))


def test_bad_type(library):
    with pytest.raises(Exception, match=r"Type 'tensor\(double\)' .*CausalConvWithState.*invalid"):
        make_session(library, make_model(INPUTS, torch.float64, OWN))


def test_sessions_in_threads(library):
    """Of two sessions with two threads each, two used by two threads at once."""
    arguments = make_arguments((3, 900, 70), 4, torch.float32, True, True)
    model = make_model(arguments, torch.float32, OWN, activation="silu")
    sessions = [make_session(library, model, 2) for _ in range(2)]
    expected = run(make_session(library, model), arguments)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: run(sessions[i % 2], arguments), range(40)))
    for values in found:
        assert all(map(torch.equal, values, expected))


# ---------------------------------------------------------------------------------------- models


class Block(torch.nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(randn(6, 4))
        self.bias = torch.nn.Parameter(randn(6, seed=1)) if bias else None

    def forward(self, x, states):
        x, states = causal_conv1d.causal_conv1d_fn(
            2 * x,
            self.weight,
            self.bias,
            initial_states=states,
            return_final_states=True,
            activation="silu",
        )
        return x + 1, states


class Step(Block):
    def forward(self, x, conv_state):
        conv_state = conv_state.clone()
        out = causal_conv1d.causal_conv1d_update(x, conv_state, self.weight, self.bias, "silu")
        return out, conv_state


def export(model, inputs, axes, path, dynamo):
    if dynamo:
        sizes = {"batch": torch.export.Dim("batch", max=99), "length": torch.export.Dim("length")}
        dims = [{i: sizes[word] for i, word in a.items()} for a in axes]
        options = {"dynamic_shapes": tuple(dims)}
    else:
        names = [f"input{i}" for i in range(len(inputs))]
        options = {"input_names": names, "dynamic_axes": dict(zip(names, axes, strict=True))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), inputs, path, dynamo=dynamo, **options)


def domains(path):
    return [n.domain for n in onnx.load(path).graph.node if n.op_type == "CausalConvWithState"]


@pytest.mark.parametrize("kind", (Block, Step))
@pytest.mark.parametrize("dynamo", (False, True), ids=("trace", "dynamo"))
@pytest.mark.parametrize("bias", (False, True))
def test_export(bias, dynamo, kind, library, tmp_path):
    """One node, and torch's own bits, with a batch and length other than those exported."""
    if dynamo:
        pytest.importorskip("onnxscript")
        if torch.__version__ < (2, 9):
            pytest.skip("this torch's exporter does not say that it is at work")
    model, path = kind(bias), str(tmp_path / "model.onnx")
    state_len = 3 if kind is Block else 5
    axes = ({0: "batch", 2: "length"}, {0: "batch"})
    with causal_conv1d.onnx.causal_conv_nodes():
        export(model, (randn(2, 6, 7), randn(2, 6, state_len)), axes, path, dynamo)
    assert domains(path) == [OWN]
    session = make_session(library, path)
    for batch, length in ((2, 7), (3, 31), (1, 1)):
        inputs = randn(batch, 6, length, seed=2), randn(batch, 6, state_len, seed=3)
        names = [value.name for value in session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        with torch.no_grad():
            expected = model(*inputs)
        found = session.run(None, feed)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(torch.from_numpy(a), b)


def test_export_is_as_before_outside(tmp_path):
    path = str(tmp_path / "model.onnx")
    with causal_conv1d.onnx.causal_conv_nodes():
        pass
    export(Block(True), (randn(2, 6, 7), randn(2, 6, 3)), ({}, {}), path, False)
    assert domains(path) == []
    make_session(None, path)


def test_export_for_onnxruntime_itself(tmp_path):
    """Its own operator, without this library's file."""
    model, path = Block(True), str(tmp_path / "model.onnx")
    inputs = randn(2, 6, 7), randn(2, 6, 3)
    with causal_conv1d.onnx.causal_conv_nodes(MICROSOFT):
        export(model, inputs, ({}, {}), path, False)
    assert domains(path) == [MICROSOFT]
    session = make_session(None, path)
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, dict(zip(names, [i.numpy() for i in inputs], strict=True)))
    with torch.no_grad():
        for a, b in zip(found, model(*inputs), strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-5)


def documented(beginning):
    """The block of docs/onnxruntime.md that begins so."""
    text = (ROOT / "docs" / "onnxruntime.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n({re.escape(beginning)}.*?)```", text, re.DOTALL)
    return code


def test_exported_and_loaded_as_documented(library, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    if torch.__version__ < (2, 9):
        pytest.skip("this torch's exporter does not say that it is at work")
    monkeypatch.chdir(tmp_path)
    model, inputs = Block(True).eval(), (randn(2, 6, 9), randn(2, 6, 3, seed=1))
    names = {"torch": torch, "causal_conv1d": causal_conv1d, "model": model, "inputs": inputs}
    exec(documented("with causal_conv1d.onnx"), names)
    assert domains("model.onnx") == [OWN]
    code = documented("options = onnxruntime.SessionOptions()")
    path = "/home/me/causal_conv1d/lib/libcausal_conv1d_onnxruntime.so"
    assert path in code
    names = {"onnxruntime": onnxruntime}
    exec(code.replace(path, library), names)
    given = [value.name for value in names["session"].get_inputs()]
    feed = {name: value.numpy() for name, value in zip(given, inputs, strict=True)}
    found = names["session"].run(None, feed)
    with torch.no_grad():
        for a, b in zip(found, model(*inputs), strict=True):
            assert torch.equal(torch.from_numpy(a), b)


def test_microsofts_node_moved(library, tmp_path, monkeypatch):
    """The documentation's lines."""
    code = documented("model = onnx.load")
    arguments = make_arguments((2, 3, 5), 4, torch.float16, True, True)
    model = make_model(arguments, torch.float16, MICROSOFT, activation="silu", ndim=1)
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "theirs.onnx")
    exec(code, {"onnx": onnx})
    assert domains("ours.onnx") == [OWN]
    assert_right(run(make_session(library, "ours.onnx"), arguments), arguments, "silu")


# ------------------------------------------------------------------------------------------- CUDA


@pytest.fixture(scope="module")
def stand_in(library, tmp_path_factory):
    """Runs the CUDA operator with a program that acts as ONNX Runtime."""
    folder = tmp_path_factory.mktemp("stand_in")
    for file in Path(library).parent.glob("lib*"):
        shutil.copy(file, folder)
    source = ROOT / "tests" / "cpp" / "onnxruntime_stand_in.cpp"
    headers = [f"-I{ROOT / 'csrc'}", "-isystem", ONNXRUNTIME_INCLUDE]
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror", *headers]
    c.run([*compiler, source, "-o", folder / "program", "-ldl"])
    shared = ["-shared", "-fPIC", "-DCUDA_LIBRARY", "-o", folder / "libcausal_conv1d_cuda.so.1"]

    def run_it(with_library, device):
        if with_library:
            c.run([*compiler, source, *shared])
        command = [folder / "program", folder / Path(library).name, str(device)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True)

    return run_it


def test_cuda_by_a_stand_in(stand_in):
    """What the CUDA library gets: device pointers, the tensors' device, ONNX Runtime's stream."""
    done = stand_in(False, 3)
    assert done.returncode == 1
    assert "CausalConvWithState: the CUDA library could not be loaded" in done.stdout
    assert "libcausal_conv1d_cuda.so.1: cannot open" in done.stdout
    assert "use the CPUExecutionProvider alone" in done.stdout
    done = stand_in(True, 3)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == [
        "device 3 stream 0x700 silu 1",
        "x 0x100 type 1: 2/15 3/5 5/1",
        "weight 0x200 type 1: 3/4 4/1",
        "bias 0x300 type 1: 3/1",
        "initial_states 0x400 type 1: 2/9 3/3 3/1",
        "out 0x500 type 1: 2/15 3/5 5/1",
        "final_states_out 0x600 type 1: 2/9 3/3 3/1",
    ]
    done = stand_in(True, 7)
    assert done.returncode == 1 and "there is no device 7" in done.stdout


@pytest.mark.parametrize("activation", (1, 1.0, "SiLU"))
def test_an_activation_that_is_none(library, activation):
    arguments = make_arguments((1, 2, 5), 4, torch.float32, True, False)
    model = make_model(arguments, torch.float32, OWN, activation=activation)
    with pytest.raises(Exception, match="activation must be"):
        make_session(library, model)
