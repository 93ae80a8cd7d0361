"""README.md and docs/: examples run, each command is known and tested somewhere, links lead there.

What is written from measurements is in test_benchmarks.py; the site is built by docs/build.sh.
"""

import ast
import doctest
import re
import subprocess
from pathlib import Path

import pytest
import torch

import causal_conv1d

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a language; a block within a list is indented."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    return [
        re.sub(rf"^{space}", "", code, flags=re.MULTILINE)
        for space, code in fence.findall(read(page))
    ]


def prose(page):
    """A page without its fenced blocks and comments."""
    return re.sub(r"^ *```.*?^ *```$|<!--.*?-->", "", read(page), flags=re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------ Python

# Blocks that need another package or a file: their beginning, and the test that runs them.
ELSEWHERE = {
    "options = onnxruntime.": "tests/test_onnxruntime.py::test_exported_and_loaded_as_documented",
    "with causal_conv1d.onnx": "tests/test_onnxruntime.py::test_exported_and_loaded_as_documented",
    "model = onnx.load": "tests/test_onnxruntime.py::test_microsofts_node_moved",
    "from pathlib import Path\nfrom kernels": "tests/ecosystem/test_kernels.py::test_as_documented",
    "# shards.py\n": "tests/test_distributed.py::test_documented_example",
    "from kernels import LocalLayer": "tests/ecosystem/test_kernels.py::test_as_documented",
}
PYTHON = [(page, code) for page in PAGES for code in blocks(page, "python")]
HERE = [(page, code) for page, code in PYTHON if not code.startswith(tuple(ELSEWHERE))]


@pytest.mark.parametrize("page, code", HERE, ids=[page for page, _ in HERE])
def test_examples_run_as_they_stand(page, code, device):
    torch.manual_seed(0)
    with torch.device(device):
        exec(compile(code, page, "exec"), {})


def test_readme_has_a_whole_example():
    (code,) = blocks("README.md", "python")
    assert "import torch" in code and "assert" in code and len(code.splitlines()) <= 12


def test_other_examples_are_run_by_a_test():
    for beginning, test in ELSEWHERE.items():
        assert any(code.startswith(beginning) for _, code in PYTHON), beginning
        assert exists(test), test


FUNCTIONS = ("causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states")
FUNCTIONS += ("causal_conv1d_varlen_fn", "CausalConv1d")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_of_docstrings(name):
    function = getattr(causal_conv1d, name)
    assert f"::: {function.__module__}.{name}\n" in read("docs/api.md")
    names = {"torch": torch, name: function}
    for test in doctest.DocTestFinder(recurse=False).find(function, name, globs=names):
        assert doctest.DocTestRunner().run(test).failed == 0


# ------------------------------------------------------------------------------------------- shell

# By what a command is run: FILE::TEST, or FILE: TEXT where a script or the CI has that text.
RUN_BY = {
    ".ci/run: bash scripts/demo.sh": ["bash scripts/demo.sh"],
    ".ci/run: bash scripts/test.sh": ["bash scripts/test.sh"],
    '.ci/run: install -q "setuptools>=77" build wheel': ["pip install build wheel"],
    ".ci/run: scripts/dev/build_wheel.py --no-isolation --machine aarch64": [
        "python3 scripts/dev/build_wheel.py --machine aarch64"
    ],
    "scripts/test_packaging.py::test_isolated": ["pip install --no-deps ."],
    "scripts/test_packaging.py::test_not_isolated": [
        "pip install --no-deps --no-build-isolation .",
        "cd / && python -m causal_conv1d",
    ],
    "scripts/setup_env.sh: -m pip wheel -v --no-deps": ["pip wheel --no-deps -w wheels ."],
    'scripts/setup_env.sh: install -q --no-deps --force-reinstall "$WHEEL"': [
        "pip install --no-deps wheels/*.whl"
    ],
    "scripts/test_packaging.py::test_what_replaces_it": [
        'echo "causal-conv1d @ file:///path/to/'
        'causal_conv1d-1.7.0+portable.1-py3-none-linux_aarch64.whl" > ~/constraints.txt',
        "export PIP_CONSTRAINT=~/constraints.txt",
    ],
    "scripts/test.sh: install_packages pytest": ["pip install pytest hypothesis numpy"],
    "scripts/dev/gpu_check.sh: --device cuda": ["pytest tests --device cuda"],
    "tests/test_*.py::test_install_wheels_installs_patches_and_verifies": [
        "python scripts/install_wheels.py dist"
    ],
    "tests/test_release.py::test_pip_takes_from_the_index": [
        "pip install --no-deps --index-url file://$PWD/dist/simple "
        "causal-conv1d==1.7.0+portable.N.cu12"
    ],
    'scripts/test_ecosystem.sh: bash -euo pipefail -c "$lines"': [
        "pip install setuptools wheel packaging ninja",
        "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps "
        "--no-build-isolation mamba-ssm==2.2.4",
        "pip install einops 'transformers<5' triton",
        "python scripts/verify.py",
    ],
    'scripts/test_ecosystem.sh: -m pip download -q -d "$partial"': [
        "pip download -d wheels setuptools wheel packaging ninja einops 'transformers<5' triton",
    ],
    "scripts/test_ecosystem.sh: PIP_NO_INDEX=1 PIP_FIND_LINKS=": [
        "export PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/wheels"
    ],
    "tests/test_hub.py::test_each_wheel_gives_the_variants_of_its_machine": [
        "python scripts/dev/build_hub.py dist/*.whl"
    ],
    "scripts/setup_env.sh: scripts/dev/get_onnxruntime_headers.sh build/onnxruntime": [
        "bash scripts/dev/get_onnxruntime_headers.sh build/onnxruntime"
    ],
    "tests/test_benchmarks.py::test_the_benchmark_writes_every_section": [
        "python benchmarks/benchmark.py --json docs/benchmark_h200.json"
    ],
    "tests/test_benchmarks.py::test_blocks_name_a_package_that_is_missing": [
        "python benchmarks/benchmark_blocks.py --json docs/benchmark_blocks_h200.json"
    ],
    "tests/test_benchmarks.py::test_scan_rows_are_of_the_same_computation": [
        "python benchmarks/benchmark_scan.py --json docs/benchmark_scan_h200.json"
    ],
    "tests/test_scan_benchmark.py::test_on_the_cpu": [
        "python benchmarks/benchmark_scan.py --device cpu --json docs/benchmark_scan_cpu.json"
    ],
    "tests/test_benchmarks.py::test_the_cpus_rows": [
        "python benchmarks/benchmark_cpu.py --json docs/benchmark_cpu.json"
    ],
    "tests/test_benchmarks.py::test_the_command_writes_and_checks": [
        "python benchmarks/write_pages.py"
    ],
    # conftest.py's c_library runs these lines of docs/c.md, with the option where headers are.
    "tests/test_onnxruntime.py::test_random": [
        'cmake -S . -B build/c -DCAUSAL_CONV1D_ONNXRUNTIME_INCLUDE="$PWD/build/onnxruntime/usr/'
        'include/onnxruntime"',
        "cmake --build build/c -j 2",
        'cmake --install build/c --prefix "$HOME/causal_conv1d"',
    ],
}
# Pages whose lines a test takes from the page itself.
RUN_WHOLE = {"docs/c.md": "tests/test_c.py::test_documented_lines"}
# Run by no test: why. Their syntax is checked, and that scripts and options exist.
BY_HAND = {
    "needs a Jetson": [
        "cat /etc/nv_tegra_release",
        "/usr/local/cuda/bin/nvcc --version",
        "pip install torch triton --index-url https://pypi.jetson-ai-lab.io/jp6/cu126",
        "pip install torch triton --index-url https://pypi.jetson-ai-lab.io/sbsa/cu130",
        "sudo apt-get install cuda-toolkit-12-6",
    ],
    "needs ROCm and a torch for it": ["CAUSAL_CONV1D_HIP=1 pip install --no-deps ."],
    "what pip fetches by itself in test_isolated": ["pip install 'setuptools>=77' cmake ninja"],
    "100 MB of CUDA 12, and a second build with it": [
        "bash scripts/dev/get_cuda12.sh /tmp/cuda12",
        "CUDACXX=/tmp/cuda12/bin/nvcc python3 scripts/dev/build_wheel.py --machine aarch64",
    ],
    "test_ecosystem.sh has mamba_ssm's sources in the folder and builds the wheel from them": [
        "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip wheel -w wheels --no-deps "
        "--no-build-isolation mamba-ssm==2.2.4",
    ],
}
# Lines of Python for a shell: run by the test below.
ONE_LINERS = ("python -c '", "python3 -c '")


def exists(test):
    """Whether FILE::TEST is a function, or FILE: TEXT occurs; FILE may be a pattern."""
    path, _, name = test.partition("::")
    if name:
        trees = [ast.parse(file.read_text(encoding="utf-8")) for file in ROOT.glob(path)]
        found = (node for tree in trees for node in tree.body)
        return name in (node.name for node in found if isinstance(node, ast.FunctionDef))
    path, text = test.split(": ", 1)
    return text in read(path)


def commands(page):
    """A page's shell lines without their remarks. README's are indented, as .ci/run's readers
    and test_ecosystem.sh take them."""
    lines = "".join(blocks(page, "bash")).splitlines()
    if page == "README.md":
        lines += re.findall(r"^    (\S.*)", prose(page), re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line) for line in lines]


