"""SGLang: planned."""
