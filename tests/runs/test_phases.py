"""Progressive runs resume exactly, and backbones that cannot change size are refused before any data is read."""

import pytest
import torch

import vitrail
from assembly import assemble
from programs import error_of, metrics, run, run_directories, train
from resuming import (
    RANDOM_DRAWS,
    assert_same_state,
    finish_ranks,
    fit,
    last_checkpoint,
    new_folder,
    resume_after_kills,
)
from vitrail.checkpoints.reading import read_checkpoint

PHASES = (
    *("phases=efficienttrain", "phases.multiple=8", "phases.downscale=lanczos"),
    "phases.calendar=[{share:0.34,image_size:16,magnitude:1},{share:0.33,image_size:24,magnitude:5},"
    "{share:0.33,image_size:32}]",
)
"""Three phases of one epoch each, with 4 optimiser steps, at 16, 24 and 32 pixels."""


def test_resume__from_within_and_between_phases_gives_the_same_weights(image_tree, tmp_path):
    """Within the first phase, after its last step, after the second phase's first, and before the third phase."""
    copies = new_folder(tmp_path / "copies")
    expected = fit(tmp_path / "whole", image_tree, copies=copies, more=PHASES)
    assert [row["train/image_size"] for row in metrics(tmp_path / "whole")] == [16, 24, 32]
    checkpoints = sorted(copies.iterdir())
    assert [torch.load(path, weights_only=True)["global_step"] for path in checkpoints] == list(range(1, 13))
    for number in (2, 4, 5, 8):
        path = copies / f"{number:02d}.ckpt"
        assert_same_state(fit(tmp_path / path.stem, image_tree, ckpt=path, more=PHASES), expected, path.stem)
    opened = vitrail.load_run(copies / "02.ckpt")  # an ordinary ViT with the position table of the final size
    assert type(opened.model).__name__ == "VisionTransformer"
    assert opened.model.pos_embed.shape[1] == 1 + 16
    assert opened.model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_resume__killed_in_two_phases_gives_the_same_bits(image_tree, tmp_path):
    """SIGKILL within the first phase and near the end of the second; two loader workers that prefetch."""
    arguments = (*RANDOM_DRAWS, *PHASES, f"data.root={image_tree}", "data.num_workers=2")
    directory = resume_after_kills(*arguments, folder=tmp_path, steps=(2, 7))
    assert [row["train/image_size"] for row in metrics(directory)] == [16, 24, 32]


@pytest.mark.parametrize("trainer", ["ddp_cpu_2", pytest.param("fsdp_cpu_2", marks=pytest.mark.slow)])
def test_processes__two_give_the_weights_of_one(trainer, image_tree, tmp_path):
    """The position table is never replaced, so that gradients are averaged, or sharded, at every size."""
    common = (*RANDOM_DRAWS, *PHASES, f"data.root={image_tree}", "data.num_workers=0", "mixing=none")
    common = (*common, "model.drop_path_rate=0", "model.drop_rate=0", "trainer.gradient_clip_val=null")
    one = last_checkpoint(train(*common, "data.batch_size=4", logs=new_folder(tmp_path / "one")))
    finish_ranks(*common, f"trainer={trainer}", logs=new_folder(tmp_path / "two"))
    two = read_checkpoint(run_directories(tmp_path / "two")[0] / "checkpoints" / "last.ckpt")  # joins shards
    for key, value in one["current_model_state"].items():
        torch.testing.assert_close(value, two["current_model_state"][key], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.name=swin_tiny_patch4_window7_224"], "phases: SwinTransformer cannot run at 160 x 160 pixels (Input"),
        (["model.name=mixer_s32_224"], "phases: MlpMixer cannot run at 160 x 160 pixels"),
        (
            ["model.name=vit_small_patch14_reg4_dinov2", "+model.depth=1"],
            "phases.calendar: 160 x 160 pixels cannot be divided into patches of VisionTransformer; set"
            " phases.multiple=14, its patch size.",
        ),
    ],
)
def test_backbone__that_cannot_run_at_a_size_is_refused(options, message, tmp_path):
    arguments = ("model=timm", "data.image_size=224", "phases=efficienttrain", "epochs=5", "trainer=cpu")
    result = run("train.py", *arguments, *options, logs=tmp_path)
    assert error_of(result).startswith(f"error: {message}")


@pytest.mark.parametrize("options", [
    ["model=timm", "model.name=resnet18"],
    ["model=t2t_vit", "model.name=t2t_vit_7"],
    ["model=timm", "model.name=vit_small_patch14_reg4_dinov2", "+model.depth=1", "data.image_size=224",
     "phases.multiple=14"],
])  # fmt: skip
def test_backbones__that_can_run_are_accepted(options, tmp_path):
    _, module, data = assemble(tmp_path, "phases=efficienttrain", "data.image_size=64", "epochs=5", *options)
    assert module.phases is data.phases
    assert len(data.phases.sizes) > 1