SHELL = [(page, line) for page in PAGES for line in commands(page)]
KNOWN = [line for lines in (*RUN_BY.values(), *BY_HAND.values()) for line in lines]


@pytest.mark.parametrize("page, line", SHELL, ids=[f"{page}: {line}" for page, line in SHELL])
def test_each_command_is_tested(page, line):
    if page in RUN_WHOLE:
        assert exists(RUN_WHOLE[page])
    elif not line.startswith(ONE_LINERS):
        assert line in KNOWN, f"{page} has a command that no test is named for"
    subprocess.run(["bash", "-n", "-c", line], check=True)
    for script, options in re.findall(r"((?:scripts|benchmarks|docs)/\S+\.(?:py|sh))(.*)", line):
        for option in re.findall(r"--[a-z-]+", options):
            assert option in read(script), f"{script} has no {option}"
        assert (ROOT / script).exists()


def test_no_command_is_known_that_no_page_has():
    lines = {line for page, line in SHELL}
    assert [line for line in KNOWN if line not in lines] == []
    assert len(KNOWN) == len(set(KNOWN))


@pytest.mark.parametrize("test", RUN_BY)
def test_the_tests_of_commands_exist(test):
    assert exists(test)


@pytest.mark.parametrize("line", sorted({line for _, line in SHELL if line.startswith(ONE_LINERS)}))
def test_python_in_one_line(line):
    (code,) = re.findall(r"-c '(.*)'$", line)
    exec(code, {})


