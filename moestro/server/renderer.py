"""Renders chat templates where they can do no harm: in their own process, with bounds on time and memory.

A template is a program that came with a checkpoint, and messages are its input. `data/template.py` keeps it in a
sandbox and bounds its size, loops and output. The sandbox cannot bound time and memory, but the operating system can.
The child says `READY` once it has loaded the tokenizer; then it reads one JSON object a line and answers with one. If
an answer is late, the child is killed and the next request starts another. Starting has its own time limit, so that a
busy machine never makes the first request fail.

    python -m moestro.server.renderer TOKENIZER BYTES      # {"messages": […], "variables": {…}} -> {"ids": […]}
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moestro.data.template import encode_chat
from moestro.data.tokenizer import Tokenizer
from moestro.data.tokenizer_files import FILES, TEMPLATE_FOLDER
from moestro.errors import DataError

SECONDS, START_SECONDS, MEMORY_BYTES = 10.0, 120.0, 4 * 2**30
READY = b"ready\n"
RESERVED = frozenset({"messages", "chat_template", "template", "add_generation_prompt"})
_NAME = re.compile("[a-z][a-z0-9_]{0,63}")


class Renderer:
    """Turns messages into ids through the child. Calls wait for each other.

    The child reads copies of the tokenizer's files, as it may start again when their directory is gone.
    """

    def __init__(self, tokenizer_path: Path, seconds: float = SECONDS, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.seconds = seconds
        folder, name = (tokenizer_path, "") if tokenizer_path.is_dir() else (tokenizer_path.parent, tokenizer_path.name)
        self._copies = TemporaryDirectory(prefix="moestro-tokenizer-")
        for file in [*map(folder.joinpath, {*FILES, name}), *(folder / TEMPLATE_FOLDER).glob("*")]:
            if file.is_file():
                copy = Path(self._copies.name) / file.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        self._arguments = [str(Path(self._copies.name) / name), str(memory_bytes)]
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of a conversation. DataError if the template refuses it or does not finish in time."""
        asked = {"messages": messages, "variables": variables or {}, "add_generation_prompt": add_generation_prompt}
        with self._lock:
            answer = self._ask(json.dumps(asked).encode() + b"\n")
        if "error" in answer:
            raise DataError(answer["error"])
        ids: list[int] = answer["ids"]
        return ids

    def close(self) -> None:
        """End the child, for good."""
        with self._lock:
            self._kill()
        self._copies.cleanup()

    def _ask(self, line: bytes) -> dict[str, Any]:
        answer = self._exchange(self._start(), line, self.seconds)
        if not answer.endswith(b"\n"):
            self._kill()
            raise DataError(f"the chat template needs more than {self.seconds:g} seconds, or too much memory")
        tree: dict[str, Any] = json.loads(answer)
        return tree

    def _start(self) -> subprocess.Popen[bytes]:
        """The child, ready for a request. RuntimeError if it cannot start, which is no client's fault."""
        if self._child is None or self._child.poll() is not None:
            self._kill()
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "moestro.server.renderer", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
                start_new_session=True,  # a terminal's Ctrl-C is for the server, which drains first
            )
            if self._exchange(self._child, b"", START_SECONDS) != READY:
                self._kill()
                raise RuntimeError("the process of the chat template does not start")
        return self._child

    @staticmethod
    def _exchange(child: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
        """The child's answer to `line`; cut short if the child ended or was killed after `seconds`."""
        late = threading.Timer(seconds, child.kill)
        late.start()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(line)
            child.stdin.flush()
            return child.stdout.readline()
        except BrokenPipeError:
            return b""
        finally:
            late.cancel()

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def encode(messages: list[dict[str, Any]], variables: Mapping[str, Any], tokenizer: Tokenizer, add: bool) -> list[int]:
    """`encode_chat` with variables for the template besides the messages, as far as they may have their names."""
    allowed = {name: value for name, value in variables.items() if _NAME.fullmatch(name) and name not in RESERVED}
    return encode_chat(messages, tokenizer, add_generation_prompt=add, variables=allowed)


def answer(line: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The child's answer to a line: ids, or the error."""
    tree = json.loads(line)
    try:
        return {"ids": encode(tree["messages"], tree["variables"], tokenizer, tree["add_generation_prompt"])}
    except DataError as error:
        return {"error": str(error)}


def limit_memory(num_bytes: int) -> None:
    """Limit the memory of this process, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    except (ImportError, ValueError, OSError) as error:
        print(f"moestro: the memory of chat templates is not bounded here: {error}", file=sys.stderr)


def main() -> None:
    """Answer until the input ends."""
    tokenizer_path, memory_bytes = sys.argv[1:]
    limit_memory(int(memory_bytes))
    tokenizer = Tokenizer.from_file(tokenizer_path)
    print(READY.decode(), end="", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line, tokenizer)), flush=True)


if __name__ == "__main__":
    main()
