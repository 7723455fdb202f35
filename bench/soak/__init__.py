"""A real server under mixed HTTP load: ``python -m bench.soak``.

* `args`, `shape`: numbers from the command line
* `job`: one request, and what it may expect; `hostile`: those that must be refused
* `load`: the list of requests, which follows from a seed alone
* `client`: sends a request and says what became of it
* `server`: starts, asks and stops the server
* `run`: the soak; `itl`: what a hostile client does to ordinary streams
* `report`: what is counted, and its tables
"""
