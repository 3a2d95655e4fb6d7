"""Processes that take turns: each holds one thing to be timed and waits while the others run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


class Worker:
    """A script called as `script --worker arguments…`, ready when it prints its first line of JSON.

    `ask` sends one line of JSON and returns the answer; RuntimeError if the process has died.
    """

    def __init__(
        self,
        script: str,
        *arguments: str,
        environment: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.name = " ".join(arguments[:1])
        self.process = subprocess.Popen(
            [python, script, "--worker", *arguments],
            env=os.environ | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.greeting = self._read()

    def ask(self, question: Any = None) -> Any:
        """One turn."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker failed: {self.name}")
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise RuntimeError(f"{self.name} printed among its answers: {line.strip()}") from error


_answers = sys.stdout


def keep_answers_apart() -> None:
    """For workers of libraries that print: only answers go to standard output, all else to standard error."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def answer(value: Any) -> None:
    """What a worker says: one line of JSON."""
    print(json.dumps(value), file=_answers, flush=True)