def test_scripts_named_anywhere_exist():
    """Also those in the middle of a sentence."""
    named = r"`(?:python3? |bash )?((?:scripts|benchmarks|tests|csrc|causal_conv1d|cmake)/[\w./]+)"
    for page in PAGES:
        if page == "docs/performance.md":  # commands as they were given then
            continue
        for path in re.findall(named, prose(page)):
            assert (ROOT / path).exists(), f"{page} names {path}"


# ------------------------------------------------------------------------------------------- links


def anchor(heading):
    """As GitHub and MkDocs make it."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def headings(page):
    return re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)


def links(page):
    """Its links within the repository: (path from the root, anchor or "")."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, fragment = target.partition("#")
            full = (ROOT / page).parent / path if path else ROOT / page
            found.append((str(full.resolve().relative_to(ROOT)), fragment))
    return found


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    for path, fragment in links(page):
        assert (ROOT / path).is_file(), f"{page} links to {path}"
        if fragment:
            assert fragment in map(anchor, headings(path)), f"{path} has no heading #{fragment}"


def test_every_page_is_in_the_index_and_on_the_site():
    named = {path for path, _ in links("docs/index.md")}
    menu = read("mkdocs.yml")
    for page in PAGES:
        assert page in named | {"docs/index.md"}, page
        assert f": {page.removeprefix('docs/')}\n" in menu, page


# What a reader looks for: the file, and the heading or line there.
QUESTIONS = {
    "install on JetPack 6": ("docs/jetson.md", "## JetPack 6$"),
    "why no libc10.so": ("docs/FIX_EXPLANATION.md", "## Why no `libc10.so`$"),
    "the C example": ("docs/examples/c/smooth.c", r"int main\(void\)"),
    "how to add a test": ("CONTRIBUTING.md", "A new test is "),
    "what width 7 costs": ("docs/performance.md", "### What the width costs$"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_readers_find_it_within_two_links(question):
    path, text = QUESTIONS[question]
    first = {page for page, _ in links("README.md")}
    second = {page for each in first if each.endswith(".md") for page, _ in links(each)}
    assert path in first | second
    assert re.search(rf"^{text}", read(path), re.MULTILINE)


def test_width_7_has_figures():
    text = read("docs/performance.md").split("### What the width costs\n")[1].split("\n###")[0]
    assert re.search(r"^\| 7 \| \d\.\d\d / \d\.\d\d \| \d\.\d\d / \d\.\d\d \|$", text, re.MULTILINE)


# ------------------------------------------------------------------------------------------- README


def test_readme_is_read_in_two_minutes():
    lines = read("README.md").splitlines()
    assert len(lines) <= 120
    sentences = [line for line in lines if not line.startswith(("|", "    ", "!"))]
    assert max(map(len, sentences)) <= 100 and max(map(len, lines)) <= 160
    assert len(re.findall(r"\w+", prose("README.md"))) <= 1100


def test_readme_has_the_recipe_for_mamba_ssm():
    """As scripts/test_ecosystem.sh takes it."""
    recipe = read("README.md").split("<!-- recipe -->")[1].split("<!-- end of recipe -->")[0]
    lines = re.findall(r"^    (\S.*)", recipe, re.MULTILINE)
    assert lines == RUN_BY['scripts/test_ecosystem.sh: bash -euo pipefail -c "$lines"']
