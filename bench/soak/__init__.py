"""A real server under mixed HTTP load: ``python -m bench.soak``.

* `args`, `shape`: numbers from the command line
* `limits`: what surely fits into a server; `hostile`: requests that must be refused
* `load`: the list of requests, which follows from a seed alone
* `run`: the soak; `itl`: what a hostile client does to ordinary streams
* `report`: what is counted, and its tables
"""
