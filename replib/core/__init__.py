"""Ground: errors, settings, storage, statistics, progress and processes, without any model."""
