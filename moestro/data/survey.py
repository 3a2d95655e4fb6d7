"""Reading a source once before anything is made of it: how much text there is, what was left out, what is wrong.

Every file is read to its end, so that all that cannot be read are named at once. That costs a few percent of what
tokenising the same text takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moestro.data.corpus import Corpus
from moestro.data.documents import Document
from moestro.errors import DataError
from moestro.terminal import printable

MOST_LISTED = 50
SAMPLE_BYTES = 1_000_000  # of text, to count tokens on
HUB_BYTES = 4_000_000  # of a data set that is streamed from the hub, since nobody knows its size
_DOMAIN_CHARS, _DOCUMENT_CHARS = 1_000_000, 8_000  # most that is kept


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
    """What a source holds. `files` is 0 where text does not come from files; `sample` are documents spread over it.

    `complete` is False for a data set that is streamed: the other figures are of its beginning.
    """

    source: str
    files: int = 0
    complete: bool = True
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
    """Read all of a corpus. Raises one `DataError`, whose details are all files that cannot be read, or for no text."""
    result = Survey(corpus.source)
    sampler = _Sampler()
    if corpus.found is None:
        _read_stream(corpus, result, sampler)
    else:
        result.files = len(corpus.found.files)
        result.skipped = dict(corpus.found.skipped.most_common())
        _read_files(corpus, result, sampler)
    if not result.domains:
        raise DataError(f"no text in '{corpus.source}'")
    result.notices, result.sample = tuple(corpus.notices()), sampler.texts(result.domains)
    return result


def _read_stream(corpus: Corpus, result: Survey, sampler: _Sampler) -> None:
    for document in corpus.documents():
        _count(document, result, sampler)
        if corpus.source != "builtin" and result.bytes >= HUB_BYTES:
            result.complete = False
            return


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
    """Keeps the beginning of every k-th document of a domain; k doubles at `_DOMAIN_BYTES`, so they stay spread out."""

    def __init__(self) -> None:
        self.kept: dict[str, list[str]] = {}
        self.every: dict[str, int] = {}
        self.seen: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def add(self, document: Document) -> None:
        """Take one document, or leave it."""
        name = document.domain
        kept, seen = self.kept.setdefault(name, []), self.seen.get(name, 0)
        self.seen[name] = seen + 1
        if seen % self.every.setdefault(name, 1):
            return
        kept.append(document.text[:_DOCUMENT_CHARS])
        self.sizes[name] = self.sizes.get(name, 0) + len(kept[-1])
        if self.sizes[name] > _DOMAIN_CHARS and len(kept) > 1:
            del kept[1::2]
            self.every[name] *= 2
            self.sizes[name] = sum(map(len, kept))

    def texts(self, domains: Mapping[str, DomainText]) -> list[str]:
        """About `SAMPLE_BYTES` in all, of each domain its share of the text."""
        total = sum(domain.bytes for domain in domains.values())
        texts = []
        for name, domain in domains.items():
            room = SAMPLE_BYTES * domain.bytes / total
            for text in self.kept[name]:
                if room <= 0:
                    break
                texts.append(text)
                room -= len(text.encode())
        return texts
