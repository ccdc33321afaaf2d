"""Look for problems before they cost a night: `python src/doctor.py data=imagefolder data.root=...`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("doctor")
