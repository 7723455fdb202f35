"""Features of SGLang beside compression: ``python -m bench.features``.

* `adapters`: random LoRA adapters, and the flags that serve them
* `asking`: prompts, and one question to a server
* `verdicts`: checks, and what came of them; `compressed`: what all of them look for
* `lora_checks`: adapters; `structured_checks`: JSON and regular expressions
* `parser_checks`: tool calls and reasoning; `end_checks`: what has to be left behind
* `args`: the command line
"""
