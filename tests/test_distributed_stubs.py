"""The names of torch.distributed that ``import causal_conv1d`` adds to a torch without them.

Each test runs in a process of its own, where torch.distributed is cut down first to what a torch
built without it defines.
"""

import os
import subprocess
import sys

import pytest

CUT_DOWN = """
import sys, types, torch
real = torch.distributed
bare = types.ModuleType("torch.distributed")
bare.__path__ = real.__path__
bare.is_available = lambda: False
bare.ProcessGroup = type("ProcessGroup", (), {})
sys.modules["torch.distributed"] = torch.distributed = bare
"""

# What mamba_ssm does when it is imported (distributed/distributed_utils.py).
MAMBA_IMPORT = """
from torch.distributed import ProcessGroup
if "all_gather_into_tensor" not in dir(torch.distributed):
    torch.distributed.all_gather_into_tensor = torch.distributed._all_gather_base
if "reduce_scatter_tensor" not in dir(torch.distributed):
    torch.distributed.reduce_scatter_tensor = torch.distributed._reduce_scatter_base
"""


def run(*code, **environment):
    return subprocess.run(
        [sys.executable, "-c", "import sys; del sys.path[0]\n" + "\n".join(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def check(*code, **environment):
    done = run(*code, **environment)
    assert done.returncode == 0, done.stderr


def test_the_cut_down_torch_breaks_such_an_import():
    done = run(CUT_DOWN, MAMBA_IMPORT)
    assert done.returncode == 1 and "AttributeError" in done.stderr, done.stderr


@pytest.mark.parametrize("module", ["causal_conv1d", "selective_scan_cuda"])
def test_import_adds_the_names(module):
    check(
        CUT_DOWN,
        f"import {module}",
        MAMBA_IMPORT,
        """
import torch.distributed as d
assert d is bare
assert d.is_initialized() is False and d.is_available() is False
for name in ("all_gather_into_tensor", "reduce_scatter_tensor",
             "_all_gather_base", "_reduce_scatter_base"):
    try:
        getattr(d, name)(None, None)
    except RuntimeError as error:
        assert name in str(error) and "without distributed" in str(error), error
    else:
        raise AssertionError(name)
""",
    )


def test_names_that_are_there_are_kept():
    check(
        CUT_DOWN,
        "bare.is_initialized = bare._all_gather_base = mine = lambda *args: 'mine'",
        "import causal_conv1d",
        "assert bare.is_initialized is mine and bare._all_gather_base is mine",
        "assert callable(bare.reduce_scatter_tensor)",
    )


def test_opt_out():
    check(
        CUT_DOWN,
        "before = dict(vars(bare))",
        "import causal_conv1d",
        "assert 'is_initialized' not in before",
        "assert {k: v for k, v in vars(bare).items() if k in before} == before",
        "assert not hasattr(bare, 'is_initialized')",
        "assert not hasattr(bare, 'all_gather_into_tensor')",
        CAUSAL_CONV1D_DISTRIBUTED_STUBS="0",
    )


def test_a_torch_with_distributed_is_left_alone():
    check(
        "import torch",
        "if not torch.distributed.is_available():",
        "    torch.distributed.is_available = lambda: True",
        "before = dict(vars(torch.distributed))",
        "import causal_conv1d",
        "after = {k: v for k, v in vars(torch.distributed).items() if k in before}",
        "assert all(after[k] is before[k] for k in before)",
        "added = set(vars(torch.distributed)) - set(before)",
        "assert not added & {'is_initialized', 'all_gather_into_tensor', '_all_gather_base'}",
    )
