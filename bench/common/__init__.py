"""Helpers that several rooms of bench/ share; they import none of them.

* `record`: JSON lines with command, commit and hardware
* `gpu_memory`: memory of the GPU, watched from outside
* `processes`: a process and what it has started
* `ports`: ports for servers and engines
* `server`, `job`, `client`: a server of HTTP, one request to it, and who sends it
* `arguments`: command lines whose end is another program's
* `percentiles`: of latencies
* `plotting`: looks and captions of plots, and which records count
"""
