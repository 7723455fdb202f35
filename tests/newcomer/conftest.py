"""The newcomer's model is that of the servers in tests/engine."""

from tests.engine.conftest import model_path, whole_model_path

__all__ = ["model_path", "whole_model_path"]
