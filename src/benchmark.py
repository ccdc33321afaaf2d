"""Measure a backbone, or the step of a training: `python src/benchmark.py train=true model=deit_small`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("benchmark")
