"""Text in and out: tokenizers, chat templates, requests, outputs."""
