"""Module paths that SGLang imports; the code is elsewhere."""
