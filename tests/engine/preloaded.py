"""What `warm` has its server import: SGLang's scheduler, this plugin, the models."""

import importlib
import os

# Threads of small CPU ops wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
importlib.import_module("tests.engine.inprocess")
importlib.import_module("sglang.srt.managers.scheduler")
# As in a server, before what they patch is imported. The models take 5 s.
importlib.import_module("sglang.srt.plugins").load_plugins()
importlib.import_module("sglang.srt.models.registry")
