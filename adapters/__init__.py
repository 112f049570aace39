"""One package per engine: its words in, ours out. Adapters never import each other."""
