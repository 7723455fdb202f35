"""A slow, independent KV-Compress: Hugging Face attention and a literal Algorithm 1.

No pages, no arena, no ring, no kernels of ours: every KV stays in the Hugging Face
cache, evicted ones are masked, scores are kept per logical position, and selection is
a Python loop over heads and blocks. Paper: arXiv 2410.00161, Algorithm 1, eq. 6-10, 20.

Metrics other than the paper's, allocations other than the joint one, the floor per head
and the share per layer are written out here once more, from their definitions.

`model` attends, `scores` says what a KV is worth, `choice` who stays, `differences`
what a server did otherwise; `replay` goes through the passes of a request with them.
"""

from tests.engine.oracle.differences import TIE, check_few_differ
from tests.engine.oracle.replay import Oracle, Policy, Step

__all__ = ["TIE", "Oracle", "Policy", "Step", "check_few_differ"]
