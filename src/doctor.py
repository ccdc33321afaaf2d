"""Look for what is wrong with data before it costs a night: `python src/doctor.py data=imagefolder data.root=...`."""

from omegaconf import DictConfig

from cli import entry_point


@entry_point("doctor")
def main(config: DictConfig) -> None:
    """Check folders, images and label maps, print what was found, exit with 1 where something is wrong."""
    from vitrail.run.diagnosis import examine

    if not examine(config):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
