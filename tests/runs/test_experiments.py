"""Every shipped recipe trains, and uses the official learning rates if they were recorded."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from peers.recorded import recorded
from programs import PROJECT, metrics
from vitrail.models import create_model
from vitrail.objectives import CrossEntropy
from vitrail.runs.assembly import build_module, build_trainer
from vitrail.runs.config import instantiate
from vitrail.runs.directory import RunDirectory
from vitrail.runs.loggers import MetricsCSV
from vitrail.training import ImageClassifier
from vitrail.types import Batch

pytestmark = pytest.mark.thorough

# tests/training/segmentation/test_module.py has those of segmentation.
EXPERIMENTS = sorted(path.stem for path in (PROJECT / "conf" / "experiment").glob("*.yaml") if path.stem[:3] != "seg")
RECORDED = json.loads((PROJECT / "tests" / "peers" / "lr_schedules.json").read_text())
RECORDED |= {  # of long runs, only some epochs
    case: {"lr_of_epoch": rates}
    for file in ("vit5.json", "volo.json")
    for case, rates in recorded(file)["lr_schedules"].items()
}
RECIPES = {
    "deit_bs1024_300ep": [("deit_small", 1024), ("deit_base_distilled", 1024)],
    "deit_bs512_300ep": [("deit_tiny", 512)],
    "deit_finetune384_bs512_30ep": [("deit_base_384", 512), ("deit_base_distilled_384", 512)],
    "deit3_finetune_lr1e-5_20ep": [("deit3_base_224", 512), ("deit3_small_384", 512)],
    "t2t_lr5e-4_300ep": [("t2t_vit_14", 512), ("t2t_vit_t_24", 512)],
    "t2t_lr1e-3_300ep": [("t2t_vit_7", 512)],
    "lvvit_lr1.6e-3_300ep": [("lvvit_s", 1024)],
    "vit5_small_pretrain": [("vit5_small", 2048)],
    "vit5_base_pretrain": [("vit5_base", 2048)],
    "vit5_large_pretrain": [("vit5_large", 2048)],
    "volo_d1_224": [("volo_d1", 1024)],
    "volo_d2_d3_224": [("volo_d3", 1024)],
    "volo_finetune": [("volo_d1_384", 512), ("volo_d3_448", 240)],
    "vit5_finetune": [("vit5_small_224", 512), ("vit5_base_384", 512)],
}


@pytest.fixture(scope="module", autouse=True)
def hydra():
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        yield


@pytest.mark.parametrize("recipe", [*EXPERIMENTS, "deit3_small objective=cosub"])
@pytest.mark.sample(20)
def test_experiment__two_steps_and_a_validation(recipe, image_tree, label_maps, tmp_path):
    """The recipe runs unchanged except for the data, smaller images and batches, and a single block."""
    weights = tmp_path / "weights.pt"
    name, *options = recipe.split()
    depth = [1, 1, 1] if name.startswith("evo_levit") else 1
    smaller = [
        *options,
        *("data=imagefolder", f"data.root={image_tree}", "data.image_size=32", "data.batch_size=4"),
        *("data.num_workers=0", "trainer=cpu", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"),
        *(
            "epochs=1",
            "schedule.cooldown_epochs=0",
            *([] if name.startswith("volo") else [f"+model.depth={depth}"]),  # timm's builders fix VOLO's depth
            "callbacks.progress=null",
            f"paths.run={tmp_path}",
        ),
        *("callbacks.model_summary=null", "init_from=null", "+callbacks.checkpoint.save_weights_only=true"),
    ]
    if name.startswith("dynamicvit"):
        smaller.append("+model.selection_blocks=[0]")
    if name.startswith("evo_deit"):
        smaller += ["model.depth=2", "model.stages=[1]"]
    config = compose("train", [f"experiment={name}", *smaller])
    if config.probe is not None:
        torch.save(create_model(config.model.name, num_classes=2, img_size=32, depth=depth).state_dict(), weights)
        config = compose("train", [f"experiment={name}", *smaller, f"init_from={weights}"])
    if config.objective._target_.endswith("TokenLabelingLoss"):
        config.data.label_maps = str(label_maps)
    if config.teacher is not None:
        teacher = config.teacher.name if name.startswith("dynamicvit") else config.model.name
        dense = create_model(teacher, num_classes=2, img_size=32, depth=depth)
        torch.save(dense.state_dict(), weights)
        extra = ["teacher=timm", f"teacher.name={teacher}", "teacher.num_classes=2", "teacher.image_size=32"]
        extra += [f"teacher.weights={weights}", f"+teacher.depth={depth}"]
        config = compose("train", [f"experiment={name}", *smaller, *extra])
    data = instantiate(config.data, "data", augment=instantiate(config.augment, "augment"))
    module = build_module(config, data)
    csv_log = MetricsCSV(tmp_path / "metrics.csv")
    trainer = build_trainer(config, RunDirectory(tmp_path), data, csv_log)
    before = {key: value.clone() for key, value in module.model.state_dict().items()}
    trainer.fit(module, datamodule=data)
    (row,) = metrics(tmp_path)
    assert np.isfinite(row["train/loss"])
    assert row["step"] == 1
    assert 0 <= row["val/top1"] <= 100
    assert ("val/top1_ema" in row) == (config.callbacks.ema is not None)
    assert any(not torch.equal(value, before[key]) for key, value in module.model.state_dict().items())


class Toy(nn.Module):
    """A network that trains for 310 epochs in a second."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, images):
        return self.head(images.mean((1, 2, 3))[:, None])


