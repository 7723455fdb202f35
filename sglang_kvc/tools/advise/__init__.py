"""Which rate for your prompts: ``python -m sglang_kvc.tools.advise --prompts FILE``.

Runs a file of prompts on a running server, with the full cache and at several rates,
and says what each rate costs in quality and saves in memory, with intervals.

* `prompts`: the file
* `server`: the few routes of the server that are used
* `forced`: how likely a given answer is, asked over HTTP
* `asking`: every prompt at every rate
* `speed`: tokens per second, in rounds of their own
* `scores`, `bootstrap`: numbers of one prompt, and of all with intervals
* `advice`: the sentence; `report` and `plot`: table and picture
"""
