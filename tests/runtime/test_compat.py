"""The private names of Lightning, Hydra and Optuna that vitrail uses still mean what they meant."""

import lightning as L
import pytest
import torch
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

from vitrail_runtime import compat
from vitrail_runtime.allowed_targets import guarded


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recorder(L.Callback):
    """What the functions say at the end of every batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append(
            (
                compat.batches_seen(trainer),
                compat.completed_batches(trainer),
                compat.is_last_batch(trainer),
                compat.is_accumulating(trainer),
            )
        )


def fit(folder, epochs=2, ckpt_path=None, callbacks=(), **options):
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks), **options,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.arange(6.0)[:, None]), batch_size=2)
    trainer.fit(Linear(), loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_progress__of_two_epochs_of_three_batches(tmp_path):
    recorder = Recorder()
    trainer = fit(tmp_path, callbacks=[recorder], accumulate_grad_batches=2)
    assert [row[0] for row in recorder.rows] == [1, 2, 3, 4, 5, 6]
    assert [row[1] for row in recorder.rows] == [1, 2, 3, 1, 2, 3]
    assert [row[2] for row in recorder.rows] == [False, False, True] * 2
    assert [row[3] for row in recorder.rows] == [True, False, False] * 2  # the last batch steps in any case
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert compat.epochs_in_checkpoint(torch.load(tmp_path / "end.ckpt", weights_only=True)) == 2


def test_next_batch__within_and_between_epochs(tmp_path):
    class Saver(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}_{batch_idx}.ckpt")

    class Asker(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.found = compat.next_batch(trainer)
            compat.skip_batches(trainer, 1)
            self.skipped = compat.completed_batches(trainer)
            compat.skip_batches(trainer, -1)
            compat.reopen_train_loader(trainer)

    assert fit(tmp_path, callbacks=[Saver()]).global_step == 6
    for name, expected in (("0_0", (0, 1)), ("0_1", (0, 2)), ("0_2", (1, 0)), ("1_0", (1, 1))):
        asker = Asker()
        fit(tmp_path, epochs=3, ckpt_path=tmp_path / f"{name}.ckpt", callbacks=[asker])
        assert asker.found == expected, name
        assert asker.skipped == (expected[1] or 3) + 1, name


def test_parallel_size_and_device__are_where_lightning_reads_them():
    strategy = ModelParallelStrategy()
    compat.set_data_parallel_size(strategy, 4)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (4, 1)
    assert set(vars(ModelParallelStrategy())) >= {"_data_parallel_size", "_tensor_parallel_size"}
    module = Linear()
    compat.set_device(module, torch.device("meta"))
    assert module.device == torch.device("meta")


def test_lightnings_signals__are_not_broadcast_at_every_batch(tmp_path):
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    compat.ignore_lightnings_signals(trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_ddp_options__reach_pytorch_unless_they_are_set():
    strategy = DDPStrategy(static_graph=True)
    compat.set_ddp_options(strategy, static_graph=False, broadcast_buffers=False)
    assert strategy._ddp_kwargs == {"static_graph": True, "broadcast_buffers": False}


def test_hydra_flags__of_a_command_line():
    flags = compat.hydra_flags(["--config-dir", "mine", "-m", "a=1", "b=2"])
    assert (flags.config_dir, flags.multirun, flags.overrides) == ("mine", True, ["a=1", "b=2"])


def test_target_check__sees_names_and_objects_and_ends_with_the_block():
    seen = []
    with compat.target_check(lambda name, built: seen.append((name, built))):
        instantiate({"_target_": "fractions.Fraction", "numerator": {"_target_": "builtins.int"}})
    assert [name for name, _ in seen] == ["fractions.Fraction", "fractions.Fraction", "builtins.int", "builtins.int"]
    assert [built is None for _, built in seen] == [True, False] * 2
    instantiate({"_target_": "fractions.Fraction"})
    assert len(seen) == 4


def test_guarded__is_active_within_its_block_only():
    with guarded(), pytest.raises((HydraException, InstantiationException)):
        instantiate({"_target_": "fractions.Fraction"})
    assert instantiate({"_target_": "fractions.Fraction"}) == 0


def test_start_checks__are_called_by_hydra_and_end_with_the_block():
    import hydra._internal.hydra
    import hydra.core.utils

    before = hydra.core.utils.configure_log, hydra._internal.hydra.configure_log, hydra.core.utils.env_override
    seen = []
    with compat.start_checks(seen.append, seen.append):
        hydra._internal.hydra.configure_log(None)
        with hydra.core.utils.env_override({}):
            pass
    assert seen == [None, {}]
    assert before == (
        *(hydra.core.utils.configure_log, hydra._internal.hydra.configure_log),
        hydra.core.utils.env_override,
    )


def test_resumed_trial__continues_the_one_that_was_begun():
    import optuna

    study = optuna.create_study()
    begun = study.ask()
    value = begun.suggest_float("x", 0, 1)
    again = compat.resumed_trial(study, begun.number)
    assert (again.number, again.params) == (begun.number, {"x": value})
    study.tell(again, 1.0)
    assert study.trials[0].value == 1.0
    assert compat.resumed_trial(study, 5) is None
