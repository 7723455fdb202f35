"""The only room that knows which SGLang is installed: seams and hooks."""
