"""Train a backbone: `python src/train.py model=deit_small data=imagenet data.root=... trainer=ddp_8gpu`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("train")
