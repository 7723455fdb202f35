"""Scouts: they say where to look, and are never a result.

* `simulate`, `simulate_choice`: many ways to choose at once, in Hugging Face
* `remembered`: what a pass keeps, by how it remembers queries
* `missed`: what the full cache's answers look at and a rate evicts
* `snapkv_check`, `snapkv_press`: ours against kvpress' SnapKV, exactly
"""
