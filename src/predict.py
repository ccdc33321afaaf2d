"""Predict images: `python src/predict.py ckpt=<run, export or weights> images=<file, folder, pattern or list.txt>`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("predict")
