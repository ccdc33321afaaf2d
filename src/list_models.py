"""List the backbones: `python src/list_models.py`, or one with its layers: `... model=t2t_vit_14`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("list_models")
