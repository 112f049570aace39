"""The cache as a service: one process holds the decider, and engines on its machine share it.

`wire` says what they tell each other, `server` answers, `client` asks.
"""
