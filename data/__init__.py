"""Raw text to batches: sources, cleaning, quality, deduplication, corpus, packed tokens."""
