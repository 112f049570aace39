"""Module paths that engines and scripts import; the code is elsewhere."""
