"""Annotate and check label maps in the test's own process, with the functions behind annotate.py and doctor.py."""

from hydra import compose, initialize_config_dir

from programs import PROJECT
from vitrail.commands import annotate as annotate_command
from vitrail.commands import doctor as doctor_command

COMMANDS = (annotate_command, doctor_command)


def annotate(root, out, *overrides):
    """Annotate the images below `root` with a small network, as annotate.py does; return the store."""
    small = ("annotator=efficientnet_lite0", "annotator.image_size=96", "num_workers=0", "batch_size=5")
    return annotate_command.annotate(
        _composed("annotate", *small, f"data.root={root}", f"out={out}", f"paths.run={out}", *overrides)
    )


def examine(root, maps, *overrides):
    """Check images and label maps as doctor.py does; return whether there are no errors."""
    return doctor_command.examine(
        _composed("doctor", f"data.root={root}", f"data.label_maps={maps}", f"paths.run={root}", *overrides)
    )


def _composed(program, *overrides):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return compose(program, [*overrides])
