"""Fully sharded data parallel: weights, gradients and moments cut over the processes, gathered block by block."""

import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from vitrail.checkpoints.reading import read_checkpoint
from vitrail.checkpoints.shards import FOLDER_KEY, cut_like, put_back, rows_of, take_out, write_shard
from vitrail.errors import ConfigError
from vitrail.models.heads import bind_forward_outputs, declared_outputs
from vitrail.training.classifier import ImageClassifier

_STACKS = ("blocks", "stages", "layers")  # where timm's backbones keep what is to be gathered one by one


class FSDP(ModelParallelStrategy):
    """PyTorch's `fully_shard` (FSDP2; Zhao et al., "PyTorch FSDP", arXiv:2304.11277) of every block of a backbone.

    Each process holds 1/N of weights, gradients and optimiser state, and gathers a block's weights while it computes
    with them. In bf16-mixed, weights travel and compute in bf16 and gradients are summed in float32. Unlike
    Lightning's FSDPStrategy it also runs on CPUs.

    A checkpoint's tensors are written by all processes, each its own rows, and read back by any number of processes,
    of whatever strategy, as theirs are by this one (`vitrail.checkpoints.shards`).

    Args:
        reshard_after_forward: free a block's weights after its forward pass and gather them again for its backward
            pass; False keeps them, for more memory and a third less communication.
        offload: keep shards and optimiser in the memory of the machine, and bring them to the GPU when needed; slow.
    """

    def __init__(self, reshard_after_forward: bool = True, offload: bool = False) -> None:
        backend = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None
        super().__init__(process_group_backend=backend)
        self.reshard_after_forward, self.offload = reshard_after_forward, offload

    def setup_environment(self) -> None:
        """Start the processes' group; all of them share one copy of the model.

        Raises:
            ConfigError: there is nothing to train.
        """
        if not isinstance(self.lightning_module, ImageClassifier):
            raise ConfigError("strategy=fsdp: is for training; trainer=ddp_8gpu evaluates on several devices.")
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def mesh(self) -> Any:
        """The processes, as PyTorch groups them."""
        return self.device_mesh["data_parallel"]

    def shard(self, model: nn.Module, compile_mode: str | None = None) -> None:
        """Cut the weights of `model` over the processes, each block by itself; blocks are compiled one by one.

        Raises:
            ConfigError: a backbone without blocks, or a precision that does not work so.
        """
        if isinstance(model, FSDPModule):
            return
        precision = str(self.precision_plugin.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"trainer.precision={precision}: strategy=fsdp works in bf16-mixed and 32-true.")
        dtype = torch.bfloat16 if precision == "bf16-mixed" else None
        pinned = torch.cuda.is_available()
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None),
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if self.offload else OffloadPolicy(),
        }
        for block in blocks_of(model):
            if compile_mode:
                block.compile(mode=compile_mode)
            fully_shard(block, **options)
        fully_shard(model, **options)
        if self.root_device.type == "cpu":  # up to PyTorch 2.8 at least, gloo gives the sum where the mean is asked for
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        if declared_outputs(model) != {"cls"}:  # gather the outermost weights also where the heads are asked for apart
            bind_forward_outputs(model)
            register_fsdp_forward_method(model, "forward_outputs")

    def model_to_device(self) -> None:
        """Move what is not sharded; what is offloaded stays where it is."""
        module = self.lightning_module
        assert isinstance(module, ImageClassifier)
        if not self.offload:
            super().model_to_device()
            return
        for part in (module.objective, module.val_metrics):
            part.to(self.root_device)
        for buffer in module.model.buffers():
            buffer.data = buffer.data.to(self.root_device)
        module._device = self.root_device

    # Checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning gives back what `load_checkpoint` read, as for other strategies."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights; those of the backbone are shards."""
        module = self.lightning_module
        assert isinstance(module, ImageClassifier)
        assert isinstance(module.model, FSDPModule)
        module.model.reshard()  # after a forward pass the outermost may still be whole
        return module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state; moments are shards."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write every process's shard, and then the file that names them, in place of which older shards go."""
        path = Path(self.broadcast(str(filepath)))
        folder = path.with_name(f"{path.name}.shards-{self.broadcast(secrets.token_hex(4))}")
        whole, parts = take_out(checkpoint)
        try:
            write_shard(folder, self.global_rank, parts)
            failed = None
        except OSError as error:
            failed = error
        if self._any(failed is not None):
            self._remove(folder)
            reason = failed.strerror if failed else "as another process says"
            raise ConfigError(f"{folder}: cannot be written ({reason}); the last good checkpoint is still there.")
        if self.is_global_zero:
            whole[FOLDER_KEY] = {"folder": folder.name, "count": self.world_size}
            self.checkpoint_io.save_checkpoint(whole, path)
            self.checkpoint_io.teardown()  # waits until it is written
        self.barrier("checkpoint")  # nobody reads or writes the next one before this one is whole

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove the file and its shards."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            for folder in Path(filepath).parent.glob(f"{Path(filepath).name}.shards-*"):
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        if self.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)

    def _any(self, flag: bool) -> bool:
        told = torch.tensor(int(flag), device=self.root_device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return bool(told)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any strategy, this process's rows of it where the tensors of the training are cut.

        Raises:
            ConfigError: it cannot be read, or its parts are missing.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        rows = rows_of(self.mesh.get_local_rank(), self.mesh.size())
        checkpoint = put_back(read_checkpoint(path, values=False), path, rows, self.mesh)
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for part in ("state_dict", "current_model_state"):
            if part in checkpoint:
                checkpoint[part] = {name: cut_like(value, own[name]) for name, value in checkpoint[part].items()}
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            _cut_moments(optimizer, state)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy what `load_checkpoint` read into the module."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy what `load_checkpoint` read into the optimisers; moments stay beside their weights."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)


def _cut_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Cut what an optimiser remembers of a parameter as that parameter is cut, in place."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, remembered in state["state"].items():
        for name, value in remembered.items():
            if isinstance(value, Tensor):
                remembered[name] = cut_like(value, parameters[number])


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a backbone, in their order.

    Raises:
        ConfigError: there are none to be found.
    """
    stacks = [getattr(model, name) for name in _STACKS if isinstance(getattr(model, name, None), nn.Module)]
    if not stacks:
        raise ConfigError(
            f"strategy=fsdp: {type(model).__name__} keeps no blocks in {', '.join(_STACKS)}; strategy=ddp trains it."
        )
    for stack in stacks:
        yield from stack.children()
