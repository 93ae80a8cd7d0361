"""CUDA C++ as C++ over tests/gpu_on_cpu: what no macro can say is put in other words.

PTX instructions become calls of the functions of their names in gpu_on_cpu/cuda/ptx.h.
"""

import re

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
ASM = re.compile(r"\basm\s*(?:volatile\s*)?\(")
SHARED = re.compile(r"(?:alignas\((?P<align>\d+)\)\s+)?__shared__\s+(?P<declaration>[^;]*);")
VARIABLE = re.compile(r"(\w+)((?:\[[^\]]*\])*)")
ONE = VARIABLE.pattern.replace("(\\w+)((?:", "\\w+(?:(?:")
DECLARATION = re.compile(rf"(?P<kind>.*?[\s>])(?P<names>{ONE}(?:\s*,\s*{ONE})*)", re.DOTALL)
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?(\w+)\s+(\w+)\[\];")
LAUNCH = re.compile(r"([\w<>]+)<<<(.*?)>>>\(", re.DOTALL)
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\()?")
REGISTERS = {".pred": "bool", ".f32": "float"}


def closing(text: str, at: int, pair: str = "()") -> int:
    """Where the bracket that opens at `at` closes; those in strings have to be pairs."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"no end of {text[at : at + 60]!r}")


def split_top(text: str, by: str) -> list:
    """Its parts between the separators that no bracket encloses and no string has."""
    parts, depth, begin, i = [], 0, 0, 0
    while i < len(text):
        string = STRING.match(text, i)
        if string:
            i = string.end()
            continue
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0 and text[i] == by:
            parts.append(text[begin:i])
            begin = i + 1
        i += 1
    return [*parts, text[begin:]]


def instruction(text: str) -> str:
    """One PTX instruction, whose operands are put in already, as C++."""
    condition = re.match(r"@(\w+)\s+", text)
    if condition:
        return f"if ({condition[1]}) {instruction(text[condition.end() :])}"
    name, _, rest = text.partition(" ")
    if name == ".reg":
        kind, _, names = rest.strip().partition(" ")
        return f"{REGISTERS[kind]} {', '.join(n.strip() + '{}' for n in names.split(','))};"
    operands = [part.strip() for part in split_top(rest, ",")] if rest.strip() else []
    flat = []
    for operand in operands:
        inside = operand[1:-1] if operand[:1] in ("{", "[") else operand
        flat += [part.strip() for part in split_top(inside.replace("|", ","), ",")]
    compared = re.fullmatch(r"setp\.(eq|ne)\.b32", name)
    if compared:
        sign = {"eq": "==", "ne": "!="}[compared[1]]
        return f"{flat[0]} = {flat[1]} {sign} {flat[2]};"
    function = re.sub(r"\W+", "_", name)
    return f"::gpu_on_cpu::ptx::{function}({', '.join(flat)});"


def assembly(inside: str) -> str:
    """What stands between the brackets of asm(...), as a C++ statement without its semicolon."""
    template, *lists = split_top(inside, ":")
    text = "".join(eval(s) for s in STRING.findall(template))
    operands = []
    for part in lists[:2]:
        for operand in filter(str.strip, split_top(part, ",")):
            operands.append(STRING.sub("", operand, count=1).strip())
    text = text.strip().replace("%%ctaid.x", "blockIdx.x")
    if text.startswith("{"):
        text = text[1:-1]
    lines = [line.strip() for line in text.split(";") if line.strip()]
    code = " ".join(instruction(line) for line in lines)
    code = code or " ".join(f"(void)({operand});" for operand in operands)
    code = re.sub(r"%(\d+)", lambda number: operands[int(number[1])], code)
    return f"do {{ {code} }} while (0)"


def shared(found: re.Match) -> str:
    """Variables in shared memory as references into the stand-in's."""
    kind, names = DECLARATION.fullmatch(found["declaration"].strip()).group("kind", "names")
    code = []
    for name, extents in VARIABLE.findall(names):
        align = "" if found["align"] is None else f", {found['align']}"
        place = f"::gpu_on_cpu::Shared<{kind.strip()}{extents}{align}>"
        code.append(f"static {place} {name}_place; auto& {name} = {name}_place.get();")
    return " ".join(code)


def replaced(pattern, text, make) -> str:
    """Text with what the pattern finds replaced, and as many lines as before."""

    def make_all(found):
        return made_with_lines(found[0], make(found))

    return pattern.sub(make_all, text)


def made_with_lines(before: str, after: str) -> str:
    return after.replace("\n", " ") + "\n" * before.count("\n")


def translate(text: str) -> str:
    while found := ASM.search(text):
        end = closing(text, found.end() - 1)
        before = text[found.start() : end + 1]
        after = made_with_lines(before, assembly(text[found.end() : end]))
        text = text[: found.start()] + after + text[end + 1 :]
    memory = r"static \1* const \2 = reinterpret_cast<\1*>(::gpu_on_cpu::dynamic_memory());"
    text = DYNAMIC.sub(memory, text)
    text = replaced(SHARED, text, shared)
    text = replaced(LAUNCH, text, lambda m: f"::gpu_on_cpu::launch({m[1]}, {m[2]})(")
    at = 0
    while found := KERNEL.search(text, at):
        at = found.end()
        body = text.find("{", at)
        if body < 0 or 0 <= text.find(";", at) < body:
            continue  # a declaration
        text = f"{text[: body + 1]} ::gpu_on_cpu::entered(__PRETTY_FUNCTION__);{text[body + 1 :]}"
    return text
