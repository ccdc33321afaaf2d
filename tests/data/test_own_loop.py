"""The loaders outside Lightning: new orders and views in each pass, plain indexing, Lightning with loaders only."""

import lightning as L
import pytest
import torch

from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.sampling import EpochSampler
from vitrail.data.sources import Digits
from vitrail.models import create_model
from vitrail.objectives import CrossEntropy
from vitrail.training import CosineSchedule, ImageClassifier, OptimizerFactory


def digits(**kwargs):
    data = ImageDataModule(Digits(), Augmentation(scale=(0.3, 1.0)), image_size=16, batch_size=64, **kwargs)
    data.setup()
    return data


@pytest.mark.thorough
@pytest.mark.parametrize("num_workers", [0, 1])
def test_own_loop__each_pass_is_the_next_epoch(num_workers):
    loader, driven = (digits(num_workers=num_workers).train_dataloader() for _ in range(2))
    passes = [[(batch.key[0], batch.image.sum().item()) for batch in loader] for _ in range(2)]
    epochs = []
    for epoch in range(2):
        driven.sampler.set_epoch(epoch)
        epochs.append([(batch.key[0], batch.image.sum().item()) for batch in driven])
    assert passes == epochs
    assert [key for key, _ in passes[0]] != [key for key, _ in passes[1]]


def test_sampler__stays_where_it_was_set():
    sampler = EpochSampler(10, seed=0, shuffle=True)
    sampler.set_epoch(3)
    assert list(sampler) == list(sampler)
    assert {draw.epoch for draw in sampler} == {3}
    free = EpochSampler(10, seed=0, shuffle=True)
    assert [{draw.epoch for draw in free} for _ in range(3)] == [{0}, {1}, {2}]


def test_dataset__takes_plain_indices():
    dataset = digits(num_workers=0).train_dataloader().dataset
    item = dataset[3]
    assert item.image.shape == (3, 16, 16)
    assert item.key == "digits/train/000003"
    assert not torch.equal(item.image, dataset[3].image)  # views differ, also between the epochs of a plain loader
    views = []
    for _ in range(2):
        torch.manual_seed(1)
        views.append(dataset[3].image)
    torch.testing.assert_close(*views)
    assert dataset[-1].key == f"digits/train/{len(dataset) - 1:06d}"
    with pytest.raises(IndexError, match="image 5000 of 1438"):
        dataset[5000]


def test_fit__with_loaders_equals_fit_with_the_data_module(tmp_path):
    weights = []
    for with_loaders in (False, True):
        torch.manual_seed(0)
        schedule = CosineSchedule(warmup_epochs=0)
        module = ImageClassifier(
            create_model("vit_nano", 10, 16, depth=1),
            CrossEntropy(),
            10,
            OptimizerFactory(lr_scaling="linear"),
            schedule,
        )
        trainer = L.Trainer(
            max_epochs=2, limit_train_batches=3, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        )  # fmt: skip
        data = digits(num_workers=0)
        if with_loaders:
            trainer.fit(module, data.train_dataloader(), data.val_dataloader())
        else:
            trainer.fit(module, datamodule=data)
        assert module.effective_batch == 64
        weights.append(module.model.state_dict())
    torch.testing.assert_close(*weights)
