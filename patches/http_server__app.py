"""Keep a client's megabytes out of the refusal of a body that has the wrong shape."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    # The handler is put into the application by a decorator, before a hook on the
    # function could be applied.
    target="sglang.srt.entrypoints.http_server:app",
    hook_type=HookType.ATTRIBUTE,
    expected_params=None,
    reason=(
        "A body of the wrong shape, such as a string as `sampling_params`, is refused "
        "by FastAPI; SGLang repeats all of it, twice."
    ),
    upstream_link="entrypoints/http_server.py:635",
    remove_when="SGLang bounds what an error message repeats.",
)


def hook(app: Any) -> Any:
    """Give SGLang's handler a shorter error if this process serves KV-Compress."""
    from fastapi.exceptions import RequestValidationError

    stock = app.exception_handlers[RequestValidationError]

    async def handler(request: Any, error: Any) -> Any:
        from sglang.srt.entrypoints.http_server import get_global_state

        from sglang_kvc.config.server_args import options_of
        from sglang_kvc.requests.contract import BriefValidationError

        server_args = get_global_state().tokenizer_manager.server_args
        if options_of(server_args) is not None:
            error = BriefValidationError(error.errors())
        return await stock(request, error)

    app.exception_handlers[RequestValidationError] = handler
    return app
