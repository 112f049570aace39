"""Module paths that engines import; the code is elsewhere."""
