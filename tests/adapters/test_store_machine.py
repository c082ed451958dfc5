"""Any order of publications, removals, rollbacks, pins and collections, with restarts between."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.store import AdapterStore
from tests.adapters.shelves import LAYOUT
from tests.adapters.store_model import (
    CONTENTS,
    KINDS,
    NAMES,
    Kind,
    Operation,
    StoreModel,
    files_in,
    files_needed,
    problems_in,
    read_contents,
    write_contents,
)


class StoreMachine(RuleBasedStateMachine):
    """The store says what the model says, and has exactly the files that its versions need."""

    @initialize()
    def open(self) -> None:
        self.temporary = TemporaryDirectory()
        self.folder = Path(self.temporary.name) / "store"
        write_contents(Path(self.temporary.name))
        self.contents = read_contents(Path(self.temporary.name))
        self.store = AdapterStore(self.folder, LAYOUT)
        self.model = StoreModel()
        self.spared: set[str] = set()  # versions that no name has, and the last collection left

    @rule(
        kind=st.sampled_from([kind for kind in KINDS if kind != "collect"]),
        name=st.sampled_from(NAMES),
        choice=st.integers(0, 60),
    )
    def change(self, kind: Kind, name: AdapterName, choice: int) -> None:
        operation = Operation(kind, name, choice)
        before = self.model.digests
        operation.run(self.store, self.contents)
        self.model = operation.after(self.model, self.contents)
        self.spared |= before  # until the next collection

    @rule(needed=st.sets(st.sampled_from(range(len(CONTENTS)))))
    def collect(self, needed: set[int]) -> None:
        digests = {self.contents[index].digest for index in needed}
        self.spared = (self.spared & digests) - self.model.digests
        files = files_in(self.folder)
        num_files, num_bytes, num_spared = self.store.collect(digests)
        kept = files_needed(self.model.digests | self.spared, self.contents)
        assert files_in(self.folder) == kept
        assert num_files == len(files - kept)
        assert (num_bytes > 0) == (num_files > 0)
        assert num_spared == len(self.spared)

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = AdapterStore(self.folder, LAYOUT)

    @invariant()
    def the_store_equals_the_model(self) -> None:
        assert StoreModel.of(self.store) == self.model

    @invariant()
    def versions_and_what_running_requests_read_are_whole(self) -> None:
        for content, adapter in zip(CONTENTS, self.contents, strict=True):
            if adapter.digest not in self.model.digests | self.spared:
                continue
            read = self.store.read(adapter.digest)
            assert read.pairs.keys() == adapter.pairs.keys()
            for (layer, module), pair in read.pairs.items():
                a, b = content.factors(layer, module)
                assert torch.equal(pair.a, a)
                assert torch.equal(pair.b, b)
                assert pair.scaling == content.scaling

    def teardown(self) -> None:
        assert problems_in(self.folder) == []
        self.store.close()
        self.temporary.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
