"""The boxes of this rank as save and load plans of torch.distributed.checkpoint.

torch (2.13) checks neither that a checkpoint covers what is asked for nor, with one rank, that a save
covers the tensors; both are checked here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megallama.checkpoint.format.boxes import BoxedTensor, cover_problem
from megallama.checkpoint.format.record import TensorRecord
from megallama.host.errors import UserError

_NAMES_SHOWN = 5


class BoxSavePlanner(SavePlanner):
    """Every owner writes its boxes; together they must be exactly the canonical tensors."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Takes `state_dict`, key -> BoxedTensor."""
        self.tensors: dict[str, BoxedTensor] = state_dict

    def create_local_plan(self) -> SavePlan:
        """One item a box, by key, so that a tensor's boxes stand together in the file."""
        items = []
        for key, tensor in sorted(self.tensors.items()):
            if not tensor.is_owner:
                continue
            properties, size = TensorProperties(dtype=tensor.dtype), torch.Size(tensor.global_shape)
            for chunk in _chunks(tensor):
                data = TensorWriteData(chunk=chunk, properties=properties, size=size)
                items.append(
                    WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
                )
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Rank 0 checks that the boxes of all ranks are a partition of every tensor."""
        tensors: dict[str, TensorStorageMetadata] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            assert data is not None, item
            known = tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            assert (known.size, known.properties.dtype) == (data.size, data.properties.dtype), (
                f"{item.index.fqn}: ranks disagree about shape or dtype"
            )
            known.chunks.append(data.chunk)
        for key, known in tensors.items():
            problem = cover_problem(known.size, [(tuple(c.offsets), tuple(c.sizes)) for c in known.chunks])
            assert problem is None, f"{key}: {problem}"
        return all_plans, Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The box itself."""
        return _box(self.tensors, write_item.index)


class BoxLoadPlanner(LoadPlanner):
    """Every rank reads what its boxes need; all of the checkpoint must be asked for by some rank."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Takes `state_dict`, key -> BoxedTensor."""
        assert metadata is not None
        self.tensors: dict[str, BoxedTensor] = state_dict
        self.stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        """The intersections of stored boxes with boxes of this rank.

        Raises:
            UserError: a tensor is missing, or has another shape or dtype.
        """
        missing = sorted(self.tensors.keys() - self.stored.keys())
        if missing:
            raise UserError(
                f"the checkpoint lacks tensors ({_shown(missing)}): use the model it was saved with"
            )
        items: list[ReadItem] = []
        for key, tensor in sorted(self.tensors.items()):
            stored = self.stored[key]
            assert isinstance(stored, TensorStorageMetadata)
            found, wanted = (tuple(stored.size), stored.properties.dtype), (tensor.global_shape, tensor.dtype)
            if found != wanted:
                raise UserError(
                    f"{key} (checkpoint {found}, this run {wanted}): use the model it was saved with"
                )
            new = create_read_items_for_chunk_list(key, stored, _chunks(tensor))
            covered = sum(math.prod(item.lengths) for item in new)
            total = sum(view.numel() for view in tensor.boxes.values())
            assert covered == total, f"{key}: the plan reads {covered} of {total} elements"
            items += new
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Rank 0 checks that nothing of the checkpoint is left over.

        Raises:
            UserError: no rank asks for a stored tensor.
        """
        wanted = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        unexpected = sorted(self.stored.keys() - wanted)
        if unexpected:
            raise UserError(
                f"the checkpoint has tensors that this model lacks ({_shown(unexpected)}):"
                " use the model it was saved with"
            )
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: only tensors are stored."""
        raise AssertionError(read_item)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the box that `read_item` fills."""
        assert read_item.type == LoadItemType.TENSOR, read_item
        view = _box(self.tensors, read_item.dest_index)
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the part is a view."""


def metadata_of(tensors: Mapping[str, TensorRecord]) -> Metadata:
    """The index as torch.distributed.checkpoint wants to see it; chunks in the order of the boxes."""
    return Metadata(
        {
            key: TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in tensor.boxes],
            )
            for key, tensor in tensors.items()
        }
    )


def _chunks(tensor: BoxedTensor) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(offset), view.size()) for offset, view in tensor.boxes.items()]


def _box(tensors: dict[str, BoxedTensor], index: MetadataIndex) -> torch.Tensor:
    assert index.offset is not None, index
    return tensors[index.fqn].boxes[tuple(index.offset)]


def _shown(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
