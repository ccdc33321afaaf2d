"""Make label maps: `python src/annotate.py annotator=convnext data=imagefolder data.root=... out=...`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("annotate")
