"""Pack a data set into a few large files: `python src/pack.py data=imagenet data.root=... out=...`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("pack")
