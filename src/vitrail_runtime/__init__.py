"""What runs around vitrail before PyTorch is imported: programs, `.env`, secrets, resolvers, allowed targets.

Nothing heavy is imported here, so that `--help`, shell completion and a misspelt key answer at once. Nothing here
imports `vitrail` before a command is about to run.
"""

from vitrail_runtime.programs import run_program

__all__ = ["run_program"]
