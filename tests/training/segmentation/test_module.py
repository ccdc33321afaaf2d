"""Trainings of a segmentation network: metrics, exact resume, initial weights, and parts that do not fit."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import masked
from assembly import assemble
from programs import metrics
from resuming import assert_same_state, copy_every_save, last_checkpoint, new_folder
from vitrail.data.segmentation.augment import normalised, resized
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads, linear_segmenter
from vitrail.runs.segmentation import inference_of
from vitrail.training.segmentation import SegmentationMetrics
from vitrail.types import InputSpec

pytestmark = pytest.mark.thorough

EMA = "callbacks.ema={_target_: vitrail.training.EMA, decay: 0.9}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return masked.write_folder(tmp_path_factory.mktemp("masked") / "data")


def built(folder, root, *options):
    return assemble(new_folder(folder), *masked.SMALL, f"data.root={root}", *options)


def fit(folder, root, *options, ckpt=None):
    trainer, module, data = built(folder, root, *options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return trainer, module, data


@pytest.mark.parametrize("epochs_of_batches", [(), ("data.batches_per_epoch=3",)])
def test_resume__within_an_epoch_gives_the_same_weights(epochs_of_batches, root, tmp_path):
    """Augmentation, dropout, drop path, BatchNorm statistics and EMA weights, with and without whole passes."""
    options = (EMA, "callbacks.preemption.minutes=0", *epochs_of_batches)
    trainer, module, data = built(tmp_path / "whole", root, *options)
    copy_every_save(trainer.strategy.checkpoint_io, new_folder(tmp_path / "copies"))
    trainer.fit(module, datamodule=data)
    expected = last_checkpoint(tmp_path / "whole")
    for ckpt in sorted((tmp_path / "copies").iterdir()):
        step = torch.load(ckpt, weights_only=True)["global_step"]
        if step in (2, 5):
            fit(tmp_path / f"from_{step}", root, *options, ckpt=ckpt)
            assert_same_state(last_checkpoint(tmp_path / f"from_{step}"), expected, str(step))
    assert (tmp_path / "from_2").is_dir()
    assert [row["step"] for row in metrics(tmp_path / "whole")] == ([2, 5] if epochs_of_batches else [3, 7])


def test_logged_scores__equal_those_of_a_plain_loop(root, tmp_path):
    """One window per image: the network sees the resized and padded image, its prediction is resized back."""
    _, module, data = fit(tmp_path / "run", root, EMA, "epochs=1", "data.image_size=[64,96]")
    expected = SegmentationMetrics(4)
    module.eval()
    split = data.source.open("val")
    for index in range(len(split)):
        sample = split[index]
        image = torch.from_numpy(sample.image if not hasattr(sample.image, "convert") else _array(sample.image))
        view = normalised(resized(image.permute(2, 0, 1), (64, 85)), data.mean, data.std)
        view = torch.nn.functional.pad(view, (0, 11))[None]
        with torch.no_grad():
            logits = module.model(view)[..., :85]
        logits = torch.nn.functional.interpolate(logits, (72, 96), mode="bilinear", align_corners=False)
        expected.update(logits.argmax(1)[0], torch.from_numpy(sample.mask))
    (row,) = metrics(tmp_path / "run")
    found = expected.scores().summary()
    for name in ("mIoU", "mAcc", "aAcc"):
        assert row[f"val/{name}"] == pytest.approx(found[name].item(), abs=0.02)  # ties of two classes
        assert f"val/{name}_ema" in row
    assert {"train/loss", "train/decoder_loss", "train/auxiliary_loss", "train/grad_norm", "train/lr"} <= row.keys()
    assert (tmp_path / "run" / "first_batch.png").is_file()


def _array(image):
    import numpy as np

    return np.array(image)


def test_training__learns_the_rectangles(root, tmp_path):
    options = ("epochs=10", "optimizer.lr=3e-3", "trainer.check_val_every_n_epoch=10", "data.batch_size=4")
    fit(tmp_path / "run", root, *options, "model.drop_path_rate=0", "augment.ratio=[0.8,1.2]")
    assert metrics(tmp_path / "run")[-1]["val/mIoU"] > 30  # the ground alone: 21


def test_batch_with_padding_only__does_not_stop_the_training(root, tmp_path):
    _, module, _ = built(tmp_path / "run", root)
    masks = torch.full((2, 64, 64), 255, dtype=torch.uint8)
    outputs = forward_heads(module.model.train(), torch.randn(2, 3, 64, 64))
    from vitrail.types import Batch

    targets = module.targets(Batch(torch.zeros(2), masks, ["a", "b"]), module.objective, 4, None)
    loss = module.objective(outputs, targets)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(value.grad.isfinite().all() for value in module.model.parameters() if value.grad is not None)


def test_init_from__a_classifier_s_weights_without_its_heads(root, tmp_path, caplog):
    """Token logits and classifier are dropped, and said; positions are resized once."""
    torch.manual_seed(1)
    classifier = create_model("lvvit_nano", 10, 32, token_head=True)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "classifier.pth")
    with caplog.at_level("INFO"):
        _, module, _ = built(tmp_path / "run", root, f"init_from={tmp_path}/classifier.pth")
    backbone = module.model.backbone.state_dict()
    for name in ("blocks.2.attn.qkv.weight", "patch_embed.bn2.running_var", "cls_token"):
        assert torch.equal(backbone[name], classifier.state_dict()[name])
    assert backbone["pos_embed"].shape[1] == 65
    assert "position embeddings resized from 4x4" in caplog.text
    assert "not used by segmentation, dropped: aux_head, head, norm" in caplog.text
    assert "classifier of tokens (aux_head) dropped" in caplog.text


def test_init_from__a_run_of_segmentation(root, tmp_path):
    trainer, module, _ = fit(tmp_path / "first", root, "epochs=1")
    trainer.strategy.checkpoint_io.teardown()
    ckpt = tmp_path / "first" / "checkpoints" / "last.ckpt"
    _, again, _ = built(tmp_path / "second", root, f"init_from={ckpt}")
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name])


def test_init_from__another_network_is_refused(root, tmp_path):
    torch.save(create_model("deit_tiny_patch16_224", 10, 64).state_dict(), tmp_path / "deit.pth")
    with pytest.raises(ConfigError, match=r"init_from=.*deit\.pth does not fit"):
        built(tmp_path / "run", root, f"init_from={tmp_path}/deit.pth")


@pytest.mark.parametrize(("options", "message"), [
    (("objective=cross_entropy",), "objective: CrossEntropy does not use masks; set objective=segmentation"),
    (("augment=none",), "augment: does not support masks"),
    (("mixing=mixup_cutmix",), "mixing: segmentation does not support it"),
    (("data.batch_size=1",), "data.batch_size=1: the decoder's BatchNorm needs at least 2 images per device"),
    (("data.source.classes=names.txt",), r"data\.source\.classes=.*names\.txt: cannot be read"),
    (("backbone=lvvit_nanoo",), "no such backbone"),
    (("optimizer.decay_all=true", "optimizer.decay_also=[backbone.pos_embed]"), "optimizer.decay_also: decay_all=true"),
])  # fmt: skip
def test_parts_that_do_not_fit__are_one_sentence_before_training(options, message, root, tmp_path):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path / "run", root, *options)


def test_whole_images__with_a_backbone_of_one_size_are_refused(root, tmp_path):
    options = ("backbone=swin_tiny_patch4_window7_224", "model.pyramid=none")
    with pytest.raises(ConfigError, match=r"data\.eval_mode=whole: .* images of every size, such as 72 x 80 pixels"):
        built(tmp_path / "whole", root, *options, "data.eval_mode=whole")
    built(tmp_path / "slide", root, *options)


@pytest.mark.parametrize(("name", "size", "accepts"), [
    *((name, 64, True) for name in ("resnet18", "convnext_atto", "deit_tiny_patch16_224", "pvt_v2_b0", "vit5_small")),
    ("xcit_nano_12_p8_224", 224, True),
    *((name, 224, False) for name in ("levit_128s", "mvitv2_tiny", "efficientformer_l1", "gcvit_xxtiny", "pit_ti_224")),
    *((name, 224, False) for name in ("coatnet_nano_rw_224", "volo_d1_224")),
])  # fmt: skip
def test_whole_images__are_predicted_or_refused_before_the_training(name, size, accepts):
    model = linear_segmenter(name, 5, size, norm=False).eval()
    spec = InputSpec((size, size), (0.5,) * 3, (0.5,) * 3, "bilinear")
    settings = {"eval_mode": "whole", "short_side": size}
    with nullcontext() if accepts else pytest.raises(ConfigError, match=r"data\.eval_mode=whole: .* every size"):
        inference = inference_of(model, spec, settings)
        image = torch.zeros(3, size + 13, size + 40, dtype=torch.uint8)
        assert inference(lambda images: model(images), image).shape[1:] == image.shape[1:]


def test_logits__are_resized_in_float32(root, tmp_path):
    """Equal classes would become more frequent in bfloat16."""
    _, module, _ = built(tmp_path / "run", root)
    images = torch.randn(2, 3, 64, 64)
    module.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, coarse = module(images), forward_heads(module.model, images).merged()
    assert (coarse.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    expected = torch.nn.functional.interpolate(coarse.float(), (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected)


def test_tasks__are_not_mixed(root, tmp_path):
    data = [option for option in masked.SMALL if option.startswith("data.")]
    small = ("experiment=segmentation", "trainer=cpu", f"data.root={root}", *data)
    with pytest.raises(ConfigError, match="model: LVViT is a classifier, but the data has masks; experiment=segm"):
        assemble(new_folder(tmp_path / "classifier"), *small, "model=lvvit_nano")
    images = ("model=upernet", "backbone=lvvit_nano", "data.image_size=64", "trainer=cpu")
    with pytest.raises(ConfigError, match="data: has no masks, which Segmenter needs; experiment=segmentation"):
        assemble(new_folder(tmp_path / "images"), *images)


@pytest.mark.parametrize("several", ["trainer=ddp_cpu_2", "trainer=fsdp_cpu_2"])
def test_shared_statistics__need_gpus(several, root, tmp_path):
    """Lightning would fail in the first step, or not share them."""
    trainer, module, data = built(tmp_path / "run", root, several, "trainer.sync_batchnorm=true")
    module.trainer, trainer.datamodule = trainer, data
    with pytest.raises(
        ConfigError, match=r"trainer\.sync_batchnorm=true: BatchNorm's statistics can be shared between"
    ):
        module.setup("fit")


@pytest.mark.parametrize(("processes", "shared", "possible"), [(2, True, True), (1, True, False), (2, False, False)])
def test_batch_of_one__is_possible_with_shared_statistics(processes, shared, possible, root, tmp_path):
    _, module, data = built(tmp_path / "run", root, "data.batch_size=1")
    strategy = SimpleNamespace(_layer_sync=object() if shared else None, root_device=torch.device("cuda"))
    module._trainer = SimpleNamespace(world_size=processes, strategy=strategy, datamodule=data)
    with nullcontext() if possible else pytest.raises(ConfigError, match=r"data\.batch_size=1: the decoder's"):
        module.setup("fit")


def test_batch_of_one__is_possible_without_pooling(root, tmp_path):
    linear = [option for option in masked.SMALL if not option.startswith("model.")]
    options = ("model=linear_segmenter", "data.batch_size=1", "epochs=1", f"data.root={root}")
    trainer, module, data = assemble(new_folder(tmp_path / "linear"), *linear, *options)
    trainer.fit(module, datamodule=data)
    assert metrics(tmp_path / "linear")[-1]["val/mIoU"] >= 0


@pytest.mark.parametrize("name", ["seg_lvvit_s", "seg_lvvit_m", "seg_lvvit_l", "seg_deit_small", "seg_linear"])
def test_experiment__two_steps_and_a_validation(name, root, tmp_path):
    """The published recipes, with four small blocks and small images."""
    backbone = "deit_nano" if name in ("seg_deit_small", "seg_linear") else "lvvit_nano"
    data = [option for option in masked.SMALL if option.startswith("data.")]
    small = () if name == "seg_linear" else ("model.channels=8", "model.auxiliary_channels=8")
    trainer, module, data = assemble(
        new_folder(tmp_path / "run"),
        *(f"experiment={name}", "data=segmentation_folder", f"data.root={root}", *data, "data.batches_per_epoch=2"),
        *(f"backbone={backbone}", "init_from=null", "epochs=1", "trainer=cpu", *small, "+model.depth=4"),
        *("+model.patch_size=8", "callbacks.progress=null"),
    )
    trainer.fit(module, datamodule=data)
    (row,) = metrics(tmp_path / "run")
    assert row["step"] == 1
    assert 0 <= row["val/mIoU"] <= 100


def test_keys_of_segmentation__reach_their_objects(root, tmp_path):
    options = [
        *("data.eval_mode=whole", "data.eval_scales=[0.5,1]", "data.eval_flip=true", "data.batches_per_epoch=3"),
        *("model.mlp_dropout=0.3", "model.drop_path_rate=0", "+model.skip_lam=3", "model.norm_eps=null"),
        *("model.pyramid=beit", "optimizer.decay_all=true", "objective.average=all", "augment.hue=0.5"),
        *("data.source.map={1: 0, 2: 1, 3: 2, 4: 3}", "data.source.ignore=[0]", "data.source.mask_suffix=''"),
        *("data.source.shift=0", "data.on_corrupt=skip", "data.source.on_unpaired=skip", "data.eval_stride=null"),
    ]
    _, module, data = built(tmp_path / "run", root, *options)
    assert (module.inference.mode, list(module.inference.scales), module.inference.flip) == ("whole", [0.5, 1], True)
    assert data.batches_per_epoch == 3
    assert (data.joint.hue, data.joint.short_side) == (0.5, 64)
    assert module.model.backbone.blocks[0].skip_lam == 3
    assert module.model.backbone.blocks[3].mlp.drop1.p == 0.3
    assert type(module.model.neck).__name__ == "BEiTPyramid"
    assert (module.optimizer.decay_all, module.objective.average) == (True, "all")
    assert data.source.table.classes(data.source.table._table[:1, None] * 0 + 2, "mask").tolist() == [[1]]
    assert module.dtype == torch.float32
    with torch.no_grad():
        scores = module.eval().inference(module, torch.zeros(3, 72, 96, dtype=torch.uint8))
    assert scores.shape == (4, 72, 96)  # whole images, for which the network was not built
