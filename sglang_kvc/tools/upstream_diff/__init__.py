"""Compare what we touch of SGLang between two releases, by reading their source.

``release`` opens a wheel, a folder or the installed package; ``symbols`` finds
functions, classes and their members in it; ``ours`` reads from our own source what we
touch, ``touched`` lists the rest; ``compare`` judges, ``report`` prints. Nothing of
SGLang is imported, and nothing of ours that could import it.
"""
