"""The mutations are run on demand; that their lines still exist is cheap to know."""

from pathlib import Path

import collegium
from mutants import MUTATIONS

SOURCE = Path(collegium.__file__).parent


def test_every_mutation_changes_a_line_that_exists() -> None:
    stale = [
        (mutation.file, mutation.before)
        for mutation in MUTATIONS
        if mutation.before not in (SOURCE / mutation.file).read_text(encoding="utf-8")
    ]
    assert not stale
    assert all(mutation.before != mutation.after for mutation in MUTATIONS)
    assert len(MUTATIONS) >= 120
