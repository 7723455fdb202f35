"""KVC-full: score keys by the attention of all queries of a prompt, not of a window.

score[h, i] = sum over queries p >= i + buffer, query heads g of prob(p, g, i) ** power

(arXiv 2410.00161, eq. 19). ``prob`` is the exact causal softmax over the keys at
positions <= p; everything is fp32. The scores of the chunks of a prompt add up.

A pass cannot do this: the ring holds a prompt's last queries only. So this takes the
queries of one layer while its prompt is computed. It is quadratic in the prompt and has
no kernel: it is for comparison, on any device, not for serving.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``queries``             [n, Hq, D]             after RoPE, of consecutive positions
``keys``                [m, H, D]              after RoPE, of positions 0 .. m - 1
``scores``              [H, m]                 fp32
======================  =====================  =========================================
"""

import torch


def full_attention_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    first_position: int,
    *,
    sm_scale: float,
    power: int,
    buffer: int = 10,
    chunk: int = 128,
) -> torch.Tensor:
    """Sum what `queries` contribute to the KVC-full score of every key of one layer.

    Parameters
    ----------
    queries, keys : any float dtype, see the module docstring; only read. Keys that no
        query sees score 0.
    first_position : position of the first query.
    sm_scale : factor on the logits, usually D ** -0.5.
    power : 1 or 2.
    buffer : v, the distance in tokens from which a query counts for a key. It still
        attends to closer keys. The paper's is 10.
    chunk : queries at a time: about 12 * chunk * Hq * m bytes are held at once.

    Returns
    -------
    torch.Tensor : [H, m] fp32, new.

    Raises
    ------
    ValueError : `power` is not 1 or 2, or a query's own key is missing.
    """
    num_queries, num_keys, heads = queries.shape[0], keys.shape[0], keys.shape[1]
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if first_position < 0 or first_position + num_queries > num_keys:
        raise ValueError(
            f"queries at positions {first_position} to "
            f"{first_position + num_queries - 1} need keys at 0 to the same, "
            f"got {num_keys} keys"
        )
    scores = torch.zeros(heads, num_keys, dtype=torch.float32, device=keys.device)
    columns = keys.float().permute(1, 2, 0)
    key_pos = torch.arange(num_keys, device=keys.device)
    for first in range(0, num_queries, chunk):
        part = queries[first : first + chunk].float()
        count, start = part.shape[0], first_position + first
        seen = start + count
        # [H, G * count, D] x [H, D, seen]
        part = part.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        logits = part.flatten(1, 2) @ columns[:, :, :seen] * sm_scale
        logits = logits.unflatten(1, (-1, count))
        query_pos = torch.arange(start, seen, device=keys.device)
        distance = query_pos[:, None] - key_pos[:seen]
        prob = logits.masked_fill_(distance < 0, -torch.inf).softmax(-1)
        prob.masked_fill_(distance < buffer, 0.0)
        scores[:, :seen] += prob.pow_(power).sum((1, 2))
    return scores
