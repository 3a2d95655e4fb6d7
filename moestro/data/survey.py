"""Reading a source once before anything is made of it: how much text there is, what was left out, what is wrong.

Every file is read to its end, so that all that cannot be read are named at once. That costs a few percent of what
tokenising the same text takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moestro.data.corpus import Corpus
from moestro.data.documents import Document
from moestro.errors import DataError
from moestro.terminal import printable

MOST_LISTED = 50
SAMPLE_BYTES = 1_000_000  # of text, to count tokens on
_SAMPLE_PARTS = 256  # per domain


@dataclass
class DomainText:
    """Text of one domain: UTF-8 bytes, documents, and whether they are not all the same."""

    bytes: int = 0
    documents: int = 0
    varied: bool = False
    first: str = field(default="", repr=False)

    def add(self, document: Document, num_bytes: int) -> None:
        """Count one document."""
        if not self.documents:
            self.first = document.text
        self.varied = self.varied or document.text != self.first
        self.bytes += num_bytes
        self.documents += 1


@dataclass
class Survey:
    """What a source holds. `files` is 0 where text does not come from files; `sample` are documents spread over it."""

    source: str
    files: int = 0
    domains: dict[str, DomainText] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    sample: list[str] = field(default_factory=list, repr=False)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of text."""
        return sum(domain.bytes for domain in self.domains.values())

    @property
    def documents(self) -> int:
        """Documents, after long texts were cut."""
        return sum(domain.documents for domain in self.domains.values())


def survey(corpus: Corpus) -> Survey:
    """Read all of a corpus. Raises one `DataError` whose details are all files that cannot be read, or if it is empty."""
    result = Survey(corpus.source)
    sampler = _Sampler()
    if corpus.found is None:
        for document in corpus.documents():
            _count(document, result, sampler)
    else:
        result.files = len(corpus.found.files)
        result.skipped = dict(corpus.found.skipped.most_common())
        _read_files(corpus, result, sampler)
    if not result.domains:
        raise DataError(f"no text in '{corpus.source}'")
    result.notices, result.sample = tuple(corpus.notices()), sampler.texts()
    return result


def _read_files(corpus: Corpus, result: Survey, sampler: _Sampler) -> None:
    assert corpus.found is not None
    problems = [f"{path}: {reason}" for path, reason in corpus.found.problems]
    for file in corpus.found.files:
        try:
            for document in corpus.read(file):
                _count(document, result, sampler)
        except DataError as error:
            problems.append(printable(str(error)))
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        listed = problems[:MOST_LISTED]
        if len(problems) > len(listed):
            listed.append(f"… and {len(problems) - len(listed)} more")
        raise DataError(
            f"{len(problems)} of {len(corpus.found.files)} files cannot be read; mend them or move them away",
            details=tuple(listed),
        )


def _count(document: Document, result: Survey, sampler: _Sampler) -> None:
    num_bytes = len(document.text.encode())
    result.domains.setdefault(document.domain, DomainText()).add(document, num_bytes)
    sampler.add(document)


class _Sampler:
    """Keeps every k-th document of a domain; k doubles when there are too many, so that they stay spread evenly."""

    def __init__(self) -> None:
        self.kept: dict[str, list[str]] = {}
        self.every: dict[str, int] = {}
        self.seen: dict[str, int] = {}

    def add(self, document: Document) -> None:
        """Take one document, or leave it."""
        name = document.domain
        kept, every, seen = self.kept.setdefault(name, []), self.every.setdefault(name, 1), self.seen.get(name, 0)
        self.seen[name] = seen + 1
        if seen % every:
            return
        kept.append(document.text)
        if len(kept) > _SAMPLE_PARTS:
            del kept[1::2]
            self.every[name] = 2 * every

    def texts(self) -> list[str]:
        """At most `SAMPLE_BYTES` in all, each domain with its share of the documents seen."""
        total = sum(self.seen.values())
        texts = []
        for name, kept in self.kept.items():
            room = SAMPLE_BYTES * self.seen[name] // total
            for text in kept:
                if room <= 0:
                    break
                texts.append(text[:room])
                room -= len(text.encode())
        return texts
