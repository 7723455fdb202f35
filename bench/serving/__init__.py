"""Loads served by stock SGLang and with --kv-compress, in one table.

``python -m bench.serving``; ``python -m bench.serving.plot`` draws what it recorded,
``python -m bench.serving.passkey`` asks which rates still find a key,
``python -m bench.serving.watch`` draws what ``/metrics`` shows beside a load, and
``python -m bench.serving.conversations`` serves sessions of several turns over HTTP.

* `loads`: what is served, and what is aimed at
* `args`, `plan`: which engines serve which loads, before which deadline
* `session`: starts engines, serves, checks, records
* `child`, `engine`: an engine in a process of its own, from outside and inside
* `log`: figures that SGLang logs
* `report`: medians, ratios to stock, the table
* `plot`, `plot_data`: figures against the rate
* `passkey`, `passkey_prompts`: a key hidden in a long prompt
* `watch`: figures of a running server, over time
* `rounded`, `rounded_formats`: a checkpoint in fp8, AWQ or GPTQ, made from one in bf16
* `conversations`: a room of its own
"""
