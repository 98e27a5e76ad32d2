"""Peak memory of stages of a run above that of the imports, one process per recipe.

    python peak_memory.py STAGE RECIPE [STAGE RECIPE]...    prints one number of bytes per pair

The parent imports everything and runs a tiny recipe, the first one, which warms up lazy imports.
Each child is a fork of it, whose peak starts at the memory that it shares with the parent.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import traceback


def peak() -> int:
    """Largest resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(stage: str, recipe: str) -> int:
    """Run a stage in a fork, and return its peak above that at the start."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            before = peak()
            run(stage, recipe)
            os.write(writer, str(peak() - before).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return int(pipe.read() or -1)


def run(stage: str, recipe: str) -> None:
    from collegium.config.recipe import load_recipe
    from collegium.run import pipeline

    getattr(pipeline, stage)(load_recipe(recipe))


def main(arguments: list[str]) -> None:
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    run(*pairs[0])
    gc.collect()
    # Freed memory that the allocator keeps would hide the first allocations of a child.
    ctypes.CDLL(None).malloc_trim(0)
    for stage, recipe in pairs[1:]:
        print(measure(stage, recipe), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
