"""Code that runs before PyTorch is imported: programs, `.env`, secrets, resolvers, allowed targets.

It imports no heavy packages, so that `--help`, shell completion and errors about misspelt keys appear at once, and
imports `vitrail` only when a command is about to run.
"""

from vitrail_runtime.programs import run_program

__all__ = ["run_program"]
