"""Look before a start: ``python -m sglang_kvc.tools.doctor --model-path MODEL``.

What is installed, which GPU path it leads to, and what would be refused and why. No
model is loaded. Rules are the server's own (`sglang_kvc.config`), asked on the
ServerArgs that SGLang makes of the same flags.
"""
