"""Measure a backbone: `python src/benchmark.py mode=train model=t2t_vit_14 against=deit_small_patch16_224`."""

from omegaconf import DictConfig

from cli import entry_point


@entry_point("benchmark")
def main(config: DictConfig) -> None:
    """Time both sides in turns, measure their memory, print a table."""
    from vitrail.run.benchmark import benchmark

    benchmark(config)


if __name__ == "__main__":
    main()
