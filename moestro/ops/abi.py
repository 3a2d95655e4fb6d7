"""The one table that Python and the native kernels share: numbers, the struct of a step, and every exported function.

`library.py` binds the compiled library with it. `setup.py` runs this file alone, so it imports only the standard
library, and writes `header()` to `csrc/abi/generated.h`. `csrc/abi/moestro.h` includes that, declares the functions
again and says what each means; the compiler refuses declarations that disagree. `moestro_abi()` in the library returns
the VERSION it was built from, and `library.py` refuses any other.

Parameters and fields are written like C struct members: "const void *a, *b; int64_t rows, width".
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

REVISION = 1  # raise it when a function changes its meaning but not its parameters

TYPES = {"float32": 0, "bfloat16": 1, "fp8_rows": 2}  # the last of caches only: ops/serving/fp8_rows.py
# formats of packed weights; fp8_both: weights as in fp8, by rows that are rounded to fp8
KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3, "fp8": 4, "fp8_both": 5}
SCORES = {"sigmoid": 0, "softmax": 1, "sqrt_softplus": 2, "constant": 3}  # score functions of routers
ERRORS = {"ok": 0, "bad_type": 1, "bad_size": 2, "no_memory": 3, "no_isa": 4, "no_address": 5}
ISAS = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "neon", "neondot")


class Opcode(IntEnum):
    """The operations of a served program, and their operands in the order of csrc/abi/run.cpp."""

    operands: tuple[str, ...]

    def __new__(cls, number: int, operands: str) -> Opcode:
        member = int.__new__(cls, number)
        member._value_, member.operands = number, tuple(operands.split())
        return member

    LINEAR = 0, "out x panels groups m k kind type"
    EXPERTS = 1, "out x weights router gate_up down num_experts hidden width kind type"
    ATTENTION = 2, "out q cache heads key_width value_width groups value_offset scale type selection selected"
    NORM = 3, "out x weight width eps weight_type type"
    SWIGLU = 4, "out x width type"
    ADD = 5, "out a b width type"
    ROPE = 6, "out x x_row offset groups x_group width type"
    COPY = 7, "out out_row out_offset out_group x x_row x_offset x_group groups width"
    STORE = 8, "cache x width coded type"
    WIDEN = 9, "out x width"
    ROUTE = (
        10,
        (
            "router weights logits bias num_experts num_groups top_k_groups scale "
            "function group_best multiply normalize given"
        ),
    )


CACHE = "void *pages; int64_t width; int type"  # the fields of MoestroCache
STEP = (  # the fields of MoestroStep
    "char *memory; int64_t *ids; const MoestroCache *caches; const float *cos, *sin; const int64_t *slots, *starts, "
    "*first; const int32_t *tables; int64_t num_rows, row_bytes, num_routers, top_k, num_caches, num_pages, "
    "half_angles, num_sequences, max_pages; int threads"
)

FUNCTIONS = {  # parameters by name; all return an error code, except those in RETURNS
    "moestro_abi": "",
    "moestro_isa": "",
    "moestro_set_isa": "const char *name",
    "moestro_matmul": (
        "void *out; const void *a, *b; int64_t m, n, k, out_stride, a_stride, b_stride; int a_transposed, "
        "b_transposed, type, out_type, threads"
    ),
    "moestro_experts_forward": (
        "void *y, *h; const void *x; const void *const *gate_up, *const *down; const int64_t *token; "
        "const float *weights; "
        "const int64_t *offsets; int64_t num_experts, num_tokens, hidden, width; int type, threads"
    ),
    "moestro_experts_backward": (
        "void *dx; float *d_weights; void *const *d_gate_up, *const *d_down; const void *dy, *x, *h; "
        "const void *const *gate_up, *const *down; "
        "const int64_t *token; const float *weights; const int64_t *offsets; int64_t num_experts, num_tokens, "
        "hidden, width; int type, threads"
    ),
    "moestro_combine": (
        "void *out; const void *y; const int64_t *slot; int64_t num_tokens, top_k, num_slots, hidden; int type, threads"
    ),
    "moestro_multiply_in_registers": "int64_t *operations, rounds; int type, threads",
    "moestro_cross_entropy": (
        "float *nll; int64_t *argmax; void *d_hidden; float *d_weight; const void *hidden, *weight; "
        "const int64_t *targets; const float *row_weights; int64_t num_rows, vocabulary, width; int type, threads"
    ),
    "moestro_pack": "void *panels; const void *x; int64_t m, k; int kind, type, threads",
    "moestro_pack_codes": "void *panels; const void *codes; const float *scales; int64_t m, k; int threads",
    "moestro_packed_linear": "void *out; const void *x, *panels; int64_t groups, n, m, k; int kind, type, threads",
    "moestro_packed_experts": (
        "void *out; const void *x; const int64_t *ids; const float *weights; const void *const *gate_up, "
        "*const *down; int64_t num_tokens, top_k, num_experts, hidden, width; int kind, type, threads"
    ),
    "moestro_paged_attention": (
        "void *out; const void *q, *pages; const int32_t *tables; const int64_t *starts, *first; int64_t num_rows, "
        "num_pages, num_sequences, max_pages, num_heads, key_width, value_width, page_width, groups, value_offset; "
        "const int32_t *selection; int64_t selected; float scale; int page_type, type, threads"
    ),
    "moestro_store_fp8_rows": (
        "void *pages; const void *x; const int64_t *slots; int64_t num_rows, num_pages, row_bytes, width, coded; "
        "int type, threads"
    ),
    "moestro_rms_norm": (
        "void *out; const void *x, *weight; int64_t rows, width; float eps; int type, weight_type, threads"
    ),
    "moestro_swiglu": "void *out; const void *gate_up; int64_t rows, width; int type, threads",
    "moestro_rope": (
        "void *out; const void *x; const float *cos, *sin; int64_t rows, groups, width, out_row, out_group, x_row, "
        "x_group; int inverse, type, threads"
    ),
    "moestro_route": (
        "int64_t *ids; float *weights; const float *logits, *bias; int64_t rows, num_experts, num_groups, "
        "top_k_groups, top_k; float scale; int function, group_best, multiply, normalize, given, threads"
    ),
    "moestro_add": "void *out; const void *a, *b; int64_t rows, width; int type, threads",
    "moestro_run": "const int64_t *program; int64_t length; const MoestroStep *step",
    "moestro_flash_forward": (
        "void *out; float *log_sums; const void *q, *k, *v; const int64_t *starts, *strides; int64_t num_documents, "
        "num_rows, num_heads, num_kv_heads, key_width, value_width; float scale; int type, threads"
    ),
    "moestro_flash_backward": (
        "void *dq, *dk, *dv; const void *d_out, *q, *k, *v, *out; const float *log_sums; const int64_t *starts, "
        "*strides; int64_t num_documents, num_rows, num_heads, num_kv_heads, key_width, value_width; float scale; "
        "int type, threads"
    ),
    "moestro_rms_norm_backward": (
        "void *dx, *d_weight; const void *dy, *x, *weight; int64_t rows, width; float eps; int type, weight_type, "
        "threads"
    ),
    "moestro_swiglu_backward": "void *d_gate_up; const void *dy, *gate_up; int64_t rows, width; int type, threads",
    "moestro_join_heads": (
        "void *out; const void *plain, *rotary; const float *cos, *sin; int64_t rows, heads, plain_width, "
        "rotary_width, plain_row, plain_head, rotary_row, rotary_head; int type, threads"
    ),
    "moestro_split_heads": (
        "void *d_plain, *d_rotary; const void *d_out; const float *cos, *sin; int64_t rows, heads, plain_width, "
        "rotary_width; int shared, type, threads"
    ),
    "moestro_fp8_quantize": (
        "void *values, *codes; float *scales; const void *x; const float *x_scales; const int64_t *rows, *bounds; "
        "const float *given; int64_t num_groups, num_slots, num_rows, width; int tall, wide, e5m6, power_of_two, type, "
        "threads"
    ),
    "moestro_fp8_widen": "void *values; const void *codes; int64_t count; int threads",
    "moestro_fp8_rows": (
        "void *out; const void *a; const float *a_scales; const int64_t *rows; const void *const *b, *const *b_scales; "
        "const int64_t *bounds; int64_t num_groups, num_slots, num_rows, m, k; int back, threads"
    ),
    "moestro_fp8_columns": (
        "float *out; const void *a; const float *a_scales; const void *b; const float *b_scales; "
        "const int64_t *bounds; int64_t num_groups, num_slots, m, k; int threads"
    ),
    "moestro_fp8_swiglu": ("void *out; const void *h; const float *weights; int64_t num_slots, width; int threads"),
    "moestro_fp8_swiglu_backward": (
        "void *act, *dh; float *d_weights; const void *d_act, *h; const float *h_scales, *weights; int64_t num_slots, "
        "width; int threads"
    ),
}
RETURNS = {"moestro_abi": "uint32_t", "moestro_isa": "const char *"}

_NUMBERS = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "float": ctypes.c_float}


def read_members(declarations: str) -> list[tuple[str, str]]:
    """(C type, name) of every member: "const void *a, *b; int64_t rows" begins with ("const void *", "a")."""
    found = []
    for declaration in declarations.split("; ") if declarations else ():
        kind, _, members = declaration.removeprefix("const ").partition(" ")
        const = "const " if declaration.startswith("const ") else ""
        for member in members.split(", "):
            name = member.rpartition("*")[2]
            found.append((f"{const}{kind} {member.removesuffix(name)}".strip(), name))
    return found


def ctype_of(kind: str) -> type[Any]:
    """The ctypes type for a C type; every pointer is an address."""
    return ctypes.c_void_p if kind.endswith("*") else _NUMBERS[kind]


class Cache(ctypes.Structure):
    """`MoestroCache`: one cache of a model."""

    _fields_ = tuple((name, ctype_of(kind)) for kind, name in read_members(CACHE))


class Step(ctypes.Structure):
    """`MoestroStep`: what a program runs on (csrc/abi/moestro.h says what each field is)."""

    _fields_ = tuple((name, ctype_of(kind)) for kind, name in read_members(STEP))


def bind(library: ctypes.CDLL) -> None:
    """Tell ctypes every function's parameters and result. AttributeError if the library lacks one."""
    for name, parameters in FUNCTIONS.items():
        function, returns = getattr(library, name), RETURNS.get(name, "int")
        function.argtypes = [ctype_of(kind) for kind, _ in read_members(parameters)]
        function.restype = ctypes.c_char_p if returns == "const char *" else ctype_of(returns)


