"""Encodes shards in several processes and writes them. The files do not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from collegium.console import say
from collegium.data.shards import (
    Encoders,
    ShardFile,
    ShardInfo,
    SourceDocument,
    encode_shard,
    is_intact,
    shard_key,
    shard_name,
    write_shard,
)
from collegium.storage.seals import read_sealed

SERIAL_SHARDS = 4
"""Shards that are encoded before worker processes are started, which takes seconds."""
_encoders: Encoders | None = None
"""The encoders of a worker process."""

Documents = Sequence[SourceDocument]


def encoded_shards(
    folder: Path, shards: Iterable[Documents], encoders: Encoders, processes: int | None = None
) -> Iterator[ShardInfo]:
    """Encode shards into a folder, and yield the sizes and digests of each in order.

    Shards that an earlier build has finished of the same documents are kept.

    Args:
        folder: folder of the corpus.
        shards: the documents of each shard.
        encoders: sent to each worker.
        processes: worker processes, by default one per available core.
    """
    processes = processes or num_cores()
    pending: deque[Callable[[], ShardInfo]] = deque()
    num_encoded = 0
    with ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None
        for number, documents in enumerate(shards):
            info = _finished_shard(folder, number, documents)
            if info is None:
                num_encoded += 1
                if processes > 1 and pool is None and num_encoded > SERIAL_SHARDS:
                    pool = stack.enter_context(_pool(encoders, processes))
                encode = partial(_encode, folder, number, documents, encoders)
                pending.append(encode if pool is None else _submit(pool, encode))
            else:
                pending.append(partial(_same, info))
            # One shard waits for each worker. More would only fill memory with text.
            while len(pending) > (2 * processes if pool else 0):
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _same(info: ShardInfo) -> ShardInfo:
    return info


def _finished_shard(folder: Path, number: int, documents: Documents) -> ShardInfo | None:
    """Return a shard that an earlier build has finished of the same documents, or None."""
    content = read_sealed(folder / f"{shard_name(number)}.json", ShardFile)
    if content is None or content.info.key != shard_key(documents):
        return None
    return content.info if is_intact(folder, content.info.files) else None


def _encode(folder: Path, number: int, documents: Documents, encoders: Encoders) -> ShardInfo:
    shard = encode_shard(documents, encoders)
    return write_shard(folder, number, shard, shard_key(documents))


def _pool(encoders: Encoders, processes: int) -> ProcessPoolExecutor:
    # Spawned: a fork copies the locks of other threads in the state they are in.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(encoders,)
    )


def _submit(pool: ProcessPoolExecutor, encode: partial[ShardInfo]) -> Callable[[], ShardInfo]:
    """Encode a shard in a worker, or here if the workers have died."""
    folder, number, documents, _ = encode.args

    def result() -> ShardInfo:
        try:
            return future.result()
        except BrokenProcessPool:
            say(f"{folder.name}: worker processes ended early; shard {number} is encoded here")
            return encode()

    try:
        future: Future[ShardInfo] = pool.submit(_work, folder, number, documents)
    except BrokenProcessPool:
        return encode
    return result


def _start_worker(encoders: Encoders) -> None:
    global _encoders
    _encoders = encoders
    # One thread per process: the processes already use all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A worker would wait for its next shard forever after the parent was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(folder: Path, number: int, documents: Documents) -> ShardInfo:
    assert _encoders is not None
    return _encode(folder, number, documents, _encoders)
