"""Watch that nobody writes a page while the prefix tree has it.

The tree's pages, those of snapshots included, are read by whoever borrows them. Each is
filled with a pattern of its own when the tree takes it. It must still be there at every
look, and when the page is freed. A request that computes its prefix once more would
write the same KVs again: over a pattern that is seen, too.
"""

from __future__ import annotations

from typing import Any

import torch

PAGE = 16
PATTERNS = 9973
"""A prime: pages that are taken one after another have different ones."""


class SharedPages:
    """Pages of a tree, from when it takes them until they are freed.

    Parameters
    ----------
    tree, allocator : SGLang's; their methods are wrapped.
    arena : of the pool, see `kernels.layout`.

    Attributes
    ----------
    fill : whether pages get a pattern. It changes what is answered; without it the
        KVs that a page comes with must stay.
    taken, freed : pages so far.
    """

    def __init__(self, tree: Any, allocator: Any, arena: Any) -> None:
        self.tree, self.cells = tree, arena.cells
        self.fill = False
        self.taken = self.freed = 0
        self._held = torch.zeros(len(arena.k), dtype=torch.bool)
        self._content = [part.clone() for part in self.cells]
        insert, clear = tree.insert, allocator.clear
        release = allocator._release_page_ids

        def inserted(params: Any) -> Any:
            result = insert(params)
            self.take()
            return result

        def released(*page_ids: torch.Tensor) -> None:
            for ids in page_ids:
                self._leave(ids.long())
            release(*page_ids)

        def cleared() -> None:
            # A flush frees everything at once.
            self._leave(self._held.nonzero().flatten())
            clear()

        tree.insert = inserted
        allocator.clear, allocator._release_page_ids = cleared, released

    def pages(self) -> torch.Tensor:
        """Pages that the tree has now, int64."""
        tree = self.tree
        if tree.disable or not tree.evictable_size() + tree.protected_size():
            return torch.zeros(0, dtype=torch.int64)
        return tree.all_values_flatten()[::PAGE].long() // PAGE

    def take(self) -> None:
        """Begin to watch what the tree has taken."""
        pages = self.pages()
        new = pages[~self._held[pages]]
        for part, content in zip(self.cells, self._content, strict=True):
            if self.fill:
                numbers = torch.arange(self.taken, self.taken + len(new))
                values = (1 + numbers % PATTERNS).to(torch.float32) / PATTERNS
                shape = (-1, *(1,) * (part.dim() - 1))
                part[new] = values.to(part.dtype).view(shape)
            content[new] = part[new]
        self._held[new] = True
        self.taken += len(new)

    def written(self, tokens: list[torch.Tensor]) -> None:
        """Pages that were taken empty have now got what belongs there."""
        for ids in tokens:
            pages = ids[::PAGE].long() // PAGE
            for part, content in zip(self.cells, self._content, strict=True):
                content[pages] = part[pages]

    def check(self) -> None:
        """Raise if a page was written, or left the tree without being freed."""
        self.take()
        held = self._held.nonzero().flatten()
        assert torch.equal(held, self.pages().sort().values), "shared pages lost"
        self._compare(held)

    def _leave(self, pages: torch.Tensor) -> None:
        gone = pages[self._held[pages]]
        self._compare(gone)
        self._held[gone] = False
        self.freed += len(gone)

    def _compare(self, pages: torch.Tensor) -> None:
        for part, content in zip(self.cells, self._content, strict=True):
            now, then = part[pages], content[pages]
            # What was never written may be poison.
            alike = (now == then) | (now != now) & (then != then)
            same = alike.flatten(1).all(1)
            assert same.all(), f"shared pages written: {pages[~same].tolist()[:8]}"
