"""Chat models: loading, adapters, templates, tokens, architecture, hooks and forward passes."""
