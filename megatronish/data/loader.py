"""Batches for one data rank, made one step ahead: the only copy from host to device.

Each rank reads its own samples; nothing is broadcast. Tensors are built in numpy, without a torch operation before `device_copy`:
a rehearsal makes meta tensors of them there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatronish.batch import Batch
from megatronish.batch_schedule import BatchSchedule
from megatronish.data.gpt_dataset import TokenDataset, TrainingDataset
from megatronish.data.sampler import sample_numbers

_MAX_BUFFERS = 4  # batches alive at a time: one in use, one made ahead, and room for a caller that keeps some

DeviceCopy = Callable[[Tensor], Tensor]
"""CPU tensor -> tensor on the device. Runs in the prefetch thread, where the current device is the default one: name the device."""


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class BatchLoader:
    """`batch(step)` for any step, fastest in order.

    `schedule` says which samples a step takes. `separate_documents`: positions restart at each document, and batches say which
    token is of which. Close it, or use it as a context manager: it owns a thread (`prefetch="thread"`)."""

    def __init__(
        self,
        dataset: TrainingDataset,
        *,
        seed: int,
        data_rank: int,
        data_size: int,
        schedule: BatchSchedule,
        separate_documents: bool = False,
        device_copy: DeviceCopy = _identity,
        prefetch: Literal["thread", "none"] = "thread",
    ) -> None:
        self.dataset = dataset
        self._seed = seed
        self._rank, self._size, self._schedule = data_rank, data_size, schedule
        self._separate_documents, self._device_copy = separate_documents, device_copy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch") if prefetch == "thread" else None
        self._ahead: tuple[int, Future[Batch]] | None = None
        for stage in schedule.stages:  # now rather than when its first step comes
            self.sample_numbers(stage.first_step)
        self._buffers = _Buffers()
        self._constant: dict[int, tuple[Tensor, Tensor]] = {}

    def sample_numbers(self, step: int) -> NDArray[np.int64]:
        """Global numbers of this rank's samples in `step`."""
        return sample_numbers(
            consumed_samples=self._schedule.first_sample(step),
            data_rank=self._rank,
            data_size=self._size,
            global_batch_size=self._schedule.batch_size(step),
        )

    def sample_ids(self, step: int) -> NDArray[np.int64]:
        """Places in the dataset of this rank's samples in `step`."""
        return self.dataset.sample_ids(self.sample_numbers(step), seed=self._seed)

    def batch(self, step: int) -> Batch:
        """This rank's samples of `step`, and begins to make those of `step + 1`. What failed in the thread is raised here.

        Do not write to a batch: inputs and labels share memory, and masks and positions are the same tensors in every batch."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            result = self._make(step)
        elif ahead[0] == step:
            result = ahead[1].result()
        else:
            ahead[1].result()  # not the step asked for, but an error in it is one in the data
            result = self._make(step)
        if self._thread is not None:
            self._ahead = (step + 1, self._thread.submit(self._make, step + 1))
        return result

    def close(self) -> None:
        """Wait for the thread and end it. A batch made ahead is dropped, its errors too: nobody asked for it."""
        self._ahead = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _make(self, step: int) -> Batch:
        ids = self.sample_ids(step)
        tokens = self.dataset.tokens(ids)
        if len(tokens) not in self._constant:
            ones = np.ones(len(tokens), np.float32)
            self._constant = {len(tokens): _mask_and_positions(ones, tokens.shape[1] - 1, self._device_copy)}
        documents = self.dataset.document_numbers(ids) if self._separate_documents else None
        buffer = self._buffers.take((tokens.shape[1], len(tokens)))
        return _to_batch(tokens, self.sample_numbers(step), self._constant[len(tokens)], documents, self._device_copy, buffer)


class _Buffers:
    """Arrays for batches, used again once no tensor looks at them: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.int64]] = [np.empty((0, 0), np.int64)]
        # How many references an array has that only the list holds differs between versions of Python.
        self._unused = next(references for _, references in self._counted())
        self._arrays.clear()

    def take(self, shape: tuple[int, int]) -> NDArray[np.int64]:
        """An array that nothing else refers to."""
        # A tensor made by from_numpy refers to its array as long as it, or a view of it, lives.
        free = [i for i, references in self._counted() if references == self._unused and self._arrays[i].shape == shape]
        if free:
            return self._arrays[free[0]]
        self._arrays = [*self._arrays[-_MAX_BUFFERS + 1 :], np.empty(shape, np.int64)]
        return self._arrays[-1]

    def _counted(self) -> Iterator[tuple[int, int]]:
        for i, array in enumerate(self._arrays):
            yield i, sys.getrefcount(array)


