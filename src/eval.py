"""Evaluate a run: `python src/eval.py ckpt=<checkpoint or run directory>`."""

from omegaconf import DictConfig

from cli import entry_point


@entry_point("eval")
def main(config: DictConfig) -> None:
    """Load the run's config and weights, validate, print a table."""
    from vitrail.run.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    main()
