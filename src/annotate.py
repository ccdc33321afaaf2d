"""Make label maps: `python src/annotate.py annotator=convnext data=imagefolder data.root=... out=...`."""

from omegaconf import DictConfig

from cli import entry_point


@entry_point("annotate")
def main(config: DictConfig) -> None:
    """Annotate what is missing, say how the maps agree with the data, draw some."""
    from vitrail.run.annotation import annotate

    annotate(config)


if __name__ == "__main__":
    main()
