"""From text to tokens: named corpora and local files become a folder of token shards, and rows are read from it."""
