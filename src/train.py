"""Train a backbone: `python src/train.py model=deit_small data=imagenet data.root=... trainer=ddp_8gpu`."""

from omegaconf import DictConfig

from cli import entry_point


@entry_point("train")
def main(config: DictConfig) -> None:
    """Compose, train, print a table; with plan=true only say what would happen."""
    if config.plan:
        from vitrail.run.plan import show_plan

        show_plan(config)
    else:
        from vitrail.run.training import train

        train(config)


if __name__ == "__main__":
    main()
