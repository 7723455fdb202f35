"""Apply the mask of structured output to logits on a CPU."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.constrained.xgrammar_backend:XGrammarGrammar.apply_vocab_mask",
    hook_type=HookType.AROUND,
    expected_params=("self", "logits", "vocab_mask"),
    reason=(
        "SGLang launches a kernel of the accelerator and raises 'Unsupported device: "
        "cpu' for others, which ends the scheduler; xgrammar has a routine for CPUs."
    ),
    upstream_link="constrained/xgrammar_backend.py:130",
    remove_when="`apply_vocab_mask` has a branch for CPUs.",
)


def hook(original: Any, grammar: Any, logits: Any, vocab_mask: Any) -> Any:
    """Mask in place: on a CPU by xgrammar, else by SGLang."""
    if logits.device.type != "cpu":
        return original(grammar, logits=logits, vocab_mask=vocab_mask)
    import xgrammar

    return xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)
