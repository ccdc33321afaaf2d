"""Show the backbones: `python src/models.py`, or one with its layers: `python src/models.py model=t2t_vit_14`."""

from omegaconf import DictConfig

from cli import entry_point


@entry_point("models")
def main(config: DictConfig) -> None:
    """Build the backbones without memory, count what they cost, print a table."""
    from vitrail.run.backbones import show

    show(config)


if __name__ == "__main__":
    main()
