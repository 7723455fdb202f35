"""Conversations over HTTP: ``python -m bench.serving.conversations``.

* `args`: the command line
* `load`: sessions, turns and forks, which follow from a seed alone
* `systems`: which servers are compared, and how each is started
* `vocabulary`: a tokenizer for shapes that have none
* `drive`: sends the turns; `figures`: what is made of them
* `table`, `plot`: what the records say side by side
"""
