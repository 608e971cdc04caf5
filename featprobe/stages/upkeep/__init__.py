"""Looking after data sets and caches; nothing here imports torch when it is loaded."""