def declare(name: str, parameters: str) -> str:
    """The C declaration of a function."""
    listed = ", ".join(_join(kind, parameter) for kind, parameter in read_members(parameters)) or "void"
    return f"{_join(RETURNS.get(name, 'int'), name)}({listed});"


def _join(kind: str, name: str) -> str:
    return kind + name if kind.endswith("*") else f"{kind} {name}"


def _enumerate(prefix: str, numbers: Mapping[str, int]) -> str:
    return "enum { " + ", ".join(f"MOESTRO_{prefix}{name.upper()} = {numbers[name]}" for name in numbers) + " };"


def _declarations() -> list[str]:
    """Everything both sides must agree on, in C, including the names of parameters and operands."""
    counts = ", ".join(str(len(opcode.operands)) for opcode in Opcode)
    isas = ", ".join(f'"{isa}"' for isa in ISAS)
    return [
        f"#define MOESTRO_REVISION {REVISION}",
        f"#define MOESTRO_ISAS {{{isas}}}",
        _enumerate("", TYPES),
        _enumerate("KIND_", KINDS),
        _enumerate("", SCORES),
        _enumerate("", ERRORS),
        *(f"// {opcode.name}: {' '.join(opcode.operands)}" for opcode in Opcode),
        _enumerate("OP_", {opcode.name: opcode.value for opcode in Opcode}),
        f"#define MOESTRO_OPERANDS {{{counts}}}",
        "typedef struct {",
        *(f"    {_join(kind, field)};" for kind, field in read_members(CACHE)),
        "} MoestroCache;",
        "typedef struct {",
        *(f"    {_join(kind, field)};" for kind, field in read_members(STEP)),
        "} MoestroStep;",
        *(declare(name, parameters) for name, parameters in FUNCTIONS.items()),
    ]


VERSION = zlib.crc32("\n".join(_declarations()).encode())


def header() -> str:
    """The text of csrc/abi/generated.h."""
    lines = [
        "// Written by setup.py from moestro/ops/abi.py, which is where to change it.",
        "// clang-format off",
        "#pragma once",
        "#include <stdint.h>",
        "",
        f"#define MOESTRO_ABI {VERSION}u",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        *_declarations(),
        "#ifdef __cplusplus",
        "}",
        "#endif",
    ]
    return "\n".join(lines) + "\n"
