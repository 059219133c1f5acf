"""Reads PTX into what `emulator.cpp` executes.

`FORMS` lists every form of an instruction that is modelled: its modifiers in their order, and its
operands. What stands in no form, an unknown modifier, special register or name raises Unsupported.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

# In the order of the C++ file.
TYPES = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"]
ROUNDINGS = ["rn", "rz", "rm", "rp"]
COMPARISONS = [
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
]
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
FLAGS = {"ftz": 1, "sat": 2, "NaN": 4, "relu": 8}
NEGATE_PREDICATE = 16
SPECIAL = [
    *("%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z"),
    *("%ntid.x", "%ntid.y", "%ntid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"),
    *("%laneid", "%warpid"),
]
# handler, guard, negated, number, results, operands, result[8], operand[12], rounding, flags,
# detail[4], immediate
INSTRUCTION = struct.Struct("<6i8i12i2i4iq")


class Unsupported(NotImplementedError):
    """PTX that is not modelled."""


class Code(NamedTuple):
    """A kernel that has been read."""

    name: str
    instructions: list[bytes]  # of INSTRUCTION
    statements: list[Statement]  # the same
    constants: list[int]  # the bits of each
    registers: int
    special: list[int]  # registers of SPECIAL, -1 where it is not read
    parameters: list[Parameter]
    threads: int  # in a program
    shared: int  # bytes that are declared
    local: int  # bytes of a thread


class Parameter(NamedTuple):
    """Of a kernel, in the order of its arguments."""

    name: str
    type: str
    offset: int

    @property
    def size(self) -> int:
        """In bytes."""
        return size_of(self.type)


class Statement(NamedTuple):
    """An instruction, and where it stands."""

    line: int  # of the PTX, from 1
    text: str
    source: str  # such as ranks.py:54:9, where the compiler says it


def size_of(type: str) -> int:
    """In bytes: b8, u16, f32x2."""
    number = re.fullmatch(r"(?:b|u|s|f|bf)(8|16|32|64)(x2)?", type)
    if not number:
        raise Unsupported(f"type .{type}")
    return int(number.group(1)) // 8 * (2 if number.group(2) else 1)


# --- the forms of instructions ------------------------------------------------------------------

_ROUND, _ROUNDS = r"(?:\.(?P<round>rn|rz|rm|rp))?", r"\.(?P<round>rn|rz|rm|rp)"
_FTZ, _SAT, _NAN = r"(?:\.(?P<ftz>ftz))?", r"(?:\.(?P<sat>sat))?", r"(?:\.(?P<NaN>NaN))?"
_INTEGER = r"\.(?P<type>[us](?:16|32|64))"
_SHORT = r"\.(?P<type>(?:f16|bf16)(?:x2)?)"  # no ftz, no sat
_BITS = r"\.(?P<type>b(?:16|32|64))"
_COMPARE = r"\.(?P<compare>[a-zN]+)(?:\.(?P<bool>and|or|xor))?"
_CACHE = (  # hints, which change no result
    r"(?:\.(?:ca|cg|cs|lu|cv|wb|wt|nc))?(?:\.L1::\w+)?(?P<policy>\.L2::cache_hint)?"
    r"(?:\.L2::(?:64|128|256)B)?"
)
_SEM = r"(?:\.(?P<sem>weak|volatile|relaxed|acquire|release|acq_rel))"
_SCOPE = r"(?:\.(?P<scope>cta|cluster|gpu|sys))"
_SPACE = r"\.(?P<space>global|shared|local)(?:::cta)?"
_ELEMENT = r"(?:\.(?P<vector>v[248]))?\.(?P<type>[bus](?:8|16|32|64)|f32|f64)"
_WHERE = (
    r"(?P<where>(?:\.(?:global|shared|shared::cta|cta|gpu|sys|relaxed|acquire|release|acq_rel))+)"
)
_SHUFFLES = ["up", "down", "bfly", "idx"]
_VOTES = ["all", "any", "uni", "ballot"]


class Form(NamedTuple):
    """One way to write an instruction.

    Operands: d a result, d|p perhaps a second one, a an operand, !p a predicate that may be
    negated, {d} and {a} one or several, [a] an address with an offset, # a number, ~ one that
    changes no result; with ? it may lack.
    """

    pattern: re.Pattern[str]  # of the whole opcode
    operands: list[str]
    handler: str  # with the groups of the pattern
    detail: Callable[[re.Match[str]], list[int]]


def _form(
    pattern: str,
    operands: str,
    handler: str,
    detail: Callable[[re.Match[str]], list[int]] = lambda match: [],
) -> Form:
    return Form(re.compile(pattern), operands.split(), handler, detail)


def _convert(match: re.Match[str]) -> list[int]:
    to, source = match["to"], match["from"]
    real = [x.lstrip("b").startswith("f") for x in (to, source)]
    if real[1] and not real[0] and not match["whole"]:
        raise Unsupported(f"{match.group()}: no rounding")
    if real == [True, True] and size_of(to) < size_of(source) and not match["round"]:
        raise Unsupported(f"{match.group()}: no rounding")
    if real == [True, False] and not match["round"]:
        raise Unsupported(f"{match.group()}: no rounding")
    if real == [False, False] and (match["round"] or match["whole"] or match["ftz"]):
        raise Unsupported(f"{match.group()}: rounding of an integer")
    return [TYPES.index(to), TYPES.index(source), int(bool(match["whole"]))]


def _compare(match: re.Match[str]) -> list[int]:
    name, type = match["compare"], match["type"]
    if type.startswith("u"):
        name = UNSIGNED_COMPARISONS.get(name, name)
    known = {"b": COMPARISONS[:2], "u": COMPARISONS[:6], "s": COMPARISONS[:6]}
    allowed = COMPARISONS if type.startswith("bf") else known.get(type[0], COMPARISONS)
    if name not in allowed:
        raise Unsupported(f"{match.group()}: no such comparison")
    return [COMPARISONS.index(name), [None, "and", "or", "xor"].index(match["bool"] or None)]


def _access(match: re.Match[str]) -> list[int]:
    type, sem = match["type"], match["sem"]
    signed = type.startswith("s") and type != "s64"
    elsewhere = sem not in (None, "weak")  # another program may write it meanwhile
    return [size_of(type), int(signed), int(elsewhere), int(sem == "acquire")]


def _atomic(match: re.Match[str]) -> list[int]:
    words = [word.removesuffix("::cta") for word in match["where"].split(".")]
    if len(set(words)) != len(words) or len({"global", "shared"} & set(words)) != 1:
        raise Unsupported(f"{match.group()}: not one state space")
    acquires = "acquire" in words or "acq_rel" in words  # without a word it is relaxed
    return [int("shared" in words), 0, 0, int(acquires)]


def _parts(*names: str) -> Callable[[re.Match[str]], list[int]]:
    """Whether each of the groups is there."""
    return lambda match: [int(bool(match[name])) for name in names]


FORMS: dict[str, list[Form]] = {}


def _add(opcodes: str, modifiers: str, operands: str, handler: str = "{op}.{type}", **more: Any):
    for opcode in opcodes.split():
        form = _form(rf"(?P<op>{re.escape(opcode)}){modifiers}", operands, handler, **more)
        FORMS.setdefault(opcode, []).append(form)


_add("add sub", _INTEGER, "d a a")
_add("mul", rf"\.(?P<half>lo|hi){_INTEGER}", "d a a", "mul.{half}.{type}")
_add("mul", r"\.wide\.(?P<type>[us](?:16|32))", "d a a", "mul.wide.{type}")
_add("mad", rf"\.(?P<half>lo|hi){_INTEGER}", "d a a a", "mad.{half}.{type}")
_add("mad", r"\.wide\.(?P<type>[us](?:16|32))", "d a a a", "mad.wide.{type}")
_add("div rem min max", _INTEGER, "d a a")
_add("min max", r"\.relu\.s32", "d a a", "{op}.relu.s32")
_add("neg abs", r"\.(?P<type>s(?:16|32|64))", "d a")
_add("add sub mul", rf"{_ROUND}{_FTZ}{_SAT}\.(?P<type>f32)", "d a a")
_add("add sub mul", rf"{_ROUND}\.(?P<type>f64)", "d a a")
_add("add sub mul", rf"(?:\.rn)?{_SHORT}", "d a a")
_add("fma mad", rf"{_ROUNDS}{_FTZ}{_SAT}\.(?P<type>f32)", "d a a a", "fma.{type}")
_add("fma mad", rf"{_ROUNDS}\.(?P<type>f64)", "d a a a", "fma.{type}")
_add("fma", rf"\.rn{_SHORT}", "d a a a")
_add("div", rf"{_ROUNDS}{_FTZ}\.(?P<type>f32)", "d a a")
_add("div", rf"\.(?:full|approx){_FTZ}\.(?P<type>f32)", "d a a")
_add("div", rf"{_ROUNDS}\.(?P<type>f64)", "d a a")
_add("rcp sqrt", rf"{_ROUNDS}{_FTZ}\.(?P<type>f32)", "d a")
_add("rcp sqrt", rf"{_ROUNDS}\.(?P<type>f64)", "d a")
_add("rcp sqrt rsqrt ex2 lg2 sin cos", rf"\.approx{_FTZ}\.(?P<type>f32)", "d a")
_add("rsqrt", r"\.approx\.(?P<type>f64)", "d a")
_add("tanh", r"\.approx\.(?P<type>f32)", "d a")
_add("rcp", r"\.approx\.ftz\.f64", "d a", "rcp.approx.f64")
_add("neg abs", rf"{_FTZ}\.(?P<type>f32)", "d a")
_add("neg abs", r"\.(?P<type>f64)", "d a")
_add("neg abs", _SHORT, "d a")
_add("min max", rf"{_FTZ}{_NAN}\.(?P<type>f32)", "d a a")
_add("min max", r"\.(?P<type>f64)", "d a a")
_add("min max", rf"{_NAN}{_SHORT}", "d a a")
_add("min max", rf"{_FTZ}{_NAN}\.xorsign\.abs\.f32", "d a a", "{op}.xorsign.f32")
_add("copysign", r"\.(?P<type>f32|f64)", "d a a")

_add("and or xor", r"\.(?P<type>pred|b16|b32|b64)", "d a a")
_add("not", r"\.(?P<type>pred|b16|b32|b64)", "d a")
_add("shl", _BITS, "d a a")
_add("shr", r"\.(?P<type>[bus](?:16|32|64))", "d a a")
_add(
    "shf",
    r"\.(?:(?P<left>l)|r)\.(?:(?P<wrap>wrap)|clamp)\.b32",
    "d a a a",
    "shf",
    detail=_parts("left", "wrap"),
)
_add("prmt", r"\.b32", "d a a a", "prmt")
_add("lop3", r"\.b32", "d a a a #", "lop3")
_add("popc clz brev", r"\.(?P<type>b32|b64)", "d a")
_add("bfind", r"(?:\.(?P<shift>shiftamt))?\.(?P<type>[us](?:32|64))", "d a", detail=_parts("shift"))
_add("bfe", r"\.(?P<type>[us](?:32|64))", "d a a a")
_add("bfi", r"\.(?P<type>b32|b64)", "d a a a a")

_add("setp", rf"{_COMPARE}{_FTZ}\.(?P<type>f32)", "d|p a a !p?", detail=_compare)
_add(
    "setp",
    rf"{_COMPARE}\.(?P<type>[bus](?:16|32|64)|f64|f16|bf16)",
    "d|p a a !p?",
    detail=_compare,
)
_add("setp", r"\.(?P<compare>[a-zN]+)(?P<bool>)\.(?P<type>b?f16x2)", "d|p a a", detail=_compare)
_add("selp", r"\.(?:[bus](?:16|32|64)|f32|f64|f16|bf16)", "d a a a", "selp")
_add("mov", r"\.(?P<type>pred|[bus](?:16|32|64)|f32|f64|f16|bf16|f16x2|bf16x2)", "{d} {a}", "mov")
_add("cvta", r"(?:\.to)?\.(?:global|local)\.u64", "d a", "mov")
_add(
    "cvt",
    r"(?:\.(?:(?P<round>rn|rz|rm|rp)|(?P<whole>r[nzmp]i)))?(?:\.(?P<relu>relu))?"
    rf"{_FTZ}{_SAT}\.(?P<to>{'|'.join(TYPES)})\.(?P<from>{'|'.join(TYPES)})",
    "d a",
    "cvt",
    detail=_convert,
)
_add(
    "cvt",
    r"\.(?P<round>rn|rz)(?P<whole>)(?P<ftz>)(?:\.(?P<relu>relu))?\.(?P<to>f16|bf16)x2\.(?P<from>f32)",
    "d a a",
    "cvt.pair",
    detail=_convert,
)

_add("ld", rf"\.param(?P<sem>)(?P<policy>){_ELEMENT}", "{d} [a]", "ld.param", detail=_access)
_add(
    "ld", rf"{_SEM}?{_SCOPE}?{_SPACE}{_CACHE}{_ELEMENT}", "{d} [a] ~?", "ld.{space}", detail=_access
)
_add(
    "st", rf"{_SEM}?{_SCOPE}?{_SPACE}{_CACHE}{_ELEMENT}", "[a] {a} ~?", "st.{space}", detail=_access
)
for _operation in (
    r"(?P<do>add)(?:\.noftz)?\.(?P<type>[us](?:32|64)|f32|f64|(?:f16|bf16)(?:x2)?)",
    r"(?P<do>min|max)\.(?P<type>[us](?:32|64))",
    r"(?P<do>and|or|xor|exch)\.(?P<type>b(?:32|64))",
    r"(?P<do>inc|dec)\.(?P<type>u32)",
):
    _atomic_form = {"handler": "atom.{do}.{type}", "detail": _atomic}
    _add("atom", rf"{_WHERE}\.{_operation}", "d [a] a", **_atomic_form)
    _add("red", rf"{_WHERE}\.{_operation}", "[a] a", **_atomic_form)
_add("atom", rf"{_WHERE}\.(?P<do>cas\.b(?:16|32|64))", "d [a] a a", "atom.{do}", detail=_atomic)
_add("membar", r"\.(?:cta|gl|sys)", "", "fence")
_add("fence", r"\.(?:sc|acq_rel)\.(?:cta|gpu|sys)", "", "fence")
_add("createpolicy", r"\.fractional\.L2::evict_(?:first|last|normal|unchanged)\.b64", "~ ~?", "nop")

_MATRIX = r"\.sync\.aligned\.m8n8\.x(?P<number>[124])(?:\.(?P<trans>trans))?\.shared(?:::cta)?\.b16"
_matrix = {"detail": lambda match: [int(match["number"]), int(bool(match["trans"]))]}
_add("ldmatrix", _MATRIX, "{d} [a]", "ldmatrix", **_matrix)
_add("stmatrix", _MATRIX, "[a] {a}", "stmatrix", **_matrix)
_COPY = r"\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::cache_hint)?(?:\.L2::\d+B)?"
_add("cp", _COPY, "[a] [a] # a? ~?", "cp.async")
_add("cp", r"\.async\.commit_group", "", "cp.async.commit_group")
_add("cp", r"\.async\.wait_group", "#", "cp.async.wait_group")

_add("bra", r"(?:\.uni)?", "label", "bra")
_add("ret exit", "", "", "ret")
_add("trap", "", "", "trap")
_add("bar", r"\.sync", "# #?", "bar.sync")
_add("bar", r"\.warp\.sync", "a", "bar.warp.sync")
_add(
    "shfl",
    rf"\.sync\.(?P<how>{'|'.join(_SHUFFLES)})\.b32",
    "d|p a a a a",
    "shfl",
    detail=lambda match: [_SHUFFLES.index(match["how"])],
)
_add(
    "vote",
    r"\.sync\.(?P<how>(?:all|any|uni)(?=\.pred)|ballot(?=\.b32))\.(?:pred|b32)",
    "d !p a",
    "vote",
    detail=lambda match: [_VOTES.index(match["how"])],
)
_add(
    "redux", r"\.sync\.(?P<how>(?:add|min|max)\.[us]32|(?:and|or|xor)\.b32)", "d a a", "redux.{how}"
)
_add("activemask", r"\.b32", "d", "activemask")
_add("elect", r"\.sync", "d|p a", "elect")


# --- reading ------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"(?P<label>[\w$]+):(?!:)|(?P<open>\{)|(?P<close>\})|(?P<statement>[^;{}]+(?:\{[^}]*\}[^;{}]*)*);"
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_BLANK = re.compile(r"\s*")
_DECLARED = re.compile(r"\.(shared|local)\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")


def read(ptx: str, handlers: list[str]) -> Code:
    """Read the one kernel of a module; `handlers` are the names that the emulator has."""
    return _Reader(handlers).read(ptx)


class _Reader:
    def __init__(self, handlers: list[str]) -> None:
        self.handlers = {name: number for number, name in enumerate(handlers)}
        self.instructions: list[dict[str, Any]] = []
        self.statements: list[Statement] = []
        self.constants: dict[int, int] = {}
        self.scopes: list[dict[str, int | None]] = [dict.fromkeys(SPECIAL)]  # name: register
        self.registers = 0
        self.symbols: dict[str, int] = {}  # where what is declared begins in its memory
        self.shared = self.local = 0
        self.labels: dict[str, int] = {}
        self.parameters: dict[str, Parameter] = {}
        self.threads = 0

    def read(self, ptx: str) -> Code:
        lines, sources = _without_comments(ptx)
        text = "\n".join(lines)
        entry = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)
        if not entry or len(re.findall(r"\.entry\b", text)) != 1:
            raise Unsupported("a module without just one kernel")
        for declared in _DECLARED.finditer(text, 0, entry.start()):
            self._declare(declared)
        self._read_parameters(entry.group(2))
        self._read_directives(entry.group(3))
        for line, token in _tokens(text, entry.end() - 1):
            self._take(token, Statement(line, " ".join(token.group().split()), sources[line - 1]))
        return Code(
            entry.group(1),
            [self._pack(number, built) for number, built in enumerate(self.instructions)],
            self.statements,
            list(self.constants),
            self.registers,
            [-1 if (x := self.scopes[0][name]) is None else x for name in SPECIAL],
            list(self.parameters.values()),
            self.threads,
            self.shared,
            self.local,
        )

    def _read_parameters(self, text: str) -> None:
        offset = 0
        for declared in filter(None, (part.strip() for part in text.split(","))):
            match = re.fullmatch(
                r"\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)",
                declared,
            )
            if not match:
                raise Unsupported(declared)
            size = size_of(match.group(1))
            offset = -(-offset // size) * size
            self.parameters[match.group(2)] = Parameter(match.group(2), match.group(1), offset)
            offset += size

    def _read_directives(self, text: str) -> None:
        for directive in filter(None, (line.strip() for line in text.splitlines())):
            match = re.fullmatch(
                r"\.(reqntid|maxntid|minnctapersm|maxnreg)\s+(\d+)(?:, 1, 1)?", directive
            )
            if not match:
                raise Unsupported(directive)
            if match.group(1) == "reqntid":
                self.threads = int(match.group(2))
        if not self.threads:
            raise Unsupported("a kernel that does not say how many threads it has")

    def _take(self, token: re.Match[str], statement: Statement) -> None:
        if token["open"]:
            self.scopes.append({})
        elif token["close"]:
            self.scopes.pop()
        elif token["label"]:
            if token["label"] in self.labels:
                raise Unsupported(f"label {token['label']} twice")
            self.labels[token["label"]] = len(self.instructions)
        elif not (text := token["statement"].strip()).startswith("."):
            try:
                self._instruction(text, statement)
            except Unsupported as error:
                raise Unsupported(f"line {statement.line}, {statement.text} {error}") from None
        elif text.startswith(".reg"):
            self._declare_registers(text)
        elif declared := _DECLARED.match(text):
            self._declare(declared)
        elif not text.startswith(".pragma"):
            raise Unsupported(f"line {statement.line}: {text}")

    def _declare_registers(self, text: str) -> None:
        for declared in text.split(None, 2)[2].split(","):
            match = re.fullmatch(r"([%\w$]+)(?:<(\d+)>)?", declared.strip())
            if not match:
                raise Unsupported(text)
            name, number = match.groups()
            names = [f"{name}{k}" for k in range(int(number))] if number else [name]
            self.scopes[-1].update(dict.fromkeys(names))

    def _declare(self, declared: re.Match[str]) -> None:
        space, alignment, name, size = declared.groups()
        start = -(-getattr(self, space) // int(alignment)) * int(alignment)
        self.symbols[name] = start
        setattr(self, space, start + int(size or 0))  # without a size it is what the launch gives

    def _instruction(self, text: str, statement: Statement) -> None:
        guard = re.match(r"@(!?)([%\w$]+)\s+", text)
        opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
        opcode, _, more = opcode.partition("\t")
        form, match = _form_of(opcode)
        built: dict[str, Any] = {
            "guard": self._register(guard.group(2)) if guard else -1,
            "negated": int(bool(guard and guard.group(1))),
            "line": statement.line,
            "handler": form.handler.format(**match.groupdict()),
            "results": [],
            "operands": [],
            "rounding": _rounding(match),
            "flags": sum(bit for name, bit in FLAGS.items() if match.groupdict().get(name)),
            "detail": form.detail(match),
            "immediate": 0,
            "numbers": [],
        }
        given = _OPERAND.findall(f"{more} {rest}")
        least = sum(not role.endswith("?") for role in form.operands)
        if not least <= len(given) <= len(form.operands):
            raise Unsupported("its number of operands")
        for role, operand in zip(form.operands, given):  # noqa: B905
            self._operand(built, role.rstrip("?") or role, operand.strip())
        self._finish(built, match)
        self.instructions.append(built)
        self.statements.append(statement)

    def _operand(self, built: dict[str, Any], role: str, text: str) -> None:
        if role in ("d", "d|p", "{d}"):
            names = text.strip("{} ").split("," if role == "{d}" else "|")
            if role == "d" and len(names) > 1:
                raise Unsupported(text)
            built["results"] += [
                -1 if x.strip() == "_" else self._register(x.strip()) for x in names
            ]
        elif role in ("a", "{a}"):
            parts = text.strip("{} ").split(",") if role == "{a}" else [text]
            built["operands"] += [self._value(part.strip()) for part in parts]
        elif role == "!p":
            built["flags"] |= NEGATE_PREDICATE if text.startswith("!") else 0
            built["operands"].append(self._register(text.lstrip("! ")))
        elif role == "[a]":
            self._address(built, text)
        elif role == "label":
            built["label"] = text
        elif role == "#":
            built["numbers"].append(int(text.rstrip("U"), 0))

    def _address(self, built: dict[str, Any], text: str) -> None:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if not match:
            raise Unsupported(text)
        base, offset = match.group(1), int(match.group(2) or "0", 0)
        if built["handler"] == "ld.param":
            if base not in self.parameters:
                raise Unsupported(text)
            built["immediate"] = self.parameters[base].offset + offset
        elif built["handler"] == "cp.async" and built["operands"]:
            built["operands"].append(self._value(base))
            built["detail"] = [0, offset]
        else:
            built["operands"].append(self._value(base))
            built["immediate"] = offset

    def _finish(self, built: dict[str, Any], match: re.Match[str]) -> None:
        """Add what is particular to an instruction."""
        handler, numbers = built["handler"], built["numbers"]
        if handler == "mov":
            self._move(built, match["type"])
        elif handler == "lop3":
            built["immediate"] = numbers[0]
        elif handler == "bar.sync":
            if numbers not in ([0], [0, self.threads]):
                raise Unsupported("a barrier of some of the threads")
        elif handler in ("cp.async", "cp.async.wait_group"):
            built["detail"] = [*numbers, *built["detail"][1:]]
        elif handler.startswith("setp") and (len(built["operands"]) == 3) != bool(match["bool"]):
            raise Unsupported("its number of operands")
        elif handler == "cvt":
            built["handler"] = _kind_of_conversion(built, match)
        if built["handler"] not in self.handlers:
            raise Unsupported("no such instruction")

    def _move(self, built: dict[str, Any], type: str) -> None:
        results, operands = len(built["results"]), len(built["operands"])
        if results > 1 and operands > 1:
            raise Unsupported("vectors on both sides")
        if results > 1 or operands > 1:
            built["handler"] = "unpack" if results > 1 else "pack"
            built["detail"] = [size_of(type) // max(results, operands)]

    def _register(self, name: str) -> int:
        for scope in reversed(self.scopes):
            if name in scope:
                if scope[name] is None:
                    scope[name] = self.registers
                    self.registers += 1
                return scope[name]  # type: ignore[return-value]
        raise Unsupported(f"unknown register {name}")

    def _value(self, text: str) -> int:
        """Return the register of an operand, or as a negative number the constant."""
        if text in self.symbols:
            return self._constant(self.symbols[text])
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            return self._constant(int(match.group(1) or match.group(2), 16))
        if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self._constant(int(text.rstrip("U"), 0))
        return self._register(text)

    def _constant(self, value: int) -> int:
        return ~self.constants.setdefault(value & (2**64 - 1), len(self.constants))

    def _pack(self, number: int, built: dict[str, Any]) -> bytes:
        def padded(numbers: list[int], length: int) -> list[int]:
            return [*numbers, *[-1 if length == 8 else 0] * (length - len(numbers))]

        immediate = built["immediate"]
        if "label" in built:
            if built["label"] not in self.labels:
                raise Unsupported(f"line {built['line']}: no label {built['label']}")
            immediate = self.labels[built["label"]]
        return INSTRUCTION.pack(
            self.handlers[built["handler"]],
            *(built["guard"], built["negated"], number),
            *(len(built["results"]), len(built["operands"])),
            *padded(built["results"], 8),
            *padded(built["operands"], 12),
            *(built["rounding"], built["flags"]),
            *padded(built["detail"], 4),
            immediate,
        )


@cache
def _form_of(opcode: str) -> tuple[Form, re.Match[str]]:
    for form in FORMS.get(opcode.partition(".")[0], []):
        if match := form.pattern.fullmatch(opcode):
            return form, match
    raise Unsupported("no such instruction")


def _rounding(match: re.Match[str]) -> int:
    found = match.groupdict()
    if whole := found.get("whole"):  # rni, rzi, ...
        return ROUNDINGS.index(whole.removesuffix("i"))
    return ROUNDINGS.index(found.get("round") or "rn")


def _kind_of_conversion(built: dict[str, Any], match: re.Match[str]) -> str:
    """Which handler; the common ones have their own."""
    to, source = match["to"], match["from"]
    if (to, source) == ("f64", "f32") and not built["flags"] and not match["whole"]:
        return "cvt.f64.f32"
    if to[0] in "us" and source[0] in "us" and not built["flags"]:
        return "cvt.integer"
    return "cvt"


def _without_comments(ptx: str) -> tuple[list[str], list[str]]:
    """Return the lines without comments and places; and of each line the place in the source."""
    lines, sources, source = [], [], ""
    for line in ptx.splitlines():
        code, _, comment = line.partition("//")
        if re.match(r"\s*\.(?:loc|file)\s", code):
            if place := re.match(r"\s*(\S+:\d+:\d+)", comment):
                source = place.group(1)
            code = ""
        lines.append(code)
        sources.append(source)
    return lines, sources


def _tokens(text: str, start: int) -> Iterator[tuple[int, re.Match[str]]]:
    """Those of the body that begins at `start`, each with its line."""
    depth, line, counted = 0, 1, 0
    while True:
        start = _BLANK.match(text, start).end()
        token = _TOKEN.match(text, start)
        line += text.count("\n", counted, start)
        counted = start
        if not token:
            raise Unsupported(f"line {line}: {text[start : start + 60]!r}")
        yield line, token
        depth += bool(token["open"]) - bool(token["close"])
        if not depth:
            return
        start = token.end()