def evaluation_batches(
    dataset: TokenDataset,
    *,
    data_rank: int,
    data_size: int,
    global_batch_size: int,
    num_batches: int | None = None,
    separate_documents: bool = False,
    device_copy: DeviceCopy = _identity,
) -> Iterator[Batch]:
    """The first `num_batches` global batches of the dataset (all when None), in its order, each sample once.

    Every rank gets the same number of batches of the same shape; places beyond the last sample have mask 0. So the sum of losses
    over the sum of masks is the same for every number of ranks and batch size."""
    length = len(dataset)
    for begin in range(0, length, global_batch_size)[:num_batches]:
        ids = sample_numbers(consumed_samples=begin, data_rank=data_rank, data_size=data_size, global_batch_size=global_batch_size)
        places = np.where(ids < length, ids, 0)
        tokens = dataset.tokens(places)
        documents = dataset.document_numbers(places) if separate_documents else None
        constant = _mask_and_positions((ids < length).astype(np.float32), dataset.sequence_length, device_copy)
        yield _to_batch(tokens, ids, constant, documents, device_copy)


def _mask_and_positions(weights_B: NDArray[np.float32], sequence_length: int, device_copy: DeviceCopy) -> tuple[Tensor, Tensor]:
    """[S, B] each: float32, each sample's weight at all its positions; int64, 0..S-1."""
    size_SB = (sequence_length, len(weights_B))
    mask = np.broadcast_to(weights_B, size_SB).copy()
    positions = np.broadcast_to(np.arange(sequence_length, dtype=np.int64)[:, None], size_SB).copy()
    return device_copy(torch.from_numpy(mask)), device_copy(torch.from_numpy(positions))


def restarted_positions(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """[B, S] document numbers -> the position of each token in its document (in what the sample has of the first)."""
    places = np.broadcast_to(np.arange(documents.shape[1]), documents.shape)
    begins = np.diff(documents, axis=1, prepend=documents[:, :1]) != 0
    positions: NDArray[np.int64] = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return positions


def _to_batch(
    tokens: NDArray[np.int64],
    numbers: NDArray[np.int64],
    mask_and_positions: tuple[Tensor, Tensor],
    documents: NDArray[np.int64] | None,
    device_copy: DeviceCopy,
    buffer: NDArray[np.int64] | None = None,
) -> Batch:
    """[B, S+1] -> inputs and labels [S, B]: contiguous views of one [S+1, B], so one transposition and one copy make both.
    `documents`: numbers [B, S], where they are to be kept apart. `buffer`: [S+1, B], to hold the tokens."""
    if buffer is None:
        buffer = np.empty(tokens.shape[::-1], np.int64)
    np.copyto(buffer, tokens.T)
    tokens_SB = device_copy(torch.from_numpy(buffer))
    (mask_SB, positions_SB), documents_SB = mask_and_positions, None
    if documents is not None:
        positions_SB = device_copy(torch.from_numpy(restarted_positions(documents).T.copy()))
        documents_SB = device_copy(torch.from_numpy(documents.T.copy()))
    return Batch(
        tokens_SB=tokens_SB[:-1],
        labels_SB=tokens_SB[1:],
        loss_mask_SB=mask_SB,
        positions_SB=positions_SB,
        sample_numbers_B=device_copy(torch.from_numpy(numbers)),
        documents_SB=documents_SB,
    )
