"""Look at what was kept: ``python -m sglang_kvc.tools.view --url ... --prompt FILE``.

`client` asks a server, `texts` finds the words of tokens, `page` and `drawings` write
one HTML file with ``page.html``, ``page.css`` and ``page.js`` in it.
"""
