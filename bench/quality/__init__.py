"""Quality under compression, measured through the served engine.

``python -m bench.quality run|heads|report|plot|list``. In the order of a run:

* `tasks`: samples, deterministic from task, length, seed and index
* `systems`: what is compared: engine keywords and the options of a request
* `presets`: runs by name: the reported tables, and one option of the server at a time
* `plan`: which cells are missing, most important first
* `asking`: one batch through ``sglang.Engine``; `forced` dictates tokens to it
* `metrics`: an answer's score in [0, 1]
* `records`: JSONL files that can be resumed and merged
* `stats`, `report`, `plot`: retention of the full cache's score, with intervals
* `heads`, `heads_report`: what every layer and head keeps
* `side_by_side`: several of these runs on one GPU
* `simulate`: a scout, many ways to choose at once in Hugging Face, never a result
* `missed`: another, what the full cache's answers look at and a rate evicts
* `kvpress_systems`, `kvpress_answers`, `hf_decoding`: other methods, in Hugging Face
* `snapkv_check`: ours against one of them, exactly

On a GPU machine
----------------
Below, M is the model's folder (``python -m sglang_kvc.fetch_model`` prints it), R a
folder for results and D the folder of the evaluation data. Where the repository is all
that travels, put D (6 MB) into ``build/``, which git ignores, and name that with
``--data``; prompts are made from it and the seed. Commands go on where they stopped:
repeat them until they exit with 0 (3: samples are left).

1. Ours, 50 samples of everything at 4k tokens, three allocations and seven rates, side
   by side on one GPU; eight tasks at a time, so that their prompts stay in the cache::

       python -m bench.quality.side_by_side --systems ours ours:allocation=layer \\
           ours:allocation=head --model $M --data $D --preset table --block 8 \\
           --engine max_total_tokens=2500000 --deadline 500 --out $R

2. kvpress in its environment (`kvpress_systems.REQUIREMENTS` in the folder K, 4 MB
   packed). One process: a prompt is prefilled once for all methods, and what they keep
   at all rates is decoded together::

       PYTHONPATH=$K python -m bench.quality run --model $M --data $D \\
           --preset table-kvpress --batch 64 --deadline 500 \\
           --out $R/quality_kvpress.jsonl

3. Heat maps, and the defaults on prompts that no table uses::

       python -m bench.quality heads --model $M --data $D --tasks ruler qa summary \\
           --rates 4 8 16 --samples 20 --out $R/quality_heads.jsonl
       python -m bench.quality run --model $M --data $D --preset tune-windows \\
           --deadline 560 --out $R/tune.jsonl

   All ``tune`` presets share one file: the defaults are measured once.
4. Merge and report; lines of all files and visits are one table::

       python -m bench.quality report $R/quality*.jsonl --out $R/quality.md
       python -m bench.quality plot $R/quality*.jsonl --out docs/plots

What it costs on the 0.5B, estimated from the samples and from 130,000 prompt tokens
per second (seen with prompts of 60,000) on one H200. A prompt is prefilled once per
engine: later rates find it in the prefix cache, but for its last window. That needs
room for all prompts, 12 KiB a token here: 65 GB for everything. The 1.5B takes 28 KiB,
so give it RULER-like tasks (76 GB) and the rest in runs of their own.

========================  =============  ================  =========================
run                       prompt tokens  answers, a rate   seconds
========================  =============  ================  =========================
``table``, one system     5.3 M          0.20 M            50 start, 40 prefill, and
                                                           45 a rate: 400
the same, ``ruler``       2.65 M         0.03 M            50 + 20 + 10 a rate: 140
``tune-*``, one system    1.06 M         0.01 M            50 + 10 + 5 a rate: 75
kvpress, a method, ruler  2.65 M         0.03 M            200 for three rates; not
                                                           yet timed on a GPU
``heads``, three rates    1.2 M          none              50 + 10 + 5 a rate: 75
========================  =============  ================  =========================
"""
