"""The errors that are the user's to mend: one clear line, exit code 2, no traceback."""


class MoestroError(Exception):
    """Bad input: the message says what is wrong and what to do."""


class ConfigError(MoestroError):
    """A key, value or combination that no run can use."""


class DataError(MoestroError):
    """Text, tokenizer or shards that cannot be read."""


class CheckpointError(MoestroError):
    """A model directory that is incomplete, damaged or of a kind that is not supported."""
