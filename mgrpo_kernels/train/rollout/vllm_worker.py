"""What the workers of a vLLM server load, by ``--worker-extension-cls``: what their model is, and weights over gloo without NCCL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions
from vllm.distributed.utils import (
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from mgrpo_kernels.train.serve import GLOO

PATIENCE = 120.0
"""Seconds that a process of a transfer over gloo waits for another."""


class Extension:
    """What the trainer can ask every worker, by ``/collective_rpc``."""

    model_config: Any

    def mgrpo_model(self) -> dict[str, Any]:
        """Return what the model's weights follow from, and the dtype of its logits."""
        return sizes_of(self.model_config.hf_text_config) | {"head_dtype": dtype_name(self.model_config.head_dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the module's."""
    return str(dtype).removeprefix("torch.")


def sizes_of(config: Any) -> dict[str, Any]:
    """Return what a model's weights follow from: its type, every number that is not a token's, and whether the head is tied."""
    values = config.to_dict()
    numbers = {name: value for name, value in values.items() if type(value) is int and not name.endswith("token_id")}
    return {"model_type": values["model_type"], **numbers, "tie_word_embeddings": bool(config.tie_word_embeddings)}


class Group:
    """The processes of a transfer: the trainer, which is rank 0, and every worker of every server."""

    def __init__(self, rendezvous: NCCLTrainerInitInfo | NCCLWeightTransferInitInfo, rank: int) -> None:
        assert rendezvous.master_address is not None
        assert rendezvous.master_port is not None
        self._group: Any = stateless_init_torch_distributed_process_group(
            rendezvous.master_address,
            rendezvous.master_port,
            rank,
            rendezvous.world_size,
            "gloo",
            timeout=timedelta(seconds=PATIENCE),
        )

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor on the CPU from rank 0 to all, or receive it."""
        options = BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        stateless_destroy_torch_distributed_process_group(self._group)


class GlooEngine(NCCLWeightTransferEngine):
    """The worker's side: vLLM's own for NCCL, but for the group and the wire."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the trainer's group."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        group: Any = Group(init_info, rank)
        self.model_update_group = group

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Load each weight as it comes. After one that does not load the rest is still received, since the trainer sends it."""
        group: Any = self.model_update_group
        model: Any = self.model  # whose load_weights nn.Module does not declare
        if group is None:
            raise RuntimeError("weights: expected a trainer that has made itself known, got none")
        error: Exception | None = None
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            group.broadcast(weight)
            if error is None:
                try:
                    model.load_weights([(name, weight)])
                except Exception as reason:  # raised below
                    error = RuntimeError(f"{name}, {tuple(shape)}: {type(reason).__name__}: {reason}")
        if error is not None:
            raise error


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """The address at which the processes of a transfer connect."""

    backend: ClassVar[str] = GLOO


class GlooTrainerEngine(NCCLTrainerWeightTransferEngine):
    """The trainer's side, the same way."""

    @classmethod
    def trainer_init(cls, init_info: NCCLTrainerInitInfo, *, client: Any, source: Any = None) -> GlooTrainerEngine:
        """Meet every worker, and return what sends to them."""
        engine = cls(client=client, source=source)
        workers = NCCLWeightTransferInitInfo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank_offset=1,
            world_size=init_info.world_size,
        )
        with ThreadPoolExecutor(1) as pool:  # a worker answers when all are there
            joined = pool.submit(client.init_weight_transfer_engine, worker_init_payload(workers))
            group: Any = Group(init_info, 0)
            joined.result()
        engine.model_update_group = group
        return engine

    def _broadcast(self, source: Any, meta: list[Any]) -> None:
        group: Any = self.model_update_group
        for _, tensor in self._checked_iter(source, meta):
            group.broadcast(tensor.detach().cpu().contiguous())


if GLOO not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(GLOO, GlooEngine)
    WeightTransferTrainerFactory.register_engine(GLOO, GlooTrainerEngine)
