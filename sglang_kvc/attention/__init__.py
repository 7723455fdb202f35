"""SGLang's attention contract, and what runs around a forward."""
