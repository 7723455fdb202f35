"""Quality under compression, measured through the served engine.

``python -m bench.quality run|report|plot|list``. In the order of a run:

* `tasks`: samples, deterministic from task, length, seed and index
* `systems`: what is compared: engine keywords and the options of a request
* `plan`: which cells are missing, most important first
* `asking`: one batch through ``sglang.Engine``; `forced` dictates tokens to it
* `metrics`: an answer's score in [0, 1]
* `records`: JSONL files that can be resumed and merged
* `stats`, `report`, `plot`: retention of the full cache's score, with intervals
"""
