"""`scipy.signal` and wandb are imported at their first use, however they are used."""

import pytest

from programs import run_python

LIKE_TORCHMETRICS = """
import sys
from vitrail_runtime.deferred import defer_imports
defer_imports()
import scipy.signal
assert hasattr(scipy.signal, "hamming") and "scipy.stats" not in sys.modules
del scipy
"""
CHECK_WINDOW = """
import scipy
assert sys.modules["scipy.signal"] is scipy.signal
assert [*window, scipy.signal.hamming(1)[0]] == [0, 1, 0, 1]
"""
LIKE_TIMM = """
import sys
from importlib.util import find_spec
from vitrail_runtime.deferred import defer_imports
defer_imports()
import wandb
assert find_spec("wandb") is not None and "wandb.sdk" not in sys.modules
timm_wandb = wandb
del wandb
"""
CHECK_ARTIFACT = """
import wandb
assert version == wandb.__version__
assert artifact is wandb.Artifact is timm_wandb.Artifact
"""
SCIPY, WANDB = (LIKE_TORCHMETRICS, CHECK_WINDOW), (LIKE_TIMM, CHECK_ARTIFACT)


@pytest.mark.parametrize(
    ("program", "use"),
    [
        (SCIPY, "import scipy; window = scipy.signal.windows.hann(3)"),
        (SCIPY, "import scipy.signal as signal; window = signal.windows.hann(3)"),
        (SCIPY, "import scipy.signal.windows; window = scipy.signal.windows.hann(3)"),
        (SCIPY, "from scipy.signal import get_window; window = get_window('hann', 3, fftbins=False)"),
        (WANDB, "import wandb; version, artifact = wandb.__version__, wandb.Artifact"),
        (WANDB, "from wandb import Artifact as artifact, __version__ as version"),
        (WANDB, "import wandb.env; version, artifact = wandb.__version__, wandb.Artifact"),
        (WANDB, "from wandb.sdk import Artifact as artifact; version = timm_wandb.__version__"),
    ],
)
def test_module__is_imported_when_used(program, use, tmp_path):
    before, after = program
    result = run_python("-c", f"{before}{use}{after}print('equal')", folder=tmp_path)
    assert result.stdout == "equal\n", result.stderr
