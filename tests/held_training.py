"""train.py, but it pauses after optimiser step HOLD_AT_STEP until it gets a signal.

A test can then end a training at a known step, on a machine of any speed. The step's checkpoint is written and the file
HOLD_FILE exists before the pause begins. In a training on several processes only the rank HOLD_RANK pauses.
"""

import os
import runpy
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "src"))

from vitrail.runs import preemption  # noqa: E402
from vitrail.runs.preemption import Preemption  # noqa: E402

save_between_steps = Preemption.on_train_batch_end


def on_train_batch_end(self, trainer, *args):
    save_between_steps(self, trainer, *args)
    if trainer.global_step == int(os.environ["HOLD_AT_STEP"]) and trainer.global_rank == int(os.environ["HOLD_RANK"]):
        trainer.strategy.checkpoint_io.teardown()
        Path(os.environ["HOLD_FILE"]).touch()
        while not self._asked:
            time.sleep(0.01)


if __name__ == "__main__":
    Preemption.on_train_batch_end = on_train_batch_end
    preemption._SECONDS = 0.0  # the processes ask each other after every step
    sys.argv[0] = str(PROJECT / "src" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
