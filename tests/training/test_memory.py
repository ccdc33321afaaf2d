"""Memory of a step by part and by hand, and the sentence when it runs out."""

import pytest
import torch

from small_training import build, trainer
from vitrail.training import EMA, CosineSchedule, OptimizerFactory
from vitrail.training.memory import StepMemory, extra_memory, is_out_of_memory, out_of_memory


def test_extra_memory__of_a_step_by_hand():
    """Two tensors of 4 MB at a time at most, and 1 MB that stays."""

    def step():
        kept.append(torch.empty(250_000))
        for _ in range(3):
            first = torch.empty(1_000_000)
            second = first + 1
            del first, second

    kept = []
    assert extra_memory(step) == pytest.approx(9e6, abs=1e4)


def fitted(tmp_path, callbacks, **kwargs):
    module, data = build(optimizer=OptimizerFactory(), schedule=CosineSchedule(), **kwargs)
    fitting = trainer(tmp_path, callbacks, max_epochs=1, limit_train_batches=4, limit_val_batches=0)
    fitting.fit(module, datamodule=data)
    return fitting, module, data


def test_parts__by_hand(tmp_path):
    """AdamW keeps two moments of every parameter, and a step count of 4 bytes."""
    memory = StepMemory(2)
    _, module, data = fitted(tmp_path, [EMA(), memory])
    tensors = list(module.model.parameters())
    weights = 4 * sum(tensor.numel() for tensor in tensors)
    kept = weights + sum(buffer.numel() * buffer.element_size() for buffer in module.model.buffers())
    assert memory.parts["gradients"] == weights
    assert memory.parts["weights"] == pytest.approx(kept, abs=200)  # the metrics' counters are buffers too
    assert memory.parts["average"] == kept
    assert memory.parts["optimizer"] == 2 * weights + 4 * len(tensors)
    assert memory.parts["activations"] > 4 * data.batch_size * 3 * 8 * 8
    assert memory.peak > sum(memory.parts.values())
    assert memory.launches is None


def test_activations__grow_with_the_batch_and_shrink_with_checkpointing(tmp_path):
    held = {}
    for checkpointed in (False, True):
        memory = StepMemory(1)
        fitted(tmp_path, [memory], grad_checkpointing=checkpointed)
        held[checkpointed] = memory.parts["activations"]
    assert held[True] < 0.5 * held[False]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_out_of_memory__is_recognised(error, expected):
    assert is_out_of_memory(error) is expected


def test_out_of_memory__the_sentence_names_the_parts_and_the_keys(tmp_path):
    fitting, module, _ = fitted(tmp_path, [EMA()])
    sentence = str(out_of_memory(fitting, module, 64, checkpointed=False))
    assert sentence.startswith("data.batch_size=64: out of memory on cpu in epoch ")
    assert "with grad_checkpointing=false; GiB: weights 0.00, gradients 0.00, optimiser state 0.00, EMA" in sentence
    advice = (
        "Set data.batch_size=32 trainer.accumulate_grad_batches=2 (the same effective batch), or grad_checkpointing"
    )
    assert advice in sentence
    assert sentence.count("\n") == 0
    assert "or grad_" not in str(out_of_memory(fitting, module, 64, checkpointed=True))
