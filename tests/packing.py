"""Pack data in the test's own process, with the function behind pack.py."""

from hydra import compose, initialize_config_dir

from programs import PROJECT
from vitrail.commands import pack as pack_command


def pack(out, *overrides):
    """Pack data as pack.py does, in one process; return the pack."""
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        overrides = [f"out={out}", "processes=1", f"paths.run={out}", f"paths.cache={out}-cache", *overrides]
        return pack_command.pack(compose("pack", overrides))
