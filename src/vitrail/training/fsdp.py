"""Fully sharded data parallel (FSDP): weights, gradients and moments sharded over the processes, block by block."""

import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vitrail.checkpoints.reading import read_checkpoint
from vitrail.checkpoints.shards import FOLDER_KEY, join_shards, rows_of, shard_like, split_shards, write_shard
from vitrail.errors import ConfigError
from vitrail.models.heads import bind_forward_outputs, declared_outputs
from vitrail.training.classifier import ImageClassifier
from vitrail_runtime.checking import checked
from vitrail_runtime.compat import set_data_parallel_size, set_device, share_batch_norm

# Attributes in which timm's backbones keep their blocks; the last two are VOLO's.
_STACKS = ("blocks", "stages", "layers", "network", "post_network")

_reduce_scatter = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor
"""PyTorch's function; the second is its name in older versions."""


@checked
class FSDP(ModelParallelStrategy):
    """Strategy that applies PyTorch's `fully_shard` (FSDP2; Zhao et al., arXiv:2304.11277) to every block.

    Each of N processes holds 1/N of the weights, gradients and optimiser state, and gathers a block's weights only
    while it computes with them. In bf16-mixed, weights are gathered and used in bf16, and gradients are reduced in
    float32. Unlike Lightning's FSDPStrategy, it also runs on CPUs.

    Each process writes its own rows of a checkpoint's tensors. Any number of processes with any strategy can load such
    a checkpoint, and this strategy can load theirs (`vitrail.checkpoints.shards`).

    Args:
        reshard_after_forward: free a block's weights after its forward pass and gather them again for its backward
            pass; False keeps them, for more memory and a third less communication.
        offload: keep shards and optimiser state in CPU memory, and copy them to the GPU when needed; slow.
    """

    def __init__(self, reshard_after_forward: bool = True, offload: bool = False) -> None:
        backend = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None
        super().__init__(process_group_backend=backend)
        self.reshard_after_forward, self.offload = reshard_after_forward, offload

    def setup_environment(self) -> None:
        """Start the process group; all processes shard one model.

        Raises:
            ConfigError: the module is not a training.
        """
        if not isinstance(self.lightning_module, ImageClassifier):
            raise ConfigError("strategy=fsdp: works for training only; evaluate with trainer=ddp_8gpu.")
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    @property
    def mesh(self) -> Any:
        """Device mesh of the processes that shard the model."""
        return self.device_mesh["data_parallel"]

    def shard(self, model: nn.Module, compile_mode: str | None = None, others: Iterable[nn.Module] = ()) -> None:
        """Shard the weights of `model` over the processes, block by block, and compile each block if asked to.

        Args:
            model: backbone.
            compile_mode: mode of `torch.compile`; None for no compilation.
            others: further trained modules, each sharded as a whole.

        Raises:
            ConfigError: the backbone has no blocks, a module is too small to be sharded, or the precision is not
                supported.
        """
        if isinstance(model, FSDPModule):
            return
        precision = str(self.precision_plugin.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"trainer.precision={precision}: strategy=fsdp supports bf16-mixed and 32-true only.")
        dtype = torch.bfloat16 if precision == "bf16-mixed" else None
        pinned = torch.cuda.is_available()
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None),
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if self.offload else OffloadPolicy(),
        }
        share_batch_norm(self, model)
        for block in blocks_of(model):
            if compile_mode:
                block.compile(mode=compile_mode, dynamic=False)
            _shard_whole(block, options)
        for module in (model, *others):
            _shard_whole(module, options)
        if declared_outputs(model) != {"cls"}:  # gather the root module's weights for `forward_outputs` too
            bind_forward_outputs(model)
            register_fsdp_forward_method(model, "forward_outputs")

    def model_to_device(self) -> None:
        """Move everything that is not sharded to the device; offloaded weights stay on the CPU."""
        module = self.lightning_module
        assert isinstance(module, ImageClassifier)
        if not self.offload:
            super().model_to_device()
            return
        module.val_metrics.to(self.root_device)
        whole = [value for value in module.objective.parameters() if not isinstance(value, DTensor)]
        for tensor in (*whole, *module.objective.buffers(), *module.model.buffers()):
            tensor.data = tensor.data.to(self.root_device)
        set_device(module, self.root_device)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Update the weights.

        Raises:
            ConfigError: this version of PyTorch cannot do it with shards.
        """
        try:
            return super().optimizer_step(optimizer, closure, *args, **kwargs)
        except NotImplementedError as error:
            found = re.search(r"(aten\.\w+).* sharding strategy", str(error))
            if found is None:
                raise
            raise ConfigError(
                f"strategy=fsdp: PyTorch {torch.__version__} cannot compute {found[1]} with sharded weights; use a"
                " newer version, another optimizer, or strategy=ddp."
            ) from error

    # Checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning restores the optimiser state that `load_checkpoint` returns, as for other strategies."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's weights; the backbone's as shards."""
        module = self.lightning_module
        assert isinstance(module, ImageClassifier)
        assert isinstance(module.model, FSDPModule)
        module.model.reshard()  # after a forward pass the root module's weights may be unsharded
        return module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimiser state; moments as shards."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the shard of every process, then the file that refers to them; this replaces the older checkpoint.

        Raises:
            ConfigError: the shards cannot be written.
        """
        path = Path(self.broadcast(str(filepath)))
        folder = path.with_name(f"{path.name}.shards-{self.broadcast(secrets.token_hex(4))}")
        whole, parts = split_shards(checkpoint)
        try:
            write_shard(folder, self.global_rank, parts)
            failed = None
        except OSError as error:
            failed = error
        if self._any(failed is not None):
            self._remove(folder)
            reason = failed.strerror if failed else "reported by another process"
            raise ConfigError(f"{folder}: cannot be written ({reason}). The previous checkpoint is still there.")
        if self.is_global_zero:
            whole[FOLDER_KEY] = {"folder": folder.name, "count": self.world_size}
            self.checkpoint_io.save_checkpoint(whole, path)
            self.checkpoint_io.teardown()  # waits until it is written
        self.barrier("checkpoint")  # no process may read or write a checkpoint before this one is complete

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint and its shards."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            for folder in Path(filepath).parent.glob(f"{Path(filepath).name}.shards-*"):
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        if self.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)

    def _any(self, flag: bool) -> bool:
        reduced = torch.tensor(int(flag), device=self.root_device)
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
        return bool(reduced)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any strategy; of sharded tensors, only this process's rows.

        Raises:
            ConfigError: the file cannot be read, or shards are missing.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        rows = rows_of(self.mesh.get_local_rank(), self.mesh.size())
        checkpoint = join_shards(read_checkpoint(path, values=False), path, rows, self.mesh)
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for part in ("state_dict", "current_model_state"):
            if part in checkpoint:
                checkpoint[part] = {name: shard_like(value, own[name]) for name, value in checkpoint[part].items()}
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            _cut_moments(optimizer, state)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights that `load_checkpoint` returned into the module."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state that `load_checkpoint` returned into the optimisers; moments stay on their weights' device."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)


class SpoilingReduction:
    """Reduction of gradients to shards that makes a NaN or infinite number reach all processes.

    Each process gets its rows of the sum only. A process whose own gradients have a norm that is NaN or infinite
    therefore sends NaN for all of them, so that non-finite gradients reach every process with no extra reduction. If no
    process does so, no rows of the mean have such a norm (triangle inequality). PyTorch's interface is
    `torch.distributed.fsdp.FSDPModule.set_custom_reduce_scatter`.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for a tensor."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """Reduce `input_tensor` (N n,), rows for each of N processes, to this process's rows `output_tensor` (n,)."""
        input_tensor.add_(torch.linalg.vector_norm(input_tensor) * 0)
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _shard_whole(module: nn.Module, options: dict[str, Any]) -> None:
    """Shard the parameters of a module that no part of it has sharded.

    Raises:
        ConfigError: some process would get no row, so that it would not learn of bad gradients in the module.
    """
    count = options["mesh"].size()
    rows = [parameter.shape[0] for parameter in module.parameters() if not isinstance(parameter, DTensor)]
    if rows and not any(end > first for first, end in map(rows_of(count - 1, count), rows)):
        raise ConfigError(
            f"strategy=fsdp: {type(module).__name__} has at most {max(rows)} rows of weights, too few for {count}"
            " processes; use strategy=ddp instead."
        )
    fully_shard(module, **options)
    if rows:
        module.set_custom_reduce_scatter(SpoilingReduction())  # type: ignore[operator]


def _cut_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Shard the moments in an optimiser's state as their parameters are sharded, in place."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                moments[name] = shard_like(value, parameters[number])


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the repeated blocks of a backbone in order.

    Raises:
        ConfigError: the backbone has no blocks.
    """
    model = getattr(model, "backbone", model)  # of a segmentation network
    stacks = [getattr(model, name) for name in _STACKS if isinstance(getattr(model, name, None), nn.Module)]
    if not stacks:
        raise ConfigError(
            f"strategy=fsdp: {type(model).__name__} has no blocks in {', '.join(_STACKS)}; use strategy=ddp instead."
        )
    for stack in stacks:
        for child in stack.children():
            yield from child.children() if isinstance(child, nn.Sequential) else (child,)
