"""Every kernel against its reference and the bytes that it must move, on one GPU.

``python -m bench.kernels``; ``python -m bench.kernels.plot`` draws what it recorded.

* `batches`: random requests in an arena as large as a server's
* `timing`: clocks, and the record and table of the figures
* `checks`: small batches on which a kernel must match its reference first
* `decode`: decode attention beside FlashAttention-3; its rows (`decode_case`), whole
  steps (`decode_steps`), sweeps of its configurations (`decode_tune`), of one choice at
  a time (`decode_around`)
* `append`, `prefill`: new tokens stored, prompts read
* `passes`: eviction passes, each stage and all of them (`pass_stages`); their batches
  (`pass_cases`)
"""
