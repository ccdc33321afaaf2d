"""Compare runs in one HTML page: `python src/report.py runs=<run, sweep or folder>`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("report")
