"""`scipy.signal` is imported at its first use, however it is used."""

import pytest

from programs import run_python

LIKE_TORCHMETRICS = """
import sys
from vitrail_runtime.deferred import defer_scipy_signal
defer_scipy_signal()
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
