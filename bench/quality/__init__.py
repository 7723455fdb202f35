"""Quality under compression, measured through the served engine.

``python -m bench.quality run|heads|report|plot|archive|list``. In the order of a run:

* `tasks`: samples, deterministic from task, length, seed and index
* `systems`: what is compared: engine keywords and the options of a request
* `presets`: runs by name: the reported tables, and one option of the server at a time
* `plan`: which cells are missing, most important first; `deadline`: which still fit
* `asking`: one batch through ``sglang.Engine``; `forced` dictates tokens to it
* `metrics`, `math_answers`: an answer's score in [0, 1]; `long_answers`: what else is
  said of a long one
* `records`: JSONL files that can be resumed and merged
* `archive`, `columns`: their samples as one compressed file a campaign
* `stats`, `report`, `plot`: retention of the full cache's score, with intervals;
  `equal_memory`: shares of an answer's own against other rates
* `heads`, `heads_report`: what every layer and head keeps
* `advised`: what `sglang_kvc.tools.advise` says of a task's prompts
* `side_by_side`: several of these runs on one GPU
* `kvpress_systems`, `kvpress_answers`, `hf_decoding`: other methods, in Hugging Face;
  `rkv`: one that evicts while decoding; `kvpress_repeat`: one that is none of kvpress
* `scouts`: tried in Hugging Face before it is worth a server, and checks of that

On a GPU machine
----------------
Below, M is the model's folder (``python -m sglang_kvc.tools.fetch_model`` prints it), R
a folder for results and D the folder of the evaluation data. Where the repository is
all that travels, put D (6 MB) into ``build/``, which git ignores, and name that with
``--data``; prompts are made from it and the seed. Commands go on where they stopped:
repeat them until they exit with 0 (3: samples are left).

1. Ours, 50 samples of everything at 4k tokens, three allocations and seven rates, side
   by side on one GPU; eight tasks at a time, so that their prompts stay in the cache::

       python -m bench.quality.side_by_side --systems ours ours:allocation=layer \\
           ours:allocation=head --model $M --data $D --preset table --block 8 \\
           --engine max_total_tokens=2500000 --deadline 500 --out $R

2. kvpress in its environment (`kvpress_systems.REQUIREMENTS` in the folder K, 4 MB
   packed). One process: a prompt is prefilled once for all methods, and what they keep
   at all rates is decoded together; with ``--block 1`` it is recorded after every task.
   On 80 GB the 1.5B wants ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``::

       PYTHONPATH=$K python -m bench.quality run --model $M --data $D \\
           --preset table-kvpress --block 1 --batch 12 --deadline 500 \\
           --out $R/quality_kvpress.jsonl

3. Heat maps, and the defaults on prompts that no table uses::

       python -m bench.quality heads --model $M --data $D --tasks ruler qa summary \\
           --rates 4 8 16 --samples 20 --out $R/quality_heads.jsonl
       python -m bench.quality run --model $M --data $D --preset tune-windows \\
           --deadline 560 --out $R/tune.jsonl

   All ``tune`` presets share one file: the defaults are measured once.
4. Long answers: texts, lists and chains of thought, with and without a share of the
   answer's own (``8+512``: rate 8 and 512 tokens of the answer whole); the report has
   them at equal means of resident tokens. What they look for and do not find::

       python -m bench.quality run --model $M --data $D --preset long --block 4 \\
           --engine max_total_tokens=5000000 --deadline 480 --out $R/long.jsonl
       python -m bench.quality.scouts.lost --model $M --data $D --length 4096 \\
           --tasks squality gsm8k_four --settings 8 8+512 --samples 10 \\
           --deadline 400 --out $R/lost.jsonl --plots $R/plots

   ``long-replay``, ``chain`` and ``long-kvpress`` are run likewise; ``tune-long``,
   ``tune-long-passes``, ``tune-delay-long`` and ``tune-chain`` choose, on odd texts,
   ``tune-sessions`` does for the conversations below.
5. Conversations: what a turn has left is what the next one starts from. 50 samples of
   five tasks are some 250 sessions of up to six turns; the pool should hold them::

       python -m bench.quality run --model $M --data $D --preset sessions \\
           --batch 50 --deadline 560 --out $R/quality_sessions.jsonl
       PYTHONPATH=$K python -m bench.quality run --model $M --data $D \\
           --preset sessions-kvpress --block 1 --batch 12 --deadline 560 \\
           --out $R/quality_sessions_kvpress.jsonl

   Rate 1 is the whole history. ``ours`` computes every turn again; KeyDiff's score and
   a KVzip-like one (`kvpress_repeat`) compress the history once, before the question.
6. Merge and report; lines of all files and visits are one table::

       python -m bench.quality report $R/quality*.jsonl --out $R/quality.md
       python -m bench.quality plot $R/quality*.jsonl --out docs/plots

   What goes into the repository is archived first: a summary that can be read, and a
   Parquet file with every sample, which all commands read beside it::

       python -m bench.quality archive bench/results/quality.jsonl

With several GPUs, ``side_by_side --gpus N`` deals its processes out; give others some
of the tasks and a GPU each (``CUDA_VISIBLE_DEVICES``). Cards decide near-ties in their
own way: measure the full cache (rate 1) on the card that measures the rest.

What it costs, 50 samples at 4k tokens. A prompt is prefilled once per engine: later
rates find it in the prefix cache if the pool has room, 12 KiB a token for the 0.5B, 28
for the 1.5B; ``--block 1`` with a pool of 300,000 has.

============================  ====================================================
run                           seconds, starts of 45 to 60 included
============================  ====================================================
``table``, 0.5B, seven rates  263 (RULER-like to summaries) and 348 (the rest), two
                              processes, some four engines to an H100
the same, 1.5B, three rates   280 (five rates) and 293, likewise
8k and 16k, 20 samples        224 (0.5B, five rates), 289 (1.5B, three), likewise
``heads``, 20 samples         119 (0.5B), 136 (1.5B), three rates, likewise
kvpress, 13 tasks, 1.5B       541, eight methods at three rates, alone on an H200
============================  ====================================================
"""
