"""Attention by SGLang's contract, and what runs around a forward."""