class Toys(L.LightningDataModule):
    """Data with a few tiny batches per epoch, which claim to have `batch_size` images each."""

    def __init__(self, batch_size, batches):
        super().__init__()
        self.batch_size, self.batches = batch_size, batches

    def train_dataloader(self):
        batch = Batch(torch.ones(1, 3, 2, 2), torch.zeros(1, dtype=torch.long), ["0"])
        return torch.utils.data.DataLoader([batch] * self.batches, batch_size=None)


class Rates(L.Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_start(self, trainer, module):
        self.rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("case", "name", "batch"), [(case, name, batch) for case, recipes in RECIPES.items() for name, batch in recipes]
)
@pytest.mark.sample(15)
def test_lr__of_every_epoch_equals_the_recorded_one(case, name, batch, accumulate, tmp_path):
    config = compose("train", [f"experiment={name}", "data.label_maps=maps", "init_from=weights", "data.root=images"])
    optimizer, schedule = instantiate(config.optimizer, "optimizer"), instantiate(config.schedule, "schedule")
    optimizer.decay_also = ()
    module = ImageClassifier(Toy(), CrossEntropy(), 2, optimizer, schedule)
    rates = Rates()
    trainer = L.Trainer(
        max_epochs=config.epochs, accumulate_grad_batches=accumulate, accelerator="cpu", callbacks=[rates],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=Toys(batch // accumulate, accumulate))
    assert all(len(groups) == 1 for groups in rates.rates)
    expected = RECORDED[case]["lr_of_epoch"]
    chosen = range(config.epochs) if isinstance(expected, list) else map(int, expected)
    expected = expected if isinstance(expected, list) else list(expected.values())
    found = [lr for (lr,) in rates.rates]
    assert [found[epoch] for epoch in chosen] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("level", "ops", "mixup"), [
    ("light1", (2, 0), 0), ("light2", (2, 10), 0.2), ("medium1", (2, 15), 0.2), ("medium2", (2, 15), 0.5),
    ("strong1", (2, 20), 0.5), ("strong2", (2, 20), 0.8),
])  # fmt: skip
def test_augreg__six_levels(level, ops, mixup):
    config = compose("train", [f"augment=augreg_{level}"])
    assert config.augment.auto_augment == f"rand-m{ops[1]}-n{ops[0]}"
    assert (config.mixing is not None) == (mixup > 0)
    if mixup:
        mixing = instantiate(config.mixing, "mixing")
        assert (mixing.mixup, mixing.cutmix) == (mixup, 0)
