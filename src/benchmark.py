"""Measure a backbone: `python src/benchmark.py mode=train model=t2t_vit_14 against=deit_small_patch16_224`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("benchmark")
