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


@pytest.mark.parametrize(
    "use",
    [
        "import scipy; window = scipy.signal.windows.hann(3)",
        "import scipy.signal as signal; window = signal.windows.hann(3)",
        "import scipy.signal.windows; window = scipy.signal.windows.hann(3)",
        "from scipy.signal import get_window; window = get_window('hann', 3, fftbins=False)",
    ],
)
def test_scipy_signal__is_imported_when_used(use, tmp_path):
    check = "assert sys.modules['scipy.signal'] is scipy.signal; print(*window, scipy.signal.hamming(1)[0])"
    result = run_python("-c", f"{LIKE_TORCHMETRICS}{use}\nimport scipy\n{check}", folder=tmp_path)
    assert result.stdout == "0.0 1.0 0.0 1.0\n", result.stderr


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


@pytest.mark.parametrize(
    "use",
    [
        "import wandb; version, artifact = wandb.__version__, wandb.Artifact",
        "from wandb import Artifact as artifact, __version__ as version",
        "import wandb.env; version, artifact = wandb.__version__, wandb.Artifact",
        "from wandb.sdk import Artifact as artifact; version = timm_wandb.__version__",
    ],
)
def test_wandb__is_imported_when_used(use, tmp_path):
    check = "import wandb; print(version == wandb.__version__, artifact is wandb.Artifact is timm_wandb.Artifact)"
    result = run_python("-c", f"{LIKE_TIMM}{use}\n{check}", folder=tmp_path)
    assert result.stdout == "True True\n", result.stderr
