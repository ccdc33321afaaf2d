"""Evaluate a run: `python src/eval.py ckpt=<checkpoint or run directory>`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("eval")
