import pytest

from wandb_server import wandb_standin


@pytest.fixture(scope="module")
def wandb_module():
    """A stand-in of W&B's server that this process's wandb talks to."""
    import wandb

    with pytest.MonkeyPatch.context() as patch, wandb_standin() as (standin, variables):
        for name, value in variables.items():
            patch.setenv(name, value)
        wandb.teardown()  # it keeps the settings of its first use
        yield standin
        wandb.teardown()


@pytest.fixture
def standin(wandb_module):
    """The stand-in without runs and views."""
    wandb_module.runs, wandb_module.views, wandb_module.artifacts = {}, [], {}
    return wandb_module
