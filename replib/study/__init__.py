"""One run of the suite on one model: its prompts, its judge, its verbs."""
