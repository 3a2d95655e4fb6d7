"""The built-in corpus: six domains of real text on every machine, offline, about 15 MB.

`english korean chinese math` are shipped compressed in `builtin/` (sources, licences and hashes in
`builtin/provenance.json`); `python` is the running interpreter's own standard library, so it differs a little
between Python versions and may be absent; `arithmetic` is generated and the same everywhere. Long documents are
cut as in any text file.

The shipped `builtin/tokenizer.json` (vocabulary 8192) was trained on this corpus. To train it again, run
`python -c "import moestro.data.builtin_corpus as b; b.train_tokenizer('moestro/data/builtin')"`.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import random
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from moestro.data.documents import Document, cut_long_document, split_text

SHIPPED = ("english", "korean", "chinese", "math")
DOMAINS = (*SHIPPED, "python", "arithmetic")
PYTHON_BYTES = 3_500_000
ARITHMETIC_BYTES = 1_000_000
VOCAB_SIZE = 8192
_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def iterate_builtin() -> Iterator[Document]:
    """Every document, domain by domain in the order of `DOMAINS`."""
    for domain in SHIPPED:
        name = f"{domain}.txt.xz"
        text = lzma.decompress((resources.files("moestro") / "data" / "builtin" / name).read_bytes())
        yield from (Document(part, domain) for part in split_text(io.BytesIO(text), Path(name), separated=True))
    for source in iterate_python(Path(sysconfig.get_path("stdlib"))):
        yield from (Document(part, "python") for part in cut_long_document(source))
    yield from (Document(problems, "arithmetic") for problems in iterate_arithmetic())


def iterate_python(folder: Path, max_bytes: int = PYTHON_BYTES) -> Iterator[str]:
    """Sources below `folder`, in the order of hashed names, up to `max_bytes`; warns if there are none."""
    paths = (path.relative_to(folder) for path in folder.rglob("*.py"))
    named = [path.as_posix() for path in paths if not _LEFT_OUT.intersection(path.parts)]
    size = 0
    for name in sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            text = (folder / name).read_bytes().decode()
        except (OSError, UnicodeDecodeError):  # a few sources are in old encodings on purpose
            continue
        size += len(text.encode())
        if size > max_bytes:
            return
        yield text
    if size == 0:
        warnings.warn(
            f"no Python sources in {folder}: the built-in corpus goes on without its python domain",
            stacklevel=2,
        )


def iterate_arithmetic(max_bytes: int = ARITHMETIC_BYTES, seed: int = 0) -> Iterator[str]:
    """Documents of a dozen worked problems, the same on every Python: only `random()` is guaranteed to be stable."""
    rng = random.Random(seed)
    size = 0
    while size < max_bytes:
        problems = (_chain_sum, _product, _gcd)
        text = "\n".join(problems[_draw(rng, 0, 2)](rng) for _ in range(12))
        size += len(text)
        yield text


def _draw(rng: random.Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def _chain_sum(rng: random.Random) -> str:
    size = 10 ** _draw(rng, 1, 4)
    total = _draw(rng, 0, size)
    terms, steps = [str(total)], []
    for _ in range(_draw(rng, 1, 5)):
        sign, term = "+-"[_draw(rng, 0, 1)], _draw(rng, 0, size)
        result = total + term if sign == "+" else total - term
        terms.append(f"{sign} {term}")
        steps.append(f"{total} {sign} {term} = {result}\n")
        total = result
    return f"What is {' '.join(terms)}?\n{''.join(steps)}Answer: {total}\n"


def _product(rng: random.Random) -> str:
    left, right = _draw(rng, 2, 10 ** _draw(rng, 1, 4)), _draw(rng, 2, 10 ** _draw(rng, 1, 3))
    lines, total = [], 0
    for power, digit in enumerate(reversed(str(right))):
        factor = int(digit) * 10**power
        if factor == 0:
            continue
        lines.append(f"{left} * {factor} = {left * factor}\n")
        if total:
            lines.append(f"{total} + {left * factor} = {total + left * factor}\n")
        total += left * factor
    return f"What is {left} * {right}?\n{''.join(lines)}Answer: {total}\n"


def _gcd(rng: random.Random) -> str:
    common = _draw(rng, 1, 40)
    left, right = common * _draw(rng, 2, 200), common * _draw(rng, 2, 200)
    lines, a, b = [], left, right
    while b:
        lines.append(f"{a} = {a // b} * {b} + {a % b}\n")
        a, b = b, a % b
    question = f"What is the greatest common divisor of {left} and {right}?"
    return f"{question}\n{''.join(lines)}Answer: {math.gcd(left, right)}\n"


def train_tokenizer(directory: str | Path) -> None:
    """Train the shipped tokenizer anew and write `tokenizer.json` to `directory`."""
    from moestro.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train((document.text for document in iterate_builtin()), VOCAB_SIZE)
    (Path(directory) / "tokenizer.json").write_text(tokenizer.specification, "utf-8")
