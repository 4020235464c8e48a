"""Shard weights, gradients and optimizer state of a stage over the processes (PyTorch's FSDP2).

Paper: none; the published code shards the same three with DeepSpeed's ZeRO.
Differs: the model itself stays whole on the host, and a twin of it is sharded. Digests, adapters, files and
the next stage see ordinary tensors, and nothing of FSDP has to be undone.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed import ProcessGroup, is_initialized
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from tinyllava.config import Hardware, Sharding
from tinyllava.errors import CheckpointError
from tinyllava.model.compat import decoder_layers, encoder_layers
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

MOMENTS = "moments"
"""Folder of a checkpoint with the optimizer's state in safetensors files, a share from each process."""


def choose_sharding(hardware: Hardware) -> Sharding:
    """Return what a run shards. A single process shards nothing."""
    return hardware.sharding if PartialState().num_processes > 1 else "none"


def shard(
    model: TinyLlavaForConditionalGeneration, sharding: Sharding, group: ProcessGroup | None = None
) -> TinyLlavaForConditionalGeneration:
    """Return a twin of a model whose tensors are sharded over the processes, on their devices.

    A layer's weights are gathered when it runs. What stays whole everywhere: an encoder that is not trained,
    which ranks without images do not run; codes in 4 and 8 bits; with ``gradients`` all that is not trained.

    Args:
        model: whole, on the host; it stays as it is.
        sharding: ``all`` frees a layer's weights after each use, ``gradients`` keeps them until they have
            their gradients.
        group: of all processes; None for that in which they train.
    """
    device = PartialState().device
    twins = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    twin = copy.deepcopy(model, dict(twins))  # the modules anew, over the same storage
    whole = {p for name, p in twin.named_parameters() if _stays_whole(name, p, twin, sharding)}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    if group is None:
        mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    else:  # a name, because PyTorch keeps what it knows of a mesh for all equal ones
        mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("given",))
    for layer in _layers(twin):
        if any(p not in whole for p in layer.parameters()):
            fully_shard(layer, mesh=mesh, reshard_after_forward=sharding == "all", ignored_params=whole)
    # Embedding, head and connector: the forward pass ends and the backward pass begins with them.
    fully_shard(twin, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
    twin.model.is_sharded = True
    return twin


def _stays_whole(
    name: str, parameter: nn.Parameter, model: TinyLlavaForConditionalGeneration, sharding: Sharding
) -> bool:
    if parameter.requires_grad:
        return False
    is_idle = name.startswith("model.vision_tower.") and not _is_trained(model.vision_encoder)
    return sharding == "gradients" or is_idle or not parameter.is_floating_point()


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _layers(model: TinyLlavaForConditionalGeneration) -> Iterator[nn.Module]:
    """Yield the layers that are gathered one by one; a CNN or fused encoders are gathered with the rest."""
    yield from decoder_layers(model.language_model)
    if model.config.encoder_kind == "transformer" and _is_trained(model.vision_encoder):
        yield from encoder_layers(model.vision_encoder)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def reshard(twin: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward pass has left."""
    for module in twin.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_trained(twin: nn.Module, model: nn.Module) -> None:
    """Put a twin's trained weights into its whole model; every process calls it and gets them."""
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                places[name].copy_(tensor)


def without_moments(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Leave divided tensors out of an optimizer's state: ``save_moments`` writes them.

    What stays are rates and counts, alike in all processes.
    """
    state = {
        number: {key: value for key, value in values.items() if not isinstance(value, DTensor)}
        for number, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def divided_moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the divided tensors of an optimizer's state by kind and parameter."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, DTensor)
    }


def save_moments(
    folder: Path, moments: dict[str, Tensor], group: ProcessGroup, *, copies: bool
) -> Callable[[], object]:
    """Return what writes the divided tensors, or waits until they are written; each process writes its share.

    Args:
        moments: see ``divided_moments``.
        group: of all processes, for this alone.
        copies: take a copy now and write it in the background.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    if not copies:
        return partial(save, moments, storage_writer=writer, process_group=group)
    # The stager that PyTorch takes where it has the choice; the writer's own copies nothing on a CPU.
    stager = DefaultStager(StagingOptions(False, False, False, False))
    future = async_save(moments, storage_writer=writer, process_group=group, async_stager=stager)
    stager.close()
    assert isinstance(future, Future), "only a stager in the background returns more"
    return future.result


def load_moments(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Complete an optimizer's state from a checkpoint of any number of processes, divided or not.

    A post-hook of ``Optimizer.load_state_dict``.

    Raises:
        CheckpointError: the moments are not those of the trained parameters.
    """
    folder = checkpoint / MOMENTS
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not folder.is_dir():
        for parameter in trained.values():
            _divide(parameter, optimizer.state[parameter])
        return
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata), "safetensors files hold nothing else"
        key, _, owner = name.partition(".")
        if owner not in trained or found.size != trained[owner].shape:
            raise CheckpointError(
                f"{folder}: {name} does not belong to a parameter that this stage trains. Delete "
                f"{checkpoint} and run the command again."
            )
        parameter = trained[owner]
        tensors[name] = torch.empty_like(parameter, dtype=found.properties.dtype, requires_grad=False)
        optimizer.state[parameter][key] = tensors[name]
    load(tensors, storage_reader=reader, no_dist=not is_initialized())


def _divide(parameter: Tensor, state: dict[str, Any]) -> None:
    """Divide whole tensors of an optimizer as their parameter is divided."""
    if not isinstance(parameter, DTensor):
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and not isinstance(value, DTensor):
            state[key] = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
