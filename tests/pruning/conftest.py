"""The command `prune` and a teacher for it."""

from prune_command import run, teacher  # noqa: F401
